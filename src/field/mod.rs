//! What is integrated: vector fields, their linearisations and tangents.

pub mod draw;
pub mod ops;
mod params;
pub mod sink;

use crate::Time;
use candle_core::Tensor;

/// J·v without second-order differentiation: a function that gives f and its directional derivative by first-order
/// ops, so that a divergence made of it can itself be differentiated with respect to θ.
pub trait Tangent {
    /// (f(t, y), ∂f/∂y · v), each of the shape and dtype of f(t, y).
    ///
    /// # Errors
    /// Whatever the ops report; [`OdeError::NoTangent`](crate::OdeError::NoTangent) from a part that has none.
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)>;

    /// (f(t, y), tr ∂f/∂y) with the trace per sample, shape `(batch,)`, for fields that know it in closed form.
    ///
    /// # Errors
    /// Whatever the ops report.
    fn trace(&self, t: &Time, y: &Tensor) -> candle_core::Result<Option<(Tensor, Tensor)>> {
        let _ = (t, y);
        Ok(None)
    }
}
