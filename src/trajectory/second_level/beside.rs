//! What moves entries beside what is computed, for each device that can.

use crate::error::Result;
use candle_core::{Device, Tensor};
use std::any::Any;
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, PoisonError};

/// What moves entries of one device, whatever its lane is.
pub(super) trait Moves: Debug + Send + Sync {
    /// Whether it is that of `device`.
    fn serves(&self, device: &Device) -> bool;

    /// Whether it can move these now.
    fn takes(&self, tensors: &[Tensor]) -> bool;

    /// Begins to move the tensors of an entry to the host. `owner` announces their bytes until they have left.
    fn put(self: Arc<Self>, tensors: &[Tensor], owner: Owner) -> Result<Box<dyn Moved>>;
}

/// Who announces what is in flight.
pub(super) type Owner = Arc<dyn Any + Send + Sync>;

/// An entry on the host, or on its way.
pub(super) trait Moved: Debug + Send + Sync {
    /// Begins to bring a copy back, unless one is coming. Until it is asked for, its bytes are those of an entry by
    /// `codec`.
    fn begin(&self, codec: &'static str) -> Result<()>;

    /// The copy that is coming, or one that comes now.
    fn fetch(&self, codec: &'static str) -> Result<Vec<Tensor>>;

    /// Lets go of what is in flight, when it has left or come.
    fn settle(&self);
}

/// One mover a device. The solves of an adjoint share them, and what they hold.
#[derive(Clone, Default)]
pub(crate) struct Movers(Arc<Mutex<Vec<Arc<dyn Moves>>>>);

/// Without what it holds: settings are told apart by what they print.
impl Debug for Movers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Movers")
    }
}

impl Movers {
    /// Whether there is one for `device`.
    pub(super) fn serve(&self, device: &Device) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|mover| mover.serves(device))
    }

    /// The one for these tensors, if they can be moved by one now.
    pub(super) fn of(&self, tensors: &[Tensor]) -> Result<Option<Arc<dyn Moves>>> {
        let Some(device) = tensors.first().map(Tensor::device) else { return Ok(None) };
        let mut movers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mover = match movers.iter().find(|mover| mover.serves(device)) {
            Some(mover) => Some(mover.clone()),
            None => open(device)?.inspect(|mover| movers.push(mover.clone())),
        };
        Ok(mover.filter(|mover| mover.takes(tensors)))
    }

    /// Those of a test.
    #[cfg(test)]
    pub(super) fn of_test(mover: Arc<dyn Moves>) -> Self {
        Self(Arc::new(Mutex::new(vec![mover])))
    }
}

#[cfg(feature = "cuda")]
fn open(device: &Device) -> Result<Option<Arc<dyn Moves>>> {
    use super::cuda::CopyStream;
    use super::line::Line;

    let Device::Cuda(device) = device else { return Ok(None) };
    Ok(CopyStream::open(device)?.map(|lane| Arc::new(Line::new(lane)) as Arc<dyn Moves>))
}

#[cfg(not(feature = "cuda"))]
fn open(_: &Device) -> Result<Option<Arc<dyn Moves>>> {
    Ok(None)
}
