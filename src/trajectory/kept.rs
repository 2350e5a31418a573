//! One kept state or increment, wherever it lies.

use super::codec::{Codec, Entry};
use super::second_level::{Away, TwoLevels};
use crate::State;
use crate::account::Owned;
use crate::error::{OdeError, Result};
use candle_core::DType;
use std::borrow::Cow;
use std::sync::Arc;

/// One kept state.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(super) at: usize,
    /// Whether the entry is y_{at+1} − y_at.
    pub(super) is_increment: bool,
    lies: Lies,
    codec: Arc<dyn Codec>,
}

#[derive(Debug)]
enum Lies {
    OnDevice(Entry, Owned),
    Away(Away),
}

impl Kept {
    /// What an entry takes in a list of entries, beside itself.
    pub(crate) const BESIDE: usize = size_of::<Self>() + 3 * size_of::<usize>();

    pub(super) fn new(at: usize, is_increment: bool, codec: Arc<dyn Codec>, entry: Entry) -> Self {
        let owned = Owned::entry(codec.name(), entry.bytes());
        Self { at, is_increment, lies: Lies::OnDevice(entry, owned), codec }
    }

    /// The same on the second level; `None` if it is there, or has nowhere to go.
    pub(super) fn put_away(&self, levels: &TwoLevels) -> Result<Option<Self>> {
        let Lies::OnDevice(entry, _) = &self.lies else { return Ok(None) };
        if !entry.tensors.first().is_some_and(|x| levels.moves(x.device())) {
            return Ok(None);
        }
        let lies = Lies::Away(levels.put(entry)?);
        Ok(Some(Self { at: self.at, is_increment: self.is_increment, lies, codec: self.codec.clone() }))
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> usize {
        match &self.lies {
            Lies::OnDevice(_, owned) => owned.bytes(),
            Lies::Away(_) => 0,
        }
    }

    /// Bytes on the second level.
    pub(super) fn bytes_away(&self) -> usize {
        match &self.lies {
            Lies::OnDevice(..) => 0,
            Lies::Away(away) => away.bytes,
        }
    }

    pub(crate) fn decode(&self, dtype: DType) -> Result<State> {
        let entry = match &self.lies {
            Lies::OnDevice(entry, _) => Cow::Borrowed(entry),
            Lies::Away(away) => Cow::Owned(away.fetch()?),
        };
        let _span = tracing::trace_span!(target: "candle_ode", "decode").entered();
        let state = self.codec.decode(&entry, dtype)?;
        if state.len() != entry.shapes.len() {
            let (found, expected) = (state.len(), entry.shapes.len());
            return Err(OdeError::Unsupported {
                what: format!("a codec that decodes {found} tensors where it was given {expected}"),
                instead: "Codec::decode gives back the tensors that were encoded",
            });
        }
        Ok(state)
    }
}

/// A state that is at hand: as it is, or to be decoded when it is needed, and every time it is.
pub(crate) enum AtHand {
    /// As it is.
    State(State),
    /// To be decoded to this dtype.
    Kept(Arc<Kept>, DType),
}

impl AtHand {
    /// The state.
    pub(crate) fn state(&self) -> Result<State> {
        match self {
            Self::State(state) => Ok(state.clone()),
            Self::Kept(kept, dtype) => kept.decode(*dtype),
        }
    }
}
