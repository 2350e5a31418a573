//! λ = dL/dy at the time that a walk backwards has reached.

use crate::State;
use crate::account::{Category, Owned};
use crate::error::Result;
use crate::field::sum;
use candle_core::DType;

/// λ, with its bytes announced.
#[derive(Default)]
pub(super) struct Lambda {
    state: Option<State>,
    owned: Option<Owned>,
}

impl Lambda {
    /// λ, given away; its bytes stay announced until another takes its place.
    pub(super) fn take(&mut self) -> Option<State> {
        self.state.take()
    }

    /// The same, its bytes to be announced by whoever it is given to.
    pub(super) fn give(&mut self) -> Option<State> {
        self.owned = None;
        self.take()
    }

    /// Adds the cotangent of an output to it.
    pub(super) fn add(&mut self, cotangent: &State, accumulate: DType) -> Result<()> {
        let sum = match &self.state {
            None => sum(Some(cotangent), &[], accumulate)?,
            Some(lambda) => sum(Some(lambda), &[(1.0, cotangent)], accumulate)?,
        };
        self.set(sum);
        Ok(())
    }

    pub(super) fn set(&mut self, state: State) {
        self.owned = Some(Owned::new(Category::Cotangents, state.held_bytes()));
        self.state = Some(state);
    }
}
