//! The second level of a trajectory: entries that wait for the backward pass outside the memory of the device.

mod beside;
#[cfg(feature = "cuda")]
mod cuda;
mod file;
#[cfg(any(test, feature = "cuda"))]
mod line;
#[cfg(test)]
mod simulated;

pub(crate) use beside::Movers;
#[cfg(test)]
pub(crate) use simulated::Simulated;

use super::codec::Entry;
use crate::error::Result;
use beside::{Moved, Owner};
use candle_core::{Device, Shape, Tensor};
use file::{Page, Pages};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Where entries of a trajectory wait when the device has all of them that it is to hold. They come back bit for bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecondLevel {
    /// The memory of the host. On a CPU entries lie there as it is, and stay where they are.
    ///
    /// On CUDA they are copied to page-locked memory on a stream of their own, while the other computes: an entry
    /// leaves during the steps that follow, and the one below an entry that is pulled back comes back meanwhile. That
    /// takes at most one entry more on the device than moves one after another, announced as the entry of the
    /// trajectory that it is. The memory of the host is not announced. Locking it is slow, so the
    /// [`Discrete`](crate::Discrete) and its clones keep all they ever had on the host at once, for each length of an
    /// entry, until the last of them is dropped: make one before the training loop, since a fresh one each iteration
    /// gains nothing, and keep the batch's size. Open the device with
    /// [`memory::cuda_device`](crate::memory::cuda_device): where Candle tracks events, a second stream makes every op
    /// wait for them. Tensors that are not contiguous, and rare dtypes, are moved by Candle, the host waiting.
    Host,
    /// A file in this directory, for a solve alone: it has no name, and is gone when the solve is. Entries are written
    /// and read while nothing else is done; the operating system's cache decides when the disk is.
    File(PathBuf),
}

impl SecondLevel {
    /// A file in the system's directory for temporary ones. Where that is a disk in memory, name another.
    pub fn temporary_file() -> Self {
        Self::File(std::env::temp_dir())
    }
}

/// Two levels of storage, as a solve and its tiles share them.
#[derive(Clone, Debug)]
pub(crate) struct TwoLevels {
    /// Entries that stay on the device: the latest.
    pub(crate) resident: usize,
    to: SecondLevel,
    movers: Movers,
    /// Made when the first entry moves there.
    pages: Arc<Mutex<Option<Arc<Pages>>>>,
}

impl TwoLevels {
    pub(crate) fn new(resident: usize, to: SecondLevel, movers: Movers) -> Self {
        Self { resident, to, movers, pages: Arc::default() }
    }

    /// Whether entries on `device` have somewhere to go.
    pub(crate) fn moves(&self, device: &Device) -> bool {
        self.to != SecondLevel::Host || !device.is_cpu() || self.movers.serve(device)
    }

    /// A copy of the entry on the second level. If it is on its way when this returns, `owner` is held until the copy
    /// is over and [settled](Away::settle).
    pub(crate) fn put(&self, entry: &Entry, owner: Owner) -> Result<Away> {
        let _span = tracing::trace_span!(target: "candle_ode", "put_away", bytes = entry.bytes() as u64).entered();
        let device = entry.tensors.first().map_or(Device::Cpu, |x| x.device().clone());
        let place = match &self.to {
            SecondLevel::Host => match self.movers.of(&entry.tensors)? {
                Some(mover) => Place::Beside(mover.put(&entry.tensors, owner)?),
                None => {
                    let tensors = entry.tensors.iter().map(|x| x.to_device(&Device::Cpu));
                    Place::Host(tensors.collect::<candle_core::Result<_>>()?)
                }
            },
            SecondLevel::File(directory) => self.in_file(entry, directory)?,
        };
        Ok(Away { place, device, shapes: entry.shapes.clone(), bytes: entry.bytes() })
    }

    fn in_file(&self, entry: &Entry, directory: &Path) -> Result<Place> {
        let pages = self.pages(directory)?;
        let mut place = vec![];
        for x in &entry.tensors {
            let on_host = x.to_device(&Device::Cpu)?;
            let put = pages.put(&safetensors::View::data(&&on_host));
            match put {
                Ok(at) => place.push(Page { at, dtype: x.dtype(), shape: x.shape().clone() }),
                Err(error) => {
                    place.iter().for_each(|page| pages.free(page.at, page.len()));
                    return Err(error);
                }
            }
        }
        Ok(Place::File(pages, place))
    }

    fn pages(&self, directory: &Path) -> Result<Arc<Pages>> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pages) = &*pages {
            return Ok(pages.clone());
        }
        Ok(pages.insert(Arc::new(Pages::new(directory)?)).clone())
    }
}

/// An entry on the second level.
#[derive(Debug)]
pub(crate) struct Away {
    place: Place,
    device: Device,
    pub(crate) shapes: Vec<Shape>,
    pub(crate) bytes: usize,
}

#[derive(Debug)]
enum Place {
    Host(Vec<Tensor>),
    /// On the host, moved beside what is computed.
    Beside(Box<dyn Moved>),
    File(Arc<Pages>, Vec<Page>),
}

impl Away {
    /// Whether it moves beside what is computed.
    pub(crate) fn moves_beside(&self) -> bool {
        matches!(self.place, Place::Beside(_))
    }

    /// Begins to bring a copy of it back, where that goes beside what is computed; `codec` is the name of its codec.
    pub(crate) fn begin(&self, codec: &'static str) -> Result<()> {
        match &self.place {
            Place::Beside(moved) => moved.begin(codec),
            Place::Host(_) | Place::File(..) => Ok(()),
        }
    }

    /// Lets go of what is on its way, there or back, as soon as its copy is over.
    pub(crate) fn settle(&self) {
        if let Place::Beside(moved) = &self.place {
            moved.settle();
        }
    }

    /// A copy of it on its device.
    pub(crate) fn fetch(&self, codec: &'static str) -> Result<Entry> {
        let _span = tracing::trace_span!(target: "candle_ode", "fetch", bytes = self.bytes as u64).entered();
        let tensors = match &self.place {
            Place::Host(tensors) => {
                tensors.iter().map(|x| x.to_device(&self.device)).collect::<candle_core::Result<_>>()?
            }
            Place::Beside(moved) => moved.fetch(codec)?,
            Place::File(pages, places) => {
                let read = |page: &Page| -> Result<Tensor> {
                    let bytes = pages.get(page.at, page.len())?;
                    Ok(Tensor::from_raw_buffer(&bytes, page.dtype, page.shape.dims(), &self.device)?)
                };
                places.iter().map(read).collect::<Result<_>>()?
            }
        };
        Ok(Entry { tensors, shapes: self.shapes.clone() })
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        if let Place::File(pages, places) = &self.place {
            places.iter().for_each(|page| pages.free(page.at, page.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn freed_pages_are_written_again_and_nothing_else_is() -> Result<()> {
        let two = TwoLevels::new(0, SecondLevel::temporary_file(), Movers::default());
        let entry = |value: f32| -> Result<Entry> {
            let x = Tensor::full(value, (2, 3), &Device::Cpu)?;
            Ok(Entry { shapes: vec![x.shape().clone()], tensors: vec![x.to_dtype(DType::F16)?, x] })
        };
        let put = |value: f32| two.put(&entry(value)?, Arc::new(()));
        let value = |away: &Away| -> Result<Vec<f32>> {
            let entry = away.fetch("f16")?;
            let read = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
            Ok(entry.tensors.iter().map(read).collect::<candle_core::Result<Vec<_>>>()?.concat())
        };
        let (first, second) = (put(1.5)?, put(-2.0)?);
        assert_eq!(first.bytes, 6 * (2 + 4));
        drop(first);
        let third = put(3.0)?;
        assert_eq!((value(&second)?, value(&third)?), (vec![-2.0; 12], vec![3.0; 12]));
        let end = two.pages(&std::env::temp_dir())?.end();
        assert_eq!(end, 2 * 6 * (2 + 4));
        Ok(())
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let two = TwoLevels::new(0, SecondLevel::File("/nowhere/at/all".into()), Movers::default());
        let x = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let error = two.put(&Entry { shapes: vec![], tensors: vec![x] }, Arc::new(())).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
