//! The last step of every weight gradient.

use crate::field::sink;
use candle_core::{Result, Tensor};

/// Gives a weight's gradient, summed in F32 or F64, to the open sums of dL/dθ, or to Candle in the weight's dtype.
pub(super) fn give(weight: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
    if sink::add(weight, gradient)? { Ok(None) } else { gradient.to_dtype(weight.dtype()).map(Some) }
}
