//! The weight of a layer as the right-hand operand B of y = x B, packed once for many products.

use super::held::Held;
use super::view::View;

/// Columns of a panel; the last one has half of them where that is enough.
pub(super) const PANEL: usize = 32;

/// B `(k, n)` in panels of 32 columns, each contiguous along k; what is missing at the edges is zero.
///
/// Within a panel, `T::DEPTH` elements of a column lie side by side: BF16 in pairs, as `vdpbf16ps` takes them.
#[derive(Debug)]
pub(crate) struct Packed<T> {
    /// The panels, from `start` on, which makes them begin at a cache line.
    values: Vec<T>,
    start: usize,
    depth: usize,
    columns: usize,
}

/// Some columns of B.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a, T> {
    /// How many columns it has with the zeros: 16 or 32.
    pub(super) width: usize,
    pub(super) values: &'a [T],
}

impl<T: Held> Packed<T> {
    /// B = Wᵀ for W `(out, in)`: y = x Wᵀ.
    pub(crate) fn transposed<S: Copy + Into<f32>>(weight: View<'_, S>) -> Self {
        let (values, stride) = (weight.slice(), weight.stride());
        Self::pack(weight.columns(), weight.rows(), |k, n| values[n * stride + k].into())
    }

    /// B = W for W `(out, in)`: the pullback g W.
    pub(crate) fn straight<S: Copy + Into<f32>>(weight: View<'_, S>) -> Self {
        let (values, stride) = (weight.slice(), weight.stride());
        Self::pack(weight.rows(), weight.columns(), |k, n| values[k * stride + n].into())
    }

    /// B of the elements at (k, n).
    pub(crate) fn pack(depth: usize, columns: usize, at: impl Fn(usize, usize) -> f32) -> Self {
        const LINE: usize = 64;
        let padded = columns.div_ceil(PANEL / 2) * (PANEL / 2);
        let steps = depth.div_ceil(T::DEPTH);
        let len = padded * steps * T::DEPTH;
        let spare = LINE / size_of::<T>();
        let mut values = vec![T::default(); len + spare];
        let start = values.as_ptr().align_offset(LINE).min(spare);
        let mut rest = &mut values[start..];
        for first in (0..padded).step_by(PANEL) {
            let width = PANEL.min(padded - first);
            for begin in (0..depth).step_by(T::DEPTH) {
                let (out, behind) = rest.split_at_mut(width * T::DEPTH);
                rest = behind;
                for k in begin..depth.min(begin + T::DEPTH) {
                    let out = out.chunks_exact_mut(T::DEPTH);
                    (first..columns).zip(out).for_each(|(n, out)| out[k - begin] = T::of(at(k, n)));
                }
            }
        }
        Self { values, start, depth, columns }
    }

    /// k: the length of the rows that it is multiplied with.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// n: the length of the rows that come out.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// How much memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.values.capacity() * size_of::<T>()
    }

    /// The panel that begins with column `column`, a multiple of [`PANEL`] below n.
    #[inline(always)]
    pub(super) fn panel(&self, column: usize) -> Panel<'_, T> {
        let height = self.depth.div_ceil(T::DEPTH) * T::DEPTH;
        let width = if self.columns - column > PANEL / 2 { PANEL } else { PANEL / 2 };
        Panel { width, values: &self.values[self.start + column * height..][..width * height] }
    }
}
