//! What a solve hands out.

use super::Ode;
use super::dense::Dense;
use crate::State;
use crate::error::{OdeError, Result};
use crate::field::Field;
use crate::solver::Solver;
use crate::stats::{Counters, Stats};
use candle_core::Tensor;
use std::sync::Arc;

/// What a solve hands out: states in the accumulate dtype, in Candle's graph if anything tracked was reachable.
#[derive(Debug)]
pub struct Solution {
    pub(super) states: Vec<State>,
    pub(super) times: Vec<f64>,
    pub(super) last: State,
    pub(super) end: f64,
    /// By tile.
    pub(super) counters: Vec<Arc<Counters>>,
    pub(super) trajectory_bytes: usize,
    pub(super) second_level_bytes: usize,
    pub(super) dense: Option<Dense>,
}

impl Solution {
    /// y at the end; of a state of several tensors the first (see [`last_state`](Self::last_state)).
    pub fn last(&self) -> &Tensor {
        &self.last[0]
    }

    /// The whole state at the end.
    pub fn last_state(&self) -> &State {
        &self.last
    }

    /// The states asked for by [`Ode::save_at`], in that order; the last alone if none was.
    pub fn states(&self) -> &[State] {
        &self.states
    }

    /// The times of [`states`](Self::states).
    pub fn times(&self) -> &[f64] {
        &self.times
    }

    /// y at any time of the solve, if [`Ode::dense`] was asked for: by the solver's interpolant (Dopri5 and Tsit5 have
    /// one of order 4, others Hermite's cubic of order 3), as part of Candle's graph like the states of
    /// [`states`](Self::states).
    ///
    /// Costs the evaluations of one step, and their linearisations and pullbacks in a backward pass: a step is taken
    /// again with other weights, so that nothing but its start was kept.
    ///
    /// ```
    /// use candle_core::{Tensor, Var};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    /// let y0 = Var::new(&[1f64], &candle_core::Device::Cpu)?;
    /// let solution = Ode::new(&field).solver(Tsit5).span(0.0, 3.0).tolerances(1e-7, 1e-7).dense().solve(y0.as_tensor())?;
    /// let y = solution.at(1.234)?.single()?.clone();
    /// assert!((y.to_vec1::<f64>()?[0] - (-1.234f64).exp()).abs() < 1e-6);
    /// let dy0 = y.sum_all()?.backward()?.get(&y0).unwrap().to_vec1::<f64>()?[0];
    /// assert!((dy0 - (-1.234f64).exp()).abs() < 1e-6);
    /// # Ok::<(), OdeError>(())
    /// ```
    ///
    /// # Errors
    /// [`OdeError::Setting`] without [`Ode::dense`], or for a time that the solve has not reached.
    pub fn at(&self, t: f64) -> Result<State> {
        let wrong = |hint| Err(OdeError::Setting { setting: "Solution::at", value: t.to_string(), hint });
        match &self.dense {
            None => wrong("ask for it with Ode::dense(), which keeps the state after each step"),
            Some(dense) if !dense.covers(t) => wrong("the solve has not been there"),
            Some(dense) => dense.at(t),
        }
    }

    /// Where the solve ended: the end of the span, or where the observer stopped it.
    pub fn end(&self) -> f64 {
        self.end
    }

    /// What has been done so far, the backward passes included.
    pub fn stats(&self) -> Stats {
        self.counters.iter().map(|counters| counters.snapshot()).reduce(Stats::largest).unwrap_or_default()
    }

    /// How many tiles the batch was cut into: see [`Ode::tile`].
    pub fn tiles(&self) -> usize {
        self.counters.len()
    }

    /// Bytes of the trajectory kept for the backward pass: the states, not the linearisations that slots may hold
    /// beside them.
    pub fn trajectory_bytes(&self) -> usize {
        self.trajectory_bytes
    }

    /// Bytes of it that wait on the second level of storage, outside the memory of the device: see
    /// [`Discrete::two_levels`](crate::Discrete::two_levels).
    pub fn second_level_bytes(&self) -> usize {
        self.second_level_bytes
    }
}

/// The torchdiffeq-shaped shortcut: solves over `times`, which are the steps, and hands out the state at each.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_ode::prelude::*;
///
/// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
/// let solution = odeint(&field, &Tensor::ones(3, candle_core::DType::F32, &Device::Cpu)?, &[0.0, 0.1, 0.2], Heun)?;
/// assert_eq!(solution.states().len(), 3);
/// # Ok::<(), OdeError>(())
/// ```
///
/// # Errors
/// As [`Ode::solve`].
pub fn odeint<F: Field + Clone>(
    field: &F,
    y0: impl Into<State>,
    times: &[f64],
    solver: impl Solver,
) -> Result<Solution> {
    Ode::new(field).solver(solver).grid(times).save_at(times).solve(y0)
}
