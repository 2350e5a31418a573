//! How one kept state is encoded.

use crate::State;
use crate::error::Result;
use crate::field::Finite;
use crate::field::ops::combine;
use candle_core::DType;
use std::fmt::Debug;

/// One kept state, encoded.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The encoded tensors.
    pub tensors: Vec<candle_core::Tensor>,
}

impl Entry {
    /// Bytes it occupies.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }
}

/// Encodes kept states. Rounding to fewer bits happens here and nowhere else.
pub trait Codec: Debug + Send + Sync + 'static {
    /// Encodes a state (accumulate dtype), and says whether all of it came out finite.
    ///
    /// # Errors
    /// When the device fails.
    fn encode(&self, state: &State) -> Result<(Entry, Finite)>;

    /// The state again, in `accumulate`.
    ///
    /// # Errors
    /// When the device fails.
    fn decode(&self, entry: &Entry, accumulate: DType) -> Result<State>;

    /// Bytes of one entry for a state of `numel` elements.
    fn bytes(&self, numel: usize) -> usize;

    /// The dtype an entry is kept in.
    fn dtype(&self) -> DType;
}

/// States as they are, rounded to F32, F16 or BF16 (or F64).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(pub DType);

impl Codec for States {
    fn encode(&self, state: &State) -> Result<(Entry, Finite)> {
        let _span = tracing::trace_span!(target: "candle_ode", "encode").entered();
        let mut finite = Finite::default();
        let mut tensors = Vec::with_capacity(state.len());
        for y in state.tensors() {
            if y.dtype() == self.0 {
                tensors.push(y.detach());
                continue;
            }
            let kept = combine::combine(Some(&y.detach()), &[], self.0)?;
            finite = finite.and(combine::finite(&kept)?);
            tensors.push(kept);
        }
        Ok((Entry { tensors }, finite))
    }

    fn decode(&self, entry: &Entry, accumulate: DType) -> Result<State> {
        let _span = tracing::trace_span!(target: "candle_ode", "decode").entered();
        let wide = |x: &candle_core::Tensor| match x.dtype() == accumulate {
            true => Ok(x.clone()),
            false => combine::combine(Some(x), &[], accumulate),
        };
        Ok(State::from(entry.tensors.iter().map(wide).collect::<candle_core::Result<Vec<_>>>()?))
    }

    fn bytes(&self, numel: usize) -> usize {
        numel * self.0.size_in_bytes()
    }

    fn dtype(&self) -> DType {
        self.0
    }
}
