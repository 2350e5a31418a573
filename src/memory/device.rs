//! CUDA devices: opened as this crate uses them, with errors where Candle would panic.

use super::probe_cuda;
use crate::error::{OdeError, Result};
use candle_core::Device;

/// How a CUDA device is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaSettings {
    /// Whether every allocation gets two events that order streams: two calls of the driver for each tensor. Only
    /// needed where tensors pass between several of Candle's devices on the same GPU; default `false`. It holds for the
    /// device that is opened and its clones.
    pub track_events: bool,
    /// How many bytes that tensors no longer use the memory pool may keep rather than give back to the driver whenever
    /// the device is waited for; default: all. It holds for the pool of the GPU in this process.
    pub keep_bytes: u64,
}

impl Default for CudaSettings {
    fn default() -> Self {
        Self { track_events: false, keep_bytes: u64::MAX }
    }
}

/// Opens CUDA device `ordinal` with the default [`CudaSettings`], on a stream of its own, and says what is missing
/// where Candle would panic. Open each GPU once and clone the `Device`.
///
/// ```
/// use candle_core::Device;
/// let device = candle_ode::memory::cuda_device(0).unwrap_or(Device::Cpu);
/// # let _ = device;
/// ```
///
/// # Errors
///
/// [`OdeError::Unsupported`] in a build without the `cuda` feature, [`OdeError::Meter`] if a CUDA library is missing,
/// [`OdeError::Candle`] if the driver refuses (no such device, out of memory).
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    cuda_device_with(ordinal, CudaSettings::default())
}

/// As [`cuda_device`], with other settings.
///
/// # Errors
///
/// As [`cuda_device`].
pub fn cuda_device_with(ordinal: usize, settings: CudaSettings) -> Result<Device> {
    if !cfg!(feature = "cuda") {
        let what = format!("CUDA device {ordinal} in a build without CUDA");
        return Err(OdeError::Unsupported { what, instead: "build with --features cuda, or use the CPU" });
    }
    probe_cuda()?;
    // A library of a version that this build does not look for is found above and still panics below.
    match std::panic::catch_unwind(|| Device::new_cuda_with_stream(ordinal)) {
        Ok(device) => {
            let device = device?;
            set_up(&device, settings)?;
            Ok(device)
        }
        Err(_) => Err(OdeError::Meter {
            counter: "cuda",
            reason: "a CUDA library of the version this program was built for is missing".to_owned(),
            hint: "install the CUDA version named above, or build against the installed one",
        }),
    }
}

#[cfg(feature = "cuda")]
fn set_up(device: &Device, settings: CudaSettings) -> Result<()> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
    use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;

    let Device::Cuda(cuda) = device else { return Ok(()) };
    let context = cuda.cuda_stream().context().clone();
    if !settings.track_events {
        // SAFETY: Candle's device works on the one stream that it was opened with, so that its tensors are allocated,
        // used and freed in order; `CudaSettings` says when that is not enough.
        unsafe { context.disable_event_tracking() };
    }
    if context.has_async_alloc() {
        let mut bytes = settings.keep_bytes;
        // SAFETY: the device is that of a live context; the attribute is a 64-bit number, which the driver copies.
        unsafe {
            let pool = device::get_mem_pool(context.cu_device()).w()?;
            mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut bytes).cast()).w()?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn set_up(_: &Device, _: CudaSettings) -> Result<()> {
    Ok(())
}
