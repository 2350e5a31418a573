//! Transposes: from row-major to feature by feature and back, in blocks as large as the vectors.

use super::held::Held;
use super::lanes::Lanes;
use super::machine::{Machine, Path, Work};
use super::view::{View, ViewMut};

/// Lanes of a vector at most.
const WIDEST: usize = 16;

/// The transpose of `from` `(rows, columns)` in `to` `(columns, rows)`.
pub(crate) fn transpose<T: Held>(from: View<'_, T>, to: ViewMut<'_, T>) {
    transpose_on(T::path(Path::best()), from, to);
}

/// [`transpose`] on a path that this CPU has.
pub(super) fn transpose_on<T: Held>(path: Path, from: View<'_, T>, to: ViewMut<'_, T>) {
    assert_eq!((from.rows(), from.columns()), (to.columns(), to.rows()));
    // Of few features the lanes are filled by rows.
    match (from.columns(), to.columns()) {
        (2, _) if from.stride() == 2 => path.run(Apart::<T, 2> { from, to }),
        (3, _) if from.stride() == 3 => path.run(Apart::<T, 3> { from, to }),
        (4, _) if from.stride() == 4 => path.run(Apart::<T, 4> { from, to }),
        (_, 2) if to.stride() == 2 => path.run(Together::<T, 2> { from, to }),
        (_, 3) if to.stride() == 3 => path.run(Together::<T, 3> { from, to }),
        (_, 4) if to.stride() == 4 => path.run(Together::<T, 4> { from, to }),
        _ => path.run(Transpose { from, to }),
    }
}

/// From rows of `N` features without a gap.
struct Apart<'a, T, const N: usize> {
    from: View<'a, T>,
    to: ViewMut<'a, T>,
}

impl<T: Held, const N: usize> Work for Apart<'_, T, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        // All features of a row at once: loads of whole vectors that are shuffled, and no gathering.
        let (rows, stride) = (self.to.columns(), self.to.stride());
        let mut features = self.to.slice_mut().chunks_mut(stride.max(1));
        let mut to: [&mut [T]; N] = std::array::from_fn(|_| &mut features.next().unwrap_or_default()[..rows]);
        for (row, from) in self.from.slice().as_chunks::<N>().0.iter().enumerate().take(rows) {
            for (to, from) in to.iter_mut().zip(from) {
                to[row] = *from;
            }
        }
    }
}

/// To rows of `N` features without a gap.
struct Together<'a, T, const N: usize> {
    from: View<'a, T>,
    to: ViewMut<'a, T>,
}

impl<T: Held, const N: usize> Work for Together<'_, T, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let rows = self.to.rows();
        let from: [&[T]; N] = std::array::from_fn(|n| &self.from.row(n)[..rows]);
        for (row, to) in self.to.slice_mut().as_chunks_mut::<N>().0[..rows].iter_mut().enumerate() {
            *to = std::array::from_fn(|n| from[n][row]);
        }
    }
}

struct Transpose<'a, T> {
    from: View<'a, T>,
    to: ViewMut<'a, T>,
}

impl<T: Held> Work for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let size = M::Lanes::WIDTH;
        let (rows, columns) = (self.from.rows(), self.from.columns());
        for row in (0..rows).step_by(size) {
            for column in (0..columns).step_by(size) {
                if rows - row >= size && columns - column >= size {
                    // SAFETY: the CPU has the instructions, says the caller.
                    unsafe { self.block::<M::Lanes>(row, column) };
                    continue;
                }
                for column in column..columns.min(column + size) {
                    let rows = row..rows.min(row + size);
                    for (row, to) in rows.clone().zip(&mut self.to.row(column)[rows]) {
                        *to = self.from.row(row)[column];
                    }
                }
            }
        }
    }
}

impl<T: Held> Transpose<'_, T> {
    /// The square block at (row, column), as large as a vector.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`.
    #[inline(always)]
    unsafe fn block<L: Lanes>(&mut self, row: usize, column: usize) {
        let mut wide = [0.0; WIDEST];
        // SAFETY: the caller's.
        let mut lanes = [unsafe { L::splat(0.0) }; WIDEST];
        for (n, lanes) in lanes.iter_mut().enumerate().take(L::WIDTH) {
            for (wide, value) in wide.iter_mut().zip(&self.from.row(row + n)[column..column + L::WIDTH]) {
                *wide = value.wide();
            }
            // SAFETY: `wide` is as long as any vector.
            *lanes = unsafe { L::load(wide.as_ptr()) };
        }
        // Each round moves the top bit of a row's number to the bottom of the lane's, and that of the lane's to the
        // row's.
        let mut size = 1;
        while size < L::WIDTH {
            let before = lanes;
            for n in 0..L::WIDTH / 2 {
                // SAFETY: the caller's.
                (lanes[2 * n], lanes[2 * n + 1]) = unsafe { before[n].interleaved(before[n + L::WIDTH / 2]) };
            }
            size *= 2;
        }
        for (n, lanes) in lanes.into_iter().enumerate().take(L::WIDTH) {
            // SAFETY: as above.
            unsafe { lanes.store(wide.as_mut_ptr()) };
            for (to, &wide) in self.to.row(column + n)[row..row + L::WIDTH].iter_mut().zip(&wide) {
                *to = T::of(wide);
            }
        }
    }
}
