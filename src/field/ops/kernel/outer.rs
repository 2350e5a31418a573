//! Sums over the rows of a tile: dW += gᵀ x and db += Σ g, into F32.
//!
//! A block of rows is summed in registers and added once, so the sums over a long batch stay accurate.

use super::held::Held;
use super::lanes::Lanes;
use super::machine::{Machine, Path, Work};
use super::tile::{Left, Right, add, by_height, tile};
use super::view::{View, ViewMut};

/// Rows that are summed before they are added.
const ROWS: usize = 256;

/// Space for the operands of [`add_outer`] in the order in which products of pairs take them; F32 needs none.
#[derive(Debug, Default)]
pub(crate) struct Scratch<T> {
    g: Vec<T>,
    x: Vec<T>,
}

/// dW += gᵀ x for g `(rows, out)`, x `(rows, in)` and dW `(out, in)`.
pub(crate) fn add_outer<T: Held>(g: View<'_, T>, x: View<'_, T>, dw: ViewMut<'_, f32>, scratch: &mut Scratch<T>) {
    add_outer_on(T::path(Path::best()), g, x, dw, scratch);
}

/// [`add_outer`] on a path that this CPU has.
pub(super) fn add_outer_on<T: Held>(
    path: Path,
    g: View<'_, T>,
    x: View<'_, T>,
    dw: ViewMut<'_, f32>,
    scratch: &mut Scratch<T>,
) {
    assert_eq!((g.rows(), g.columns(), x.columns()), (x.rows(), dw.rows(), dw.columns()));
    let (g, x) = (T::interleaved(g, &mut scratch.g), T::interleaved(x, &mut scratch.x));
    path.run(Outer { g, x, dw });
}

/// The operands have `DEPTH` rows side by side in one.
struct Outer<'a, T> {
    g: View<'a, T>,
    x: View<'a, T>,
    dw: ViewMut<'a, f32>,
}

impl<T: Held> Work for Outer<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let steps = ROWS / T::DEPTH;
        for first in (0..self.g.rows()).step_by(steps) {
            let steps = steps.min(self.g.rows() - first);
            let (out, columns) = (self.dw.rows(), self.dw.columns());
            for column in (0..columns).step_by(2 * M::Lanes::WIDTH) {
                let mut row = 0;
                while row < out {
                    row += by_height!(M::Lanes, out - row, HEIGHT => {
                        // SAFETY: the CPU has the instructions, says the caller; the loops stay in the shapes.
                        unsafe { self.block::<M, HEIGHT>(first, steps, row, column) };
                    });
                }
            }
        }
    }
}

impl<T: Held> Outer<'_, T> {
    /// Adds what `steps` rows of the operands from `first` on contribute to `HEIGHT` rows of dW from `row` on, in up to
    /// two vectors of columns.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; rows and columns lie in the matrices.
    #[inline(always)]
    unsafe fn block<M: Machine, const HEIGHT: usize>(&mut self, first: usize, steps: usize, row: usize, column: usize) {
        let width = M::Lanes::WIDTH;
        let columns = self.dw.columns() - column;
        let stride = self.dw.stride();
        // SAFETY: element (s, j · DEPTH) of an operand lies in it for every s < first + steps and every j below the
        // number of dW's rows (g) or columns (x); of the last vector, no more lanes are touched than columns are left.
        unsafe {
            let g = self.g.as_ptr().add(first * self.g.stride() + row * T::DEPTH);
            let x = self.x.as_ptr().add(first * self.x.stride() + column * T::DEPTH);
            let a = Left { at: g, row: T::DEPTH, step: self.g.stride() };
            let b = Right { at: x, step: self.x.stride() };
            let to = self.dw.as_mut_ptr().add(row * stride + column);
            let depth = steps * T::DEPTH;
            let zero = |_, _| M::Lanes::splat(0.0);
            if columns >= 2 * width {
                add(tile::<T::Scheme<M>, HEIGHT, 2, true>(depth, a, b, 0, zero), to, stride, width);
            } else if columns > width {
                add(
                    tile::<T::Scheme<M>, HEIGHT, 2, false>(depth, a, b, columns - width, zero),
                    to,
                    stride,
                    columns - width,
                );
            } else {
                add(tile::<T::Scheme<M>, HEIGHT, 1, false>(depth, a, b, columns, zero), to, stride, columns);
            }
        }
    }
}

/// db += Σ over the rows of g `(rows, out)`.
pub(crate) fn add_column_sums<T: Held>(g: View<'_, T>, db: &mut [f32]) {
    add_column_sums_on(T::path(Path::best()), g, db);
}

/// [`add_column_sums`] on a path that this CPU has.
pub(super) fn add_column_sums_on<T: Held>(path: Path, g: View<'_, T>, db: &mut [f32]) {
    assert_eq!(g.columns(), db.len());
    path.run(ColumnSums { g, db });
}

struct ColumnSums<'a, T> {
    g: View<'a, T>,
    db: &'a mut [f32],
}

impl<T: Held> Work for ColumnSums<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(self) {
        const COLUMNS: usize = 64;
        for first in (0..self.g.rows()).step_by(ROWS) {
            let rows = first..self.g.rows().min(first + ROWS);
            for (n, db) in self.db.chunks_mut(COLUMNS).enumerate() {
                let columns = n * COLUMNS..n * COLUMNS + db.len();
                let mut sums = [0.0; COLUMNS];
                for row in rows.clone() {
                    let row = &self.g.row(row)[columns.clone()];
                    // Of a known length, the sums stay in registers.
                    if let Ok(row) = <&[T; COLUMNS]>::try_from(row) {
                        for (sum, value) in sums.iter_mut().zip(row) {
                            *sum += value.wide();
                        }
                    } else {
                        for (sum, value) in sums.iter_mut().zip(row) {
                            *sum += value.wide();
                        }
                    }
                }
                for (db, sum) in db.iter_mut().zip(sums) {
                    *db += sum;
                }
            }
        }
    }
}
