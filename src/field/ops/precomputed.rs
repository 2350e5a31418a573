//! How an op with one node in the graph runs on devices that have no kernel of ours: its value is composed of
//! Candle's ops first, and the node hands it over.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, MetalStorage, Result, Shape, Storage, Tensor, bail};
use std::sync::{Mutex, PoisonError};

/// The value of an op, made before its node is; taken by the node's forward pass.
#[derive(Debug, Default)]
pub(super) struct Precomputed(Mutex<Option<Value>>);

#[derive(Debug)]
enum Value {
    /// Composed of Candle's ops; the node copies it.
    Composed(Tensor),
    /// Made by a kernel of ours for the node alone.
    #[cfg(feature = "cuda")]
    OnDevice(super::cuda::Value),
}

impl Precomputed {
    /// A value for any device.
    pub(super) fn of(value: Tensor) -> Self {
        Self(Mutex::new(Some(Value::Composed(value))))
    }

    /// A value that kernels of ours have made on CUDA.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(value: super::cuda::Value) -> Self {
        Self(Mutex::new(Some(Value::OnDevice(value))))
    }

    /// A value where `x` is on a device without our kernels; nothing on the CPU.
    pub(super) fn off_cpu(x: &Tensor, compose: impl FnOnce() -> Result<Tensor>) -> Result<Self> {
        if x.device().is_cpu() { Ok(Self::default()) } else { compose().map(Self::of) }
    }

    pub(super) fn cpu(&self, op: &'static str) -> Result<(CpuStorage, Shape)> {
        self.hand_over(op, |storage| match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        })
    }

    pub(super) fn cuda(&self, op: &'static str) -> Result<(CudaStorage, Shape)> {
        #[cfg(feature = "cuda")]
        {
            let mut value = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match value.take() {
                Some(Value::OnDevice(value)) => return Ok((value.storage, value.shape)),
                other => *value = other,
            }
        }
        self.hand_over(op, |storage| match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        })
    }

    pub(super) fn metal(&self, op: &'static str) -> Result<(MetalStorage, Shape)> {
        self.hand_over(op, |storage| match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        })
    }

    fn hand_over<S: BackendStorage>(
        &self,
        op: &'static str,
        pick: impl FnOnce(&Storage) -> Option<&S>,
    ) -> Result<(S, Shape)> {
        let value = match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Value::Composed(value)) => value,
            _ => bail!("`{op}` has no value for this device: its arguments are on different devices"),
        };
        let value = value.contiguous()?;
        let (storage, layout) = value.storage_and_layout();
        match pick(&storage) {
            Some(storage) => Ok((storage.try_clone(layout)?, value.shape().clone())),
            None => bail!("`{op}` has no value for this device: its arguments are on different devices"),
        }
    }
}

/// The two forward passes of a custom op that hands over a precomputed value; `$storage` repeats per argument.
macro_rules! hand_over {
    (@methods $field:ident, $($storage:ident $layout:ident),+) => {
        fn cuda_fwd(
            &self,
            $($storage: &candle_core::CudaStorage, $layout: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
            $(let _ = ($storage, $layout);)+
            self.$field.cuda(self.label())
        }

        fn metal_fwd(
            &self,
            $($storage: &candle_core::MetalStorage, $layout: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::MetalStorage, candle_core::Shape)> {
            $(let _ = ($storage, $layout);)+
            self.$field.metal(self.label())
        }
    };
    ($field:ident, 1) => { hand_over!(@methods $field, s1 l1); };
    ($field:ident, 2) => { hand_over!(@methods $field, s1 l1, s2 l2); };
    ($field:ident, 3) => { hand_over!(@methods $field, s1 l1, s2 l2, s3 l3); };
}
pub(super) use hand_over;
