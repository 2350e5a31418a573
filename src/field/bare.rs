//! Fields that are layers of this crate alone: steps run them on buffers, without tensors for what they need in
//! between.

use super::session::Session;
use candle_core::{Result, Tensor};
use std::fmt;
use std::sync::Arc;

/// The layers of an open field that consists of them alone: see
/// [`ModelField::of_layers`](super::ModelField::of_layers).
pub struct Bare {
    row: Vec<usize>,
    layers: Box<dyn Rows>,
}

impl Bare {
    pub(super) fn new(row: &[usize], layers: Box<dyn Rows>) -> Self {
        Self { row: row.to_vec(), layers }
    }

    /// The shape of a row of their argument, and of their value.
    pub(super) fn row(&self) -> &[usize] {
        &self.row
    }

    /// Buffers for a step of so many stages, of a state of so many elements.
    pub(crate) fn buffers(&self, stages: usize, elements: usize) -> Box<dyn Buffers + '_> {
        self.layers.buffers(stages, elements)
    }
}

impl fmt::Debug for Bare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layers on rows of {:?}", self.row)
    }
}

/// Where layers are to run, and on what.
pub struct Site<'a> {
    pub(crate) session: &'a Arc<Session>,
    /// A row like those they will be given.
    pub(crate) x: &'a Tensor,
}

/// Layers on rows of a batch, in one compute dtype.
pub(crate) trait Rows {
    fn buffers(&self, stages: usize, elements: usize) -> Box<dyn Buffers + '_>;
}

/// The stages of one step: slopes and cotangents in the compute dtype, sums in F32. The terms of a sum are coefficients
/// of what belongs to a stage, which has been made before.
pub(crate) trait Buffers {
    /// kᵢ = f(t, Yᵢ) at Yᵢ = y + Σ c kⱼ for a stage i at its time t; gives max |Yᵢ| where it is looked for, NaN if any
    /// of it is not finite.
    ///
    /// # Errors
    /// Whatever the layers report.
    fn evaluate(&mut self, stage: (usize, f64), y: &[f32], terms: &[(f64, usize)]) -> Result<Option<f64>>;

    /// The same, keeping what the pullback needs; kᵢ itself only if it is `wanted`, or the pullback needs it.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate).
    fn linearize(&mut self, stage: (usize, f64), y: &[f32], terms: &[(f64, usize)], wanted: bool) -> Result<()>;

    /// y + Σ c kⱼ, and its largest absolute value, NaN if any of it is not finite.
    ///
    /// # Errors
    /// None of their own.
    fn end(&self, y: &[f32], terms: &[(f64, usize)]) -> Result<(Vec<f32>, f64)>;

    /// κ = c λ + Σ c μⱼ, and max |κ|, NaN if any of it is not finite. All stages that matter have been linearised.
    ///
    /// # Errors
    /// None of their own.
    fn gather(&mut self, lambda: (f64, &[f32]), terms: &[(f64, usize)]) -> Result<f64>;

    /// μᵢ = (∂f/∂y)ᵀκ for the κ gathered last, S times which goes through the layers; S (∂f/∂θ)ᵀκ / S to the open sums.
    ///
    /// # Errors
    /// When no sums are open for a parameter.
    fn pull(&mut self, i: usize, scale: f64) -> Result<()>;

    /// Whether all of μᵢ is finite.
    fn is_finite(&self, i: usize) -> bool;

    /// λ + Σ c μⱼ, and its largest absolute value, NaN if any of it is not finite.
    ///
    /// # Errors
    /// None of their own.
    fn back(&self, lambda: &[f32], terms: &[(f64, usize)]) -> Result<(Vec<f32>, f64)>;
}
