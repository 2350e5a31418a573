//! The same kernels with the batch in the lanes of the vectors, for layers with few inputs or outputs.
//!
//! Tiles are stored feature by feature: element (row r of the batch, feature j) is in row j, column r of the matrix. A
//! weight is then broadcast and multiplied with many rows of the batch at a time, where row-major kernels would fill
//! panels with zeros. Tiles are F32. Products have the
//! bits of the row-major kernels; sums over the batch are made in another order.

use super::epilogue::{Epilogue, Then};
use super::held::Held;
use super::lanes::Lanes;
use super::machine::{Machine, Path, Work};
use super::packed::{PANEL, Packed};
use super::scheme::Single;
use super::shares::{OF_OTHERS, Worth, in_shares};
use super::tile::{Left, Right, by_height, store, tile};
use super::view::{View, ViewMut};
use std::ops::Range;

/// Rows of the batch in a block at most.
pub(super) const ROWS: usize = 256;
/// Rows of dW in the tallest block.
const TALLEST: usize = 4;

/// out = epilogue(Bᵀ x) for x `(k, rows)` and B `(k, n)`; the bias belongs to the rows of `out` `(n, rows)`.
pub(crate) fn multiply_lanes(x: View<'_, f32>, b: &Packed<f32>, epilogue: &Epilogue<'_, f32>, out: ViewMut<'_, f32>) {
    multiply_lanes_on(f32::path(Path::best()), x, b, epilogue, out);
}

/// [`multiply_lanes`] on a path that this CPU has.
pub(super) fn multiply_lanes_on(
    path: Path,
    x: View<'_, f32>,
    b: &Packed<f32>,
    epilogue: &Epilogue<'_, f32>,
    out: ViewMut<'_, f32>,
) {
    let shape = (out.rows(), out.columns());
    assert_eq!((x.rows(), (b.columns(), x.columns())), (b.depth(), shape));
    assert!(epilogue.fits(shape.0, shape.1, shape.0));
    in_shares(out, of_product(shape.1, b, epilogue), |features, out| {
        Multiply { x, b, epilogue, first: features.start, out }.run_on(path);
    });
}

/// How threads may share the features of a product with so many rows of the batch.
pub(super) fn of_product(rows: usize, b: &Packed<f32>, epilogue: &Epilogue<'_, f32>) -> Worth {
    (1, rows * (b.depth() + epilogue.multiplications()), OF_OTHERS)
}

/// Some features of the result.
pub(super) struct Multiply<'a> {
    pub(super) x: View<'a, f32>,
    pub(super) b: &'a Packed<f32>,
    pub(super) epilogue: &'a Epilogue<'a, f32>,
    /// The first of the features.
    pub(super) first: usize,
    pub(super) out: ViewMut<'a, f32>,
}

impl Work for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let last = self.first + self.out.rows();
        for first in (0..self.out.columns()).step_by(ROWS) {
            let rows = first..self.out.columns().min(first + ROWS);
            let mut feature = self.first;
            while feature < last {
                let end = last.min((feature / PANEL + 1) * PANEL);
                while feature < end {
                    let height = by_height!(M::Lanes, end - feature, HEIGHT => {
                        // SAFETY: the CPU has the instructions, says the caller; the loops stay in the shapes.
                        unsafe { self.block::<M, HEIGHT>(feature, rows.clone()) };
                    });
                    self.finish(feature..feature + height, rows.clone());
                    feature += height;
                }
            }
        }
    }
}

impl Multiply<'_> {
    /// `HEIGHT` features from `feature` on, which lie in one panel, of some rows of the batch: products and bias.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; there are such features and rows.
    #[inline(always)]
    unsafe fn block<M: Machine, const HEIGHT: usize>(&mut self, feature: usize, rows: Range<usize>) {
        let width = M::Lanes::WIDTH;
        let panel = self.b.panel(feature / PANEL * PANEL);
        let bias: [f32; HEIGHT] = std::array::from_fn(|m| self.epilogue.start().map_or(0.0, |bias| bias[feature + m]));
        let (depth, stride) = (self.b.depth(), self.out.stride());
        let mut at = rows.start;
        while at < rows.end {
            let left = rows.end - at;
            // SAFETY: x has as many rows as the panel is deep, `multiply_lanes_on` has seen to that; of x and of the
            // result no more is touched than the features and rows that the caller says are there.
            unsafe {
                let a = Left::even(panel.values.as_ptr().add(feature % PANEL), 1, panel.width);
                let b = Right { at: self.x.as_ptr().add(at), step: self.x.stride() };
                let to = self.out.as_mut_ptr().add((feature - self.first) * stride + at);
                let start = |m: usize, _| M::Lanes::splat(bias[m]);
                if HEIGHT <= 2 && left >= 4 * width {
                    // Few sums wait for each other; these are enough to fill the time.
                    store(tile::<Single<M::Lanes>, HEIGHT, 4, true>(depth, a, b, 0, start), to, stride, width);
                    at += 4 * width;
                } else if left >= 2 * width {
                    store(tile::<Single<M::Lanes>, HEIGHT, 2, true>(depth, a, b, 0, start), to, stride, width);
                    at += 2 * width;
                } else if left > width {
                    let last = left - width;
                    store(tile::<Single<M::Lanes>, HEIGHT, 2, false>(depth, a, b, last, start), to, stride, last);
                    at = rows.end;
                } else {
                    store(tile::<Single<M::Lanes>, HEIGHT, 1, false>(depth, a, b, left, start), to, stride, left);
                    at = rows.end;
                }
            }
        }
    }

    /// What follows the sums, on them in place.
    #[inline(always)]
    fn finish(&mut self, features: Range<usize>, rows: Range<usize>) {
        if let Some(gate) = self.epilogue.gate {
            for feature in features.clone() {
                let (gate, bias) = (gate[feature], self.epilogue.bias.map_or(0.0, |bias| bias[feature]));
                let out = &mut self.out.row(feature - self.first)[rows.clone()];
                out.iter_mut().for_each(|value| *value = *value * gate + bias);
            }
        }
        match self.epilogue.then {
            Then::Nothing => {}
            // Features without a gap between them are one slice.
            Then::Activation(activation) if rows.len() == self.out.stride() => {
                let (first, count) = ((features.start - self.first) * rows.len(), features.len() * rows.len());
                activation.value_in_place(&mut self.out.slice_mut()[first..first + count]);
            }
            Then::Activation(activation) => {
                features.for_each(|feature| {
                    activation.value_in_place(&mut self.out.row(feature - self.first)[rows.clone()]);
                });
            }
            Then::TimesSlope(activation, kept) => {
                for feature in features {
                    let out = &mut self.out.row(feature - self.first)[rows.clone()];
                    activation.times_slope(&kept.row(feature)[rows.clone()], out);
                }
            }
        }
    }
}

/// dW += g xᵀ for g `(out, rows)`, x `(in, rows)` and dW `(out, in)`.
pub(crate) fn add_outer_lanes(g: View<'_, f32>, x: View<'_, f32>, dw: ViewMut<'_, f32>) {
    add_outer_lanes_on(f32::path(Path::best()), g, x, dw);
}

/// [`add_outer_lanes`] on a path that this CPU has.
pub(super) fn add_outer_lanes_on(path: Path, g: View<'_, f32>, x: View<'_, f32>, dw: ViewMut<'_, f32>) {
    assert_eq!((g.columns(), g.rows(), x.rows()), (x.columns(), dw.rows(), dw.columns()));
    in_shares(dw, of_outer(&g, &x), |rows, dw| {
        path.run(Outer { g: g.part(rows, 0..g.columns()), x, dw });
    });
}

/// How threads may share the rows of dW.
pub(super) fn of_outer(g: &View<'_, f32>, x: &View<'_, f32>) -> Worth {
    (TALLEST, x.rows() * g.columns(), OF_OTHERS)
}

struct Outer<'a> {
    g: View<'a, f32>,
    x: View<'a, f32>,
    dw: ViewMut<'a, f32>,
}

impl Work for Outer<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let (out, input) = (self.dw.rows(), self.dw.columns());
        let mut row = 0;
        while row < out {
            let (height, width) = match out - row {
                1 => (1, 4),
                2 | 3 => (2, 4),
                _ => (4, 2),
            };
            let mut column = 0;
            while column < input {
                let width = if input - column >= width { width } else { 1 };
                // SAFETY: the CPU has the instructions, says the caller; the loops stay in the shapes.
                unsafe {
                    match (height, width) {
                        (4, 2) => self.block::<M::Lanes, 4, 2>(row, column),
                        (4, _) => self.block::<M::Lanes, 4, 1>(row, column),
                        (2, 4) => self.block::<M::Lanes, 2, 4>(row, column),
                        (2, _) => self.block::<M::Lanes, 2, 1>(row, column),
                        (_, 4) => self.block::<M::Lanes, 1, 4>(row, column),
                        _ => self.block::<M::Lanes, 1, 1>(row, column),
                    }
                }
                column += width;
            }
            row += height;
        }
    }
}

impl Outer<'_> {
    /// Adds the scalar products of `M` rows of g from `row` on with `N` rows of x from `column` on.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`; there are such rows.
    #[inline(always)]
    unsafe fn block<L: Lanes, const M: usize, const N: usize>(&mut self, row: usize, column: usize) {
        let count = self.g.columns();
        let g: [_; M] = std::array::from_fn(|m| self.g.row(row + m).as_ptr());
        let x: [_; N] = std::array::from_fn(|n| self.x.row(column + n).as_ptr());
        // SAFETY: rows of both operands are `count` long, `add_outer_lanes_on` has seen to that.
        let sums = unsafe {
            let mut sums = [[L::splat(0.0); N]; M];
            let mut add = |g: [L; M], x: [L; N]| {
                for (sums, &g) in sums.iter_mut().zip(&g) {
                    for (sum, &x) in sums.iter_mut().zip(&x) {
                        *sum = sum.plus_product(g, x);
                    }
                }
            };
            let whole = count / L::WIDTH * L::WIDTH;
            for at in (0..whole).step_by(L::WIDTH) {
                add(g.map(|g| L::load(g.add(at))), x.map(|x| L::load(x.add(at))));
            }
            if whole < count {
                let rest = |from: *const f32| L::load_first(from.add(whole), count - whole);
                add(g.map(rest), x.map(rest));
            }
            sums
        };
        for (m, sums) in sums.into_iter().enumerate() {
            for (dw, sum) in self.dw.row(row + m)[column..].iter_mut().zip(sums) {
                // SAFETY: the caller's.
                *dw += unsafe { sum.total() };
            }
        }
    }
}

/// db += Σ over the batch of g `(out, rows)`.
pub(crate) fn add_column_sums_lanes(g: View<'_, f32>, db: &mut [f32]) {
    add_column_sums_lanes_on(f32::path(Path::best()), g, db);
}

/// [`add_column_sums_lanes`] on a path that this CPU has.
pub(super) fn add_column_sums_lanes_on(path: Path, g: View<'_, f32>, db: &mut [f32]) {
    assert_eq!(g.rows(), db.len());
    path.run(RowSums { g, db });
}

struct RowSums<'a> {
    g: View<'a, f32>,
    db: &'a mut [f32],
}

impl Work for RowSums<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(self) {
        let width = M::Lanes::WIDTH;
        for (n, db) in self.db.iter_mut().enumerate() {
            let row = self.g.row(n);
            // SAFETY: the CPU has the instructions, says the caller; `whole` elements are four vectors many times, and
            // no chunk of the others is longer than a vector.
            unsafe {
                let mut sums = [M::Lanes::splat(0.0); 4];
                let whole = row.len() / (4 * width) * (4 * width);
                for at in (0..whole).step_by(4 * width) {
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum = sum.plus(M::Lanes::load(row.as_ptr().add(at + n * width)));
                    }
                }
                for (sum, chunk) in sums.iter_mut().zip(row[whole..].chunks(width)) {
                    *sum = sum.plus(M::Lanes::load_first(chunk.as_ptr(), chunk.len()));
                }
                let [a, b, c, d] = sums;
                *db += a.plus(b).plus(c.plus(d)).total();
            }
        }
    }
}
