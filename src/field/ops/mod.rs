//! Differentiable fused ops, and the layers made of them.

pub mod activation;
pub mod combine;
mod cpu;
#[cfg(test)]
mod gradcheck;
mod precomputed;
mod real;
mod weight;

pub use activation::{Activation, cos, elu, gelu, log_cosh, relu, sigmoid, silu, sin, softplus, tanh};
