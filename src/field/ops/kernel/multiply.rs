//! y = f(x B + b), row-major: blocks of rows times panels of B.
//!
//! x is read in place; a block of rows takes a group of panels that stays in the second cache, so that its sums lie in
//! the first one when the epilogue takes them. Where the result is F32 and a group of its columns fills vectors, they
//! are made there.

use super::epilogue::{Epilogue, Sums};
use super::held::Held;
use super::lanes::Lanes;
use super::machine::{Machine, Path, Work};
use super::packed::{PANEL, Packed};
use super::scheme::Scheme;
use super::shares::{OF_OTHERS, OF_ROWS, in_shares};
use super::tile::{Left, Right, by_height, store, tile};
use super::view::{View, ViewMut};
use super::windows::{Rows, Windows};

/// Rows of a block at most.
const ROWS: usize = 8;
/// Columns of a group of panels at most.
const COLUMNS: usize = 256;
/// Elements of a group of panels at most: a quarter of a MiB in F32.
const GROUP: usize = 1 << 16;

/// out = epilogue(x B) for x `(rows, k)` and B `(k, n)`.
///
/// A row of the result depends on that row of x alone, to the last bit.
pub(crate) fn multiply<T: Held>(x: View<'_, T>, b: &Packed<T>, epilogue: &Epilogue<'_, T>, out: ViewMut<'_, T>) {
    let each = out.columns() * (b.depth() / T::DEPTH + epilogue.multiplications());
    in_shares(out, (ROWS, each, OF_ROWS), |rows, out| {
        let x = x.part(rows.clone(), 0..x.columns());
        multiply_on(T::path(Path::best()), x, b, &epilogue.part(rows), out);
    });
}

/// [`multiply`] with the windows of images for rows: a convolution.
pub(crate) fn convolve<T: Held>(x: Windows<'_, T>, b: &Packed<T>, epilogue: &Epilogue<'_, T>, out: ViewMut<'_, T>) {
    let windows = x.looks().windows[0] * x.looks().windows[1];
    let each = out.columns() * (b.depth() / T::DEPTH + epilogue.multiplications());
    in_shares(out, (windows, each, OF_OTHERS), |rows, out| {
        let x = x.part(rows.start / windows..rows.end / windows);
        multiply_on(T::path(Path::best()), x, b, &epilogue.part(rows), out);
    });
}

/// [`multiply`] on a path that this CPU has.
pub(super) fn multiply_on<T: Held>(
    path: Path,
    x: impl Rows<T>,
    b: &Packed<T>,
    epilogue: &Epilogue<'_, T>,
    out: ViewMut<'_, T>,
) {
    let shape = (out.rows(), out.columns());
    assert_eq!((x.segments() * x.depth(), (x.rows(), b.columns())), (b.depth(), shape));
    assert!(x.segments() == 1 || x.depth().is_multiple_of(T::DEPTH));
    assert!(epilogue.fits(shape.0, shape.1, shape.1));
    path.run(Multiply { x, b, epilogue, out });
}

struct Multiply<'a, T, X> {
    x: X,
    b: &'a Packed<T>,
    epilogue: &'a Epilogue<'a, T>,
    out: ViewMut<'a, T>,
}

impl<T: Held, X: Rows<T>> Work for Multiply<'_, T, X> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let (mut start, mut sums, mut slopes) = ([0.0; COLUMNS], [0.0; ROWS * COLUMNS], [0.0; ROWS * COLUMNS]);
        let group = (GROUP / self.b.depth().max(1) / PANEL * PANEL).clamp(PANEL, COLUMNS);
        let (rows, columns, apart) = (self.out.rows(), self.out.columns(), self.out.stride());
        for first in (0..columns).step_by(group) {
            let columns = first..columns.min(first + group);
            let padded = columns.len().next_multiple_of(PANEL / 2);
            if let Some(bias) = self.epilogue.start() {
                start[..columns.len()].copy_from_slice(&bias[columns.clone()]);
            }
            let mut row = 0;
            while row < rows {
                let there = T::floats_mut(self.out.slice_mut()).filter(|_| padded == columns.len());
                let is_there = there.is_some();
                let (values, stride) = match there {
                    Some(values) => (&mut values[row * apart + first..], apart.max(padded)),
                    None => (&mut sums[..], padded),
                };
                let height = by_height!(M::Lanes, rows - row, HEIGHT => {
                    for panel in columns.clone().step_by(PANEL) {
                        let at = panel - first;
                        let (start, sums) = (&start[at..], &mut values[at..]);
                        // SAFETY: the CPU has the instructions, says the caller; the block lies in x, the panel in the
                        // group.
                        unsafe { block::<T, M, HEIGHT>(&self.x, self.b, (row, panel), start, sums, stride) };
                    }
                });
                let values = &mut values[..(height - 1) * stride + padded];
                let (block, sums_of) =
                    (row..row + height, Sums { values, stride, length: padded, slopes: &mut slopes });
                self.epilogue.finish(sums_of, block.clone(), columns.clone());
                if !is_there {
                    for (row, values) in block.zip(sums.chunks_exact(stride)) {
                        // SAFETY: the CPU has the instructions, says the caller.
                        unsafe { T::Scheme::<M>::narrow(values, &mut self.out.row(row)[columns.clone()]) };
                    }
                }
                row += height;
            }
        }
    }
}

/// The products of `HEIGHT` rows of x from `row` on with the panel of B at `column`, added to `start`, to the first
/// columns of `sums`.
///
/// # Safety
/// The CPU has the instructions of `M`; there are so many rows, and that panel.
#[inline(always)]
unsafe fn block<T: Held, M: Machine, const HEIGHT: usize>(
    x: &impl Rows<T>,
    b: &Packed<T>,
    (row, column): (usize, usize),
    start: &[f32],
    sums: &mut [f32],
    stride: usize,
) {
    let panel = b.panel(column);
    let (depth, apart) = (x.depth(), x.apart());
    let values = x.values().as_ptr();
    assert!(sums.len() >= (HEIGHT - 1) * stride + panel.width && start.len() >= panel.width);
    let mut at = 0;
    while at < panel.width {
        // SAFETY: x has the rows, and in them as much as the panel is deep, `multiply_on` has seen to that; the panel
        // is as wide as the vectors from `at` on, and start and sums are wide enough for them, asserted above.
        unsafe {
            let rows = std::array::from_fn(|m| values.add(x.start(row + m)));
            let panel_at = panel.values.as_ptr().add(at * T::DEPTH);
            let to = sums.as_mut_ptr().add(at);
            let start = |_, v| M::Lanes::load(start.as_ptr().add(at + v * M::Lanes::WIDTH));
            let segment = |n: usize| {
                let a = Left { rows: rows.map(|row: *const T| row.add(n * apart)), step: T::DEPTH };
                (a, Right { at: panel_at.add(n * depth * panel.width), step: panel.width * T::DEPTH })
            };
            if panel.width - at >= 2 * M::Lanes::WIDTH {
                let sums = segmented::<T::Scheme<M>, HEIGHT, 2>(x.segments(), depth, segment, start);
                store(sums, to, stride, M::Lanes::WIDTH);
                at += 2 * M::Lanes::WIDTH;
            } else {
                let sums = segmented::<T::Scheme<M>, HEIGHT, 1>(x.segments(), depth, segment, start);
                store(sums, to, stride, M::Lanes::WIDTH);
                at += M::Lanes::WIDTH;
            }
        }
    }
}

/// The tile of sums over all segments, which begin at `start`.
///
/// # Safety
/// As [`tile`], for the operands of every segment.
#[inline(always)]
unsafe fn segmented<S: Scheme, const M: usize, const V: usize>(
    segments: usize,
    depth: usize,
    segment: impl Fn(usize) -> (Left<S::Element, M>, Right<S::Element>),
    start: impl Fn(usize, usize) -> S::Lanes,
) -> [[S::Lanes; V]; M] {
    let mut sums = std::array::from_fn(|m| std::array::from_fn(|v| start(m, v)));
    for n in 0..segments {
        let (a, b) = segment(n);
        // SAFETY: the caller's.
        sums = unsafe { tile::<S, M, V, true>(depth, a, b, 0, |m, v| sums[m][v]) };
    }
    sums
}
