//! The kept entries of one solve: y₁ … y_{N−1}. y₀ is the layer's input and costs nothing; y_N is its output.

use super::codec::{Codec, Entry, States};
use crate::State;
use crate::account::{Category, Owned};
use crate::error::{OdeError, Result};
use crate::field::Finite;
use candle_core::DType;
use std::sync::Arc;

/// A trajectory that keeps every state.
#[derive(Debug)]
pub(crate) struct Trajectory {
    codec: Arc<dyn Codec>,
    start: State,
    kept: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    entry: Entry,
    codec: Option<Arc<dyn Codec>>,
    owned: Owned,
}

impl Trajectory {
    /// An empty one that starts at `start` (accumulate dtype).
    pub(crate) fn new(codec: Arc<dyn Codec>, start: State) -> Self {
        Self { codec, start: start.detach(), kept: vec![] }
    }

    /// Keeps the next state, and says whether its encoding is finite.
    pub(crate) fn push(&mut self, state: &State) -> Result<Finite> {
        let (entry, finite) = self.codec.encode(state)?;
        self.keep(entry, None);
        Ok(finite)
    }

    /// Keeps the last pushed state again, in `dtype`: it did not fit the codec.
    pub(crate) fn push_instead(&mut self, state: &State, dtype: DType) -> Result<()> {
        self.kept.pop();
        let codec = Arc::new(States(dtype));
        let (entry, _) = codec.encode(state)?;
        self.keep(entry, Some(codec));
        Ok(())
    }

    /// y_n, in `accumulate`.
    pub(crate) fn state(&self, n: usize, accumulate: DType) -> Result<State> {
        let Some(before) = n.checked_sub(1) else { return Ok(self.start.clone()) };
        let Some(kept) = self.kept.get(before) else {
            return Err(OdeError::Unsupported {
                what: format!("state {n} of a trajectory that keeps {}", self.kept.len()),
                instead: "this is a bug of candle-ode, please report it",
            });
        };
        kept.codec.as_ref().unwrap_or(&self.codec).decode(&kept.entry, accumulate)
    }

    /// Bytes of all kept entries.
    pub(crate) fn bytes(&self) -> usize {
        self.kept.iter().map(|kept| kept.owned.bytes()).sum()
    }

    /// The dtype entries are kept in.
    pub(crate) fn dtype(&self) -> DType {
        self.codec.dtype()
    }

    fn keep(&mut self, entry: Entry, codec: Option<Arc<dyn Codec>>) {
        let owned = Owned::new(Category::Trajectory, entry.bytes());
        self.kept.push(Kept { entry, codec, owned });
    }
}
