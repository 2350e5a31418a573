//! How gradients come back.

mod backsolve;
mod discrete;
mod drift;
mod lambda;
mod passes;
mod reconstruct;
mod times;

pub use backsolve::Backsolve;
pub(crate) use backsolve::Backsolved;
pub(crate) use discrete::Recorded;
pub(crate) use passes::Passes;
pub use reconstruct::Reconstruct;
pub(crate) use reconstruct::{Anchors, Reconstructed};
pub(crate) use times::Moments;

use crate::State;
use crate::error::Result;
use crate::solver::{Solver, StageMemory};
use crate::trajectory::Codec;
use candle_core::Tensor;
use std::sync::Arc;

/// A finished forward pass that can be gone through backwards, as often as Candle asks.
pub(crate) trait Reverse: Send + Sync {
    /// The whole reverse pass. `cotangents` are dL/dy at grid points (index, state), in the order of the grid.
    ///
    /// # Errors
    /// Whatever the field reports, with its place; an overflow that no scaling helps.
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed>;

    /// Bytes that were kept for it.
    fn bytes(&self) -> usize;
}

/// What a backward pass gives.
pub(crate) struct Reversed {
    /// dL/dy0, accumulate dtype.
    pub(crate) y0: State,
    /// Per slot, the sum of the gradient.
    pub(crate) sums: Vec<Option<Tensor>>,
}

/// The gradient of the steps that were taken (discretise-then-optimise): each step is linearised again at its kept
/// state and pulled back, last step first.
///
/// Keeps (N − 1) states in the storage dtype. Costs s linearisations and s pullbacks a step.
#[derive(Clone, Debug, Default)]
pub struct Discrete {
    pub(crate) stage_memory: StageMemory,
    pub(crate) codec: Option<Arc<dyn Codec>>,
}

impl Discrete {
    /// How many linearisations of a step live at once.
    pub fn stage_memory(mut self, memory: StageMemory) -> Self {
        self.stage_memory = memory;
        self
    }

    /// How kept states are encoded; by default [`States`](crate::States) in the storage dtype of the precision.
    pub fn codec(mut self, codec: impl Codec) -> Self {
        self.codec = Some(Arc::new(codec));
        self
    }
}

/// Candle's own graph through every step: the oracle. Keeps every intermediate of every evaluation.
///
/// Candle's backward recurses, so long solves need a thread with a large stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unrolled;

/// Which of them.
#[derive(Clone, Debug)]
pub enum Adjoint {
    /// See [`Discrete`].
    Discrete(Discrete),
    /// See [`Reconstruct`].
    Reconstruct(Reconstruct),
    /// See [`Backsolve`].
    Backsolve(Backsolve),
    /// See [`Unrolled`].
    Unrolled(Unrolled),
}

impl Adjoint {
    /// After how many steps what the solver carries is kept, by those who go backwards from the end; checks that they can.
    pub(crate) fn anchors(&self, solver: &dyn Solver) -> Result<Option<usize>> {
        match self {
            Self::Reconstruct(adjoint) => adjoint.spacing(solver).map(Some),
            Self::Backsolve(adjoint) => adjoint.tableau(solver).map(|_| Some(usize::MAX)),
            Self::Discrete(_) | Self::Unrolled(_) => Ok(None),
        }
    }
}

impl Default for Adjoint {
    fn default() -> Self {
        Self::Discrete(Discrete::default())
    }
}

impl From<Discrete> for Adjoint {
    fn from(adjoint: Discrete) -> Self {
        Self::Discrete(adjoint)
    }
}

impl From<Reconstruct> for Adjoint {
    fn from(adjoint: Reconstruct) -> Self {
        Self::Reconstruct(adjoint)
    }
}

impl From<Backsolve> for Adjoint {
    fn from(adjoint: Backsolve) -> Self {
        Self::Backsolve(adjoint)
    }
}

impl From<Unrolled> for Adjoint {
    fn from(adjoint: Unrolled) -> Self {
        Self::Unrolled(adjoint)
    }
}
