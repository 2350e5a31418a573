//! How one step is made, and how a cotangent is pulled back through it.

pub(crate) mod bare;
mod carried;
mod explicit;
mod interpolant;
mod methods;
mod reversible;
mod reversible_heun;
mod slope;
mod stages;
mod tableau;
mod watch;

pub(crate) use carried::{carry, fold, lift, visible};
pub use explicit::{ExplicitRungeKutta, Linearized, StageMemory};
pub(crate) use explicit::{estimate, no_linearizations};
pub use methods::{Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Rk3, Rk4, ThreeEighths, Tsit5};
pub use reversible::{Reversal, Reversible};
pub use reversible_heun::ReversibleHeun;
pub use slope::Slope;
pub use stages::{Clock, Pullbacks, Stages, StepAt};
pub(crate) use stages::{Slopes, StageScale, StepTimes, zeros_like};
pub use tableau::Tableau;

use crate::State;
use crate::error::{OdeError, Result};
use crate::field::Finite;
use std::fmt::Debug;

/// What one step gives.
#[derive(Debug)]
pub struct Step {
    /// y at the end of the step, in the accumulate dtype.
    pub y: State,
    /// Per stage, whether its slope is finite.
    pub finite: Vec<Finite>,
}

/// A step with an estimate of its error: what a controller needs.
#[derive(Debug)]
pub struct EstimatedStep {
    /// The step.
    pub step: Step,
    /// y⁺ − ŷ⁺ = h Σ dᵢ kᵢ, in the accumulate dtype, out of Candle's graph.
    pub error: State,
    /// dᵢ = bᵢ − b̂ᵢ by stage: how rounding of the slopes enters the estimate.
    pub weights: Vec<f64>,
    /// f at the stages that were evaluated, by stage, in the dtype of the step. The first is f(t, y).
    pub slopes: Vec<Option<Slope>>,
    /// Whether the last of the slopes is f(t + h, y⁺), to the bit: it is then the first of the next step.
    pub first_same_as_last: bool,
}

/// Makes one step, and pulls a cotangent back through it.
///
/// Explicit Runge–Kutta methods implement [`ExplicitRungeKutta`] (a tableau) and are solvers by that.
pub trait Solver: Debug + Send + Sync + 'static {
    /// Its name.
    fn name(&self) -> &str;

    /// Its order.
    fn order(&self) -> usize;

    /// The nodes c: the times, as fractions of a step, at which a step evaluates the field, by stage.
    fn nodes(&self) -> &[f64];

    /// How many states like y it carries from step to step: y itself, and others that start as y0 too. What it calls y
    /// below is all of them in a row, y first.
    fn carries(&self) -> usize {
        1
    }

    /// The coefficients of an explicit Runge–Kutta method.
    fn tableau(&self) -> Option<&Tableau> {
        None
    }

    /// Itself as a solver whose steps can be undone, if they can.
    fn reversal(&self) -> Option<&dyn Reversal> {
        None
    }

    /// One step from `y` (accumulate dtype).
    ///
    /// # Errors
    /// Whatever the vector field reports, with its place.
    fn step(&self, stages: &Stages<'_>, at: &StepAt<'_>, y: &State) -> Result<Step>;

    /// As [`step`](Self::step), with the linearisations of its stages; `None` from a solver that cannot keep them.
    ///
    /// # Errors
    /// Whatever the vector field reports, with its place.
    fn linearized_step(&self, stages: &Stages<'_>, at: &StepAt<'_>, y: &State) -> Result<Option<(Step, Linearized)>> {
        let _ = (stages, at, y);
        Ok(None)
    }

    /// As [`pullback`](Self::pullback), by linearisations that were kept: evaluates nothing.
    ///
    /// # Errors
    /// [`OdeError::Unsupported`] from a solver that cannot keep them; whatever the vector field reports, with its
    /// place.
    fn pullback_linearized(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        linearized: &Linearized,
        lambda: &State,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State> {
        let _ = (stages, at, linearized, lambda, pullbacks);
        Err(no_linearizations(self.name()))
    }

    /// The order of the weaker of the two solutions whose difference estimates the error of a step; `None` for a method
    /// without an estimate, which cannot choose its steps.
    fn estimate_order(&self) -> Option<usize> {
        None
    }

    /// One step with an estimate of its error. `first` is f(t, y) where it is known already: it is not evaluated again.
    ///
    /// # Errors
    /// [`OdeError::NoErrorEstimate`] from a method without one; whatever the vector field reports, with its place.
    fn estimated_step(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        first: Option<&Slope>,
    ) -> Result<EstimatedStep> {
        let _ = (stages, at, y, first);
        Err(OdeError::NoErrorEstimate { solver: self.name().to_owned() })
    }

    /// The method whose step from y gives y(t + θh) inside a step of this one: dense output. `None` if there is none.
    fn interpolated(&self, theta: f64) -> Option<Tableau> {
        let _ = theta;
        None
    }

    /// dL/dy at the start of the step from `lambda` = dL/dy at its end; contributions to dL/dθ go through `pullbacks`.
    /// `y`, the state at the start, is given away so that it can be dropped once all stages are linearised.
    ///
    /// # Errors
    /// Whatever the vector field reports, with its place.
    fn pullback(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: State,
        lambda: &State,
        memory: StageMemory,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State>;
}
