//! The walk forward and the walk back, in bytes: makes and drops the buffers that the passes would, in their order.

use super::ghost::{Announced, Ghost, Heap};
use super::probe::Costs;
use super::slots::{AtHand, Slots};
use crate::account::Category;
use crate::memory::composition::Part;
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
    /// At most while an entry is encoded or decoded.
    pub(super) encoding: usize,
    pub(super) decoding: usize,
    /// Whether an entry is the state itself, not a copy of it.
    pub(super) entry_is_state: bool,
    /// Whether a stage state without terms is the state itself.
    pub(super) same_dtype: bool,
    /// y0 in the accumulate dtype, if that is a copy.
    pub(super) widened: usize,
    /// The times of the stages on the host, and on the device.
    pub(super) clock: usize,
    pub(super) times: usize,
    /// The masters, which are live before.
    pub(super) parameters: usize,
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
    pub(super) memory: StageMemory,
    pub(super) schedule: &'a dyn Schedule,
    pub(super) encodes: Encodes,
    pub(super) consume: bool,
    pub(super) costs: Costs,
    pub(super) sizes: Sizes,
    pub(super) steps: usize,
    pub(super) heap: Heap,
    pub(super) counts: Counts,
    /// The sums of dL/dθ, once a pullback has made them.
    pub(super) sums: Option<(Ghost, Announced)>,
}

/// What a forward pass leaves behind.
pub(super) struct Walked {
    start: Ghost,
    slots: Slots,
    scheduled: Vec<usize>,
    /// Casts, times, y0 in the accumulate dtype, what is handed out.
    _held: Vec<Ghost>,
    _owned: [Announced; 2],
}

impl Walked {
    /// Bytes of the entries.
    pub(super) fn trajectory(&self) -> usize {
        self.slots.bytes()
    }
}

/// Bytes that the forward pass notes for each stage and step until its end, and the backward pass for each pullback: where
/// it was, and whether it was finite.
const FLAG: usize = 48;
const FLAG_BACK: usize = 40;

impl Solve<'_> {
    /// The forward pass; `outputs` are the grid points handed out, the last of them the end. `keep` says whether a backward
    /// pass follows.
    pub(super) fn forward(&mut self, outputs: &[usize], keep: bool, checks: usize) -> Walked {
        self.heap.hold(Category::Parameters, self.sizes.parameters);
        let casts = self.heap.buffer(Part::Other, self.costs.casts + self.costs.casts_beside);
        let times = self.heap.buffer(Part::Other, self.sizes.clock + self.sizes.times);
        let owned =
            [casts.announce(Category::Casts, self.costs.casts), times.announce(Category::Scratch, self.sizes.times)];
        let mut held = vec![casts, times];
        // y0 is the caller's, or a copy.
        let start = self.heap.buffer(Part::Other, self.sizes.widened);
        let model = self.heap.buffer(Part::Field, self.costs.evaluated_model);
        for n in 0..checks {
            self.heap.pass(Part::Field, (n + 1) * self.sizes.compute + self.costs.evaluation);
            self.counts.evaluations += 1;
        }
        let mut sweep = self.schedule.sweep(Some(self.steps));
        let (mut slots, mut scheduled, mut reached) = (Slots::default(), vec![], vec![]);
        let mut flags = vec![];
        let mut y = start.clone();
        for n in 0..self.steps {
            let after = self.step();
            self.flag(n, FLAG * (self.tableau.stages() + 1), &mut flags);
            let is_last = n + 1 == self.steps;
            if is_last || outputs.contains(&(n + 1)) {
                reached.push(slots.whole(self, &after));
            }
            if is_last {
                if keep && n > 0 && self.schedule.keeps_last() {
                    slots.keep(self, n, &y);
                }
                break;
            }
            y = after;
            if keep {
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
                y = slots.reach(self, n + 1, y, wanted);
            }
        }
        drop((y, flags, model));
        // Handed out as copies, one after another.
        for state in reached {
            held.push(self.outside());
            drop(state);
        }
        Walked { start, slots, scheduled, _held: held, _owned: owned }
    }

    /// The backward pass, for one cotangent of each of the outputs.
    pub(super) fn backward(&mut self, walked: &mut Walked, outputs: &[usize]) {
        let cotangents: Vec<Ghost> = outputs.iter().map(|_| self.outside()).collect();
        let model = self.heap.buffer(Part::Field, self.costs.linearised_model);
        let mut slots = if self.consume { std::mem::take(&mut walked.slots) } else { walked.slots.share() };
        let held = slots.states();
        let kept: Vec<usize> = walked.scheduled.iter().copied().filter(|n| held.contains(n)).collect();
        let last = self.steps - 1;
        let is_at_last = last == 0 || held.contains(&last);
        let mut at_hand = if is_at_last { self.restore(walked, &mut slots, last) } else { None };
        if !kept.contains(&last) {
            slots.drop_state(self, last);
        }
        let mut lambda: Option<(Ghost, Announced)> = None;
        let mut flags = vec![];
        let mut actions = self.schedule.reversal(&kept, self.steps, is_at_last).peekable();
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
                        self.set(&mut lambda, sum);
                    }
                    let Some(y) = at_hand.take() else { continue };
                    let start = y.state(self);
                    let pulled = self.pullback(start);
                    self.flag(last - n, FLAG_BACK * self.tableau.stages(), &mut flags);
                    self.set(&mut lambda, pulled);
                }
            }
        }
        drop((model, flags));
        // dL/dy0 and the sums are handed over, and added up by Candle.
        drop(self.sums.take().map(|(sums, _)| sums));
    }

    fn restore(&self, walked: &Walked, slots: &mut Slots, n: usize) -> Option<AtHand> {
        if n == 0 { Some(AtHand::State(walked.start.clone())) } else { slots.restore(self, n) }
    }

    /// The new λ is announced before the old one is let go.
    fn set(&self, lambda: &mut Option<(Ghost, Announced)>, state: Ghost) {
        let owned = state.announce(Category::Cotangents, self.sizes.accumulate);
        *lambda = Some((state, owned));
    }

    /// A state in Candle's hands.
    fn outside(&self) -> Ghost {
        self.heap.buffer(Part::Outside, self.sizes.accumulate + self.costs.state_beside)
    }

    /// After `n` steps of a pass the list of flags, `bytes` a step, may have to grow for one more: it doubles.
    fn flag(&self, n: usize, bytes: usize, flags: &mut Vec<Ghost>) {
        let room = |steps: usize| if steps == 0 { 0 } else { bytes * steps.next_power_of_two() };
        let grown = room(n + 1) - room(n);
        flags.extend((grown > 0).then(|| self.heap.buffer(Part::Other, grown)));
    }
}
