//! A CUDA device as a [`Machine`], and the tensors on it.
//!
//! Everything runs on the one stream of Candle's device, in order, so that no address is used after its memory was
//! freed in that order, whether events are tracked or not.

use super::arguments::{Arguments, Element, Launch, Module};
use super::cuda_kernels;
use super::machine::{ColumnMajor, Machine, Operand};
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr, gemm_reduced_precision_f32};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};
use std::ffi::c_void;

/// The most elements of a tensor: kernels count them in 32 bits.
pub(super) const LARGEST: usize = 1 << 31;

/// Whether kernels of ours take a tensor.
pub(in crate::field::ops) fn runs(x: &Tensor) -> bool {
    let fits = Element::of(x.dtype()).is_some() && (1..=LARGEST).contains(&x.elem_count());
    fits && x.device().is_cuda() && cuda_kernels()
}

/// The PTX that the build script had made.
fn module(module: Module) -> (&'static str, &'static str) {
    match module {
        Module::Activation => ("candle_ode_activation", include_str!(concat!(env!("OUT_DIR"), "/activation.ptx"))),
        Module::Sums => ("candle_ode_sums", include_str!(concat!(env!("OUT_DIR"), "/sums.ptx"))),
        Module::Combine => ("candle_ode_combine", include_str!(concat!(env!("OUT_DIR"), "/combine.ptx"))),
        Module::Convolution => ("candle_ode_convolution", include_str!(concat!(env!("OUT_DIR"), "/convolution.ptx"))),
        Module::Planar => ("candle_ode_planar", include_str!(concat!(env!("OUT_DIR"), "/planar.ptx"))),
        Module::Norm => ("candle_ode_norm", include_str!(concat!(env!("OUT_DIR"), "/norm.ptx"))),
        Module::Rows => ("candle_ode_rows", include_str!(concat!(env!("OUT_DIR"), "/rows.ptx"))),
    }
}

/// A CUDA device.
#[derive(Clone, Debug)]
pub(super) struct Gpu(CudaDevice);

impl Gpu {
    /// The one that a tensor is on.
    pub(super) fn of(x: &Tensor) -> Result<Self> {
        match x.device() {
            Device::Cuda(device) => Ok(Self(device.clone())),
            other => bail!("a kernel for CUDA was given a tensor on {:?}", other.location()),
        }
    }

    /// A new tensor with anything in it.
    pub(super) fn output(&self, element: Element, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        let count = shape.elem_count();
        // SAFETY: every kernel that is given an output writes all of it.
        let storage = unsafe {
            match element {
                Element::F32 => CudaStorage::wrap_cuda_slice(self.0.alloc::<f32>(count)?, self.0.clone()),
                Element::F16 => CudaStorage::wrap_cuda_slice(self.0.alloc::<f16>(count)?, self.0.clone()),
                Element::BF16 => CudaStorage::wrap_cuda_slice(self.0.alloc::<bf16>(count)?, self.0.clone()),
            }
        };
        Ok(Value { storage, shape })
    }

    /// A new tensor of bytes with anything in it.
    pub(super) fn bytes(&self, shape: impl Into<Shape>) -> Result<Value> {
        let shape = shape.into();
        let storage = CudaStorage::wrap_cuda_slice(self.allocate(shape.elem_count())?, self.0.clone());
        Ok(Value { storage, shape })
    }

    /// Zeros in F32.
    pub(super) fn zeros(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::zeros(shape, DType::F32, &Device::Cuda(self.0.clone()))
    }
}

/// A new tensor that nothing else refers to.
#[derive(Debug)]
pub(in crate::field::ops) struct Value {
    pub(in crate::field::ops) storage: CudaStorage,
    pub(in crate::field::ops) shape: Shape,
}

impl Value {
    pub(super) fn at(&self) -> u64 {
        start(&self.storage).unwrap_or(0)
    }

    /// Outside any graph.
    pub(in crate::field::ops) fn tensor(self) -> Tensor {
        Tensor::from_storage(Storage::Cuda(self.storage), self.shape, BackpropOp::none(), false)
    }
}

/// Where the elements of a storage begin, if they are bytes or of a dtype with kernels.
fn start(storage: &CudaStorage) -> Option<u64> {
    fn of<T>(slice: &CudaSlice<T>) -> Option<u64> {
        Some(slice.device_ptr(slice.stream()).0)
    }
    match &storage.slice {
        CudaStorageSlice::U8(slice) => of(slice),
        CudaStorageSlice::F32(slice) => of(slice),
        CudaStorageSlice::F16(slice) => of(slice),
        CudaStorageSlice::BF16(slice) => of(slice),
        _ => None,
    }
}

/// x outside any graph, contiguous.
pub(super) fn dense(x: &Tensor) -> Result<Tensor> {
    x.detach().contiguous()
}

/// Where the elements of a contiguous tensor are.
pub(super) fn address(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let at = match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cuda(storage), Some((from, _))) => {
            start(storage).map(|at| at + (from * x.dtype().size_in_bytes()) as u64)
        }
        _ => None,
    };
    match at {
        Some(at) => Ok(at),
        None => bail!("a kernel takes contiguous floats or bytes on CUDA, not {:?} with layout {layout:?}", x.dtype()),
    }
}

/// A kernel's arguments, as cudarc takes them.
#[repr(transparent)]
struct Raw<A>(A);

// SAFETY: `Arguments` promises the layout that the kernel is declared with.
unsafe impl<A: Arguments> DeviceRepr for Raw<A> {}

impl Machine for Gpu {
    type Memory = CudaSlice<u8>;

    fn allocate(&self, bytes: usize) -> Result<Self::Memory> {
        // SAFETY: bytes have no invalid values, and whoever asks for memory writes before it reads.
        unsafe { self.0.alloc::<u8>(bytes) }
    }

    fn address(memory: &Self::Memory) -> u64 {
        memory.device_ptr(memory.stream()).0
    }

    unsafe fn launch<A: Arguments>(&self, launch: &Launch<A>) -> Result<()> {
        let (name, ptx) = module(launch.module);
        let function = self.0.get_or_load_custom_func(&launch.kernel, name, ptx)?;
        let arguments = Raw(launch.arguments);
        let mut builder = function.builder();
        builder.arg(&arguments);
        let ([x, y, z], [i, j, k]) = (launch.blocks, launch.threads);
        let config = LaunchConfig { grid_dim: (x, y, z), block_dim: (i, j, k), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes one struct, this one; the caller answers for the addresses in it.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }

    unsafe fn multiply(&self, product: &ColumnMajor) -> Result<()> {
        let ColumnMajor { a, b, c, m, n, k, batch, alpha, beta } = *product;
        let blas = self.0.cublas_handle();
        self.0.cuda_stream().context().bind_to_thread().w()?;
        let compute = match a.element {
            Element::F32 if gemm_reduced_precision_f32() => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let algorithm = sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP;
        let (alpha, beta) = ((&raw const alpha).cast::<c_void>(), (&raw const beta).cast::<c_void>());
        let (at_a, at_b, at_c) = (a.at as *const c_void, b.at as *const c_void, c.at as *mut c_void);
        let (type_a, type_b, type_c) = (data_type(&a), data_type(&b), data_type(&c));
        // SAFETY: the caller answers for the operands; α and β are in F32, as sums are, and read before the call
        // returns.
        unsafe {
            let (handle, op_a, op_b) = (*blas.handle(), operation(&a), operation(&b));
            if batch == 1 {
                return result::gemm_ex(
                    handle, op_a, op_b, m, n, k, alpha, at_a, type_a, a.leading, at_b, type_b, b.leading, beta, at_c,
                    type_c, c.leading, compute, algorithm,
                )
                .w();
            }
            result::gemm_strided_batched_ex(
                handle, op_a, op_b, m, n, k, alpha, at_a, type_a, a.leading, a.stride, at_b, type_b, b.leading,
                b.stride, beta, at_c, type_c, c.leading, c.stride, batch, compute, algorithm,
            )
            .w()
        }
    }
}

fn operation(operand: &Operand) -> sys::cublasOperation_t {
    if operand.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
}

fn data_type(operand: &Operand) -> sys::cudaDataType {
    match operand.element {
        Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Element::F16 => sys::cudaDataType_t::CUDA_R_16F,
        Element::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}
