//! Where in a solve something happened, and how far it came.

use crate::State;
use candle_core::DType;
use std::fmt;

/// Where in a solve something happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// Step, counted from 0 in the direction of the forward pass.
    pub step: usize,
    /// Stage inside the step, counted from 0.
    pub stage: usize,
    /// Model time at which the vector field was evaluated.
    pub time: f64,
    /// Dtype the vector field ran in.
    pub dtype: DType,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, stage, time, dtype } = self;
        write!(f, "step {step}, stage {stage}, t = {time}, {dtype:?}")
    }
}

/// Which pass over the steps an error belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassKind {
    /// From the first time to the last.
    Forward,
    /// From the last time to the first.
    Backward,
}

impl fmt::Display for PassKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
        })
    }
}

/// The component of a state whose estimated error is farthest beyond its tolerance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    /// Which tensor of the state.
    pub tensor: usize,
    /// Flat, row-major index.
    pub index: usize,
    /// Its error in units of its tolerance; NaN if it is not finite.
    pub error: f64,
}

/// How far an adaptive solve came that could not go on.
#[derive(Clone, Debug)]
pub struct Interrupted {
    /// The time reached.
    pub time: f64,
    /// The state there, in the accumulate dtype, out of Candle's graph.
    pub state: State,
    /// The output times that were reached.
    pub times: Vec<f64>,
    /// The states there.
    pub states: Vec<State>,
    /// Accepted steps.
    pub steps: usize,
    /// The norms of the scaled errors of the last steps tried, oldest first; NaN where something was not finite.
    pub errors: Vec<f64>,
    /// The offending component of the last step tried.
    pub worst: Worst,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { time, steps, errors, worst: Worst { tensor, index, error }, .. } = self;
        write!(f, "t = {time} after {steps} accepted steps; last errors, in tolerances: [")?;
        for (n, error) in errors.iter().enumerate() {
            write!(f, "{}{error:.3}", if n == 0 { "" } else { ", " })?;
        }
        write!(f, "], worst {error:.3} in tensor {tensor} of the state at flat index {index}")
    }
}
