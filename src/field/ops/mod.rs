//! Differentiable building blocks.

pub mod activation;
mod cpu;
#[cfg(test)]
mod gradcheck;
mod precomputed;
mod real;
mod weight;

pub use activation::{Activation, cos, elu, gelu, log_cosh, relu, sigmoid, silu, sin, softplus, tanh};
