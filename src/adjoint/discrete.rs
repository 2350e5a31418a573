//! The discrete adjoint: walks the kept steps backwards.

use super::lambda::Lambda;
use super::passes::{Pass, Passes};
use super::{Reverse, Reversed};
use crate::State;
use crate::error::Result;
use crate::solver::{Solver, StageMemory, fold, lift, zeros_like};
use crate::trajectory::Trajectory;
use std::sync::Arc;

/// Everything the backward pass needs of a finished forward pass.
pub(crate) struct Recorded {
    pub(crate) passes: Passes,
    pub(crate) solver: Arc<dyn Solver>,
    pub(crate) trajectory: Trajectory,
    pub(crate) memory: StageMemory,
}

impl Reverse for Recorded {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        self.passes.run(|pass| self.walk(pass, cotangents))
    }

    fn bytes(&self) -> usize {
        self.trajectory.bytes()
    }
}

impl Recorded {
    fn walk(&self, pass: &mut Pass<'_, '_>, cotangents: &[(usize, State)]) -> Result<Option<State>> {
        let (solver, accumulate) = (self.solver.as_ref(), self.passes.precision.accumulate_dtype());
        let mut lambda = Lambda::default();
        let mut waiting = cotangents.iter().rev().peekable();
        for n in (0..=self.passes.dtypes.len()).rev() {
            while let Some((_, cotangent)) = waiting.next_if(|(at, _)| *at == n) {
                lambda.add(&lift(solver, cotangent, accumulate)?, accumulate)?;
            }
            if n == 0 {
                break;
            }
            // Nothing has reached this time yet: the steps after the last output used by the loss cost nothing.
            let Some(state) = lambda.take() else { continue };
            lambda.set(pass.step(n - 1, &state, |stages, at, pullbacks| {
                let y = self.trajectory.state(n - 1, accumulate)?;
                solver.pullback(stages, at, y, &state, self.memory, pullbacks)
            })?);
            if pass.is_lost() {
                return Ok(None);
            }
        }
        let lambda = match lambda.take() {
            Some(state) => state,
            None => zeros_like(&self.trajectory.state(0, accumulate)?, accumulate)?,
        };
        fold(solver, &lambda, accumulate).map(Some)
    }
}
