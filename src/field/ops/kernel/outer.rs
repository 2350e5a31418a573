//! Sums over the rows of a tile: dW += gᵀ x and db += Σ g, into F32.
//!
//! A block of rows is summed in registers and added once, so the sums over a long batch stay accurate.

use super::held::Held;
use super::lanes::{Lanes, fetch};
use super::machine::{Machine, Path, Work};
use super::scheme::Scheme;
use super::shares::{OF_OTHERS, OF_ROWS, in_shares};
use super::tile::{Left, Right, add, by_height, tile};
use super::view::{View, ViewMut};
use super::windows::{Rows, Windows};
use std::ops::Range;

/// Rows that are summed before they are added.
const ROWS: usize = 256;
/// Rows of dW in the tallest tile.
const TALLEST: usize = 8;

/// Space for the operands of [`add_outer`] in the order in which products of pairs take them; F32 needs none.
#[derive(Debug, Default)]
pub(crate) struct Scratch<T> {
    g: Vec<T>,
    x: Vec<T>,
}

impl<T> Scratch<T> {
    /// How much memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        (self.g.capacity() + self.x.capacity()) * size_of::<T>()
    }
}

/// dW += gᵀ x for g `(rows, out)`, x `(rows, in)` and dW `(out, in)`.
pub(crate) fn add_outer<T: Held>(g: View<'_, T>, x: View<'_, T>, dw: ViewMut<'_, f32>, scratch: &mut Scratch<T>) {
    add_outer_on(T::path(Path::best()), g, x, dw, scratch);
}

/// [`add_outer`] with the windows of images for x: dW `(out, kernel · channels)`. Each row of windows has so many rows
/// of g, filled up with zeros to an even number for BF16.
pub(crate) fn add_outer_windows<T: Held>(
    g: View<'_, T>,
    x: Windows<'_, T>,
    dw: ViewMut<'_, f32>,
    scratch: &mut Scratch<T>,
) {
    add_outer_windows_on(T::path(Path::best()), g, x, dw, scratch);
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
    let (steps, step, depth) = (ROWS / T::DEPTH, x.stride(), dw.columns());
    let lines = Lines { images: 1, image: 0, block: 1, line: steps * step, steps, step, segments: 1, apart: 0, depth };
    Outer { g, x: x.slice(), lines, dw }.run_on(path, OF_ROWS);
}

/// [`add_outer_windows`] on a path that this CPU has.
pub(super) fn add_outer_windows_on<T: Held>(
    path: Path,
    g: View<'_, T>,
    x: Windows<'_, T>,
    dw: ViewMut<'_, f32>,
    scratch: &mut Scratch<T>,
) {
    let looks = *x.looks();
    let (steps, shift) = (looks.windows[1].div_ceil(T::DEPTH), looks.stride * looks.channels);
    let shape = (looks.images * looks.windows[0] * steps * T::DEPTH, looks.kernel[0] * x.depth());
    assert_eq!((shape.0, shape.1, g.columns()), (g.rows(), dw.columns(), dw.rows()));
    let lines = Lines {
        images: looks.images,
        image: T::DEPTH * looks.image(),
        block: (ROWS / T::DEPTH / steps).max(1),
        line: T::DEPTH * looks.stride * looks.row(),
        steps,
        step: T::DEPTH * T::DEPTH * shift,
        segments: looks.kernel[0],
        apart: T::DEPTH * looks.row(),
        depth: x.depth(),
    };
    let (g, x) = (T::interleaved(g, &mut scratch.g), T::gathered(x.values(), shift, &mut scratch.x));
    Outer { g, x, lines, dw }.run_on(path, OF_OTHERS);
}

/// The operands have `DEPTH` rows side by side in one, a step of the sums.
struct Outer<'a, T> {
    g: View<'a, T>,
    x: &'a [T],
    lines: Lines,
    dw: ViewMut<'a, f32>,
}

impl<T: Held> Outer<'_, T> {
    /// The sums, the rows of dW shared among threads that make so many products at least.
    fn run_on(self, path: Path, least: usize) {
        let Self { g, x, lines, dw } = self;
        let each = dw.columns() * g.rows();
        in_shares(dw, (TALLEST, each, least), |rows, dw| {
            let g = g.part(0..g.rows(), rows.start * T::DEPTH..rows.end * T::DEPTH);
            path.run(Outer { g, x, lines, dw });
        });
    }
}

/// Where the steps of x lie: in lines, of which each image has as many; only the last line of a single image is
/// shorter.
#[derive(Clone, Copy)]
struct Lines {
    images: usize,
    /// From an image to the next.
    image: usize,
    /// Lines that are summed before they are added.
    block: usize,
    /// From a line to the next.
    line: usize,
    /// Steps in a line.
    steps: usize,
    /// From a step to the next.
    step: usize,
    /// Segments of a row of x, which are those of a row of dW.
    segments: usize,
    /// From a segment to the next.
    apart: usize,
    /// Columns of a segment.
    depth: usize,
}

impl<T: Held> Work for Outer<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let steps = self.g.rows() / self.lines.images.max(1);
        for image in 0..self.lines.images {
            for first in (0..steps).step_by(self.lines.block * self.lines.steps) {
                let rows =
                    image * steps + first..image * steps + steps.min(first + self.lines.block * self.lines.steps);
                let start = image * self.lines.image + first / self.lines.steps * self.lines.line;
                for segment in 0..self.lines.segments {
                    // SAFETY: the CPU has the instructions, says the caller.
                    unsafe { self.segment::<M>(rows.clone(), start + segment * self.lines.apart, segment) };
                }
            }
        }
    }
}

impl<T: Held> Outer<'_, T> {
    /// Adds what those rows of g contribute to the columns of a segment, where x begins at `start`.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`.
    #[inline(always)]
    unsafe fn segment<M: Machine>(&mut self, rows: Range<usize>, start: usize, segment: usize) {
        let out = self.dw.rows();
        for column in (0..self.lines.depth).step_by(2 * M::Lanes::WIDTH) {
            let mut row = 0;
            while row < out {
                row += by_height!(M::Lanes, out - row, HEIGHT => {
                    // SAFETY: the CPU has the instructions, says the caller; the loops stay in the shapes.
                    unsafe { self.block::<M, HEIGHT>(rows.clone(), start, segment, row, column) };
                });
            }
        }
    }

    /// Adds what those rows of g contribute to `HEIGHT` rows of dW from `row` on, in up to two vectors from column
    /// `column` of a segment on.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; rows and columns lie in the matrices.
    #[inline(always)]
    unsafe fn block<M: Machine, const HEIGHT: usize>(
        &mut self,
        rows: Range<usize>,
        start: usize,
        segment: usize,
        row: usize,
        column: usize,
    ) {
        let width = M::Lanes::WIDTH;
        let Lines { line, steps, step, depth, .. } = self.lines;
        let (columns, stride) = (depth - column, self.dw.stride());
        // SAFETY: element (s, j · DEPTH) of an operand lies in it for every step s and every j below the number of dW's
        // rows (g) or a segment's columns (x); of the last vector, no more lanes are touched than columns are left.
        unsafe {
            let g = self.g.as_ptr().add(row * T::DEPTH);
            let x = self.x.as_ptr().add(start + column * T::DEPTH);
            let operands = |n: usize| {
                let at = rows.start + n * steps;
                let a = Left::even(g.add(at * self.g.stride()), T::DEPTH, self.g.stride());
                (steps.min(rows.end - at) * T::DEPTH, a, Right { at: x.add(n * line), step })
            };
            let lines = rows.len().div_ceil(steps);
            let to = self.dw.as_mut_ptr().add(row * stride + segment * depth + column);
            for row in 0..HEIGHT {
                // It is on its way to the cache while the sums are made that are added to it.
                fetch(to.wrapping_add(row * stride));
                fetch(to.wrapping_add(row * stride + width));
            }
            if columns >= 2 * width {
                add(summed::<T::Scheme<M>, HEIGHT, 2, true>(lines, operands, 0), to, stride, width);
            } else if columns > width {
                let last = columns - width;
                add(summed::<T::Scheme<M>, HEIGHT, 2, false>(lines, operands, last), to, stride, last);
            } else {
                add(summed::<T::Scheme<M>, HEIGHT, 1, false>(lines, operands, columns), to, stride, columns);
            }
        }
    }
}

/// The tile of sums over all lines: the depth and the operands of each.
///
/// # Safety
/// As [`tile`], for every line.
#[inline(always)]
unsafe fn summed<S: Scheme, const M: usize, const V: usize, const WHOLE: bool>(
    lines: usize,
    operands: impl Fn(usize) -> (usize, Left<S::Element, M>, Right<S::Element>),
    last: usize,
) -> [[S::Lanes; V]; M] {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[S::Lanes::splat(0.0); V]; M];
        for n in 0..lines {
            let (depth, a, b) = operands(n);
            sums = tile::<S, M, V, WHOLE>(depth, a, b, last, |m, v| sums[m][v]);
        }
        sums
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
