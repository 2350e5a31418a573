//! What tiles hold: F32, or BF16. (F16 is held in F32.)

use super::machine::{Machine, Path, Work};
use super::scheme::{Scheme, Single};
use super::view::View;
use half::bf16;

/// An element of a tile.
pub(crate) trait Held: std::fmt::Debug + Copy + Default + Send + Sync + 'static {
    /// How products of such elements are summed.
    type Scheme<M: Machine>: Scheme<Element = Self, Lanes = M::Lanes>;
    /// Elements that lie side by side for one product: see [`Scheme::DEPTH`].
    const DEPTH: usize;

    /// Rounded to nearest.
    fn of(value: f32) -> Self;
    /// Exactly.
    fn wide(self) -> f32;
    /// The elements, if they are what sums are made in.
    fn floats(values: &[Self]) -> Option<&[f32]>;
    /// The elements to be written, if sums can be made in them.
    fn floats_mut(values: &mut [Self]) -> Option<&mut [f32]>;
    /// The path for such elements on a CPU that has `best`.
    fn path(best: Path) -> Path;
    /// The matrix with `DEPTH` rows side by side, element by element, in place of one; the last filled up with zeros.
    fn interleaved<'a>(matrix: View<'a, Self>, scratch: &'a mut Vec<Self>) -> View<'a, Self>;
    /// Each element with those that follow it at distances of `apart`, `DEPTH` side by side; beyond the end lie zeros.
    fn gathered<'a>(values: &'a [Self], apart: usize, scratch: &'a mut Vec<Self>) -> &'a [Self];
}

impl Held for f32 {
    type Scheme<M: Machine> = Single<M::Lanes>;
    const DEPTH: usize = 1;

    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn floats(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
    #[inline(always)]
    fn floats_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }
    fn path(best: Path) -> Path {
        #[cfg(target_arch = "x86_64")]
        if best == Path::Avx512Bf16 {
            return Path::Avx512;
        }
        best
    }
    fn interleaved<'a>(matrix: View<'a, Self>, _: &'a mut Vec<Self>) -> View<'a, Self> {
        matrix
    }
    fn gathered<'a>(values: &'a [Self], _: usize, _: &'a mut Vec<Self>) -> &'a [Self] {
        values
    }
}

impl Held for bf16 {
    type Scheme<M: Machine> = M::Pairs;
    const DEPTH: usize = 2;

    /// As `bf16::from_f32`, without a branch.
    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        // A NaN keeps its upper bits and becomes a quiet one.
        let bits = if value.is_nan() { bits | 0x40_0000 } else { rounded };
        Self::from_bits((bits >> 16) as u16)
    }
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn floats(_: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn floats_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
    fn path(best: Path) -> Path {
        best
    }
    fn interleaved<'a>(matrix: View<'a, Self>, scratch: &'a mut Vec<Self>) -> View<'a, Self> {
        let (pairs, width) = (matrix.rows().div_ceil(2), 2 * matrix.columns());
        scratch.resize(pairs * width, Self::ZERO);
        for (pair, out) in scratch.chunks_exact_mut(width.max(1)).enumerate() {
            let second = if 2 * pair + 1 < matrix.rows() { matrix.row(2 * pair + 1) } else { &[] };
            pair_up(matrix.row(2 * pair), second, out);
        }
        View::new(scratch, pairs, width, width)
    }
    fn gathered<'a>(values: &'a [Self], apart: usize, scratch: &'a mut Vec<Self>) -> &'a [Self] {
        scratch.resize(2 * values.len(), Self::ZERO);
        pair_up(values, values.get(apart..).unwrap_or_default(), scratch);
        scratch
    }
}

/// Each of the first with one of the second, or zero beyond their end; twice as many as of the first.
fn pair_up(first: &[bf16], second: &[bf16], out: &mut [bf16]) {
    Path::best().run(Pairs { first, second, out });
}

struct Pairs<'a> {
    first: &'a [bf16],
    second: &'a [bf16],
    out: &'a mut [bf16],
}

impl Work for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(self) {
        let (both, alone) = self.first.split_at(self.second.len());
        let (of_both, of_alone) = self.out.as_chunks_mut::<2>().0.split_at_mut(both.len());
        for ((out, &first), &second) in of_both.iter_mut().zip(both).zip(self.second) {
            *out = [first, second];
        }
        for (out, &first) in of_alone.iter_mut().zip(alone) {
            *out = [first, bf16::ZERO];
        }
    }
}
