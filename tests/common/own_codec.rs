//! Codecs of increments that leave it to the trait where an increment leads.
#![allow(dead_code, missing_docs, reason = "not every file needs all of it")]

use candle_core::{DType, Shape};
use candle_ode::field::ops::combine::{self, Finite};
use candle_ode::prelude::*;
use candle_ode::{Codec, Encodes, Entry, Result};

/// Increments in a dtype, which has no codes for what does not fit it: such an entry is without tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own(pub(crate) DType);

impl Codec for Own {
    fn encodes(&self) -> Encodes {
        Encodes::Increments
    }

    fn encode(&self, values: &State) -> Result<(Entry, Finite)> {
        let kept = values.try_map(|x| x.to_dtype(self.0))?;
        let finite = combine::all_finite(kept.tensors())?;
        let tensors = if finite.known_bad() { vec![] } else { kept.into_tensors() };
        Ok((Entry::new(tensors, values), finite))
    }

    fn decode(&self, entry: &Entry, dtype: DType) -> Result<State> {
        Ok(State::from(entry.tensors.clone()).try_map(|x| x.to_dtype(dtype))?)
    }

    fn bytes(&self, shapes: &[Shape]) -> usize {
        shapes.iter().map(|shape| self.0.size_in_bytes() * shape.elem_count()).sum()
    }

    fn dtype(&self) -> DType {
        self.0
    }
}
