//! Differentiable fused ops, and the layers made of them.

pub mod activation;
mod bias;
pub mod combine;
mod concat_time;
mod cpu;
#[cfg(test)]
mod gradcheck;
mod linear;
mod mlp;
mod precomputed;
mod real;
mod sequential;
mod weight;

pub use activation::{Activation, cos, elu, gelu, log_cosh, relu, sigmoid, silu, sin, softplus, tanh};
pub use bias::add_bias;
pub use concat_time::{ConcatLinear, concat_linear};
pub use linear::{Linear, affine, linear, linear_b, linear_no_bias};
pub use mlp::{Mlp, MlpBuilder};
pub use sequential::{Sequential, Timed, seq};
