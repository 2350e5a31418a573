//! One kept state or increment, wherever it lies.

use super::codec::{Codec, Entry, decoded};
use super::image::{Form, Image};
use super::second_level::{Away, TwoLevels};
use crate::State;
use crate::account::Owned;
use crate::error::Result;
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
    OnHost(Image, Owned),
    Away(Away),
}

impl Kept {
    /// What an entry takes in a list of entries, beside itself.
    pub(crate) const BESIDE: usize = size_of::<Self>() + 3 * size_of::<usize>();

    pub(super) fn new(at: usize, is_increment: bool, codec: Arc<dyn Codec>, entry: Entry) -> Self {
        let owned = Owned::entry(codec.name(), entry.bytes());
        Self { at, is_increment, lies: Lies::OnDevice(entry, owned), codec }
    }

    /// The same without tensors around its bytes, where an [`Image`] can be made of them; `form` is that of entries
    /// before.
    pub(super) fn without_tensors(self, form: &mut Option<Arc<Form>>) -> Result<Self> {
        let lies = match self.lies {
            Lies::OnDevice(entry, owned) => match Image::of(&entry, form)? {
                Some(image) => Lies::OnHost(image, owned),
                None => Lies::OnDevice(entry, owned),
            },
            lies => lies,
        };
        Ok(Self { lies, ..self })
    }

    /// The same on the second level; `None` if it is there, or has nowhere to go. Where it is on its way, `self` is
    /// held until [`InFlight`] lets it go.
    pub(super) fn put_away(self: &Arc<Self>, levels: &TwoLevels) -> Result<Option<Arc<Self>>> {
        let Lies::OnDevice(entry, _) = &self.lies else { return Ok(None) };
        if !entry.tensors.first().is_some_and(|x| levels.moves(x.device())) {
            return Ok(None);
        }
        let lies = Lies::Away(levels.put(entry, self.clone())?);
        let away = Self { at: self.at, is_increment: self.is_increment, lies, codec: self.codec.clone() };
        Ok(Some(Arc::new(away)))
    }

    pub(super) fn is_away(&self) -> bool {
        matches!(self.lies, Lies::Away(_))
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> usize {
        match &self.lies {
            Lies::OnDevice(_, owned) | Lies::OnHost(_, owned) => owned.bytes(),
            Lies::Away(_) => 0,
        }
    }

    /// Bytes on the second level.
    pub(super) fn bytes_away(&self) -> usize {
        match &self.lies {
            Lies::OnDevice(..) | Lies::OnHost(..) => 0,
            Lies::Away(away) => away.bytes,
        }
    }

    pub(super) fn decode(&self, dtype: DType) -> Result<State> {
        let entry = match &self.lies {
            Lies::OnDevice(entry, _) => Cow::Borrowed(entry),
            Lies::OnHost(image, _) => Cow::Owned(image.entry()?),
            Lies::Away(away) => Cow::Owned(away.fetch(self.codec.name())?),
        };
        decoded(self.codec.as_ref(), &entry, dtype)
    }
}

/// An entry that is on its way to the second level or back, or may be, as long as somebody waits for it. Then its copy
/// on the device is let go.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Kept>);

impl InFlight {
    /// `None` if it moves while nothing else does.
    pub(super) fn of(kept: &Arc<Kept>) -> Option<Self> {
        match &kept.lies {
            Lies::Away(away) if away.moves_beside() => Some(Self(kept.clone())),
            Lies::Away(_) | Lies::OnDevice(..) | Lies::OnHost(..) => None,
        }
    }

    pub(super) fn is(&self, kept: &Arc<Kept>) -> bool {
        Arc::ptr_eq(&self.0, kept)
    }

    /// It begins to come back, unless it does.
    pub(super) fn begin(&self) -> Result<()> {
        match &self.0.lies {
            Lies::Away(away) => away.begin(self.0.codec.name()),
            Lies::OnDevice(..) | Lies::OnHost(..) => Ok(()),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Lies::Away(away) = &self.0.lies {
            away.settle();
        }
    }
}

/// A state that is at hand: as it is, or to be decoded when it is needed, and every time it is.
pub(crate) enum AtHand {
    /// As it is.
    State(State),
    /// To be decoded.
    Kept(Encoded),
}

impl AtHand {
    /// The state.
    pub(crate) fn state(&self) -> Result<State> {
        match self {
            Self::State(state) => Ok(state.clone()),
            Self::Kept(encoded) => encoded.state(),
        }
    }
}

/// A kept state, and the one that is needed after it.
pub(crate) struct Encoded {
    pub(super) kept: Arc<Kept>,
    /// To which it is decoded.
    pub(super) dtype: DType,
    /// Itself, on its way.
    pub(super) _arriving: Option<Arc<InFlight>>,
    pub(super) next: Option<Arc<InFlight>>,
}

impl Encoded {
    pub(crate) fn state(&self) -> Result<State> {
        let state = self.kept.decode(self.dtype)?;
        // Not before, so that no more than one is on its way.
        if let Some(next) = &self.next {
            next.begin()?;
        }
        Ok(state)
    }
}
