//! How one step is made, and how a cotangent is pulled back through it.

mod carried;
mod explicit;
mod methods;
mod reversible;
mod reversible_heun;
mod stages;
mod tableau;

pub(crate) use carried::{carry, fold, lift, visible};
pub use explicit::{ExplicitRungeKutta, StageMemory};
pub(crate) use explicit::{Slope, all_finite, sum};
pub use methods::{Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Rk3, Rk4, ThreeEighths, Tsit5};
pub use reversible::{Reversal, Reversible};
pub use reversible_heun::ReversibleHeun;
pub use stages::{Clock, Pullbacks, Stages, StepAt};
pub(crate) use stages::{Slopes, StageScale, largest, zeros_like};
pub use tableau::Tableau;

use crate::State;
use crate::error::Result;
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
