//! The solution between the ends of steps: y(t + θh) is one step from y with the weights bᵢ(θ) of the solver's
//! interpolant.

use super::Ode;
use super::moments::TimeTensors;
use crate::State;
use crate::adjoint::{Adjoint, Discrete, Unrolled};
use crate::error::{OdeError, Result};
use crate::solver::Tableau;
use crate::time::before;
use std::fmt;
use std::sync::Arc;

/// The states after all steps of a solve, and how to go on from them.
pub(super) struct Dense {
    ode: Ode,
    times: Vec<f64>,
    states: Vec<State>,
}

impl Dense {
    pub(super) fn new(ode: &Ode, (times, states): (Vec<f64>, Vec<State>)) -> Self {
        Self { ode: ode.clone(), times, states }
    }

    /// Whether the solve has been at `t`.
    pub(super) fn covers(&self, t: f64) -> bool {
        let (first, last) = self.ends();
        (first.min(last)..=first.max(last)).contains(&t)
    }

    /// y at a time that the solve has been at.
    pub(super) fn at(&self, t: f64) -> Result<State> {
        let n = before(&self.times, t);
        if self.times[n] == t {
            return Ok(self.states[n].clone());
        }
        let (from, to) = (self.times[n - 1], self.times[n]);
        match self.ode.solver.interpolated((t - from) / (to - from)) {
            Some(solver) => self.one_step(solver, [from, to], &self.states[n - 1]),
            None => Err(without(self.ode.solver.name())),
        }
    }

    /// One step over `times` by `solver`, from `y`, with the other settings of the solve.
    fn one_step(&self, solver: Tableau, times: [f64; 2], y: &State) -> Result<State> {
        let adjoint = match self.ode.adjoint {
            Adjoint::Unrolled(_) => Unrolled.into(),
            _ => Discrete::default().into(),
        };
        let discontinuities = self.ode.discontinuities.iter().copied().filter(|t| times.contains(t)).collect();
        let ode = Ode {
            solver: Arc::new(solver),
            grid: Some(times.to_vec()),
            tolerances: None,
            controller: None,
            save_at: vec![],
            discontinuities,
            dense: false,
            interpolate: false,
            time_tensors: TimeTensors::default(),
            adjoint,
            check_determinism: false,
            observer: None,
            ..self.ode.clone()
        };
        Ok(ode.solve(y)?.last)
    }

    fn ends(&self) -> (f64, f64) {
        (self.times[0], self.times[self.times.len() - 1])
    }
}

/// A solver has no interpolant.
pub(super) fn without(solver: &str) -> OdeError {
    OdeError::Unsupported { what: format!("dense output of {solver}"), instead: "step to the output times" }
}

impl fmt::Debug for Dense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dense").field("times", &self.times).finish_non_exhaustive()
    }
}
