//! A CUDA device: its memory pool, which Candle's tensors live in, and the device as a whole.
//!
//! Candle allocates stream-ordered from the device's pool. The pool tells what its users hold (*used*) and what it
//! holds itself (*reserved*), now and at most. The context, loaded kernels and the libraries' workspaces lie outside.
//! With the driver's default release threshold of 0 the reserved bytes shrink at every synchronisation, and with that
//! of [`CudaSettings`](crate::memory::CudaSettings) they do not shrink at all, so used bytes are the ones to compare.

use super::{Meter, Reading};
use crate::error::{OdeError, Result};
use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{CUmemPool_attribute, CUmemoryPool, CUstreamCaptureStatus};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One counter of the memory pool of a CUDA device.
///
/// Every reading first waits for the device's stream, so that frees under way count: measure memory and speed in
/// separate runs.
#[derive(Debug)]
pub struct CudaPoolMeter {
    stream: Arc<CudaStream>,
    name: &'static str,
    now: CUmemPool_attribute,
    high: CUmemPool_attribute,
    /// Live bytes when the peak was last reset: the driver resets its high-water mark to 0, not to what is in use.
    at_mark: AtomicU64,
}

impl CudaPoolMeter {
    /// Bytes that tensors hold.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] if `device` is not CUDA, or has no memory pools (no stream-ordered allocation).
    pub fn used(device: &Device) -> Result<Self> {
        use CUmemPool_attribute::{CU_MEMPOOL_ATTR_USED_MEM_CURRENT as NOW, CU_MEMPOOL_ATTR_USED_MEM_HIGH as HIGH};
        Self::new(device, "cuda pool used", NOW, HIGH)
    }

    /// Bytes that the pool holds from the device, in use or not.
    ///
    /// # Errors
    ///
    /// As [`used`](Self::used).
    pub fn reserved(device: &Device) -> Result<Self> {
        use CUmemPool_attribute::{
            CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT as NOW, CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH as HIGH,
        };
        Self::new(device, "cuda pool reserved", NOW, HIGH)
    }

    fn new(device: &Device, name: &'static str, now: CUmemPool_attribute, high: CUmemPool_attribute) -> Result<Self> {
        let Device::Cuda(cuda) = device else {
            let reason = format!("{:?} is not a CUDA device", device.location());
            return Err(OdeError::Meter { counter: name, reason, hint: "use meter_for(&device)" });
        };
        let stream = cuda.cuda_stream();
        if !stream.context().has_async_alloc() {
            return Err(OdeError::Meter {
                counter: name,
                reason: "the device has no memory pools (no stream-ordered allocation)".to_owned(),
                hint: "a driver for CUDA 11.2 or later, outside of MIG and vGPU modes without pools, has them",
            });
        }
        let meter = Self { stream, name, now, high, at_mark: AtomicU64::new(0) };
        meter.reset_peak()?;
        Ok(meter)
    }

    /// Waits for the stream and returns the pool that allocations come from now.
    fn pool(&self) -> Result<CUmemoryPool> {
        let status = self.stream.capture_status().map_err(|error| self.failed(error))?;
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Err(OdeError::Meter {
                counter: self.name,
                reason: "the stream is being captured into a CUDA graph, and may not be waited for".to_owned(),
                hint: "measure memory without graph capture",
            });
        }
        self.stream.synchronize().map_err(|error| self.failed(error))?;
        // SAFETY: the device is the one of a live context, which `self.stream` keeps.
        unsafe { device::get_mem_pool(self.stream.context().cu_device()) }.map_err(|error| self.failed(error))
    }

    fn attribute(&self, pool: CUmemoryPool, attribute: CUmemPool_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: `pool` is the device's current pool; both attributes of this meter are 64-bit unsigned.
        unsafe { mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }
            .map_err(|error| self.failed(error))?;
        Ok(value)
    }

    fn clear_high(&self, pool: CUmemoryPool) -> Result<()> {
        let mut zero = 0u64;
        // SAFETY: as in `attribute`; the driver accepts 0 only, and copies it.
        unsafe { mem_pool::set_attribute(pool, self.high, (&raw mut zero).cast()) }.map_err(|error| self.failed(error))
    }

    fn failed(&self, error: DriverError) -> OdeError {
        OdeError::Meter {
            counter: self.name,
            reason: format!("{error}"),
            hint: "an earlier failure on the device shows up here too; look for the first error",
        }
    }
}

impl Meter for CudaPoolMeter {
    fn name(&self) -> &'static str {
        self.name
    }

    fn live(&self) -> Result<u64> {
        self.attribute(self.pool()?, self.now)
    }

    fn peak(&self) -> Result<u64> {
        Ok(self.attribute(self.pool()?, self.high)?.max(self.at_mark.load(Relaxed)))
    }

    fn reset_peak(&self) -> Result<()> {
        self.mark().map(|_| ())
    }

    /// One synchronisation for the three.
    fn mark(&self) -> Result<Reading> {
        let pool = self.pool()?;
        let live = self.attribute(pool, self.now)?;
        let peak = self.attribute(pool, self.high)?.max(live);
        self.clear_high(pool)?;
        let at_mark = self.at_mark.swap(live, Relaxed);
        Ok(Reading { live, peak: peak.max(at_mark) })
    }

    fn synchronises(&self) -> bool {
        true
    }
}

/// The whole of a CUDA device, as the driver sees it (`cuMemGetInfo`): total − free, so other processes, the context,
/// loaded kernels and the workspaces of libraries count too.
///
/// The driver keeps no high-water mark: the peak is the highest of the readings since the last reset.
#[derive(Debug)]
pub struct CudaDeviceMeter {
    stream: Arc<CudaStream>,
    highest: AtomicU64,
}

impl CudaDeviceMeter {
    /// The meter of a device; its peak begins now.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] if `device` is not CUDA, or the driver does not tell.
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(cuda) = device else {
            let reason = format!("{:?} is not a CUDA device", device.location());
            return Err(OdeError::Meter { counter: "cuda device", reason, hint: "use meter_for(&device)" });
        };
        let meter = Self { stream: cuda.cuda_stream(), highest: AtomicU64::new(0) };
        meter.reset_peak()?;
        Ok(meter)
    }
}

impl Meter for CudaDeviceMeter {
    fn name(&self) -> &'static str {
        "cuda device"
    }

    fn live(&self) -> Result<u64> {
        let (free, total) = self.stream.context().mem_get_info().map_err(|error| OdeError::Meter {
            counter: self.name(),
            reason: format!("{error}"),
            hint: "an earlier failure on the device shows up here too; look for the first error",
        })?;
        let live = total.saturating_sub(free) as u64;
        self.highest.fetch_max(live, Relaxed);
        Ok(live)
    }

    fn peak(&self) -> Result<u64> {
        self.live()?;
        Ok(self.highest.load(Relaxed))
    }

    fn reset_peak(&self) -> Result<()> {
        self.mark().map(|_| ())
    }

    fn mark(&self) -> Result<Reading> {
        let live = self.live()?;
        Ok(Reading { live, peak: self.highest.swap(live, Relaxed) })
    }
}
