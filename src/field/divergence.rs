//! Log-densities of flows: d(log p)/dt = −tr ∂f/∂y along dy/dt = f.
//!
//! The trace is made from [`Tangent`], first-order ops alone, so that it can be differentiated with respect to θ: exact
//! with one tangent per dimension, or Hutchinson's estimate εᵀ(∂f/∂y)ε with one tangent and an ε that is fixed during a
//! solve.

use super::Tangent;
use super::draw::{Kept, Stream};
use crate::error::OdeError;
use crate::{State, Time};
use candle_core::{D, DType, Result, Tensor};

/// How the trace of ∂f/∂y is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trace {
    /// All of it: [`Tangent::trace`] where the field knows it, else one tangent per dimension, d times the cost. Eight
    /// of them are taken at once ([`Tangent::tangents`]).
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
/// is drawn from the seed of the solve. Each row has an ε of its own, the same in whatever tile it lies: over a model
/// that treats rows independently the field may be declared [`row_wise`](crate::ModelField::row_wise).
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
    directions: Kept,
}

impl<M: Tangent> LogDensity<M> {
    /// `model` with its log-density.
    pub fn new(model: M, trace: Trace) -> Self {
        Self { model, trace, stream: Stream::next().by_row(), directions: Kept::default() }
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
        if self.trace == Trace::Exact
            && let Some(known) = self.model.trace(t, z)?
        {
            return Ok(known);
        }
        let v = self.directions(z)?;
        let (mut value, mut trace) = (None, None);
        for first in (0..v.dim(0)?).step_by(Self::AT_ONCE) {
            let v = v.narrow(0, first, Self::AT_ONCE.min(v.dim(0)? - first))?;
            let (f, along) = self.model.tangents(t, z, &v)?;
            value.get_or_insert(f);
            let parts = match self.trace {
                Trace::Exact => diagonal(&along, first)?,
                _ => (along * &v)?,
            };
            let part = row_sum(&parts)?.sum(0)?;
            trace = Some(match trace {
                None => part,
                Some(trace) => (trace + part)?,
            });
        }
        match value.zip(trace) {
            Some((f, trace)) => Ok((f, trace.to_dtype(z.dtype())?)),
            None => candle_core::bail!("a log-density needs at least one dimension, z has shape {:?}", z.dims()),
        }
    }

    /// Directions that are taken together: what a field holds of them at once is that of so many.
    const AT_ONCE: usize = 8;

    /// What to take tangents along, `(k, batch, dim)`: ε, or the unit vectors.
    fn directions(&self, z: &Tensor) -> Result<Tensor> {
        let (shape, dtype, device) = (z.shape(), z.dtype(), z.device());
        self.directions.like(z, || match self.trace {
            Trace::Gaussian => self.stream.normal(shape, dtype, device)?.unsqueeze(0),
            Trace::Rademacher => self.stream.rademacher(shape, dtype, device)?.unsqueeze(0),
            Trace::Exact => {
                let (batch, dim) = z.dims2()?;
                let units: Vec<f32> = (0..dim * dim).map(|n| if n % (dim + 1) == 0 { 1.0 } else { 0.0 }).collect();
                let units = Tensor::from_vec(units, (dim, 1, dim), device)?.to_dtype(dtype)?;
                units.broadcast_as((dim, batch, dim))?.contiguous()
            }
        })
    }
}

/// Of what lies along unit vectors from the one of dimension `first` on, that dimension of each: `(k, batch, 1)`.
fn diagonal(along: &Tensor, first: usize) -> Result<Tensor> {
    let of = |n: usize| along.narrow(0, n, 1)?.narrow(D::Minus1, first + n, 1);
    Tensor::cat(&(0..along.dim(0)?).map(of).collect::<Result<Vec<_>>>()?, 0)
}

/// The sum over the last dimension, in F32 for half dtypes.
fn row_sum(x: &Tensor) -> Result<Tensor> {
    let wide = if matches!(x.dtype(), DType::F16 | DType::BF16) { DType::F32 } else { x.dtype() };
    x.to_dtype(wide)?.sum(D::Minus1)
}
