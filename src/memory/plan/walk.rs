//! The walk forward over one tile, in bytes: makes and drops the buffers that the pass would, in their order. A batch
//! that is not cut is one tile.

use super::ghost::{Ghost, Heap};
use super::probe::Costs;
use super::session::Session;
use super::slots::Slots;
use super::step::Held;
use crate::account::Category;
use crate::memory::composition::Part;
use crate::solver::{StageMemory, Tableau};
use crate::trajectory::Encodes;
use crate::trajectory::schedule::{Action, Schedule, Slot};
use std::rc::Rc;

/// The states of a tile, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// A state in the accumulate dtype.
    pub(super) accumulate: usize,
    /// A state in the compute dtype.
    pub(super) compute: usize,
    /// A kept entry, and what it takes beside its elements.
    pub(super) entry: usize,
    pub(super) entry_beside: usize,
    /// What a state takes that is kept as it is.
    pub(super) handle: usize,
    /// What an increment takes beside its elements, and as an entry once more, where it lies without tensors.
    pub(super) image: Option<[usize; 2]>,
    /// At most while an entry is encoded or decoded.
    pub(super) encoding: usize,
    pub(super) decoding: usize,
    /// At most while an increment is summed and encoded, with where it leads and what rounding leaves over.
    pub(super) following: usize,
    pub(super) encodes: Encodes,
    /// Whether an entry is the state itself, not a copy of it.
    pub(super) entry_is_state: bool,
    /// Whether a stage state without terms is the state itself.
    pub(super) same_dtype: bool,
    /// The second level of storage, if entries go there.
    pub(super) levels: Option<Levels>,
}

/// Two levels of storage, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Levels {
    /// Entries that stay on the device.
    pub(super) resident: usize,
    /// What is told of an entry that does not.
    pub(super) beside: usize,
    /// At most while an entry goes there and comes back.
    pub(super) putting: usize,
    pub(super) fetching: usize,
    /// Whether it does so beside what is computed.
    pub(super) overlaps: bool,
}

/// Bytes of a table of times: on the host, and on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClockBytes {
    pub(super) host: usize,
    pub(super) device: usize,
}

/// How often what is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) evaluations: usize,
    pub(super) linearizations: usize,
    pub(super) pullbacks: usize,
    pub(super) recomputed_steps: usize,
}

/// One imagined solve of a tile with its backward pass.
pub(super) struct Solve<'a> {
    pub(super) tableau: &'a Tableau,
    /// Whether the solver couples two states over the tableau, as reversible ones do.
    pub(super) coupled: bool,
    pub(super) memory: StageMemory,
    pub(super) keeps: Keeps<'a>,
    pub(super) costs: Costs,
    pub(super) sizes: Sizes,
    pub(super) steps: usize,
    pub(super) heap: Heap,
    pub(super) counts: Counts,
    /// The sums of dL/dθ, once a pullback has made them, and those of a step that may be tried again.
    pub(super) sums: Option<Held>,
    pub(super) of_step: Option<Held>,
    /// Whether pullbacks of steps, and the steps between them, run on buffers where the field can.
    pub(super) pulls_on_buffers: bool,
    /// Whether steps may be tried again, with another scale.
    pub(super) tries_again: bool,
    pub(super) session: Session,
    /// Whether somebody else holds the weights that are packed for linearisations.
    pub(super) packed_elsewhere: bool,
}

/// What the forward pass keeps for the backward pass.
#[derive(Clone, Copy)]
pub(super) enum Keeps<'a> {
    /// Nothing follows.
    Nothing,
    /// States, as a schedule says.
    States(&'a dyn Schedule, Consume),
    /// What is carried after so many steps each, and at the end.
    Anchors(usize),
}

/// Whether the backward pass frees what it has used.
pub(super) type Consume = bool;

impl Keeps<'_> {
    /// Whether linearisations are kept.
    pub(super) fn linearizes(&self) -> bool {
        matches!(self, Self::States(schedule, _) if schedule.slot() == Slot::Stages)
    }
}

/// What a forward pass leaves behind.
pub(super) struct Walked {
    pub(super) start: Ghost,
    pub(super) slots: Slots,
    pub(super) scheduled: Vec<usize>,
    /// By the number of steps before them, the end last.
    pub(super) anchors: Vec<(usize, Vec<Held>)>,
    /// What is handed out.
    pub(super) reached: Vec<Ghost>,
}

impl Walked {
    /// Bytes of the entries.
    pub(super) fn trajectory(&self) -> usize {
        let anchors = self.anchors.iter().flat_map(|(_, states)| states);
        self.slots.bytes() + anchors.map(|(_, owned)| owned.bytes()).sum::<usize>()
    }
}

impl Solve<'_> {
    /// The field is opened, evaluated so often to check it, and closed.
    pub(super) fn check(&mut self, checks: usize) {
        let model = self.open(self.keeps.linearizes());
        self.evaluate_first(checks);
        self.close(model);
    }

    /// The forward pass, after so many checks; `outputs` are the grid points handed out, the last of them the end.
    pub(super) fn forward(&mut self, outputs: &[usize], checks: usize) -> Walked {
        // Somebody else's.
        let start = self.heap.handle(Part::Other);
        let model = self.open(self.keeps.linearizes());
        self.evaluate_first(checks);
        let mut sweep = match self.keeps {
            Keeps::States(schedule, _) => Some((schedule, schedule.sweep(Some(self.steps)))),
            _ => None,
        };
        let (mut slots, mut scheduled, mut anchors) = (Slots::default(), vec![], vec![]);
        let mut reached: Vec<Ghost> = outputs.contains(&0).then(|| start.clone()).into_iter().collect();
        let mut carried = vec![start.clone()];
        for n in 0..self.steps {
            let is_last = n + 1 == self.steps;
            let actions = match &mut sweep {
                Some((_, sweep)) if !is_last => sweep.reached(n + 1),
                _ => vec![],
            };
            let wanted = actions.iter().any(|action| matches!(action, Action::Keep(_)));
            let linearizes = self.keeps.linearizes()
                && if is_last { sweep.as_ref().is_some_and(|(schedule, _)| schedule.keeps_last()) } else { wanted };
            let mut after = match linearizes {
                true => {
                    let (after, linearized) = self.linearized_step();
                    slots.keep_linearized(n + 1, Rc::new(linearized));
                    vec![after]
                }
                false => self.advance(),
            };
            if is_last || outputs.contains(&(n + 1)) {
                reached.push(slots.whole(self, &after[0]));
            }
            if let Keeps::Anchors(every) = self.keeps
                && (is_last || (n + 1).is_multiple_of(every))
            {
                anchors.push((n + 1, after.iter().map(|state| self.anchored(state)).collect()));
            }
            if let Some((schedule, _)) = &sweep {
                if is_last {
                    if n > 0 && schedule.keeps_last() && schedule.slot() == Slot::State {
                        slots.keep(self, n, &carried[0]);
                    }
                    break;
                }
                let y = after.swap_remove(0);
                carried.clear();
                for action in actions {
                    if let Action::Drop(dropped) = action {
                        slots.drop_state(self, dropped);
                        scheduled.retain(|state| *state != dropped);
                    }
                }
                scheduled.extend(wanted.then_some(n + 1));
                after.push(slots.reach(self, n + 1, y, wanted));
            }
            carried = after;
        }
        drop(carried);
        self.close(model);
        Walked { start, slots, scheduled, anchors, reached }
    }

    /// The model is opened.
    pub(super) fn open(&mut self, linearises: bool) -> Ghost {
        self.session = Session::new(linearises);
        let costs = &self.costs;
        let model = if linearises { costs.linearised_model } else { costs.evaluated_model };
        self.heap.buffer(Part::Field, model)
    }

    /// The model is closed.
    pub(super) fn close(&mut self, model: Ghost) {
        drop(model);
        self.session = Session::default();
    }

    /// The first evaluation, and others that are compared with it.
    fn evaluate_first(&mut self, checks: usize) {
        for n in 0..checks {
            self.evaluate_layers();
            self.heap.pass(Part::Field, (n + 1) * self.sizes.compute + self.costs.evaluation);
            self.counts.evaluations += 1;
        }
    }

    /// λ, or a part of it: the new one is announced before the old one is let go.
    pub(super) fn cotangent(&self, state: Ghost) -> Held {
        let owned = state.announce(Category::Cotangents, self.sizes.accumulate);
        (state, owned)
    }

    /// A table of times.
    pub(super) fn clock(&self, ClockBytes { host, device }: ClockBytes) -> Held {
        let times = self.heap.buffer(Part::Other, host + device);
        let owned = times.announce(Category::Scratch, device);
        (times, owned)
    }

    fn anchored(&self, state: &Ghost) -> Held {
        (state.clone(), state.announce(Category::Trajectory, self.sizes.accumulate))
    }
}
