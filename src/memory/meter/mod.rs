//! Meters: each reads live and peak bytes of one memory.

#[cfg(feature = "cuda")]
mod cuda;
mod heap;
mod library;
mod process;

#[cfg(feature = "cuda")]
pub use cuda::{CudaDeviceMeter, CudaPoolMeter};
pub use heap::{HeapMeter, TrackingAllocator};
pub(crate) use heap::{Held, held};
pub use library::probe_cuda;
pub use process::ProcessMeter;

use crate::error::{OdeError, Result};
use candle_core::Device;

/// What a meter said at one moment, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Bytes in use now.
    pub live: u64,
    /// The most bytes that were in use at once since the last mark, that mark's live bytes included.
    pub peak: u64,
}

/// Reads live and peak bytes of one memory.
///
/// A peak belongs to a *window*, which begins where the peak was last reset. Meters of the same memory share that
/// window when the memory itself keeps the peak (the heap's counters are process-wide), so while a
/// [`Recording`](super::Recording) is under way, ask it, not the meter, for peaks. A recording reads its meter at span
/// boundaries, so reading must not open spans itself.
///
/// # Errors
///
/// Every method returns [`OdeError::Meter`] when the counter behind it cannot be read.
pub trait Meter: Send + Sync {
    /// The counter's name in reports, such as `heap` or `cuda pool used`.
    fn name(&self) -> &'static str;

    /// Bytes in use now.
    fn live(&self) -> Result<u64>;

    /// The most bytes in use at once since the last reset.
    fn peak(&self) -> Result<u64>;

    /// Starts a new window: the peak becomes what is live now.
    fn reset_peak(&self) -> Result<()>;

    /// Closes the window and starts the next one: live and peak, then a reset.
    ///
    /// Meters that can do this without losing an allocation in between override it.
    fn mark(&self) -> Result<Reading> {
        let reading = Reading { live: self.live()?, peak: self.peak()? };
        self.reset_peak()?;
        Ok(reading)
    }

    /// Whether a reading waits for the device, so that times taken beside it say little about speed.
    fn synchronises(&self) -> bool {
        false
    }
}

/// The meter of the memory that tensors on `device` live in: the heap for the CPU, the pool's used bytes for CUDA.
///
/// ```
/// use candle_core::Device;
/// // Without a `TrackingAllocator` nothing counts the heap, and the error says how to install one.
/// let error = candle_ode::memory::meter_for(&Device::Cpu).err().unwrap();
/// assert!(error.to_string().contains("#[global_allocator]"));
/// ```
///
/// # Errors
///
/// [`OdeError::Meter`] if the heap is not counted (no [`TrackingAllocator`]), or the CUDA device has no memory pools;
/// [`OdeError::Unsupported`] on Metal.
pub fn meter_for(device: &Device) -> Result<Box<dyn Meter>> {
    match device {
        Device::Cpu => Ok(Box::new(HeapMeter::new()?)),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => Ok(Box::new(CudaPoolMeter::used(device)?)),
        other => Err(OdeError::Unsupported {
            what: format!("metering memory on {:?}", other.location()),
            instead: "run on the CPU or on CUDA (--features cuda) to measure memory",
        }),
    }
}
