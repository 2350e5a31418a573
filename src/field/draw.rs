//! Randomness that is fixed for a solve: dropout masks and the ε of Hutchinson's estimator.
//!
//! A solve has one seed. Every random layer takes a [`Stream`] when it is built; the model is built once for the
//! forward and once for the backward pass, in the same order, so both see the same draws.

use candle_core::{DType, Device, Result, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::Cell;

thread_local! {
    static SCOPE: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// One source of draws: the same stream always gives the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    index: u64,
}

impl Stream {
    /// The next stream of the solve whose model is being built on this thread; outside a solve, of seed 0.
    pub fn next() -> Self {
        let (seed, index) = SCOPE.get();
        SCOPE.set((seed, index + 1));
        Self { seed, index }
    }

    /// A stream of a seed of one's own.
    pub fn from_seed(seed: u64) -> Self {
        Self { seed, index: 0 }
    }

    /// The generator, at its start.
    pub fn rng(self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.index);
        rng
    }

    /// Signs: −1 or 1 with equal probability, exact in every dtype.
    ///
    /// # Errors
    /// When the device fails to hold them.
    pub fn rademacher(self, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut rng = self.rng();
        let signs = (0..shape.elem_count()).map(|_| if rng.random::<bool>() { 1.0_f32 } else { -1.0 });
        Tensor::from_iter(signs, device)?.reshape(shape)?.to_dtype(dtype)
    }

    /// Standard normal numbers (Box–Muller), rounded to `dtype`.
    ///
    /// # Errors
    /// When the device fails to hold them.
    pub fn normal(self, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut rng = self.rng();
        let draws = (0..shape.elem_count()).map(|_| {
            let (u, v): (f64, f64) = (rng.random(), rng.random());
            (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
        });
        Tensor::from_iter(draws, device)?.reshape(shape)?.to_dtype(dtype)
    }

    /// Ones with probability `keep`, zeros otherwise.
    ///
    /// # Errors
    /// When the device fails to hold them.
    pub fn bernoulli(self, keep: f64, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut rng = self.rng();
        let draws = (0..shape.elem_count()).map(|_| if rng.random::<f64>() < keep { 1.0_f32 } else { 0.0 });
        Tensor::from_iter(draws, device)?.reshape(shape)?.to_dtype(dtype)
    }
}

/// Builds something whose random layers draw from `seed`, numbered from 0.
pub(crate) fn seeded<T>(seed: u64, build: impl FnOnce() -> T) -> T {
    let _outer = Outer(SCOPE.replace((seed, 0)));
    build()
}

/// The scope before, put back however `build` ends.
struct Outer((u64, u64));

impl Drop for Outer {
    fn drop(&mut self) {
        SCOPE.set(self.0);
    }
}
