//! What is integrated: vector fields, their linearisations and tangents.

mod bare;
mod connected;
pub(crate) use connected::beside;
pub mod divergence;
pub mod draw;
mod function;
mod gradients;
mod linearized;
mod model;
mod opened;
pub mod ops;
mod params;
pub(crate) mod session;
pub(crate) use params::{first_non_finite, on_host};
pub mod sink;
mod sum;
mod vjp;

#[doc(hidden)]
pub use bare::Bare;
pub use function::FnField;
pub use gradients::Gradients;
pub use model::ModelField;
pub(crate) use opened::{Fallback, Opened};
pub(crate) use ops::with_elements;
pub use params::{Casts, Params};
pub(crate) use sum::{all_finite, largest, sum};

use crate::error::Result;
use crate::scaling::Scale;
use crate::{State, Time};
use candle_core::Tensor;
pub use ops::combine::Finite;

/// J·v without second-order differentiation: a function that gives f and its directional derivative by first-order
/// ops, so that a divergence made of it can itself be differentiated with respect to θ.
pub trait Tangent {
    /// (f(t, y), ∂f/∂y · v), each of the shape and dtype of f(t, y).
    ///
    /// # Errors
    /// Whatever the ops report; [`OdeError::NoTangent`](crate::OdeError::NoTangent) from a part that has none.
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)>;

    /// (f(t, y), ∂f/∂y · vₙ for k directions at once): v is `(k, …)`, each vₙ of the shape and dtype of y, and the
    /// second of what comes out `(k, …)` too, each of the shape and dtype of f(t, y).
    ///
    /// By default that is one direction after another, k times [`tangent`](Self::tangent). A field that shares work
    /// between them does it here: [`Mlp`](crate::ops::Mlp) and [`Sequential`](crate::ops::Sequential) evaluate f once,
    /// and all directions go through each layer together.
    ///
    /// # Errors
    /// As [`tangent`](Self::tangent), and a v of no direction.
    fn tangents(&self, t: &Time, y: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        one_by_one(v, |v| self.tangent(t, y, v))
    }

    /// (f(t, y), tr ∂f/∂y) with the trace per sample, shape `(batch,)`, for fields that know it in closed form.
    ///
    /// # Errors
    /// Whatever the ops report.
    fn trace(&self, t: &Time, y: &Tensor) -> candle_core::Result<Option<(Tensor, Tensor)>> {
        let _ = (t, y);
        Ok(None)
    }
}

/// f and the tangents along every `v[n]`, one after another.
pub(crate) fn one_by_one(
    v: &Tensor,
    tangent: impl Fn(&Tensor) -> candle_core::Result<(Tensor, Tensor)>,
) -> candle_core::Result<(Tensor, Tensor)> {
    let (values, along): (Vec<_>, Vec<_>) =
        (0..v.dim(0)?).map(|n| tangent(&v.get(n)?)).collect::<candle_core::Result<Vec<_>>>()?.into_iter().unzip();
    match values.into_iter().next() {
        Some(value) => Ok((value, Tensor::stack(&along, 0)?)),
        None => candle_core::bail!("tangents along no direction: v has shape {:?}", v.shape()),
    }
}

/// A vector field f(t, y; θ), ready to be evaluated on one thread for one pass.
///
/// Every tensor of a state comes in the compute dtype, and dy/dt goes out in it, with the shapes of y.
pub trait VectorField {
    /// f(t, y).
    ///
    /// # Errors
    /// Whatever the field reports.
    fn eval(&self, t: &Time, y: &State) -> candle_core::Result<State>;

    /// f(t, y) with what its pullback needs.
    ///
    /// # Errors
    /// Whatever the field reports.
    fn linearize(&self, t: &Time, y: &State) -> candle_core::Result<Box<dyn Linearization>>;

    /// The layers that it consists of, if it is layers of this crate alone that steps from states like `y` can run on
    /// buffers: see [`ModelField::of_layers`]. Their values and gradients are those of [`eval`](Self::eval) and
    /// [`linearize`](Self::linearize), to the bit.
    ///
    /// Whoever wraps a field hands this on only with the same `eval` and `linearize`: steps call neither.
    #[doc(hidden)]
    fn bare(&self, y: &State) -> Option<&Bare> {
        let _ = y;
        None
    }

    /// One tensor per parameter and input: what stands for them in this pass.
    fn leaves(&self) -> &[Tensor] {
        &[]
    }
}

/// f's value at a point, with what its pullback needs. It may outlive the field it came from.
pub trait Linearization: Send + Sync {
    /// f(t, y), detached.
    fn value(&self) -> &State;

    /// Pulls `cotangent` (accumulate dtype) back: multiplies it by S, goes through f in the compute dtype, divides by
    /// S in the accumulate dtype, and adds dL/dθ to `gradients`. May be called again with another scale.
    ///
    /// # Errors
    /// Whatever the pullback reports.
    fn pull(&self, cotangent: &State, scale: &Scale, gradients: &mut Gradients) -> candle_core::Result<Pulled>;
}

/// What a pullback gives.
#[derive(Debug)]
pub struct Pulled {
    /// Cotangent of y, in the accumulate dtype.
    pub y: State,
    /// Cotangent of t (0-d, accumulate dtype), if the linearisation was made at a tracked time.
    pub t: Option<Tensor>,
    /// Whether all of it is finite, the contributions to dL/dθ included.
    pub finite: Finite,
}

/// What a pass wants of a field when it opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// Evaluations only, nothing tracked.
    Evaluate,
    /// Evaluations only, over copies of the parameters that the field may write to: the caller looks whether it did.
    Probe,
    /// Linearisations: the leaves are variables.
    Linearize,
    /// Evaluations in Candle's own graph, tracked to the masters.
    Track,
}

/// Where vector fields come from: parameters, and a way to open a [`VectorField`] over their casts on any thread.
///
/// A field is a cheap clone; models need be neither `Send` nor `Sync`, since each pass builds its own.
pub trait Field: Send + Sync + 'static {
    /// Its parameters.
    fn params(&self) -> &Params;

    /// Builds it over `casts`. Random layers draw from `seed`.
    ///
    /// # Errors
    /// Whatever building the model reports.
    fn open(&self, casts: &Casts, opening: Opening, seed: u64) -> Result<Box<dyn VectorField>>;

    /// Whether it has yet to be probed for writes to its own parameters.
    fn needs_probe(&self) -> bool {
        false
    }

    /// Told when a probe has found none: it need not be probed again.
    fn probed(&self) {}

    /// Whether it says that f is layers of this crate and nothing else: see [`VectorField::bare`].
    #[doc(hidden)]
    fn is_layers(&self) -> bool {
        false
    }

    /// Whether it says that f treats the rows of a batch (dimension 0 of every tensor of the state) independently, so
    /// that a solve may take them in tiles.
    fn is_row_wise(&self) -> bool {
        false
    }

    /// Whether that has yet to be checked.
    fn needs_row_check(&self) -> bool {
        false
    }

    /// Told when it has been seen to be so.
    fn rows_checked(&self) {}
}
