//! A vector field without parameters: a closure.

use super::{Casts, Field, ModelField, Opening, Params, VectorField};
use crate::error::Result;
use crate::{State, Time};
use candle_core::Tensor;

/// A closure (t, y) ↦ dy/dt as a vector field.
///
/// Tensors that need gradients are not captured but declared: see [`with_inputs`](Self::with_inputs).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_ode::prelude::*;
///
/// let decay = FnField::new(|_: &Time, y: &Tensor| y.neg());
/// let y0 = Tensor::new(&[1f64], &Device::Cpu)?;
/// let y1 = odeint(&decay, &y0, &[0.0, 0.5, 1.0], Rk4)?;
/// assert!((y1.last().to_vec1::<f64>()?[0] - (-1f64).exp()).abs() < 1e-3);
/// # Ok::<(), OdeError>(())
/// ```
#[derive(Clone)]
pub struct FnField(ModelField);

impl FnField {
    /// Over a state of one tensor.
    pub fn new(f: impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static) -> Self {
        Self::with_inputs(move |t, y, _| f(t, y.single()?).map(State::from))
    }

    /// Over a state of several tensors.
    pub fn with_state(f: impl Fn(&Time, &State) -> candle_core::Result<State> + Send + Sync + 'static) -> Self {
        Self::with_inputs(move |t, y, _| f(t, y))
    }

    /// Over a state of several tensors, with the inputs of the solve ([`Ode::inputs`](crate::Ode::inputs)) in the
    /// compute dtype.
    pub fn with_inputs(
        f: impl Fn(&Time, &State, &[Tensor]) -> candle_core::Result<State> + Send + Sync + 'static,
    ) -> Self {
        Self(ModelField::without_parameters(move |(): &(), t, y, inputs| f(t, y, inputs)))
    }

    /// The same field, which stops gradients on purpose: see
    /// [`ModelField::stops_gradients`](crate::ModelField::stops_gradients).
    pub fn stops_gradients(self) -> Self {
        Self(self.0.stops_gradients())
    }

    /// The same field, whose rows do not see each other: see [`ModelField::row_wise`](crate::ModelField::row_wise).
    pub fn row_wise(self) -> Self {
        Self(self.0.row_wise())
    }
}

impl Field for FnField {
    fn params(&self) -> &Params {
        Field::params(&self.0)
    }

    fn open(&self, casts: &Casts, opening: Opening, seed: u64) -> Result<Box<dyn VectorField>> {
        self.0.open(casts, opening, seed)
    }

    fn is_row_wise(&self) -> bool {
        self.0.is_row_wise()
    }

    fn needs_row_check(&self) -> bool {
        self.0.needs_row_check()
    }

    fn rows_checked(&self) {
        self.0.rows_checked();
    }
}
