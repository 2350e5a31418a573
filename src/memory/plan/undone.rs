//! The walks back that keep next to nothing, in bytes: steps of a reversible solver undone, and the ODE solved
//! backwards.

use super::back::Left;
use super::ghost::Ghost;
use super::step::Held;
use super::walk::{ClockBytes, Solve, Walked};
use crate::account::Category;
use crate::memory::composition::Part;
use crate::solver::Tableau;

/// The way back of a solve that is solved backwards.
pub(super) struct Way<'a> {
    pub(super) tableau: &'a Tableau,
    /// Steps back for each step.
    pub(super) substeps: usize,
    pub(super) clock: ClockBytes,
}

impl<'a> Solve<'a> {
    /// Undoes every step from the end, or from the next anchor.
    pub(super) fn undo_all(&mut self, walked: &Walked, outputs: &[usize]) -> Left {
        let cotangents = self.cotangents(outputs);
        let model = self.open(true);
        let anchor = |n: usize| {
            let (_, states) = walked.anchors.iter().find(|(at, _)| *at == n)?;
            Some(states.iter().map(|(state, _)| state.clone()).collect::<Vec<_>>())
        };
        let mut carried = anchor(self.steps);
        let mut lambda: Vec<Held> = vec![];
        for n in (0..=self.steps).rev() {
            if let Some(anchor) = anchor(n).filter(|_| n < self.steps) {
                self.compare();
                carried = Some(anchor);
            }
            if let Some(at) = outputs.iter().position(|output| *output == n) {
                // ȳ and zeros for z̄.
                let zeros = self.state();
                let lifted = match lambda.is_empty() {
                    true => [cotangents[at].clone(), zeros],
                    false => [self.state(), self.state()],
                };
                lambda = lifted.map(|state| self.cotangent(state)).into();
            }
            if n == 0 {
                break;
            }
            if lambda.is_empty() {
                lambda = vec![self.own_cotangent(), self.own_cotangent()];
            }
            let [states, bars] = self.undo(carried.take().unwrap_or_default(), std::mem::take(&mut lambda));
            self.settle();
            carried = Some(states.into());
            lambda = bars.map(|bar| self.cotangent(bar)).into();
        }
        self.compare();
        // ȳ + z̄.
        let folded = self.state();
        drop((carried, lambda));
        (self.hand_over(model, Some(folded)), None)
    }

    /// Solves y and λ backwards.
    pub(super) fn solve_backwards(&mut self, outputs: &[usize], way: &Way<'a>) -> Left {
        let clock = self.clock(way.clock);
        let cotangents = self.cotangents(outputs);
        let model = self.open(true);
        self.tableau = way.tableau;
        let mut y: Option<Ghost> = None;
        let mut lambda: Option<Held> = None;
        for n in (0..=self.steps).rev() {
            if let Some(at) = outputs.iter().position(|output| *output == n) {
                lambda = Some(self.with_cotangent(lambda.as_ref(), &cotangents[at]));
            }
            for _ in 0..if n == 0 { 0 } else { way.substeps } {
                let _zeros = lambda.is_none().then(|| self.state());
                let [before, pulled] = self.step_back();
                self.settle();
                y = Some(before);
                lambda = Some(self.cotangent(pulled));
            }
        }
        self.compare();
        drop(y);
        (self.hand_over(model, lambda.map(|(lambda, _)| lambda)), Some(clock))
    }

    /// One step back of y and λ.
    fn step_back(&mut self) -> [Ghost; 2] {
        let mut found: Vec<(Held, Held)> = vec![];
        for stage in self.used() {
            let linearization = self.linearise(stage);
            // λ at the stage, which without terms is λ itself.
            let here = (0..stage).any(|j| self.tableau.a(stage, j) != 0.0).then(|| self.own_cotangent());
            let kappa = self.own_cotangent();
            drop(here);
            let mu = self.pull_back(&linearization);
            // The slope outlives the linearisation that it is part of.
            drop(linearization);
            let k = self.heap.buffer(Part::Field, self.sizes.compute + self.costs.state_beside);
            let owned = k.announce(Category::Stages, self.sizes.compute);
            drop(kappa);
            found.push(((k, owned), mu));
        }
        let states = [self.state(), self.state()];
        drop(found);
        states
    }

    /// ‖reconstructed − kept‖: a difference and its square.
    fn compare(&self) {
        self.heap.pass(Part::Other, 2 * self.sizes.accumulate);
    }
}
