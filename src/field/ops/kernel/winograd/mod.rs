//! 3 × 3 convolutions with 16 products where 36 are summed: Winograd's minimal filtering F(2 × 2, 3 × 3), in F32.
//!
//! An image is cut into tiles of 2 × 2 results, each of which sees 4 × 4 pixels d. With w the kernel and ∘ the product
//! by elements, summed over channels,
//!
//! y = Aᵀ [(G w Gᵀ) ∘ (Bᵀ d B)] A,  dL/dw += Eᵀ [Σ over the tiles of (H g Hᵀ) ∘ (Bᵀ d B)] E
//!
//! where g are the 2 × 2 cotangents of a tile, and
//!
//! ```text
//! Bᵀ = 1  0 −1  0   G = 1  0  0   Aᵀ = 1  1  1  0   H = 1  0   Eᵀ = 1  1  1  0
//!      0  1  1  0       ½  ½  ½        0  1 −1 −1       ½  ½        0  1 −1  0
//!      0 −1  1  0       ½ −½  ½                         ½ −½        0  1  1 −1
//!      0  1  0 −1       0  0  1                         0  1
//! ```
//!
//! At each of the 16 points that is a product of matrices `(tiles, channels)`, of a few tiles at a time, so that they
//! and their results stay in the nearer caches. Sums are nine times shorter than those of 3 × 3 products, and round
//! less.
//!
//! Small matrices are filled in plain loops: through closures (`array::from_fn`) some builds call a function for each
//! vector, and convolutions take twice as long.
//!
//! # Reference
//! A. Lavin, S. Gray, *Fast Algorithms for Convolutional Neural Networks*, arXiv 1509.09308.

mod convolve;
mod outer;

use super::lanes::Lanes;
use super::windows::{Looks, Windows};
use std::ops::Range;

pub(crate) use convolve::{convolve_in_tiles, of_kernel, shares_of_images, space};
pub(crate) use outer::{add_outer_in_tiles, shares_of_outputs, space_of_sums};
#[cfg(test)]
pub(super) use {convolve::convolve_in_tiles_on, outer::add_outer_in_tiles_on};

/// Points at which products are made.
pub(crate) const POINTS: usize = 16;
/// Tiles that are taken at a time; with so many floats each, a line of the cache many times.
const TILES: usize = 16;

/// Whether images that are looked at so can be filtered so: windows of 3 × 3, one pixel apart, in even numbers.
pub(crate) fn fits(looks: &Looks) -> bool {
    looks.kernel == [3, 3] && looks.stride == 1 && looks.windows.iter().all(|n| n.is_multiple_of(2))
}

/// Elements from a point to the next, for so many a tile: an odd number of lines of the cache, so that the points of a
/// tile do not fall on the same ones.
#[inline(always)]
fn apart(elements: usize) -> usize {
    TILES * (elements | 1)
}

/// The tiles of all images, some at a time.
fn blocks(looks: &Looks) -> impl Iterator<Item = Range<usize>> + use<> {
    let tiles = looks.images * (looks.windows[0] / 2) * (looks.windows[1] / 2);
    (0..tiles).step_by(TILES).map(move |first| first..tiles.min(first + TILES))
}

/// Where a tile's first result is: image, row and column.
#[inline(always)]
fn corner(tile: usize, looks: &Looks) -> [usize; 3] {
    let [down, across] = looks.windows.map(|n| n / 2);
    [tile / across / down, 2 * (tile / across % down), 2 * (tile % across)]
}

/// The number of a tile's first result among those of all images.
#[inline(always)]
fn first_result(tile: usize, looks: &Looks) -> usize {
    let [image, row, column] = corner(tile, looks);
    (image * looks.windows[0] + row) * looks.windows[1] + column
}

/// Loads `count` lanes, all of them if they are so many.
#[inline(always)]
unsafe fn load<L: Lanes>(from: *const f32, count: usize) -> L {
    // SAFETY: the caller's.
    unsafe { if count >= L::WIDTH { L::load(from) } else { L::load_first(from, count) } }
}

/// Stores `count` lanes, all of them if they are so many.
#[inline(always)]
unsafe fn put<L: Lanes>(lanes: L, to: *mut f32, count: usize) {
    // SAFETY: the caller's.
    unsafe { if count >= L::WIDTH { lanes.store(to) } else { lanes.store_first(to, count) } }
}

/// Bᵀ d B of some tiles, point by point: element c of tile n at point p is at p · `apart(channels)` + n · channels + c.
///
/// # Safety
/// The CPU has the instructions of `L`; there are such tiles, [`TILES`] at most, and `v` is [`POINTS`] times
/// `apart(channels)` long.
#[inline(always)]
unsafe fn transform<L: Lanes>(x: &Windows<'_, f32>, tiles: Range<usize>, v: &mut [f32]) {
    let looks = *x.looks();
    let channels = looks.channels;
    for (n, tile) in tiles.enumerate() {
        let [image, row, column] = corner(tile, &looks);
        let from = x.image(image).as_ptr();
        let start = row * looks.row() + column * channels;
        for c in (0..channels).step_by(L::WIDTH) {
            let count = channels - c;
            // SAFETY: the 4 × 4 pixels of a tile lie in its image, and of each of them no more channels are touched
            // than there are.
            unsafe {
                let d = load_square::<L, 4>(from.add(start + c), [looks.row(), channels], count);
                let points = both_ways::<OfPixels, _, 4, 4>(d);
                put_points(points, v.as_mut_ptr().add(n * channels + c), apart(channels), count);
            }
        }
    }
}

/// A matrix T, of which tiles take T d Tᵀ.
trait OneWay<const N: usize, const M: usize> {
    /// T d
    ///
    /// # Safety
    /// The CPU has the instructions of `L`.
    unsafe fn times<L: Lanes>(d: [L; N]) -> [L; M];
}

/// Bᵀ
struct OfPixels;

impl OneWay<4, 4> for OfPixels {
    #[inline(always)]
    unsafe fn times<L: Lanes>([a, b, c, d]: [L; 4]) -> [L; 4] {
        // SAFETY: the caller's.
        unsafe { [a.minus(c), b.plus(c), c.minus(b), b.minus(d)] }
    }
}

/// T d Tᵀ
///
/// # Safety
/// The CPU has the instructions of `L`.
#[inline(always)]
unsafe fn both_ways<T: OneWay<N, M>, L: Lanes, const N: usize, const M: usize>(d: [[L; N]; N]) -> [[L; M]; M] {
    // SAFETY: the caller's.
    unsafe {
        let zero = L::splat(0.0);
        let (mut columns, mut both) = ([[zero; N]; M], [[zero; M]; M]);
        for j in 0..N {
            let mut column = [zero; N];
            for (to, line) in column.iter_mut().zip(&d) {
                *to = line[j];
            }
            for (line, value) in columns.iter_mut().zip(T::times(column)) {
                line[j] = value;
            }
        }
        for (to, line) in both.iter_mut().zip(columns) {
            *to = T::times(line);
        }
        both
    }
}

/// `N` × `N` vectors, from which to the next one down and across there are so many elements: of each `count` lanes, all
/// if they are so many.
///
/// # Safety
/// The CPU has the instructions of `L`; so much lies in memory.
#[inline(always)]
unsafe fn load_square<L: Lanes, const N: usize>(
    from: *const f32,
    [down, across]: [usize; 2],
    count: usize,
) -> [[L; N]; N] {
    // SAFETY: the caller's.
    unsafe {
        let mut square = [[L::splat(0.0); N]; N];
        for (i, line) in square.iter_mut().enumerate() {
            for (j, to) in line.iter_mut().enumerate() {
                *to = load(from.add(i * down + j * across), count);
            }
        }
        square
    }
}

/// Stores the first `count` lanes of every point, `apart` from each other.
///
/// # Safety
/// The CPU has the instructions of `L`; there is memory for them.
#[inline(always)]
// Two plain loops: over `flatten` the compiler keeps the points in memory, and convolutions take half as long again.
unsafe fn put_points<L: Lanes>(points: [[L; 4]; 4], to: *mut f32, apart: usize, count: usize) {
    for (i, line) in points.into_iter().enumerate() {
        for (j, lanes) in line.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { put(lanes, to.add((4 * i + j) * apart), count) }
        }
    }
}
