//! How long a step is: a controller looks at the estimated error of each step and decides the length of the next.
//!
//! With e the norm of error/(atol + rtol·max(|y|, |y⁺|)), a step is accepted if e ≤ 1; with k the order of the estimate
//! plus one, the next is h⁺ = h · safety · e_n^(−β₁/k) · e_{n−1}^(−β₂/k) · e_{n−2}^(−β₃/k), within limits.

mod initial;
mod law;
mod tolerance;

pub(crate) use initial::initial_step;
pub(crate) use law::Memory;
pub(crate) use tolerance::Tolerances;
pub use tolerance::{CustomNorm, Norm, Tolerance};

use crate::error::{OdeError, Result};

/// How the lengths of adaptive steps are chosen. The tolerances are those of
/// [`Ode::tolerances`](crate::Ode::tolerances).
///
/// | setting | default |
/// |---|---|
/// | β | (3/5, −1/5, 0), the PI controller PI.4.2 |
/// | [`safety`](Self::safety) | 0.9 |
/// | [`factors`](Self::factors) | a step is at least 0.2 and at most 10 times as long as the one before |
/// | [`first_step`](Self::first_step) | found by Hairer's algorithm, one evaluation |
/// | [`min_step`](Self::min_step), [`max_step`](Self::max_step) | 16 ulp of the time; the span |
/// | [`max_steps`](Self::max_steps) | 10 000, rejected ones included |
/// | [`norm`](Self::norm) | [`Norm::Rms`] |
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_ode::prelude::*;
///
/// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
/// let y0 = Tensor::new(&[1f64], &Device::Cpu)?;
/// let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).tolerances(1e-8, 1e-8);
/// let solution = ode.controller(Controller::pi().max_step(0.25)).solve(&y0)?;
/// assert!((solution.last().to_vec1::<f64>()?[0] - (-1f64).exp()).abs() < 1e-8);
/// # Ok::<(), OdeError>(())
/// ```
///
/// # Reference
/// G. Söderlind, *Digital filters in adaptive time-stepping*, ACM TOMS 29 (2003); G. Söderlind, L. Wang, *Adaptive
/// time-stepping and computational stability*, J. Comput. Appl. Math. 185 (2006).
#[derive(Clone, Debug)]
pub struct Controller {
    pub(crate) betas: [f64; 3],
    pub(crate) safety: f64,
    pub(crate) least_factor: f64,
    pub(crate) most_factor: f64,
    pub(crate) first_step: Option<f64>,
    pub(crate) min_step: f64,
    pub(crate) max_step: f64,
    pub(crate) max_steps: usize,
    pub(crate) norm: Norm,
    pub(crate) floor: AtFloor,
}

/// What to do where a step's error estimate is made of the rounding of f, so that shorter steps cannot reach the
/// tolerance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtFloor {
    /// [`OdeError::ErrorFloor`], which says how many tolerances the rounding makes up.
    #[default]
    Error,
    /// The step is accepted, and counted in [`Stats::floored_steps`](crate::Stats::floored_steps); steps become as long
    /// as that allows. A second number is read from the device each step.
    Accept,
}

impl Controller {
    /// With exponents β of one's own.
    pub fn new(betas: [f64; 3]) -> Self {
        Self {
            betas,
            safety: 0.9,
            least_factor: 0.2,
            most_factor: 10.0,
            first_step: None,
            min_step: 0.0,
            max_step: f64::INFINITY,
            max_steps: 10_000,
            norm: Norm::Rms,
            floor: AtFloor::Error,
        }
    }

    /// The elementary controller, β = (1, 0, 0): quick to react, and quick to overshoot.
    pub fn i() -> Self {
        Self::new([1.0, 0.0, 0.0])
    }

    /// PI.4.2, β = (3/5, −1/5, 0): the default. Smoother where stability, not accuracy, limits the step.
    pub fn pi() -> Self {
        Self::new([0.6, -0.2, 0.0])
    }

    /// The filter H312, β = (1/18, 1/9, 1/18): the smoothest sequence of steps, slow to react.
    pub fn pid() -> Self {
        Self::new([1.0 / 18.0, 1.0 / 9.0, 1.0 / 18.0])
    }

    /// How much shorter a step is made than the law says, in (0, 1].
    pub fn safety(mut self, safety: f64) -> Self {
        self.safety = safety;
        self
    }

    /// How much shorter and longer than the last a step may be: 0 < `least` < 1 < `most`.
    pub fn factors(mut self, least: f64, most: f64) -> Self {
        (self.least_factor, self.most_factor) = (least, most);
        self
    }

    /// The length of the first step that is tried, instead of Hairer's.
    pub fn first_step(mut self, h: f64) -> Self {
        self.first_step = Some(h);
        self
    }

    /// No step is shorter, unless an output time, a discontinuity or the end is nearer. A step of this length that is
    /// rejected is [`OdeError::StepTooSmall`].
    pub fn min_step(mut self, h: f64) -> Self {
        self.min_step = h;
        self
    }

    /// No step is longer.
    pub fn max_step(mut self, h: f64) -> Self {
        self.max_step = h;
        self
    }

    /// How many steps may be tried, rejected ones included, before it is [`OdeError::StepLimit`].
    pub fn max_steps(mut self, steps: usize) -> Self {
        self.max_steps = steps;
        self
    }

    /// The norm of scaled errors.
    pub fn norm(mut self, norm: Norm) -> Self {
        self.norm = norm;
        self
    }

    /// What to do where rounding of f keeps the tolerance out of reach.
    pub fn at_floor(mut self, floor: AtFloor) -> Self {
        self.floor = floor;
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |setting, value: f64, hint| Err(OdeError::Setting { setting, value: value.to_string(), hint });
        let positive = |h: f64| h > 0.0 && !h.is_nan();
        if let Some(beta) = self.betas.iter().find(|beta| !beta.is_finite()) {
            return wrong("Controller::new", *beta, "the exponents must be finite");
        }
        if !(self.safety > 0.0 && self.safety <= 1.0) {
            return wrong("Controller::safety", self.safety, "give a number in (0, 1]");
        }
        if !(self.least_factor > 0.0 && self.least_factor < 1.0) {
            return wrong(
                "Controller::factors",
                self.least_factor,
                "a rejected step must become shorter: give 0 < least < 1",
            );
        }
        if !(self.most_factor > 1.0 && self.most_factor.is_finite()) {
            return wrong(
                "Controller::factors",
                self.most_factor,
                "steps must be able to grow: give a finite most > 1",
            );
        }
        if let Some(h) = self.first_step.filter(|h| !(positive(*h) && h.is_finite())) {
            return wrong("Controller::first_step", h, "lengths are positive, in both directions of time");
        }
        if !(self.min_step >= 0.0 && self.min_step.is_finite()) {
            return wrong("Controller::min_step", self.min_step, "lengths are positive, in both directions of time");
        }
        if !positive(self.max_step) || self.max_step < self.min_step {
            return wrong(
                "Controller::max_step",
                self.max_step,
                "give a positive length, at least that of .min_step(..)",
            );
        }
        if self.max_steps == 0 {
            return wrong("Controller::max_steps", 0.0, "allow at least one step");
        }
        Ok(())
    }
}

impl Default for Controller {
    fn default() -> Self {
        Self::pi()
    }
}
