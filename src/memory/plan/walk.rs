//! The walk forward, and the walk back over what was kept, in bytes: makes and drops the buffers that the passes would, in
//! their order.

use super::ghost::{Announced, Ghost, Heap};
use super::probe::Costs;
use super::slots::{AtHand, Slots};
use super::step::Held;
use crate::account::Category;
use crate::error::Result;
use crate::memory::composition::Part;
use crate::memory::meter::held;
use crate::solver::{StageMemory, Tableau};
use crate::trajectory::Encodes;
use crate::trajectory::schedule::{Action, Schedule};

/// The shape of a solve, in bytes.
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
    /// At most while an entry is encoded or decoded.
    pub(super) encoding: usize,
    pub(super) decoding: usize,
    pub(super) encodes: Encodes,
    /// Whether an entry is the state itself, not a copy of it.
    pub(super) entry_is_state: bool,
    /// Whether a stage state without terms is the state itself.
    pub(super) same_dtype: bool,
    /// y0 in the accumulate dtype, if that is a copy.
    pub(super) widened: usize,
    /// The times of the stages.
    pub(super) clock: ClockBytes,
    /// The masters, which are live before.
    pub(super) parameters: usize,
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

/// One imagined solve with its backward pass.
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
    /// The sums of dL/dθ, once a pullback has made them.
    pub(super) sums: Option<Held>,
    /// Linearisations that live.
    pub(super) live: usize,
    /// Whether the field is open for linearisations.
    pub(super) goes_back: bool,
    /// Weights that the field's layers have packed, once per solve and once per backward pass, and buffers of the session
    /// that is open.
    pub(super) packed: Option<Held>,
    pub(super) packed_back: Option<Held>,
    pub(super) session: Vec<Held>,
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

/// What a forward pass leaves behind.
pub(super) struct Walked {
    pub(super) start: Ghost,
    slots: Slots,
    scheduled: Vec<usize>,
    /// By the number of steps before them, the end last.
    pub(super) anchors: Vec<(usize, Vec<Held>)>,
    /// The times of the stages.
    pub(super) clock: Option<Held>,
    /// Casts, y0 in the accumulate dtype, what is handed out.
    _held: Vec<Ghost>,
    _casts: Announced,
}

impl Walked {
    /// Bytes of the entries.
    pub(super) fn trajectory(&self) -> usize {
        let anchors = self.anchors.iter().flat_map(|(_, states)| states);
        self.slots.bytes() + anchors.map(|(_, owned)| owned.bytes()).sum::<usize>()
    }
}

impl Solve<'_> {
    /// The forward pass; `outputs` are the grid points handed out, the last of them the end.
    pub(super) fn forward(&mut self, outputs: &[usize], checks: usize) -> Walked {
        self.heap.hold(Category::Parameters, self.sizes.parameters);
        let casts = self.heap.buffer(Part::Other, self.costs.casts + self.costs.casts_beside);
        let owned = casts.announce(Category::Casts, self.costs.casts);
        let mut held = vec![casts];
        let clock = Some(self.clock(self.sizes.clock));
        // y0 is the caller's, or a copy.
        let start = self.heap.buffer(Part::Other, self.sizes.widened);
        let model = self.heap.buffer(Part::Field, self.costs.evaluated_model);
        for n in 0..checks {
            self.layers(self.costs.layers.evaluation);
            self.heap.pass(Part::Field, (n + 1) * self.sizes.compute + self.costs.evaluation);
            self.counts.evaluations += 1;
        }
        let mut sweep = match self.keeps {
            Keeps::States(schedule, _) => Some((schedule, schedule.sweep(Some(self.steps)))),
            _ => None,
        };
        let (mut slots, mut scheduled, mut anchors, mut reached) = (Slots::default(), vec![], vec![], vec![]);
        let mut carried = vec![start.clone()];
        for n in 0..self.steps {
            let mut after = self.advance();
            let is_last = n + 1 == self.steps;
            if is_last || outputs.contains(&(n + 1)) {
                reached.push(slots.whole(self, &after[0]));
            }
            if let Keeps::Anchors(every) = self.keeps
                && (is_last || (n + 1).is_multiple_of(every))
            {
                anchors.push((n + 1, after.iter().map(|state| self.anchored(state)).collect()));
            }
            if let Some((schedule, sweep)) = &mut sweep {
                if is_last {
                    if n > 0 && schedule.keeps_last() {
                        slots.keep(self, n, &carried[0]);
                    }
                    break;
                }
                let y = after.swap_remove(0);
                carried.clear();
                let mut wanted = false;
                for action in sweep.reached(n + 1) {
                    match action {
                        Action::Drop(dropped) => {
                            slots.drop_state(self, dropped);
                            scheduled.retain(|state| *state != dropped);
                        }
                        _ => wanted = true,
                    }
                }
                scheduled.extend(wanted.then_some(n + 1));
                after.push(slots.reach(self, n + 1, y, wanted));
            }
            carried = after;
        }
        drop((carried, model));
        self.session.clear();
        // Handed out as copies, one after another.
        for state in reached {
            held.push(self.outside());
            drop(state);
        }
        Walked { start, slots, scheduled, anchors, clock, _held: held, _casts: owned }
    }

    /// The backward pass over what a schedule has kept, for one cotangent of each of the outputs.
    pub(super) fn backward(
        &mut self,
        walked: &mut Walked,
        outputs: &[usize],
        (schedule, consume): (&dyn Schedule, Consume),
    ) -> Result<()> {
        let cotangents: Vec<Ghost> = outputs.iter().map(|_| self.outside()).collect();
        let model = self.open_back();
        let mut slots = if consume { std::mem::take(&mut walked.slots) } else { walked.slots.share() };
        let states = slots.states();
        let kept: Vec<usize> = walked.scheduled.iter().copied().filter(|n| states.contains(n)).collect();
        let last = self.steps - 1;
        let is_at_last = last == 0 || states.contains(&last);
        let mut at_hand = if is_at_last { self.restore(walked, &mut slots, last) } else { None };
        if !kept.contains(&last) {
            slots.drop_state(self, last);
        }
        let mut lambda: Option<Held> = None;
        let actions = || schedule.reversal(&kept, self.steps, is_at_last);
        // What is to be done, and the states that are held and scheduled, in both passes.
        let (_, to_do) = held(|| Ok(actions().count()))?;
        let numbers = walked.scheduled.len() + kept.len() + states.len();
        let lists = self.heap.buffer(Part::Other, to_do.most + size_of::<usize>() * numbers);
        let mut actions = actions().peekable();
        while let Some(action) = actions.next() {
            match action {
                Action::Advance { from, to } => {
                    let Some(mut y) = at_hand.take().map(|at_hand: AtHand| at_hand.state(self)) else { continue };
                    for n in from..to {
                        let after = self.step();
                        self.counts.recomputed_steps += 1;
                        let keep = n + 1 == to && actions.peek() == Some(&Action::Keep(to));
                        y = slots.reach(self, n + 1, after, keep);
                    }
                    at_hand = Some(AtHand::State(y));
                }
                Action::Keep(_) => {}
                Action::Restore(n) => at_hand = self.restore(walked, &mut slots, n),
                Action::Drop(n) => slots.drop_state(self, n),
                Action::Reverse(n) => {
                    if let Some(at) = outputs.iter().position(|output| *output == n + 1) {
                        let sum = if lambda.is_some() { self.state() } else { cotangents[at].clone() };
                        lambda = Some(self.cotangent(sum));
                    }
                    let Some(y) = at_hand.take() else { continue };
                    let start = y.state(self);
                    let pulled = self.pullback(start);
                    lambda = Some(self.cotangent(pulled));
                }
            }
        }
        drop(lists);
        self.hand_over(model);
        Ok(())
    }

    /// The model is opened for linearisations.
    pub(super) fn open_back(&mut self) -> Ghost {
        self.goes_back = true;
        self.heap.buffer(Part::Field, self.costs.linearised_model)
    }

    /// The model is closed; dL/dy0 and the sums are handed over, and added up by Candle.
    pub(super) fn hand_over(&mut self, model: Ghost) {
        drop(model);
        self.session.clear();
        (self.goes_back, self.packed_back) = (false, None);
        drop(self.sums.take().map(|(sums, _)| sums));
    }

    fn restore(&self, walked: &Walked, slots: &mut Slots, n: usize) -> Option<AtHand> {
        if n == 0 { Some(AtHand::State(walked.start.clone())) } else { slots.restore(self, n) }
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

    /// A state in Candle's hands.
    pub(super) fn outside(&self) -> Ghost {
        self.heap.buffer(Part::Outside, self.sizes.accumulate + self.costs.state_beside)
    }
}
