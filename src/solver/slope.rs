//! A slope or a cotangent that is held, with its bytes announced.

use crate::State;
use crate::account::{Category, Owned};
use std::sync::Arc;

/// f at a stage, or a cotangent, whose bytes count as owned for as long as it or a clone lives.
#[derive(Clone, Debug)]
pub struct Slope {
    state: State,
    _owned: Arc<Owned>,
}

impl Slope {
    /// Announces the bytes of `state` under `category`.
    pub fn new(state: State, category: Category) -> Self {
        let bytes = state.held_bytes();
        Self { state, _owned: Arc::new(Owned::new(category, bytes)) }
    }

    /// The value.
    pub fn state(&self) -> &State {
        &self.state
    }
}
