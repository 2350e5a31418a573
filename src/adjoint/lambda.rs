//! λ = dL/dy at the time that a walk backwards has reached.

use crate::State;
use crate::account::{Category, Owned};
use crate::error::Result;
use crate::field::ops::combine;
use candle_core::DType;

/// λ, with its bytes announced.
#[derive(Default)]
pub(super) struct Lambda {
    state: Option<State>,
    owned: Option<Owned>,
}

impl Lambda {
    /// λ, given away: it is not ours while a step pulls it back.
    pub(super) fn take(&mut self) -> Option<State> {
        self.state.take()
    }

    /// Adds the cotangent of an output to it.
    pub(super) fn add(&mut self, cotangent: &State, accumulate: DType) -> Result<()> {
        let sum = match &self.state {
            None => cotangent.try_map(|x| combine::combine(Some(x), &[], accumulate))?,
            Some(lambda) => {
                let pairs = lambda.tensors().iter().zip(cotangent.tensors());
                let sums = pairs.map(|(lambda, x)| combine::combine(Some(lambda), &[(1.0, x)], accumulate));
                State::from(sums.collect::<candle_core::Result<Vec<_>>>()?)
            }
        };
        self.set(sum);
        Ok(())
    }

    pub(super) fn set(&mut self, state: State) {
        let bytes = state.tensors().iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
        self.owned = Some(Owned::new(Category::Cotangents, bytes));
        self.state = Some(state);
    }
}
