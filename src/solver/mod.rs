//! How one step is made, and how a cotangent is pulled back through it.

mod explicit;
mod methods;
mod stages;
mod tableau;

pub use explicit::{ExplicitRungeKutta, StageMemory};
pub use methods::{Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Rk3, Rk4, ThreeEighths, Tsit5};
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

    /// Its tableau, if it is an explicit Runge–Kutta method: what plans are made of.
    fn as_explicit(&self) -> Option<&Tableau> {
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
