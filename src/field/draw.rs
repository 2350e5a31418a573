//! Randomness that is fixed for a solve: dropout masks and the ε of Hutchinson's estimator.
//!
//! A solve has one seed. Every random layer takes a [`Stream`] when it is built; the model is built once for the
//! forward and once for the backward pass, in the same order, so both see the same draws.

use candle_core::{DType, Device, Result, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

thread_local! {
    static SCOPE: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    static FIRST_ROW: Cell<usize> = const { Cell::new(0) };
}

/// One source of draws: the same stream always gives the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    index: u64,
    by_row: bool,
}

impl Stream {
    /// The next stream of the solve whose model is being built on this thread; outside a solve, of seed 0.
    pub fn next() -> Self {
        let (seed, index) = SCOPE.get();
        SCOPE.set((seed, index + 1));
        Self { seed, index, by_row: false }
    }

    /// A stream of a seed of one's own.
    pub fn from_seed(seed: u64) -> Self {
        Self { seed, index: 0, by_row: false }
    }

    /// The same stream for tensors with a row for each of the batch (dimension 0): where a field sees a tile of the
    /// batch alone, the draws are those of its rows, so that noise for each row makes no field less row-wise.
    pub fn by_row(self) -> Self {
        Self { by_row: true, ..self }
    }

    /// The generator, at its start, also of a stream [`by_row`](Self::by_row).
    pub fn rng(self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.index);
        rng
    }

    /// The generator where the draws for a tensor of that shape begin, for so many words each.
    fn rng_for(self, shape: &Shape, words: usize) -> ChaCha8Rng {
        let mut rng = self.rng();
        if self.by_row {
            let row: usize = shape.dims().iter().skip(1).product();
            rng.set_word_pos((FIRST_ROW.get() * row * words) as u128);
        }
        rng
    }

    /// Signs: −1 or 1 with equal probability, exact in every dtype.
    ///
    /// # Errors
    /// When the device fails to hold them.
    pub fn rademacher(self, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut rng = self.rng_for(shape, 1);
        let signs = (0..shape.elem_count()).map(|_| if rng.random::<bool>() { 1.0_f32 } else { -1.0 });
        Tensor::from_iter(signs, device)?.reshape(shape)?.to_dtype(dtype)
    }

    /// Standard normal numbers (Box–Muller), rounded to `dtype`.
    ///
    /// # Errors
    /// When the device fails to hold them.
    pub fn normal(self, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut rng = self.rng_for(shape, 4);
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
        let mut rng = self.rng_for(shape, 2);
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

/// Runs `pass` over rows of a batch of which the first is row `first` of those at hand.
pub(crate) fn from_row<T>(first: usize, pass: impl FnOnce() -> T) -> T {
    let _before = Before(FIRST_ROW.replace(FIRST_ROW.get() + first));
    pass()
}

/// Draws that are made once for the rows at hand, and for each shape, dtype and device.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<Vec<(usize, Shape, Tensor)>>);

impl Kept {
    /// What `draw` has drawn for tensors like `x`, or draws now.
    pub(crate) fn like(&self, x: &Tensor, draw: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = FIRST_ROW.get();
        let fits = |(row, shape, kept): &&(usize, Shape, Tensor)| {
            let same = kept.dtype() == x.dtype() && kept.device().same_device(x.device());
            *row == first && shape == x.shape() && same
        };
        if let Some((.., kept)) = all.iter().find(fits) {
            return Ok(kept.clone());
        }
        let drawn = draw()?;
        all.push((first, x.shape().clone(), drawn.clone()));
        Ok(drawn)
    }
}

/// The row before, put back however the pass ends.
struct Before(usize);

impl Drop for Before {
    fn drop(&mut self) {
        FIRST_ROW.set(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_row_a_part_of_the_batch_draws_what_the_whole_does() {
        type Draw = fn(Stream, &Shape) -> Result<Tensor>;
        let draws: [Draw; 3] = [
            |stream, shape| stream.rademacher(shape, DType::F64, &Device::Cpu),
            |stream, shape| stream.normal(shape, DType::F64, &Device::Cpu),
            |stream, shape| stream.bernoulli(0.3, shape, DType::F64, &Device::Cpu),
        ];
        for draw in draws {
            let values = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for stream in [Stream::from_seed(7), seeded(3, || [Stream::next(), Stream::next()][1])] {
                let whole = values(draw(stream.by_row(), &Shape::from((9, 5, 3))).unwrap());
                assert_eq!(whole, values(draw(stream, &Shape::from((9, 5, 3))).unwrap()));
                let part = |stream| from_row(4, || values(draw(stream, &Shape::from((3, 5, 3))).unwrap()));
                assert_eq!(part(stream.by_row()), whole[4 * 15..7 * 15]);
                assert_eq!(part(stream), whole[..3 * 15]);
            }
        }
        assert_eq!(from_row(2, || from_row(3, || FIRST_ROW.get())), 5);
        assert_eq!(FIRST_ROW.get(), 0);
    }
}
