//! What can be said about y0 before anything runs.

use crate::State;
use crate::error::{OdeError, Result};
use crate::precision::Precision;
use candle_core::DType;

/// F64 for a state in F64, else F32.
pub(super) fn default_precision(y0: &State) -> Precision {
    if y0.tensors().iter().any(|x| x.dtype() == DType::F64) { Precision::F64 } else { Precision::F32 }
}

/// What can be said about y0 before anything runs.
pub(super) fn check_start(y0: &State) -> Result<()> {
    if y0.is_empty() {
        let hint = "a state needs at least one tensor";
        return Err(OdeError::Setting { setting: "y0", value: "no tensors".into(), hint });
    }
    for (tensor, x) in y0.tensors().iter().enumerate() {
        if !x.dtype().is_float() || !matches!(x.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            let what = format!("tensor {tensor} of y0");
            let hint = "a state is F16, BF16, F32 or F64; convert it with .to_dtype(..)";
            return Err(OdeError::UnsupportedDType { what, dtype: x.dtype(), hint });
        }
        if x.elem_count() == 0 {
            return Err(OdeError::EmptyState { tensor, shape: x.shape().clone() });
        }
        if !x.device().same_device(y0.device()) {
            let what = format!("tensor {tensor} of y0");
            let (expected, found) = (y0.device().location(), x.device().location());
            return Err(OdeError::DeviceMismatch { what, expected, found });
        }
    }
    let flags = y0.tensors().iter().map(crate::field::ops::combine::finite).collect::<candle_core::Result<Vec<_>>>()?;
    let read = crate::field::Finite::read(&flags)?;
    match read.iter().position(|finite| !finite) {
        None => Ok(()),
        Some(tensor) => {
            let (index, value) = crate::field::first_non_finite(&y0[tensor])?;
            Err(OdeError::NonFiniteState { tensor, index, value })
        }
    }
}
