//! One explicit step and its pullback, in bytes.
//!
//! A step of u used stages holds, beside y: forward up to u slopes and a stage state in the compute dtype; backward u
//! linearisations (or one, and the slopes below it), κ, the μᵢ and both λ.

use super::ghost::{Announced, Ghost};
use super::session::Linearization;
use super::walk::Solve;
use crate::account::Category;
use crate::memory::composition::Part;
use crate::solver::{StageMemory, Tableau};

/// A state of ours, announced. The buffer goes first.
pub(super) type Held = (Ghost, Announced);

/// What a backward pass holds of the stages of a step.
enum Points {
    All(Vec<Linearization>),
    One(Vec<Held>),
}

impl Solve<'_> {
    /// A state in the accumulate dtype.
    pub(super) fn state(&self) -> Ghost {
        self.heap.buffer(Part::Other, self.sizes.accumulate + self.costs.state_beside)
    }

    /// One step: the states it leads to.
    pub(super) fn advance(&mut self) -> Vec<Ghost> {
        if !self.coupled {
            return vec![self.step()];
        }
        let stages = self.tableau.stages();
        let of_ahead = self.slopes(stages);
        let ahead = self.state();
        let of_back = self.slopes(stages);
        let across = self.state();
        drop((of_back, of_ahead));
        vec![ahead, across]
    }

    /// One step of the tableau: the state it leads to.
    pub(super) fn step(&mut self) -> Ghost {
        if let Some(bare) = self.costs.bare.filter(|_| self.pulls_on_buffers || !self.linearises()) {
            self.step_layers(&bare);
            self.heap.pass(Part::Field, bare.step_most);
            self.counts.evaluations += self.used().len();
            return self.state();
        }
        let slopes = self.slopes(self.tableau.stages());
        let y = self.state();
        drop(slopes);
        y
    }

    /// The same, with the linearisations of the step.
    pub(super) fn linearized_step(&mut self) -> (Ghost, Vec<Linearization>) {
        let all = self.used().into_iter().map(|i| self.linearise(i)).collect();
        (self.state(), all)
    }

    /// The pullback of one step by linearisations that are kept: the new λ.
    pub(super) fn pullback_linearized(&mut self, all: &[Linearization]) -> Ghost {
        let mus: Vec<Held> = all.iter().rev().map(|linearization| self.pull(linearization)).collect();
        let lambda = self.state();
        drop(mus);
        lambda
    }

    /// The pullback of one step from `y`: the new λ.
    pub(super) fn pullback(&mut self, y: Ghost) -> Ghost {
        if let Some(bare) = self.costs.bare.filter(|_| self.pulls_on_buffers) {
            self.pull_step_layers(&bare);
            self.make_sums();
            let end = self.sizes.accumulate + self.costs.state_beside;
            self.heap.pass(Part::Pullback, bare.pullback_most.saturating_sub(end));
            drop(y);
            self.heap.pass(Part::Pullback, bare.pullback_most);
            self.counts.linearizations += self.used().len();
            self.counts.pullbacks += self.used().len();
            return self.state();
        }
        let last = self.used().last().copied().unwrap_or(0);
        let points = self.points(last);
        let start = (self.memory == StageMemory::One).then_some(y);
        let mus = self.pull_points(points);
        drop(start);
        let lambda = self.state();
        drop(mus);
        lambda
    }

    /// A step undone that has led to a coupled pair with the cotangents `bars`: the pair it started from, and its λ.
    pub(super) fn undo(&mut self, pair: Vec<Ghost>, bars: Vec<Held>) -> [[Ghost; 2]; 2] {
        let bars_again = || bars.iter().map(|(bar, _)| bar.clone()).collect::<Vec<_>>();
        let _again = self.tries_again.then(|| (pair.clone(), bars_again()));
        let stages = self.tableau.stages();
        let points = self.points(stages);
        let z = self.state();
        let _z = z.announce(Category::Stages, self.sizes.accumulate);
        // What y is found from is needed on.
        let ahead = pair.into_iter().next();
        let mus = self.pull_points(points);
        let star = self.state();
        drop(mus);
        let star = self.cotangent(star);
        let z_bar = bars.into_iter().last();
        let points = self.points(stages);
        let y = self.state();
        let _y = y.announce(Category::Stages, self.sizes.accumulate);
        drop(ahead);
        let mus = self.pull_points(points);
        let bars = [self.state(), self.state()];
        drop((mus, star, z_bar));
        [[y, z], bars]
    }

    /// What is held of the stages: their linearisations, or the slopes below `end`.
    fn points(&mut self, end: usize) -> Points {
        match self.memory {
            StageMemory::All => Points::All(self.used().into_iter().map(|i| self.linearise(i)).collect()),
            StageMemory::One => Points::One(self.slopes(end)),
        }
    }

    /// μ of every used stage.
    fn pull_points(&mut self, mut points: Points) -> Vec<Held> {
        let used = self.used();
        let mut mus = vec![];
        for i in used.iter().rev() {
            let linearization = match &mut points {
                Points::All(all) => all.pop(),
                Points::One(slopes) => {
                    slopes.truncate(used.iter().filter(|j| *j < i).count());
                    Some(self.linearise(*i))
                }
            };
            mus.extend(linearization.map(|linearization| self.pull(&linearization)));
        }
        mus
    }

    /// The slopes of the used stages below `end`.
    fn slopes(&mut self, end: usize) -> Vec<Held> {
        let used = self.used();
        let slope = |solve: &mut Self, i: usize| {
            let point = solve.point(i);
            solve.evaluate_layers();
            solve.heap.pass(Part::Field, solve.costs.evaluation);
            let k = solve.heap.buffer(Part::Field, solve.sizes.compute + solve.costs.state_beside);
            solve.counts.evaluations += 1;
            let owned = k.announce(Category::Stages, solve.sizes.compute);
            drop(point);
            (k, owned)
        };
        used.into_iter().filter(|i| *i < end).map(|i| slope(self, i)).collect()
    }

    pub(super) fn linearise(&mut self, stage: usize) -> Linearization {
        let point = self.point(stage);
        self.linearize_layers();
        self.heap.pass(Part::Field, self.costs.linearisation);
        let graph = self.heap.buffer(Part::Field, self.costs.linearised);
        self.counts.linearizations += 1;
        drop(point);
        self.linearization(graph)
    }

    /// One pullback: μ.
    fn pull(&mut self, through: &Linearization) -> Held {
        let _kappa = self.own_cotangent();
        self.pull_back(through)
    }

    pub(super) fn own_cotangent(&self) -> Held {
        let state = self.state();
        self.cotangent(state)
    }

    /// μ of a κ that is at hand.
    pub(super) fn pull_back(&mut self, through: &Linearization) -> Held {
        self.make_sums();
        self.pull_layers(through);
        self.heap.pass(Part::Owned(Category::Scratch), self.costs.layers.moment);
        self.heap.pass(Part::Pullback, self.costs.pullback);
        self.counts.pullbacks += 1;
        let mu = self.state();
        self.cotangent(mu)
    }

    /// The first pullback makes the sums.
    fn make_sums(&mut self) {
        match self.tries_again {
            true if self.of_step.is_none() => self.of_step = Some(self.new_sums()),
            false if self.sums.is_none() => self.sums = Some(self.new_sums()),
            _ => {}
        }
    }

    fn new_sums(&self) -> Held {
        let sums = self.heap.buffer(Part::Other, self.costs.sums);
        let owned = sums.announce(Category::Gradients, self.costs.sums);
        (sums, owned)
    }

    /// A step is pulled back: sums that were its own are added to those of the pass.
    pub(super) fn settle(&mut self) {
        if let Some(of_step) = self.of_step.take() {
            if self.sums.is_none() {
                self.sums = Some(self.new_sums());
            }
            drop(of_step);
        }
    }

    /// A stage state; without terms and in the same dtype it is y itself.
    fn point(&self, stage: usize) -> Option<Ghost> {
        let has_terms = (0..stage).any(|j| self.tableau.a(stage, j) != 0.0);
        let is_new = !self.sizes.same_dtype || has_terms;
        is_new.then(|| self.heap.buffer(Part::Other, self.sizes.compute + self.costs.state_beside))
    }

    pub(super) fn used(&self) -> Vec<usize> {
        used(self.tableau)
    }
}

/// The stages that matter.
pub(super) fn used(tableau: &Tableau) -> Vec<usize> {
    (0..tableau.stages()).filter(|i| tableau.is_used(*i)).collect()
}
