//! The walk forward and the walk back, in bytes: takes and gives what the passes would, in their order.
//!
//! An explicit step of u used stages holds, beside y: forward up to u slopes and a stage state in the compute dtype;
//! backward u linearisations (or one, and the slopes below it), κ, the μᵢ and both λ.

use super::probe::Costs;
use super::tally::Tally;
use crate::account::Category;
use crate::memory::composition::Part;
use crate::solver::{StageMemory, Tableau};

/// The shape of a solve, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// A state in the accumulate dtype.
    pub(super) accumulate: usize,
    /// A state in the compute dtype.
    pub(super) compute: usize,
    /// A kept entry.
    pub(super) entry: usize,
    /// Whether an entry is the state itself, not a copy of it.
    pub(super) entry_is_state: bool,
    /// Whether a stage state without terms is the state itself.
    pub(super) same_dtype: bool,
    /// y0 in the accumulate dtype, if that is a copy.
    pub(super) widened: usize,
    /// The times of the stages on the host and on the device.
    pub(super) clock: usize,
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
pub(super) struct Walk<'a> {
    pub(super) tableau: &'a Tableau,
    pub(super) memory: StageMemory,
    pub(super) costs: Costs,
    pub(super) sizes: Sizes,
    pub(super) steps: usize,
    pub(super) tally: Tally,
    pub(super) counts: Counts,
    /// Bytes of the entries at the end of the forward pass.
    pub(super) trajectory: usize,
    sums_made: bool,
}

const STAGES: Part = Part::Owned(Category::Stages);
const COTANGENTS: Part = Part::Owned(Category::Cotangents);
const TRAJECTORY: Part = Part::Owned(Category::Trajectory);
const GRADIENTS: Part = Part::Owned(Category::Gradients);

/// Bytes that a pass notes for each evaluation until its end: where it was, and whether it was finite.
const FLAG: usize = 48;

impl<'a> Walk<'a> {
    pub(super) fn new(tableau: &'a Tableau, memory: StageMemory, costs: Costs, sizes: Sizes, steps: usize) -> Self {
        let (tally, counts) = (Tally::default(), Counts::default());
        Self { tableau, memory, costs, sizes, steps, tally, counts, trajectory: 0, sums_made: false }
    }

    /// The forward pass; `outputs` states are handed out, the last of them the end. `keep` says whether a backward pass
    /// follows.
    pub(super) fn forward(&mut self, outputs: usize, keep: bool, checks: usize) {
        let Sizes { accumulate, compute, .. } = self.sizes;
        self.tally.take(Part::Owned(Category::Casts), self.costs.casts);
        self.tally.take(Part::Other, self.costs.casts_beside + self.sizes.widened + self.sizes.clock);
        self.tally.take(Part::Field, self.costs.evaluated_model);
        for n in 0..checks {
            self.tally.pass(Part::Field, (n + 1) * compute + self.costs.evaluation);
            self.counts.evaluations += 1;
        }
        let mut is_own = false;
        for n in 1..=self.steps {
            self.step();
            self.flags(n);
            if is_own {
                self.give_state();
            }
            is_own = true;
            if keep && n < self.steps {
                is_own = !self.keep();
            }
        }
        self.tally.give(Part::Other, self.flags_room(self.steps));
        self.tally.give(Part::Field, self.costs.evaluated_model);
        // Handed out as copies.
        self.tally.take(Part::Outside, outputs * (accumulate + self.costs.state_beside));
        self.give_state();
    }

    /// The backward pass, for one cotangent of each of `outputs`.
    pub(super) fn backward(&mut self, outputs: usize) {
        let Sizes { accumulate, .. } = self.sizes;
        self.tally.take(Part::Outside, outputs * (accumulate + self.costs.state_beside));
        self.tally.take(Part::Field, self.costs.linearised_model);
        // λ is Candle's cotangent at first, then a sum of ours.
        self.tally.rename(Part::Outside, COTANGENTS, accumulate);
        for n in (0..self.steps).rev() {
            let decoded = n > 0 && !self.sizes.entry_is_state;
            if decoded {
                self.tally.take(Part::Other, accumulate + self.costs.state_beside);
            }
            self.pullback(decoded);
            // The new λ is announced before the old one is let go.
            self.tally.rename(Part::Other, COTANGENTS, accumulate);
            if n + 1 == self.steps {
                self.tally.rename(COTANGENTS, Part::Outside, accumulate);
            } else {
                self.tally.give(COTANGENTS, accumulate);
                self.tally.give(Part::Other, self.costs.state_beside);
            }
        }
        self.tally.give(COTANGENTS, accumulate);
        self.tally.give(GRADIENTS, self.costs.sums);
        self.tally.take(Part::Outside, accumulate + self.costs.sums);
        self.tally.give(Part::Field, self.costs.linearised_model);
    }

    /// One step: from a state that is held to another.
    fn step(&mut self) {
        let slopes = self.slopes(self.tableau.stages());
        self.tally.take(Part::Other, self.sizes.accumulate + self.costs.state_beside);
        self.give_slopes(slopes);
    }

    /// The slopes of the used stages below `end`; says how many.
    fn slopes(&mut self, end: usize) -> usize {
        let used: Vec<usize> = self.used().into_iter().filter(|i| *i < end).collect();
        for i in &used {
            let point = self.point(*i);
            self.tally.pass(Part::Field, self.costs.evaluation);
            self.tally.take(Part::Field, self.sizes.compute + self.costs.state_beside);
            self.tally.rename(Part::Field, STAGES, self.sizes.compute);
            self.tally.give(Part::Other, point);
            self.counts.evaluations += 1;
        }
        used.len()
    }

    fn give_slopes(&mut self, slopes: usize) {
        self.tally.give(STAGES, slopes * self.sizes.compute);
        self.tally.give(Part::Field, slopes * self.costs.state_beside);
    }

    /// The pullback of one step; `own` says whether the state at its start is freed on the way.
    fn pullback(&mut self, own: bool) {
        let used = self.used();
        let mut slopes = 0;
        match self.memory {
            StageMemory::All => {
                used.iter().for_each(|i| self.linearise(*i));
                if own {
                    self.give_state();
                }
            }
            StageMemory::One => slopes = self.slopes(used.last().copied().unwrap_or(0)),
        }
        for i in used.iter().rev() {
            if self.memory == StageMemory::One {
                let below = used.iter().filter(|j| *j < i).count();
                self.give_slopes(slopes - slopes.min(below));
                slopes = slopes.min(below);
                self.linearise(*i);
            }
            self.pull();
        }
        self.give_slopes(slopes);
        if own && self.memory == StageMemory::One {
            self.give_state();
        }
        self.tally.take(Part::Other, self.sizes.accumulate + self.costs.state_beside);
        self.tally.give(COTANGENTS, used.len() * self.sizes.accumulate);
        self.tally.give(Part::Other, used.len() * self.costs.state_beside);
    }

    fn linearise(&mut self, stage: usize) {
        let point = self.point(stage);
        self.tally.pass(Part::Field, self.costs.linearisation);
        self.tally.take(Part::Field, self.costs.linearised);
        self.tally.give(Part::Other, point);
        self.counts.linearizations += 1;
    }

    /// One pullback; its linearisation is dropped after it, and μ stays.
    fn pull(&mut self) {
        let Sizes { accumulate, .. } = self.sizes;
        self.tally.take(COTANGENTS, accumulate);
        self.tally.take(Part::Other, self.costs.state_beside);
        if !std::mem::replace(&mut self.sums_made, true) {
            self.tally.take(GRADIENTS, self.costs.sums);
            self.tally.take(Part::Other, self.costs.sums_beside);
        }
        self.tally.pass(Part::Pullback, self.costs.pullback);
        self.tally.take(COTANGENTS, accumulate);
        self.tally.take(Part::Other, self.costs.state_beside);
        self.tally.give(COTANGENTS, accumulate);
        self.tally.give(Part::Other, self.costs.state_beside);
        self.tally.give(Part::Field, self.costs.linearised);
        self.counts.pullbacks += 1;
    }

    /// A stage state: says what it takes.
    fn point(&mut self, stage: usize) -> usize {
        let has_terms = (0..stage).any(|j| self.tableau.a(stage, j) != 0.0);
        if self.sizes.same_dtype && !has_terms {
            return 0;
        }
        let bytes = self.sizes.compute + self.costs.state_beside;
        self.tally.take(Part::Other, bytes);
        bytes
    }

    /// The state at hand is kept; says whether it is now the trajectory's.
    fn keep(&mut self) -> bool {
        self.trajectory += self.sizes.entry;
        if self.sizes.entry_is_state {
            self.tally.rename(Part::Other, TRAJECTORY, self.sizes.entry);
        } else {
            self.tally.take(TRAJECTORY, self.sizes.entry);
            self.tally.take(Part::Other, self.costs.state_beside);
        }
        self.sizes.entry_is_state
    }

    fn give_state(&mut self) {
        self.tally.give(Part::Other, self.sizes.accumulate + self.costs.state_beside);
    }

    /// After step `n`, a growing list of flags may have doubled.
    fn flags(&mut self, n: usize) {
        let grown = self.flags_room(n) - self.flags_room(n - 1);
        self.tally.take(Part::Other, grown);
    }

    fn flags_room(&self, steps: usize) -> usize {
        match steps * (self.tableau.stages() + 1) {
            0 => 0,
            flags => FLAG * flags.next_power_of_two().max(4),
        }
    }

    fn used(&self) -> Vec<usize> {
        (0..self.tableau.stages()).filter(|i| self.tableau.is_used(*i)).collect()
    }
}
