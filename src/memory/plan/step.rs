//! One explicit step and its pullback, in bytes.
//!
//! A step of u used stages holds, beside y: forward up to u slopes and a stage state in the compute dtype; backward u
//! linearisations (or one, and the slopes below it), κ, the μᵢ and both λ.

use super::ghost::{Announced, Ghost};
use super::walk::Solve;
use crate::account::Category;
use crate::memory::composition::Part;
use crate::solver::StageMemory;

/// A state of ours, announced. The buffer goes first.
type Held = (Ghost, Announced);

impl Solve<'_> {
    /// A state in the accumulate dtype.
    pub(super) fn state(&self) -> Ghost {
        self.heap.buffer(Part::Other, self.sizes.accumulate + self.costs.state_beside)
    }

    /// One step: the state it leads to.
    pub(super) fn step(&mut self) -> Ghost {
        let slopes = self.slopes(self.tableau.stages());
        let y = self.state();
        drop(slopes);
        y
    }

    /// The pullback of one step from `y`: the new λ.
    pub(super) fn pullback(&mut self, y: Ghost) -> Ghost {
        let used = self.used();
        let last = used.last().copied().unwrap_or(0);
        let (mut all, mut slopes, mut start) = (vec![], vec![], Some(y));
        match self.memory {
            StageMemory::All => {
                all = used.iter().map(|i| self.linearise(*i)).collect();
                start = None;
            }
            StageMemory::One => slopes = self.slopes(last),
        }
        let mut mus = vec![];
        for i in used.iter().rev() {
            slopes.truncate(used.iter().filter(|j| *j < i).count());
            let linearization = match all.pop() {
                Some(linearization) => linearization,
                None => self.linearise(*i),
            };
            mus.push(self.pull());
            drop(linearization);
        }
        let lambda = self.state();
        drop((mus, slopes, start));
        lambda
    }

    /// The slopes of the used stages below `end`.
    fn slopes(&mut self, end: usize) -> Vec<Held> {
        let used = self.used();
        let slope = |solve: &mut Self, i: usize| {
            let point = solve.point(i);
            solve.heap.pass(Part::Field, solve.costs.evaluation);
            let k = solve.heap.buffer(Part::Field, solve.sizes.compute + solve.costs.state_beside);
            solve.counts.evaluations += 1;
            let owned = k.announce(Category::Stages, solve.sizes.compute);
            drop(point);
            (k, owned)
        };
        used.into_iter().filter(|i| *i < end).map(|i| slope(self, i)).collect()
    }

    fn linearise(&mut self, stage: usize) -> Ghost {
        let point = self.point(stage);
        self.heap.pass(Part::Field, self.costs.linearisation);
        let graph = self.heap.buffer(Part::Field, self.costs.linearised);
        self.counts.linearizations += 1;
        drop(point);
        graph
    }

    /// One pullback: μ.
    fn pull(&mut self) -> Held {
        let kappa = self.state();
        let _owned = kappa.announce(Category::Cotangents, self.sizes.accumulate);
        if self.sums.is_none() {
            let sums = self.heap.buffer(Part::Other, self.costs.sums + self.costs.sums_beside);
            let owned = sums.announce(Category::Gradients, self.costs.sums);
            self.sums = Some((sums, owned));
        }
        self.heap.pass(Part::Pullback, self.costs.pullback);
        self.counts.pullbacks += 1;
        let mu = self.state();
        let owned = mu.announce(Category::Cotangents, self.sizes.accumulate);
        (mu, owned)
    }

    /// A stage state; without terms and in the same dtype it is y itself.
    fn point(&self, stage: usize) -> Option<Ghost> {
        let has_terms = (0..stage).any(|j| self.tableau.a(stage, j) != 0.0);
        let is_new = !self.sizes.same_dtype || has_terms;
        is_new.then(|| self.heap.buffer(Part::Other, self.sizes.compute + self.costs.state_beside))
    }

    fn used(&self) -> Vec<usize> {
        (0..self.tableau.stages()).filter(|i| self.tableau.is_used(*i)).collect()
    }
}
