//! In which dtype what is done.

use crate::error::{OdeError, Result};
use candle_core::{DType, Device};

/// The three dtypes of a solve.
///
/// | dtype | what runs or is kept in it |
/// |---|---|
/// | compute | the vector field and its pullbacks |
/// | storage | the trajectory kept for the backward pass |
/// | accumulate | y, λ and dL/dθ are summed in it, and handed out |
///
/// With compute and storage in F16 and sums in F32 the error of y(T) and of the gradients is O(u_F16) + O(u_F32/h):
/// it does not grow under refinement (Celledoni, Owren, Ruthotto, Yang, arXiv 2510.23498).
///
/// ```
/// use candle_core::DType;
/// use candle_ode::Precision;
///
/// let mixed = Precision::F16;                                   // F16, F16, F32
/// let thrifty = Precision::new().storage(DType::F16);           // F32, F16, F32
/// assert_eq!(mixed.accumulate_dtype(), thrifty.accumulate_dtype());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Precision {
    compute: DType,
    storage: DType,
    accumulate: DType,
}

impl Precision {
    /// Everything in F32.
    pub const F32: Self = Self { compute: DType::F32, storage: DType::F32, accumulate: DType::F32 };
    /// Field and trajectory in F16, sums in F32.
    pub const F16: Self = Self { compute: DType::F16, storage: DType::F16, accumulate: DType::F32 };
    /// Field and trajectory in BF16, sums in F32.
    pub const BF16: Self = Self { compute: DType::BF16, storage: DType::BF16, accumulate: DType::F32 };
    /// Everything in F64.
    pub const F64: Self = Self { compute: DType::F64, storage: DType::F64, accumulate: DType::F64 };

    /// F32 throughout, to be changed field by field.
    pub const fn new() -> Self {
        Self::F32
    }

    /// Sets the dtype of the vector field.
    pub const fn compute(mut self, dtype: DType) -> Self {
        self.compute = dtype;
        self
    }

    /// Sets the dtype of the trajectory.
    pub const fn storage(mut self, dtype: DType) -> Self {
        self.storage = dtype;
        self
    }

    /// Sets the dtype of the sums: F32 or F64.
    pub const fn accumulate(mut self, dtype: DType) -> Self {
        self.accumulate = dtype;
        self
    }

    /// The dtype of the vector field.
    pub const fn compute_dtype(&self) -> DType {
        self.compute
    }

    /// The dtype of the trajectory.
    pub const fn storage_dtype(&self) -> DType {
        self.storage
    }

    /// The dtype of the sums.
    pub const fn accumulate_dtype(&self) -> DType {
        self.accumulate
    }

    pub(crate) fn check(&self, device: &Device) -> Result<()> {
        let floats = [DType::F16, DType::BF16, DType::F32, DType::F64];
        let wrong = |what: &str, dtype, hint| Err(OdeError::UnsupportedDType { what: what.into(), dtype, hint });
        if !floats.contains(&self.compute) {
            return wrong("the compute dtype", self.compute, "take F16, BF16, F32 or F64");
        }
        if !floats.contains(&self.storage) {
            return wrong("the storage dtype", self.storage, "take F16, BF16, F32 or F64");
        }
        if !matches!(self.accumulate, DType::F32 | DType::F64) {
            return wrong("the accumulate dtype", self.accumulate, "sums need F32 or F64");
        }
        if device.is_metal() && [self.compute, self.storage, self.accumulate].contains(&DType::F64) {
            return wrong("the precision", DType::F64, "Metal has no F64: take F32");
        }
        if self.accumulate.size_in_bytes() < self.compute.size_in_bytes() {
            return wrong("the accumulate dtype", self.accumulate, "it cannot be narrower than the compute dtype");
        }
        Ok(())
    }
}

impl Default for Precision {
    fn default() -> Self {
        Self::F32
    }
}

/// The unit roundoff u of a float dtype: half the distance from 1 to the next number.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-53),
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 0.5,
    }
}

/// The largest finite number of a float dtype.
pub fn largest_finite(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f64(),
        DType::BF16 => half::bf16::MAX.to_f64(),
        DType::F32 => f64::from(f32::MAX),
        _ => f64::MAX,
    }
}
