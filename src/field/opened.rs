//! A field opened for one pass, in the dtypes its steps need.

use super::{Casts, Field, Opening, VectorField};
use crate::error::Result;
use crate::stats::{Counters, add, count};
use candle_core::{DType, Tensor};
use std::sync::{Mutex, PoisonError};

/// The casts of a solve, and wider ones made only if something overflows.
pub(crate) struct Fallback {
    pub(crate) casts: Casts,
    pub(crate) inputs: Vec<Tensor>,
    wide: Mutex<Option<Casts>>,
}

impl Fallback {
    pub(crate) fn new(casts: Casts, inputs: Vec<Tensor>) -> Self {
        Self { casts, inputs, wide: Mutex::new(None) }
    }

    /// The casts in `dtype`.
    fn of(&self, dtype: DType, field: &dyn Field, counters: &Counters) -> Result<Casts> {
        if dtype == self.casts.dtype() {
            return Ok(self.casts.clone());
        }
        let mut wide = self.wide.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(wide) = wide.as_ref() {
            return Ok(wide.clone());
        }
        let made = field.params().cast(&self.inputs, dtype, self.casts.device())?;
        add(&counters.casts, made.count());
        Ok(wide.insert(made).clone())
    }
}

/// The field opened for one pass, per dtype of its steps, on the thread of the pass.
pub(crate) struct Opened<'a> {
    source: &'a Fallback,
    field: &'a dyn Field,
    opening: Opening,
    seed: u64,
    counters: &'a Counters,
    open: Vec<(DType, Box<dyn VectorField>)>,
}

impl<'a> Opened<'a> {
    pub(crate) fn new(
        source: &'a Fallback,
        field: &'a dyn Field,
        opening: Opening,
        seed: u64,
        counters: &'a Counters,
    ) -> Self {
        Self { source, field, opening, seed, counters, open: vec![] }
    }

    /// The field in `dtype`, opened when first asked for.
    pub(crate) fn get(&mut self, dtype: DType) -> Result<&dyn VectorField> {
        let at = match self.open.iter().position(|(open, _)| *open == dtype) {
            Some(at) => at,
            None => {
                let casts = self.source.of(dtype, self.field, self.counters)?;
                count(&self.counters.builds);
                self.open.push((dtype, self.field.open(&casts, self.opening, self.seed)?));
                self.open.len() - 1
            }
        };
        Ok(self.open[at].1.as_ref())
    }
}
