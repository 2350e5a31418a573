//! The ops on CUDA: kernels of ours in F32, F16 and BF16, and cuBLAS with sums in F32.
//!
//! | file | what it computes |
//! |---|---|
//! | `activation.cu` | f⁽ⁿ⁾(x + b + t w) · v · w, with or without each |
//! | `sums.cu` | cotangent · f′ and its sums over the batch; sums over the channels of images; sums added to dL/dθ |
//! | `combine.cu` | the kernels of [`combine`](super::combine): sums in mixed dtypes, flags, scales |
//! | `convolution.cu` | images as columns of windows, and back |
//! | `planar.cu` | planar units with their divergence, and back |
//! | `norm.cu` | normalisations over groups, and back, with the sums for their parameters |
//! | `rows.cu` | rows in few bits, and increments that are summed and kept so ([`rows`](super::rows)) |
//!
//! What is launched for an op, on what and in which order, is written once against a [`Machine`](machine::Machine): a
//! GPU ([`device`]), or the host in tests ([`host`]), which compiles the same kernels with a C++ compiler and
//! multiplies as cuBLAS is told to. Other dtypes, more than 2³¹ elements, and everything where
//! `CANDLE_ODE_CUDA_KERNELS=0` is set, are composed of Candle's ops as on other devices.

#[cfg(any(test, feature = "cuda"))]
mod arguments;
#[cfg(feature = "cuda")]
mod chain;
#[cfg(feature = "cuda")]
mod coded;
#[cfg(feature = "cuda")]
mod combined;
#[cfg(any(test, feature = "cuda"))]
mod convolution;
#[cfg(feature = "cuda")]
mod device;
#[cfg(test)]
mod host;
#[cfg(any(test, feature = "cuda"))]
mod layer;
#[cfg(any(test, feature = "cuda"))]
mod machine;
#[cfg(any(test, feature = "cuda"))]
mod norm;
#[cfg(any(test, feature = "cuda"))]
mod planar;
#[cfg(any(test, feature = "cuda"))]
mod rows;
#[cfg(any(test, feature = "cuda"))]
mod sums;
#[cfg(feature = "cuda")]
mod tensors;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;
#[cfg(feature = "cuda")]
pub(super) use {chain::run as run_chain, coded::*, combined::*, device::Value, device::runs, tensors::*};

/// Whether this build has kernels for CUDA and they are switched on.
///
/// They are part of the feature `cuda`; the environment variable `CANDLE_ODE_CUDA_KERNELS=0`, read once, switches them
/// off, so that results can be compared with those of Candle's own.
pub fn cuda_kernels() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    cfg!(feature = "cuda") && *ON.get_or_init(|| std::env::var_os("CANDLE_ODE_CUDA_KERNELS").is_none_or(|v| v != "0"))
}
