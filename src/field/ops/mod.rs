//! Differentiable fused ops, and the layers made of them.

pub mod combine;
