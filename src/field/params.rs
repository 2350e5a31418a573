//! Stub of the sums of dL/dθ.

use candle_core::{Tensor, TensorId};
use std::collections::HashMap;

/// Sums of dL/dθ, keyed by leaf.
#[derive(Default)]
pub struct Gradients(pub(crate) HashMap<TensorId, Option<Tensor>>);

impl Gradients {
    #[cfg(test)]
    pub(crate) fn of(leaves: &[&Tensor]) -> Self {
        Self(leaves.iter().map(|leaf| (leaf.id(), None)).collect())
    }

    pub(crate) fn add_leaf(&mut self, leaf: &Tensor, contribution: &Tensor) -> candle_core::Result<bool> {
        let Some(sum) = self.0.get_mut(&leaf.id()) else { return Ok(false) };
        *sum = Some(match sum.take() {
            None => contribution.clone(),
            Some(sum) => (sum + contribution)?,
        });
        Ok(true)
    }
}
