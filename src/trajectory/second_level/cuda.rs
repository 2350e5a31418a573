//! Copies on a stream of their own, between a CUDA device and page-locked memory of the host.
//!
//! Nothing here relies on cudarc's tracking of events, which may be off: without it neither a slice nor a page-locked
//! buffer knows of the copies that it is in. Where tracking is on it is told of every copy.

use super::line::{Lane, Like};
use crate::error::{OdeError, Result};
use candle_core::cuda_backend::cudarc::driver::sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr, PinnedHostSlice,
};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor, bail};
use half::{bf16, f16};
use std::sync::Arc;

/// The stream of a device that computes, and one that copies.
#[derive(Debug)]
pub(super) struct CopyStream {
    device: CudaDevice,
    compute: Arc<CudaStream>,
    copies: Arc<CudaStream>,
}

impl CopyStream {
    /// `None` while the device's stream is captured into a graph.
    pub(super) fn open(device: &CudaDevice) -> Result<Option<Self>> {
        let compute = device.cuda_stream();
        if is_captured(&compute)? {
            return Ok(None);
        }
        let copies = compute.context().new_stream().w()?;
        Ok(Some(Self { device: device.clone(), compute, copies }))
    }

    fn new_room<T: CudaDType + DeviceRepr>(&self, count: usize) -> Result<CudaStorage> {
        // SAFETY: every bit pattern is a value of each dtype, and nothing reads it before a copy has filled it.
        let slice = unsafe { self.device.alloc::<T>(count) }?;
        Ok(CudaStorage::wrap_cuda_slice(slice, self.device.clone()))
    }
}

fn is_captured(stream: &CudaStream) -> Result<bool> {
    Ok(stream.capture_status().w()? != CU_STREAM_CAPTURE_STATUS_NONE)
}

/// `$bytes` of the typed `$slice` that a storage is, if it is of a dtype that is copied.
macro_rules! in_bytes {
    ($storage:expr, $slice:ident => $bytes:expr) => {
        match $storage {
            CudaStorageSlice::U8($slice) => $bytes,
            CudaStorageSlice::U32($slice) => $bytes,
            CudaStorageSlice::I16($slice) => $bytes,
            CudaStorageSlice::I32($slice) => $bytes,
            CudaStorageSlice::I64($slice) => $bytes,
            CudaStorageSlice::F16($slice) => $bytes,
            CudaStorageSlice::BF16($slice) => $bytes,
            CudaStorageSlice::F32($slice) => $bytes,
            CudaStorageSlice::F64($slice) => $bytes,
            _ => None,
        }
    };
}

fn bytes_of<T>(slice: &CudaSlice<T>, from: usize, end: usize) -> Option<CudaView<'_, u8>> {
    let view = slice.try_slice(from..end)?;
    // SAFETY: the elements are numbers, and any bytes are bytes.
    unsafe { view.transmute(size_of::<T>() * (end - from)) }
}

fn bytes_of_mut<T>(slice: &mut CudaSlice<T>) -> Option<CudaViewMut<'_, u8>> {
    let bytes = slice.num_bytes();
    // SAFETY: the elements are numbers, for which any bytes will do.
    unsafe { slice.transmute_mut(bytes) }
}

impl Lane for CopyStream {
    type Buffer = PinnedHostSlice<u8>;
    type Room = CudaStorage;
    type Mark = CudaEvent;

    fn serves(&self, device: &Device) -> bool {
        matches!(device, Device::Cuda(device) if device.id() == self.device.id())
    }

    fn takes(&self, x: &Tensor) -> bool {
        let known = matches!(
            x.dtype(),
            DType::U8
                | DType::U32
                | DType::I16
                | DType::I32
                | DType::I64
                | DType::F16
                | DType::BF16
                | DType::F32
                | DType::F64
        );
        let fits = known && x.elem_count() > 0 && x.is_contiguous() && self.serves(x.device());
        fits && is_captured(&self.compute).is_ok_and(|captured| !captured)
    }

    fn buffer(&self, bytes: usize) -> Result<Self::Buffer> {
        // SAFETY: it is read only by copies, after another has filled it.
        let buffer = unsafe { self.compute.context().alloc_pinned(bytes) };
        Ok(buffer.map_err(|error| {
            let advice = "keep more entries on the device, fewer of them (checkpoints, a codec), or name a file";
            candle_core::Error::Msg(format!("second level: no {bytes} bytes of page-locked memory: {error}; {advice}"))
        })?)
    }

    fn room(&self, like: &Like) -> Result<Self::Room> {
        if is_captured(&self.compute)? {
            return Err(OdeError::Unsupported {
                what: "bringing a trajectory back from the host while the stream is captured into a CUDA graph".into(),
                instead: "capture without two levels of storage",
            });
        }
        let count = like.shape.elem_count();
        match like.dtype {
            DType::U8 => self.new_room::<u8>(count),
            DType::U32 => self.new_room::<u32>(count),
            DType::I16 => self.new_room::<i16>(count),
            DType::I32 => self.new_room::<i32>(count),
            DType::I64 => self.new_room::<i64>(count),
            DType::F16 => self.new_room::<f16>(count),
            DType::BF16 => self.new_room::<bf16>(count),
            DType::F32 => self.new_room::<f32>(count),
            DType::F64 => self.new_room::<f64>(count),
            other => Ok(refused(other)?),
        }
    }

    fn after_compute(&self) -> Result<()> {
        Ok(self.copies.join(&self.compute).w()?)
    }

    fn put(&self, from: &Tensor, to: &mut Self::Buffer) -> Result<()> {
        let (storage, layout) = from.storage_and_layout();
        let bytes = match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cuda(storage), Some((from, end))) => {
                in_bytes!(&storage.slice, slice => bytes_of(slice, from, end))
            }
            _ => None,
        };
        match bytes {
            Some(bytes) => Ok(self.copies.memcpy_dtoh(&bytes, to).w()?),
            None => Ok(refused(from.dtype())?),
        }
    }

    fn fetch(&self, from: &Self::Buffer, to: &mut Self::Room) -> Result<()> {
        match in_bytes!(&mut to.slice, slice => bytes_of_mut(slice)) {
            Some(mut bytes) => Ok(self.copies.memcpy_htod(from, &mut bytes).w()?),
            None => Ok(refused(candle_core::backend::BackendStorage::dtype(to))?),
        }
    }

    fn mark(&self) -> Result<Self::Mark> {
        Ok(self.copies.record_event(None).w()?)
    }

    fn compute_waits(&self, mark: &Self::Mark) -> Result<()> {
        Ok(self.compute.wait(mark).w()?)
    }

    fn arrived(&self, room: Self::Room, like: &Like) -> Tensor {
        Tensor::from_storage(Storage::Cuda(room), like.shape.clone(), BackpropOp::none(), false)
    }

    fn finish(&self) {
        // An error that cudarc has recorded before is reported instead, once. After one of the device nothing runs.
        if self.copies.synchronize().is_err() {
            let _ = self.copies.synchronize();
        }
    }
}

/// What `takes` says no to.
fn refused<T>(dtype: DType) -> candle_core::Result<T> {
    bail!("second level: contiguous tensors on CUDA are copied, not {dtype:?}")
}
