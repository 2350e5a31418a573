//! States as they are, rounded to a float dtype: numel · size of the dtype bytes an entry.

use super::{Codec, Entry};
use crate::State;
use crate::error::Result;
use crate::field::Finite;
use crate::field::ops::combine;
use candle_core::{DType, Shape, Tensor};

/// States rounded to F32, F16 or BF16 (or F64).
///
/// A state that is in that dtype already is kept without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States(pub DType);

impl Codec for States {
    fn name(&self) -> &'static str {
        self.0.as_str()
    }

    fn encode(&self, state: &State) -> Result<(Entry, Finite)> {
        let mut finite = Finite::default();
        let mut tensors = Vec::with_capacity(state.len());
        for y in state.tensors() {
            if y.dtype() == self.0 {
                tensors.push(y.detach());
                continue;
            }
            let (kept, all) = combine::rounded(y, self.0)?;
            finite = finite.and(all);
            tensors.push(kept);
        }
        Ok((Entry::new(tensors, state), finite))
    }

    fn decode(&self, entry: &Entry, dtype: DType) -> Result<State> {
        let wide = |x: &Tensor| match x.dtype() == dtype {
            true => Ok(x.clone()),
            false => combine::combine(Some(x), &[], dtype),
        };
        Ok(State::from(entry.tensors.iter().map(wide).collect::<candle_core::Result<Vec<_>>>()?))
    }

    fn bytes(&self, shapes: &[Shape]) -> usize {
        shapes.iter().map(Shape::elem_count).sum::<usize>() * self.0.size_in_bytes()
    }

    fn dtype(&self) -> DType {
        self.0
    }
}
