//! The continuous adjoint: y, λ and θ̄ are solved backwards as one equation.
//!
//! dy/dt = f, dλ/dt = −(∂f/∂y)ᵀλ, dθ̄/dt = −(∂f/∂θ)ᵀλ from the last time to the first, λ jumping by dL/dy at each
//! output. By an explicit Runge–Kutta method with step h < 0: Yᵢ = y + h Σ aᵢⱼ kⱼ, Λᵢ = λ + Σ (aᵢⱼ/wⱼ) μⱼ, where
//! μᵢ = (∂f/∂y)ᵀ(−h wᵢ Λᵢ) at Yᵢ and wᵢ = bᵢ, or 1 where bᵢ = 0 (no contribution to θ̄ there); λ⁻ = λ + Σ_{bᵢ≠0} μᵢ.

use super::drift::Drifts;
use super::lambda::Lambda;
use super::passes::{Pass, Passes};
use super::{Anchors, Reverse, Reversed};
use crate::State;
use crate::account::Category;
use crate::controller::{Controller, Tolerance};
use crate::error::{OdeError, Result};
use crate::field::{all_finite, sum};
use crate::solver::{
    ExplicitRungeKutta, Pullbacks, Slope, Solver, Stages, StepAt, Tableau, estimate, visible, zeros_like,
};
use crate::time::TimeGrid;
use candle_core::DType;
use std::sync::Arc;

/// The continuous adjoint (optimise-then-discretise): solves y backwards from its end, together with λ and dL/dθ.
///
/// Keeps the state at the end alone. Costs s linearisations and s pullbacks a step. The gradient is **not** that of the
/// steps taken: it converges to it with the step size, at the order of the method, as long as y can be solved backwards
/// at all; where f contracts it cannot, and the gradient is wrong without a word: look at
/// [`Stats::drift`](crate::Stats::drift), and prefer [`Discrete`](crate::Discrete) or
/// [`Reconstruct`](crate::Reconstruct).
///
/// # Reference
/// A. Gholami, K. Keutzer, G. Biros, *ANODE*, arXiv 1902.10298, §3 (why it fails).
#[derive(Clone, Debug)]
pub struct Backsolve {
    solver: Option<Arc<dyn ExplicitRungeKutta>>,
    substeps: usize,
    pub(crate) tolerances: Option<(Tolerance, Tolerance)>,
    pub(crate) controller: Controller,
}

impl Default for Backsolve {
    fn default() -> Self {
        Self { solver: None, substeps: 1, tolerances: None, controller: Controller::default() }
    }
}

impl Backsolve {
    /// Another explicit Runge–Kutta method for the way back; by default that of the solve.
    pub fn solver(mut self, solver: impl ExplicitRungeKutta) -> Self {
        self.solver = Some(Arc::new(solver));
        self
    }

    /// The way back chooses its own steps, between the outputs that the loss uses, instead of going over those of the
    /// solve: so that the estimated errors of y and of λ are within these. λ is measured against its largest component
    /// so far, so that the steps do not depend on the scale of the loss; dL/dθ follows and is not measured.
    ///
    /// The method needs an error estimate: [`Dopri5`](crate::Dopri5), [`Tsit5`](crate::Tsit5) and others. A step that
    /// is not finite in half precision is tried in F32 before it is made shorter.
    ///
    /// ```
    /// use candle_core::{Tensor, Var};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    /// let y0 = Var::new(&[1f64], &candle_core::Device::Cpu)?;
    /// let adjoint = Backsolve::default().tolerances(1e-9, 1e-9);
    /// let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).tolerances(1e-3, 1e-3).adjoint(adjoint);
    /// let solution = ode.solve(y0.as_tensor())?;
    /// let dy0 = solution.last().sum_all()?.backward()?.get(&y0).unwrap().to_vec1::<f64>()?[0];
    /// assert!((dy0 - (-1f64).exp()).abs() < 1e-8);
    /// assert!(solution.stats().back_steps > solution.stats().accepted_steps);
    /// # Ok::<(), OdeError>(())
    /// ```
    pub fn tolerances(mut self, rtol: impl Into<Tolerance>, atol: impl Into<Tolerance>) -> Self {
        self.tolerances = Some((rtol.into(), atol.into()));
        self
    }

    /// How the lengths of those steps are chosen; for [`tolerances`](Self::tolerances).
    pub fn controller(mut self, controller: Controller) -> Self {
        self.controller = controller;
        self
    }

    /// How many equal steps back are made for each step of the solve; by default 1. With
    /// [`tolerances`](Self::tolerances) it has no meaning.
    pub fn substeps(mut self, substeps: usize) -> Self {
        self.substeps = substeps;
        self
    }

    /// Whether there is a way back of a solve by `solver`, and by which method.
    pub(crate) fn tableau(&self, solver: &dyn Solver) -> Result<Tableau> {
        if self.substeps == 0 {
            let hint = "each step of the solve needs at least one step back";
            return Err(OdeError::Setting { setting: "Backsolve::substeps", value: "0".into(), hint });
        }
        match self.solver.as_ref().map(|solver| solver.tableau()).or(solver.tableau()) {
            Some(tableau) => {
                if self.tolerances.is_some() {
                    self.controller.check()?;
                    estimate(tableau)?;
                }
                Ok(tableau.clone())
            }
            None => Err(OdeError::Unsupported {
                what: format!("Backsolve with {}, which is no explicit Runge–Kutta method,", solver.name()),
                instead: "name one for the way back: Backsolve::default().solver(Rk4)",
            }),
        }
    }

    /// The way back over steps whose ends are `times`.
    pub(crate) fn back(&self, solver: &dyn Solver, times: &[f64]) -> Result<Back> {
        let part = |pair: &[f64], n: usize| pair[1] + (pair[0] - pair[1]) * (n as f64 / self.substeps as f64);
        let pairs = times.windows(2).rev();
        let inner = pairs.flat_map(|pair| (0..self.substeps).map(move |n| part(pair, n)));
        let (mut ends, steps) = (vec![], (times.len() - 1).saturating_mul(self.substeps));
        if ends.try_reserve_exact(steps.saturating_add(1)).is_err() {
            let (setting, value) = ("Backsolve::substeps", self.substeps.to_string());
            return Err(OdeError::Setting { setting, value, hint: "so many times do not fit into memory" });
        }
        ends.extend(inner.chain([times[0]]));
        Ok(Back { grid: TimeGrid::new(ends)?, tableau: self.tableau(solver)?, substeps: self.substeps })
    }
}

/// The way back: its times, its method, and how many of its steps there are for each step of the solve.
pub(crate) struct Back {
    pub(crate) grid: TimeGrid,
    pub(crate) tableau: Tableau,
    pub(crate) substeps: usize,
}

/// Everything the backward pass needs of a finished forward pass.
pub(crate) struct Backsolved {
    /// Those of the way back: its times, and the dtype of each of its steps.
    pub(crate) passes: Passes,
    pub(crate) solver: Arc<dyn Solver>,
    pub(crate) back: Back,
    /// y0, accumulate dtype.
    pub(crate) start: State,
    /// What was carried at the end, alone.
    pub(crate) end: Anchors,
}

impl Reverse for Backsolved {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        let end = visible(self.solver.as_ref(), self.end.last()?);
        self.passes.run(|pass| self.walk(pass, end.clone(), cotangents))
    }

    fn bytes(&self) -> usize {
        self.end.bytes()
    }
}

impl Backsolved {
    fn walk(&self, pass: &mut Pass<'_, '_>, mut y: State, cotangents: &[(usize, State)]) -> Result<Option<State>> {
        let (accumulate, substeps) = (self.passes.precision.accumulate_dtype(), self.back.substeps);
        let mut lambda = Lambda::default();
        let mut waiting = cotangents.iter().rev().peekable();
        let back = self.passes.dtypes.len();
        for done in 0..=back {
            while let Some((_, cotangent)) = waiting.next_if(|(at, _)| at * substeps == back - done) {
                lambda.add(cotangent, accumulate)?;
            }
            if done == back {
                break;
            }
            let state = match lambda.take() {
                Some(state) => state,
                None => zeros_like(&y, accumulate)?,
            };
            let (before, pulled) = pass.step(done, state, |stages, at, lambda, pullbacks| {
                step(&self.back.tableau, stages, at, &y, &lambda, pullbacks)
            })?;
            y = before;
            lambda.set(pulled);
            if all_finite(&y)?.known_bad() {
                let hint = "y cannot be solved backwards here: use Discrete::default(), which keeps it";
                let at = self.passes.clock.step(done, self.passes.dtypes[done]);
                let time = at.t + at.h;
                let step = (back - done - 1) / substeps;
                return Err(OdeError::Reconstruction { step, time, hint });
            }
            if pass.is_lost() {
                return Ok(None);
            }
        }
        let mut drifts = Drifts::default();
        drifts.compare(&y, &self.start)?;
        drifts.report(&self.passes.counters)?;
        match lambda.take() {
            Some(state) => Ok(Some(state)),
            None => zeros_like(&y, accumulate).map(Some),
        }
    }
}

/// One step back of y and λ; θ̄ goes through `pullbacks`.
fn step(
    tableau: &Tableau,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    y: &State,
    lambda: &State,
    pullbacks: &mut Pullbacks<'_>,
) -> Result<(State, State)> {
    let matter: Vec<bool> = (0..tableau.stages()).map(|i| tableau.is_used(i)).collect();
    Found::at(tableau, stages, at, &matter, [y, lambda], pullbacks)?.moved(tableau, at.h, [y, lambda])
}

/// What the stages of a step have given, those that do not matter left out.
pub(super) struct Found(Vec<Option<(Slope, Slope)>>);

impl Found {
    /// k and μ of the stages that `matter`.
    pub(super) fn at(
        tableau: &Tableau,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        matter: &[bool],
        [y, lambda]: [&State; 2],
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<Self> {
        let (h, accumulate) = (at.h, stages.accumulate());
        let mut found = Self(vec![]);
        for (i, matters) in matter.iter().enumerate() {
            if !matters {
                found.0.push(None);
                continue;
            }
            let _span = tracing::trace_span!(target: "candle_ode", "stage", index = i).entered();
            let of_y: Vec<_> = found.iter().map(|(j, k, _)| (h * tableau.a(i, j), k)).collect();
            let of_lambda: Vec<_> = found.iter().map(|(j, _, mu)| (tableau.a(i, j) / weight(tableau, j), mu)).collect();
            let linearization = stages.linearize(at, i, &sum(Some(y), &of_y, at.dtype)?)?;
            let kappa = {
                let here = match of_lambda.is_empty() {
                    true => None,
                    false => Some(Slope::new(sum(Some(lambda), &of_lambda, accumulate)?, Category::Cotangents)),
                };
                let here = here.as_ref().map_or(lambda, Slope::state);
                Slope::new(sum(None, &[(-h * weight(tableau, i), here)], accumulate)?, Category::Cotangents)
            };
            let mu = match tableau.weights()[i] == 0.0 {
                true => pullbacks.pull_state(linearization.as_ref(), at, i, kappa.state())?,
                false => pullbacks.pull(linearization.as_ref(), at, i, kappa.state())?,
            };
            let k = Slope::new(linearization.value().clone(), Category::Stages);
            found.0.push(Some((k, Slope::new(mu, Category::Cotangents))));
        }
        Ok(found)
    }

    /// y⁻ and λ⁻.
    pub(super) fn moved(&self, tableau: &Tableau, h: f64, [y, lambda]: [&State; 2]) -> Result<(State, State)> {
        let accumulate = lambda[0].dtype();
        let (of_y, of_lambda) = self.terms(tableau, h, tableau.weights());
        Ok((sum(Some(y), &of_y, accumulate)?, sum(Some(lambda), &of_lambda, accumulate)?))
    }

    /// h Σ dᵢ kᵢ and Σ dᵢ/wᵢ μᵢ: with dᵢ = bᵢ − b̂ᵢ, the errors of y⁻ and λ⁻.
    pub(super) fn errors(&self, tableau: &Tableau, h: f64, d: &[f64], accumulate: DType) -> Result<[State; 2]> {
        let (of_y, of_lambda) = self.terms(tableau, h, d);
        Ok([sum(None, &of_y, accumulate)?, sum(None, &of_lambda, accumulate)?])
    }

    fn terms<'a>(&'a self, tableau: &Tableau, h: f64, weights: &[f64]) -> (Terms<'a>, Terms<'a>) {
        let used = || self.iter().filter(|(i, ..)| weights[*i] != 0.0);
        let of_lambda = used().map(|(i, _, mu)| (weights[i] / weight(tableau, i), mu));
        (used().map(|(i, k, _)| (h * weights[i], k)).collect(), of_lambda.collect())
    }

    /// Stage, k and μ.
    fn iter(&self) -> impl Iterator<Item = (usize, &State, &State)> {
        let found = self.0.iter().enumerate().filter_map(|(i, found)| found.as_ref().map(|found| (i, found)));
        found.map(|(i, (k, mu))| (i, k.state(), mu.state()))
    }
}

type Terms<'a> = Vec<(f64, &'a State)>;

/// wᵢ.
fn weight(tableau: &Tableau, i: usize) -> f64 {
    match tableau.weights()[i] {
        0.0 => 1.0,
        b => b,
    }
}
