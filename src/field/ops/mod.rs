//! Differentiable building blocks for vector fields, usable in any Candle model.
//!
//! Layers have candle-nn's constructors and parameter names and implement [`Module`](candle_core::Module), so they are
//! drop-in twins; they also implement [`Tangent`](crate::Tangent), which divergences need. All of them take F16, BF16,
//! F32 and F64 with any strides. In half precision they calculate in F32 and round once; sums over a batch are made in
//! F32 always; and inside a solve the gradient of a weight goes to the F32 sums of dL/dθ without being rounded.
//!
//! | here | formula | why not Candle's |
//! |---|---|---|
//! | [`linear()`], [`linear_no_bias`], [`affine`] | x Wᵀ + b | F16 sums over the batch stop at 2048; F16 products with one row or column lose digits |
//! | [`concat_linear`] | [x, t] Wᵀ + b | makes no copy of x |
//! | [`hyper_linear`], [`concat_squash_linear`] | x W(t)ᵀ + b(t) | weights made of the time; sums as in `linear` |
//! | [`Planar`] | mean of uⱼ h(wⱼ·z + bⱼ), and its divergence | one pass, keeps nothing of the width |
//! | [`add_bias`] | x + b along a dimension | as `linear` |
//! | [`conv2d`], [`conv2d_no_bias`] | x ∗ w + b | no BF16 on the CPU; sums as in `linear`; an error in the backward pass of some strided convolutions of oblong images |
//! | [`concat_conv2d`] | [x, t] ∗ w + b | as `conv2d`; inside a solve on the CPU makes no copy of x for the time |
//! | [`layer_norm`], [`layer_norm_no_bias`], [`rms_norm`] | (x − mean) / std · w + b | no backward pass for contiguous input; no F32 weights on F16 input |
//! | [`group_norm`], [`instance_norm`] | the same over groups of channels | no F32 weights on F16 input; batch sums; part of one op with the convolutions beside it |
//! | [`softmax`], [`Softmax`] | eˣ / Σ eˣ | `softmax_last_dim` has no backward pass |
//! | [`Dropout`] | x · mask / (1 − p) | draws anew at each call, which no solve allows |
//! | [`Activation`], [`tanh`], [`sigmoid`], [`softplus`], [`silu`], [`gelu`], [`relu`], [`elu`], [`sin`], [`cos`], [`log_cosh`] | f(x) | scalar code, and several kernels in the backward pass |
//! | [`Sequential`], [`Mlp`] | one after another | no tangent, neither `Send` nor `Sync` |
//!
//! Each op is one node in Candle's graph and keeps nothing but what Candle keeps anyway: its arguments and its result.
//! On the CPU it runs in loops of ours, on CUDA linear layers, planar units, convolutions, norms, biases and
//! activations in kernels of ours ([`cuda_kernels`]); elsewhere its value is composed of Candle's ops, with the same
//! formulas.
//!
//! Ops whose backward pass Candle lacks and that have no twin here: `conv_transpose1d`, `upsample_bilinear2d`, and
//! pools with a kernel that differs from the stride.

mod activation;
mod bias;
mod chain;
pub mod combine;
mod concat_time;
mod conv;
mod cpu;
mod cuda;
mod dropout;
#[cfg(test)]
mod gradcheck;
mod hyper_linear;
pub(super) mod kernel;
mod linear;
mod minimax;
mod mlp;
mod norm;
mod planar;
mod precomputed;
mod product;
mod real;
pub(crate) mod rows;
mod sequential;
mod softmax;
mod weight;

pub use activation::{Activation, cos, elu, gelu, log_cosh, relu, sigmoid, silu, sin, softplus, tanh};
pub use bias::add_bias;
pub(crate) use chain::with_elements;
pub use concat_time::{ConcatLinear, concat_linear};
pub use conv::{ConcatConv2d, Conv2d, concat_conv2d, conv2d, conv2d_no_bias};
pub use cuda::cuda_kernels;
pub use dropout::Dropout;
pub use hyper_linear::{ConcatSquashLinear, HyperLinear, concat_squash_linear, hyper_linear};
pub use linear::{Linear, affine, linear, linear_b, linear_no_bias};
pub use mlp::{Mlp, MlpBuilder};
pub use norm::{
    GroupNorm, InstanceNorm, LayerNorm, group_norm, instance_norm, layer_norm, layer_norm_no_bias, rms_norm,
};
pub use planar::Planar;
pub use sequential::{Layers, Sequential, Timed, seq};
pub use softmax::{Softmax, softmax};
