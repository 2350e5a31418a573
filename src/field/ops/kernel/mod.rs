//! Kernels of fused layers on the CPU: products, sums over rows and what is done with them, on tiles of rows.
//!
//! A pass takes a tile of rows through all its layers, on one thread, so that the tile stays in cache and threads meet
//! nowhere. Only a batch that is not cut into tiles has its larger products shared among threads ([`shares`]). Weights
//! are packed once for many tiles ([`Packed`]); everything else is read and written where it lies. What a row gives
//! depends on that row alone, to the last bit, so tiles cannot change results; sums over rows ([`add_outer`],
//! [`add_column_sums`]) are made in F32, in the order of the rows.
//!
//! | here | formula | for |
//! |---|---|---|
//! | [`multiply()`] with [`Packed::transposed`] | f(x Wᵀ + b) | a layer |
//! | [`multiply()`] with [`Packed::straight`] | (g W) ∘ f′ | its pullback to x, through the activation before |
//! | [`add_outer`] | dW += gᵀ x | its pullback to W |
//! | [`add_column_sums`] | db += Σ g | its pullback to b |
//! | [`convolve`], [`add_outer_windows`] | the same with the windows of images for x | a convolution |
//! | [`winograd`] | the same with fewer products | a convolution of 3 × 3 |
//! | [`group_norm`] | mean, variance, w x̂ + b and their pullback | a group norm between convolutions |
//! | [`multiply_lanes`], [`add_outer_lanes`], [`add_column_sums_lanes`] | the same | layers of few features |
//! | [`pull_lanes`] | all three of a pullback | the same |
//!
//! Tiles hold F32 or BF16 ([`Held`]); F16 is held in F32. Products of BF16 are
//! exact and summed in F32. Each kernel is written once, in vectors of [`lanes`] and products of a [`scheme`], and
//! compiled for AVX-512 with and without BF16, for AVX2 and for what the target has; the [`machine`] chooses at run
//! time.

mod batch_lanes;
mod epilogue;
pub(crate) mod group_norm;
mod held;
mod lanes;
mod machine;
mod multiply;
mod outer;
mod packed;
mod pulled;
mod scheme;
mod shallow;
mod shares;
#[cfg(test)]
mod tests;
mod tile;
mod transpose;
mod view;
mod windows;
pub(crate) mod winograd;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use batch_lanes::{add_column_sums_lanes, add_outer_lanes, multiply_lanes};
pub(crate) use epilogue::{Epilogue, Then};
pub(crate) use held::Held;
pub(crate) use multiply::{convolve, multiply};
pub(crate) use outer::{Scratch, add_column_sums, add_outer, add_outer_windows};
pub(crate) use packed::Packed;
pub(crate) use pulled::{Pullback, pull_lanes};
pub(crate) use transpose::transpose;
pub(crate) use view::{View, ViewMut};
pub(crate) use windows::{Looks, Windows};
