//! Scaled errors: error/(atol + rtol·max(|y|, |y⁺|)), component by component, and their norm.

use crate::State;
use crate::error::{OdeError, Result, Worst};
use crate::field::ops::combine;
use crate::field::{Finite, on_host};
use candle_core::{DType, Tensor};
use std::fmt;
use std::sync::Arc;

/// A relative or absolute tolerance: the same for all components, or given for each.
///
/// `1e-6.into()`, or from a tensor that broadcasts against y, or from a [`State`] with one such tensor for each of y's.
#[derive(Clone, Debug)]
pub enum Tolerance {
    /// The same for every component.
    Scalar(f64),
    /// One tensor for each tensor of the state, each broadcastable to its shape.
    PerComponent(State),
}

impl From<f64> for Tolerance {
    fn from(tolerance: f64) -> Self {
        Self::Scalar(tolerance)
    }
}

impl From<&Tensor> for Tolerance {
    fn from(tolerance: &Tensor) -> Self {
        Self::PerComponent(tolerance.into())
    }
}

impl From<State> for Tolerance {
    fn from(tolerance: State) -> Self {
        Self::PerComponent(tolerance)
    }
}

/// How the scaled errors of all components become one number.
#[derive(Clone, Default)]
pub enum Norm {
    /// √(mean of squares) over all components of all tensors. A batch is judged as a whole.
    #[default]
    Rms,
    /// The largest magnitude: every component of every sample is within its tolerance.
    Max,
    /// A function of one's own from a state of scaled errors to a 0-d tensor on the same device.
    Custom(Arc<CustomNorm>),
}

/// See [`Norm::Custom`].
pub type CustomNorm = dyn Fn(&State) -> candle_core::Result<Tensor> + Send + Sync;

impl fmt::Debug for Norm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rms => "Rms",
            Self::Max => "Max",
            Self::Custom(_) => "Custom",
        })
    }
}

impl Norm {
    /// A 0-d tensor on the device of `scaled`.
    fn of(&self, scaled: &State) -> candle_core::Result<Tensor> {
        let over = |one: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
            let each = scaled.tensors().iter().map(one).collect::<candle_core::Result<Vec<_>>>()?;
            Tensor::stack(&each, 0)
        };
        match self {
            Self::Rms => (over(&|x| x.sqr()?.sum_all())?.sum_all()? / scaled.numel() as f64)?.sqrt(),
            Self::Max => over(&|x| x.abs()?.flatten_all()?.max(0))?.max(0),
            Self::Custom(norm) => norm(scaled),
        }
    }
}

/// Both tolerances, on the device and in the accumulate dtype.
#[derive(Clone, Debug)]
pub(crate) struct Tolerances {
    relative: Prepared,
    absolute: Prepared,
    norm: Norm,
}

#[derive(Clone, Debug)]
enum Prepared {
    Scalar(f64),
    Tensors(Vec<Tensor>),
}

impl Tolerances {
    /// Checks them against the state they are for.
    pub(crate) fn new(
        relative: &Tolerance,
        absolute: &Tolerance,
        norm: Norm,
        y0: &State,
        accumulate: DType,
    ) -> Result<Self> {
        let relative = prepare("rtol", relative, y0, accumulate)?;
        let absolute = prepare("atol", absolute, y0, accumulate)?;
        if let (Prepared::Scalar(0.0), Prepared::Scalar(0.0)) = (&relative, &absolute) {
            let hint = "one of rtol and atol must be positive";
            return Err(OdeError::Setting { setting: "tolerances", value: "0 and 0".into(), hint });
        }
        Ok(Self { relative, absolute, norm })
    }

    /// The norm of `error` between two states, on the host: one read from the device, which brings `finite` along. NaN
    /// if anything is not finite.
    pub(crate) fn measure(&self, error: &State, before: &State, after: &State, finite: Finite) -> Result<f64> {
        let flags = match finite {
            Finite::Host(false) => return Ok(f64::NAN),
            Finite::Host(true) => vec![],
            Finite::Device(flags) => flags,
        };
        let mut norm = self.norm.of(&self.scaled(error, before, after)?)?;
        if norm.rank() != 0 {
            let value = format!("a norm of shape {:?}", norm.shape());
            let hint = "a norm is a 0-d tensor: end it in sum_all, mean_all or max";
            return Err(OdeError::Setting { setting: "Norm::Custom", value, hint });
        }
        for flag in flags {
            norm = (norm + flag.to_dtype(error[0].dtype())?)?;
        }
        let norm: f64 = on_host(&norm)?.to_vec1::<f64>()?[0];
        Ok(if norm.is_finite() { norm } else { f64::NAN })
    }

    /// Which component is farthest from its tolerance; one that is not finite before all others.
    pub(crate) fn worst(&self, error: &State, before: &State, after: &State) -> Result<Worst> {
        let mut worst = Worst { tensor: 0, index: 0, error: 0.0 };
        for (tensor, scaled) in self.scaled(error, before, after)?.tensors().iter().enumerate() {
            for (index, error) in on_host(scaled)?.to_vec1::<f64>()?.into_iter().map(f64::abs).enumerate() {
                if error > worst.error || error.is_nan() {
                    worst = Worst { tensor, index, error };
                }
                if error.is_nan() {
                    return Ok(worst);
                }
            }
        }
        Ok(worst)
    }

    /// error/(atol + rtol·max(|y|, |y⁺|)).
    fn scaled(&self, error: &State, before: &State, after: &State) -> Result<State> {
        let one = |n: usize| -> candle_core::Result<Tensor> {
            let size = before[n].detach().abs()?.maximum(&after[n].detach().abs()?)?;
            let scale = match &self.relative {
                Prepared::Scalar(rtol) => (size * *rtol)?,
                Prepared::Tensors(rtol) => size.broadcast_mul(&rtol[n])?,
            };
            let scale = match &self.absolute {
                Prepared::Scalar(atol) => (scale + *atol)?,
                Prepared::Tensors(atol) => scale.broadcast_add(&atol[n])?,
            };
            // With no absolute tolerance a component that stays 0 has no error: 0 of 0.
            error[n].detach() / scale.maximum(f64::from(f32::MIN_POSITIVE))?
        };
        Ok(State::from((0..error.len()).map(one).collect::<candle_core::Result<Vec<_>>>()?))
    }
}

fn prepare(setting: &'static str, tolerance: &Tolerance, y0: &State, accumulate: DType) -> Result<Prepared> {
    let wrong = |value: String, hint| Err(OdeError::Setting { setting, value, hint });
    let given = match tolerance {
        Tolerance::Scalar(scalar) if *scalar >= 0.0 && scalar.is_finite() => return Ok(Prepared::Scalar(*scalar)),
        Tolerance::Scalar(scalar) => return wrong(scalar.to_string(), "a tolerance is finite and not negative"),
        Tolerance::PerComponent(given) => given,
    };
    if given.len() != y0.len() {
        let value = format!("{} tensors for a state of {}", given.len(), y0.len());
        return wrong(value, "give one tensor for each tensor of the state, or a number for all");
    }
    let mut tensors = Vec::with_capacity(given.len());
    for (n, (tolerance, y)) in given.tensors().iter().zip(y0.tensors()).enumerate() {
        if !tolerance.device().same_device(y.device()) {
            let what = format!("tensor {n} of {setting}");
            let (expected, found) = (y.device().location(), tolerance.device().location());
            return Err(OdeError::DeviceMismatch { what, expected, found });
        }
        if tolerance.broadcast_as(y.shape()).is_err() {
            let value = format!("shape {:?} for a tensor of shape {:?}", tolerance.shape(), y.shape());
            return wrong(value, "a tolerance must broadcast to the shape of the state");
        }
        if let Some(bad) = on_host(tolerance)?.to_vec1::<f64>()?.iter().find(|x| !(**x >= 0.0 && x.is_finite())) {
            return wrong(bad.to_string(), "a tolerance is finite and not negative");
        }
        tensors.push(combine::combine(Some(&tolerance.detach()), &[], accumulate)?);
    }
    Ok(Prepared::Tensors(tensors))
}
