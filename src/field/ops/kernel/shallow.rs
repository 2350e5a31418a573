//! Products of a few terms with the batch in the lanes, and the hyperbolic tangent of them or its slope, without a stop
//! of the sums in memory. The bits are those of `batch_lanes.rs`.

use super::batch_lanes::{Multiply, ROWS};
use super::epilogue::Then;
use super::lanes::{Beside, Lanes};
use super::machine::{Machine, Path, Work};
use super::packed::PANEL;
use crate::field::ops::Activation;
use crate::field::ops::minimax::tanh;

/// Vectors that are finished side by side.
pub(super) const BESIDE: usize = 4;

impl Multiply<'_> {
    /// Runs it on a path that this CPU has.
    pub(super) fn run_on(self, path: Path) {
        match (self.b.depth(), self.follows()) {
            // The portable path has no fused products where the target has none.
            (1, Some(follows)) if path != Path::Portable => path.run(Shallow::<1> { product: self, follows }),
            (2, Some(follows)) if path != Path::Portable => path.run(Shallow::<2> { product: self, follows }),
            (3, Some(follows)) if path != Path::Portable => path.run(Shallow::<3> { product: self, follows }),
            (4, Some(follows)) if path != Path::Portable => path.run(Shallow::<4> { product: self, follows }),
            _ => path.run(self),
        }
    }

    fn follows(&self) -> Option<Follows> {
        match self.epilogue.then {
            _ if self.epilogue.gate.is_some() => None,
            Then::Activation(Activation::Tanh) => Some(Follows::Tanh),
            Then::TimesSlope(Activation::Tanh, _) => Some(Follows::TimesSlope),
            Then::Nothing | Then::Activation(_) | Then::TimesSlope(..) => None,
        }
    }
}

/// What is done with a sum.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follows {
    Tanh,
    /// Of tanh, by the value that is kept: (1 − y)(1 + y).
    TimesSlope,
}

/// A product of depth K.
struct Shallow<'a, const K: usize> {
    product: Multiply<'a>,
    follows: Follows,
}

impl<const K: usize> Work for Shallow<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let (first, width) = (self.product.first, M::Lanes::WIDTH);
        let (features, columns) = (first..first + self.product.out.rows(), self.product.out.columns());
        for from in (0..columns).step_by(ROWS) {
            let end = columns.min(from + ROWS);
            for feature in features.clone() {
                let mut at = from;
                // SAFETY: the CPU has the instructions, says the caller; so many rows of the batch are left.
                unsafe {
                    while at + BESIDE * width <= end {
                        self.block::<M::Lanes, BESIDE>(feature, at, width);
                        at += BESIDE * width;
                    }
                    while at < end {
                        self.block::<M::Lanes, 1>(feature, at, width.min(end - at));
                        at += width;
                    }
                }
            }
        }
    }
}

impl<const K: usize> Shallow<'_, K> {
    /// A feature of `N` vectors of the batch from row `at` on, the last of which has `last` rows.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`; there are such rows.
    #[inline(always)]
    unsafe fn block<L: Lanes, const N: usize>(&mut self, feature: usize, at: usize, last: usize) {
        let Multiply { x, b, epilogue, first, out } = &mut self.product;
        let panel = b.panel(feature / PANEL * PANEL);
        let bias = epilogue.bias.map_or(0.0, |bias| bias[feature]);
        // SAFETY: rows of all operands are as long as those of the result, `multiply_lanes_on` has seen to that, and of
        // the last vector no more is touched than there is.
        unsafe {
            let mut sums = [L::splat(bias); N];
            for k in 0..K {
                let w = L::splat(panel.values[k * panel.width + feature % PANEL]);
                let x: [L; N] = read(x.row(k), at, last);
                sums = std::array::from_fn(|n| sums[n].plus_product(w, x[n]));
            }
            let done = match (self.follows, epilogue.then) {
                (Follows::TimesSlope, Then::TimesSlope(_, kept)) => {
                    times_slope_of_tanh(sums, read(kept.row(feature), at, last))
                }
                _ => tanh(Beside::new(sums)).into_lanes(),
            };
            write(done, out.row(feature - *first), at, last);
        }
    }
}

/// g ∘ tanh′, by the value y of tanh.
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn times_slope_of_tanh<L: Lanes, const N: usize>(g: [L; N], y: [L; N]) -> [L; N] {
    // SAFETY: the caller's.
    unsafe {
        let one = L::splat(1.0);
        std::array::from_fn(|n| g[n].times(one.minus(y[n]).times(one.plus(y[n]))))
    }
}

/// `N` vectors of a row from `at` on, whole ones of `last` lanes, or one of fewer.
///
/// # Safety
/// The CPU has the instructions of `L`; the row is so long.
#[inline(always)]
pub(super) unsafe fn read<L: Lanes, const N: usize>(row: &[f32], at: usize, last: usize) -> [L; N] {
    debug_assert!((last == L::WIDTH || N == 1) && at + (N - 1) * L::WIDTH + last <= row.len());
    // SAFETY: the caller's.
    unsafe {
        let from = row.as_ptr().add(at);
        std::array::from_fn(|n| match last == L::WIDTH {
            true => L::load(from.add(n * L::WIDTH)),
            false => L::load_first(from, last),
        })
    }
}

/// Those vectors to a row.
///
/// # Safety
/// As [`read`].
#[inline(always)]
pub(super) unsafe fn write<L: Lanes, const N: usize>(vectors: [L; N], row: &mut [f32], at: usize, last: usize) {
    debug_assert!((last == L::WIDTH || N == 1) && at + (N - 1) * L::WIDTH + last <= row.len());
    // SAFETY: the caller's.
    unsafe {
        let to = row.as_mut_ptr().add(at);
        for (n, vector) in vectors.into_iter().enumerate() {
            if last == L::WIDTH { vector.store(to.add(n * L::WIDTH)) } else { vector.store_first(to, last) }
        }
    }
}
