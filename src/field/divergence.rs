//! Log-densities of flows: d(log p)/dt = −tr ∂f/∂y along dy/dt = f.
//!
//! The trace is made from [`Tangent`], first-order ops alone, so that it can be differentiated with respect to θ: exact
//! with one tangent per dimension, or Hutchinson's estimate εᵀ(∂f/∂y)ε with one tangent and an ε that is fixed during a
//! solve.

use super::Tangent;
use super::draw::Stream;
use crate::error::OdeError;
use crate::{State, Time};
use candle_core::{D, Result, Tensor};
use std::sync::{Mutex, PoisonError};

/// How the trace of ∂f/∂y is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trace {
    /// All of it: [`Tangent::trace`] where the field knows it, else one tangent per dimension, d times the cost.
    #[default]
    Exact,
    /// Hutchinson's estimator with one ε of random signs per solve.
    Rademacher,
    /// Hutchinson's estimator with one standard normal ε per solve.
    Gaussian,
}

/// A velocity field together with the log-density it transports: (z, log p) ↦ (f, −tr ∂f/∂z).
///
/// Shapes: z is `(batch, dim)`, log p is `(batch,)`. Build it inside a [`ModelField`](crate::ModelField), so that its ε
/// is drawn from the seed of the solve.
///
/// # Reference
/// Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, *FFJORD*, arXiv 1810.01367.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarMap;
/// use candle_ode::field::divergence::{LogDensity, Trace};
/// use candle_ode::ops::{Activation, Mlp};
/// use candle_ode::prelude::*;
///
/// let vars = VarMap::new();
/// let field = ModelField::with_state(
///     &vars,
///     &Device::Cpu,
///     |vb| Ok(LogDensity::new(Mlp::new(&[2, 16, 2], Activation::Tanh, vb)?, Trace::Exact)),
///     |flow, t, state| flow.eval(t, state),
/// )?;
/// let z = Tensor::randn(0f32, 1.0, (8, 2), &Device::Cpu)?;
/// let log_p = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
/// let solution = Ode::new(&field).span(1.0, 0.0).steps(8).solve(State::from([z, log_p]))?;
/// assert_eq!(solution.last_state()[1].dims(), [8]);
/// # Ok::<(), OdeError>(())
/// ```
#[derive(Debug)]
pub struct LogDensity<M> {
    model: M,
    trace: Trace,
    stream: Stream,
    epsilon: Mutex<Option<Tensor>>,
}

impl<M: Tangent> LogDensity<M> {
    /// `model` with its log-density.
    pub fn new(model: M, trace: Trace) -> Self {
        Self { model, trace, stream: Stream::next(), epsilon: Mutex::new(None) }
    }

    /// (f(t, z), −tr ∂f/∂z) at a state (z, log p).
    ///
    /// # Errors
    /// A state of another form, or [`OdeError::NoTangent`] from the model.
    pub fn eval(&self, t: &Time, state: &State) -> Result<State> {
        let [z, log_p] = state.tensors() else {
            return Err(OdeError::Unsupported {
                what: format!("a log-density over a state of {} tensors", state.len()),
                instead: "solve from State::from([z, log_p])",
            }
            .into());
        };
        let (f, trace) = self.divergence(t, z)?;
        Ok(State::from([f, trace.reshape(log_p.shape())?.neg()?]))
    }

    /// (f(t, z), tr ∂f/∂z), the trace of shape `(batch,)`.
    ///
    /// # Errors
    /// Whatever the model reports.
    pub fn divergence(&self, t: &Time, z: &Tensor) -> Result<(Tensor, Tensor)> {
        if self.trace != Trace::Exact {
            let epsilon = self.epsilon(z)?;
            let (f, along) = self.model.tangent(t, z, &epsilon)?;
            return Ok((f, row_sum(&(along * epsilon)?)?));
        }
        if let Some(known) = self.model.trace(t, z)? {
            return Ok(known);
        }
        let (batch, dim) = z.dims2()?;
        let mut value = None;
        let mut columns = Vec::with_capacity(dim);
        for n in 0..dim {
            let unit: Vec<f32> = (0..dim).map(|m| if m == n { 1.0 } else { 0.0 }).collect();
            let unit = Tensor::new(unit, z.device())?.to_dtype(z.dtype())?.broadcast_as((batch, dim))?.contiguous()?;
            let (f, along) = self.model.tangent(t, z, &unit)?;
            columns.push(along.narrow(D::Minus1, n, 1)?);
            value.get_or_insert(f);
        }
        match value {
            Some(f) => Ok((f, row_sum(&Tensor::cat(&columns, D::Minus1)?)?)),
            None => candle_core::bail!("a log-density needs at least one dimension, z has shape {:?}", z.dims()),
        }
    }

    fn epsilon(&self, z: &Tensor) -> Result<Tensor> {
        let mut kept = self.epsilon.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.as_ref() {
            Some(epsilon) if epsilon.dims() == z.dims() => Ok(epsilon.clone()),
            _ => {
                let (shape, dtype, device) = (z.shape(), z.dtype(), z.device());
                let drawn = match self.trace {
                    Trace::Gaussian => self.stream.normal(shape, dtype, device)?,
                    _ => self.stream.rademacher(shape, dtype, device)?,
                };
                Ok(kept.insert(drawn).clone())
            }
        }
    }
}

/// The sum over the last dimension, in F32 for half dtypes.
fn row_sum(x: &Tensor) -> Result<Tensor> {
    use candle_core::DType::{BF16, F16, F32};
    match x.dtype() {
        half @ (F16 | BF16) => x.to_dtype(F32)?.sum(D::Minus1)?.to_dtype(half),
        _ => x.sum(D::Minus1),
    }
}
