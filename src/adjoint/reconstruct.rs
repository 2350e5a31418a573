//! The adjoint of a reversible solver: undoes each step and pulls its cotangent back at once, so that nothing but the
//! end is kept, however many the steps.

use super::drift::Drifts;
use super::lambda::Lambda;
use super::passes::{Pass, Passes};
use super::{Reverse, Reversed};
use crate::State;
use crate::account::Owned;
use crate::error::{OdeError, Result};
use crate::field::{Finite, all_finite};
use crate::solver::{Reversal, Solver, StageMemory, fold, lift, visible, zeros_like};
use candle_core::DType;
use std::sync::Arc;

/// Undoes the steps of a reversible solver instead of keeping them: O(1) memory in the number of steps.
///
/// Keeps what the solver carries at the end, in the accumulate dtype. A step costs 2s linearisations and 2s pullbacks
/// with [`Reversible`](crate::Reversible). In exact arithmetic the gradient is that of [`Discrete`](crate::Discrete)
/// over the same solver; rounding makes the reconstructed states drift, which [`Stats::drift`](crate::Stats::drift)
/// measures, and [`anchor_every`](Self::anchor_every) bounds.
///
/// # Reference
/// S. McCallum, J. Foster, *Efficient, Accurate and Stable Gradients for Neural ODEs*, arXiv 2410.11648, Algorithm 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconstruct {
    anchor_every: Option<usize>,
    pub(crate) stage_memory: StageMemory,
}

/// How far rounding may grow before an anchor. Rounding of y is u_H a step, and f rounds differently at a state that is
/// off by that, by up to h·u_L: on an MLP over 1024 steps with c = 0.99 a growth of 16 costs nothing, 64 doubles the
/// error of the gradient in F32, 1024 makes it fifty times as large.
const GROWTH: f64 = 16.0;

impl Reconstruct {
    /// Keeps the states after every `steps` steps too, and goes on from there. By default they are kept before
    /// rounding, which grows by c⁻¹ a step, has grown by 16: every 2771 steps with c = 0.999, every 275 with c = 0.99.
    pub fn anchor_every(mut self, steps: usize) -> Self {
        self.anchor_every = Some(steps);
        self
    }

    /// How many linearisations live at once: all of Ψ_h or Ψ₋ₕ, or one, at the price of one more evaluation each.
    pub fn stage_memory(mut self, memory: StageMemory) -> Self {
        self.stage_memory = memory;
        self
    }

    /// After how many steps `solver` needs an anchor.
    pub(crate) fn spacing(&self, solver: &dyn Solver) -> Result<usize> {
        let growth = reversal(solver)?.growth();
        match self.anchor_every {
            Some(0) => {
                let hint = "give the number of steps between kept states, at least 1";
                Err(OdeError::Setting { setting: "Reconstruct::anchor_every", value: "0".into(), hint })
            }
            Some(steps) => Ok(steps),
            None => {
                // A method without growth gives infinity, which saturates.
                Ok(((GROWTH.ln() / growth.ln()) as usize).max(1))
            }
        }
    }
}

fn reversal(solver: &dyn Solver) -> Result<&dyn Reversal> {
    solver.reversal().ok_or_else(|| OdeError::Unsupported {
        what: format!("Reconstruct with {}, whose steps cannot be undone,", solver.name()),
        instead: "wrap the method: .solver(Reversible::new(Rk4)), or use Discrete::default()",
    })
}

/// States that are kept all the same, by the number of steps before them, the end last; in the accumulate dtype.
#[derive(Debug)]
pub(crate) struct Anchors {
    every: usize,
    dtype: DType,
    kept: Vec<(usize, State, Owned)>,
}

impl Anchors {
    /// One every `every` steps, in the accumulate dtype.
    pub(crate) fn new(every: usize, dtype: DType) -> Self {
        Self { every, dtype, kept: vec![] }
    }

    /// Is shown what is carried after `steps` steps.
    pub(crate) fn see(&mut self, steps: usize, carried: &State, is_last: bool) {
        if is_last || steps.is_multiple_of(self.every) {
            let bytes = carried.bytes(self.dtype);
            self.kept.push((steps, carried.detach(), Owned::entry(self.dtype.as_str(), bytes)));
        }
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        self.kept.iter().map(|(_, _, owned)| owned.bytes()).sum()
    }

    /// What was carried at the end.
    pub(crate) fn last(&self) -> Result<&State> {
        match self.kept.last() {
            Some((_, end, _)) => Ok(end),
            None => Err(OdeError::NoSteps),
        }
    }

    fn after(&self, steps: usize) -> Option<&State> {
        let found = self.kept.binary_search_by_key(&steps, |(at, _, _)| *at).ok()?;
        Some(&self.kept[found].1)
    }
}

/// Everything the backward pass needs of a finished forward pass.
pub(crate) struct Reconstructed {
    pub(crate) passes: Passes,
    pub(crate) solver: Arc<dyn Solver>,
    /// y0, accumulate dtype.
    pub(crate) start: State,
    pub(crate) anchors: Anchors,
    pub(crate) memory: StageMemory,
}

impl Reverse for Reconstructed {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        let (reversal, end) = (reversal(self.solver.as_ref())?, self.anchors.last()?);
        self.passes.run(|pass| self.walk(pass, reversal, end.clone(), cotangents))
    }

    fn bytes(&self) -> usize {
        self.anchors.bytes()
    }
}

impl Reconstructed {
    fn walk(
        &self,
        pass: &mut Pass<'_, '_>,
        reversal: &dyn Reversal,
        mut carried: State,
        cotangents: &[(usize, State)],
    ) -> Result<Option<State>> {
        let (solver, accumulate) = (self.solver.as_ref(), self.passes.precision.accumulate_dtype());
        let (mut lambda, mut drifts, mut finite) = (Lambda::default(), Drifts::default(), vec![]);
        let mut waiting = cotangents.iter().rev().peekable();
        let steps = self.passes.dtypes.len();
        for n in (0..=steps).rev() {
            if let Some(anchor) = self.anchors.after(n).filter(|_| n < steps) {
                drifts.compare(&visible(solver, &carried), &visible(solver, anchor))?;
                carried = anchor.clone();
            }
            while let Some((_, cotangent)) = waiting.next_if(|(at, _)| *at == n) {
                lambda.add(&lift(solver, cotangent, accumulate)?, accumulate)?;
            }
            if n == 0 {
                break;
            }
            let state = match lambda.give() {
                Some(state) => state,
                None => zeros_like(&carried, accumulate)?,
            };
            // What is carried is given away, unless the step may be undone once more.
            let mut given = pass.given(n - 1, carried);
            let (before, pulled) = pass.step(n - 1, state, |stages, at, lambda, pullbacks| {
                reversal.undo(stages, at, given.take()?, lambda, self.memory, pullbacks)
            })?;
            carried = before;
            lambda.set(pulled);
            match all_finite(&carried)? {
                good if good.known_good() => {}
                flag => finite.push((n - 1, flag)),
            }
            if finite.last().is_some_and(|(_, finite)| finite.known_bad()) {
                break;
            }
            if pass.is_lost() {
                return Ok(None);
            }
        }
        self.check(&finite)?;
        drifts.compare(&visible(solver, &carried), &self.start)?;
        drifts.report(&self.passes.counters)?;
        let lambda = match lambda.take() {
            Some(state) => state,
            None => zeros_like(&carried, accumulate)?,
        };
        fold(solver, &lambda, accumulate).map(Some)
    }

    /// Each undone step must have given finite states.
    fn check(&self, undone: &[(usize, Finite)]) -> Result<()> {
        let (steps, flags): (Vec<usize>, Vec<Finite>) = undone.iter().cloned().unzip();
        let read = Finite::read(&flags)?;
        let Some(first) = read.iter().position(|finite| !finite) else { return Ok(()) };
        let (step, dtype) = (steps[first], self.passes.dtypes[steps[first]]);
        let hint = "keep a state now and then with Reconstruct::default().anchor_every(K), take smaller steps \
                    (|h λ| < 1 − c for each eigenvalue λ of ∂f/∂y), or use Discrete::default()";
        Err(OdeError::Reconstruction { step, time: self.passes.clock.step(step, dtype).t, hint })
    }
}
