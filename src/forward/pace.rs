//! Where the steps of a walk come from: a grid, or a controller.

use super::Forward;
use super::adaptive::{Adaptive, Stepper};
use crate::error::Result;
use crate::solver::Clock;
use crate::trajectory::Encodes;
use candle_core::{DType, Device};

/// Where the steps of a solve come from.
#[derive(Clone, Debug)]
pub(crate) enum Course {
    /// They are given.
    Grid(Clock),
    /// A controller decides.
    Adaptive(Box<Adaptive>),
}

impl Course {
    /// Where the first step starts, and a later time.
    pub(super) fn ends(&self) -> (f64, f64) {
        match self {
            Self::Grid(clock) => (clock.times()[0], clock.times()[1]),
            Self::Adaptive(adaptive) => (adaptive.start, adaptive.end),
        }
    }

    /// Steps, where they are known.
    pub(crate) fn steps(&self) -> Option<usize> {
        match self {
            Self::Grid(clock) => Some(clock.times().len() - 1),
            Self::Adaptive(_) => None,
        }
    }
}

/// A step that was taken, after those before it.
pub(super) struct Taken<'a> {
    pub(super) n: usize,
    pub(super) pace: &'a Pace<'a>,
    pub(super) dtypes: &'a [DType],
}

/// The steps of one walk.
pub(super) enum Pace<'a> {
    Grid(&'a Clock),
    Adaptive(Box<Stepper<'a>>),
}

impl Pace<'_> {
    /// The ends of step `n`, which has been taken.
    pub(super) fn ends(&self, n: usize) -> (f64, f64) {
        let times = match self {
            Self::Grid(clock) => clock.times(),
            Self::Adaptive(stepper) => stepper.times(),
        };
        (times[n], times[n + 1])
    }

    /// Where the last step ends.
    pub(super) fn end(&self) -> Option<f64> {
        match self {
            Self::Grid(clock) => clock.times().last().copied(),
            Self::Adaptive(stepper) => Some(stepper.end()),
        }
    }

    /// The next step starts where a codec of that kind lets it.
    pub(super) fn goes_on_from(&mut self, encodes: Encodes) {
        if let (Self::Adaptive(stepper), Encodes::Increments) = (self, encodes) {
            stepper.forget_first();
        }
    }

    /// The steps that were taken, and of a grid the rest.
    pub(super) fn into_clock(self, forward: &Forward<'_>, device: &Device) -> Result<Clock> {
        match self {
            Self::Grid(clock) => Ok(clock.clone()),
            Self::Adaptive(stepper) => stepper.into_clock(forward, device),
        }
    }
}
