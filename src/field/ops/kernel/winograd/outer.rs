//! dL/dw by minimal filtering.

use super::{
    OneWay, POINTS, apart, blocks, both_ways, first_result, fits, load, load_square, put, put_points, transform,
};
use crate::field::ops::kernel::held::Held;
use crate::field::ops::kernel::lanes::Lanes;
use crate::field::ops::kernel::machine::{Machine, Path, Work};
use crate::field::ops::kernel::scheme::Single;
use crate::field::ops::kernel::shares::{OF_OTHERS, parts};
use crate::field::ops::kernel::tile::{Left, Right, add, by_height, tile};
use crate::field::ops::kernel::view::{View, ViewMut};
use crate::field::ops::kernel::windows::{Looks, Windows};
use crate::workers::share;
use std::ops::Range;

/// Outputs in the tallest tile of sums.
const TALLEST: usize = 8;

/// The outputs that threads take.
pub(crate) fn shares_of_outputs(looks: &Looks, outputs: usize) -> Vec<Range<usize>> {
    let tiles = looks.images * looks.windows[0] * looks.windows[1] / 4;
    parts(outputs, (TALLEST, looks.channels * POINTS * tiles, OF_OTHERS))
}

/// Floats of space that [`add_outer_in_tiles`] needs for a share of so many outputs.
pub(crate) fn space_of_sums(channels: usize, outputs: usize) -> usize {
    POINTS * (apart(channels) + apart(outputs) + outputs * channels)
}

/// dw += gᵀ x for g `(pixels, outputs)`, the windows of x that [`fits`], and dw `(outputs, 9 · channels)`; the outputs
/// [shared](shares_of_outputs) among threads.
pub(crate) fn add_outer_in_tiles(
    outputs: Vec<Range<usize>>,
    g: View<'_, f32>,
    x: Windows<'_, f32>,
    dw: ViewMut<'_, f32>,
    mut space: &mut [f32],
) {
    let path = f32::path(Path::best());
    let outs = dw.split(outputs.iter().map(Range::len));
    let spaces: Vec<&mut [f32]> = outputs
        .iter()
        .map(|outputs| {
            let (own, rest) = std::mem::take(&mut space).split_at_mut(space_of_sums(x.looks().channels, outputs.len()));
            space = rest;
            own
        })
        .collect();
    share(outputs.into_iter().zip(outs).zip(spaces), |((outputs, dw), space)| {
        add_outer_in_tiles_on(path, g.part(0..g.rows(), outputs), x, dw, space);
    });
}

/// [`add_outer_in_tiles`] on a path that this CPU has.
pub(in crate::field::ops::kernel) fn add_outer_in_tiles_on(
    path: Path,
    g: View<'_, f32>,
    x: Windows<'_, f32>,
    dw: ViewMut<'_, f32>,
    space: &mut [f32],
) {
    let (looks, outputs) = (*x.looks(), g.columns());
    assert!(fits(&looks), "{looks:?}");
    assert_eq!(g.rows(), looks.images * looks.windows[0] * looks.windows[1]);
    assert_eq!((dw.rows(), dw.columns()), (outputs, 9 * looks.channels));
    let (v, rest) = space.split_at_mut(POINTS * apart(looks.channels));
    let (h, sums) = rest.split_at_mut(POINTS * apart(outputs));
    let sums = &mut sums[..POINTS * outputs * looks.channels];
    sums.fill(0.0);
    path.run(Outer { g, x, dw, v, h, sums });
}

struct Outer<'a> {
    g: View<'a, f32>,
    x: Windows<'a, f32>,
    dw: ViewMut<'a, f32>,
    /// Transformed pixels.
    v: &'a mut [f32],
    /// Transformed cotangents.
    h: &'a mut [f32],
    /// S, `(16 · outputs, channels)`.
    sums: &'a mut [f32],
}

impl Work for Outer<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        for tiles in blocks(self.x.looks()) {
            // SAFETY: the CPU has the instructions, says the caller; the tiles are there, TILES at most, and
            // `add_outer_in_tiles_on` has made the space.
            unsafe {
                transform::<M::Lanes>(&self.x, tiles.clone(), self.v);
                self.transform_cotangents::<M::Lanes>(tiles.clone());
                for point in 0..POINTS {
                    self.add_products::<M>(point, tiles.len());
                }
            }
        }
        // SAFETY: the CPU has the instructions, says the caller; the sums are there.
        unsafe { self.finish::<M::Lanes>() };
    }
}

impl Outer<'_> {
    /// H g Hᵀ of some tiles, in the order of [`transform`].
    ///
    /// # Safety
    /// The CPU has the instructions of `L`; there are such tiles, [`TILES`](super::TILES) at most, and h is as long as
    /// they need.
    #[inline(always)]
    unsafe fn transform_cotangents<L: Lanes>(&mut self, tiles: Range<usize>) {
        let (looks, outputs) = (*self.x.looks(), self.g.columns());
        for (n, tile) in tiles.enumerate() {
            let pixel = first_result(tile, &looks);
            for c in (0..outputs).step_by(L::WIDTH) {
                let count = outputs - c;
                // SAFETY: a tile's four pixels are rows of g, and of each no more is touched than there is; the points
                // lie in the space.
                unsafe {
                    let stride = self.g.stride();
                    let from = self.g.as_ptr().add(pixel * stride + c);
                    let g = load_square::<L, 2>(from, [looks.windows[1] * stride, stride], count);
                    let points = both_ways::<OfCotangents, _, 2, 4>(g);
                    put_points(points, self.h.as_mut_ptr().add(n * outputs + c), apart(outputs), count);
                }
            }
        }
    }

    /// Adds the products of so many tiles at a point.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; there are at most [`TILES`](super::TILES), and v, h and S are as long as
    /// they need.
    #[inline(always)]
    unsafe fn add_products<M: Machine>(&mut self, point: usize, tiles: usize) {
        let (channels, outputs, width) = (self.x.looks().channels, self.g.columns(), M::Lanes::WIDTH);
        for column in (0..channels).step_by(2 * width) {
            let columns = channels - column;
            let mut row = 0;
            while row < outputs {
                row += by_height!(M::Lanes, outputs - row, HEIGHT => {
                    // SAFETY: row n of an operand is the tile's at this point; of the last vector no more lanes are
                    // touched than there are channels; the sums of the point are there.
                    unsafe {
                        let h = self.h.as_ptr().add(point * apart(outputs) + row);
                        let v = self.v.as_ptr().add(point * apart(channels) + column);
                        let (a, b) = (Left::<f32, HEIGHT>::even(h, 1, outputs), Right { at: v, step: channels });
                        let to = self.sums.as_mut_ptr().add((point * outputs + row) * channels + column);
                        let zero = |_, _| M::Lanes::splat(0.0);
                        if columns >= 2 * width {
                            add(tile::<Single<M::Lanes>, HEIGHT, 2, true>(tiles, a, b, 0, zero), to, channels, width);
                        } else if columns > width {
                            let last = columns - width;
                            add(tile::<Single<M::Lanes>, HEIGHT, 2, false>(tiles, a, b, last, zero), to, channels, last);
                        } else {
                            let sums = tile::<Single<M::Lanes>, HEIGHT, 1, false>(tiles, a, b, columns, zero);
                            add(sums, to, channels, columns);
                        }
                    }
                });
            }
        }
    }

    /// dw += Eᵀ S E
    ///
    /// # Safety
    /// The CPU has the instructions of `L`; S has its [`POINTS`] matrices.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&mut self) {
        let (channels, outputs) = (self.x.looks().channels, self.g.columns());
        for n in 0..outputs {
            let dw = self.dw.row(n);
            for c in (0..channels).step_by(L::WIDTH) {
                let count = channels - c;
                // SAFETY: the sums of an output at a point are as many as there are channels, as are its elements of dw
                // at a tap; of both no more are touched.
                unsafe {
                    let from = self.sums.as_ptr().add(n * channels + c);
                    let s = load_square::<L, 4>(from, [4 * outputs * channels, outputs * channels], count);
                    for (i, line) in both_ways::<ToTaps, _, 4, 3>(s).into_iter().enumerate() {
                        for (j, sum) in line.into_iter().enumerate() {
                            let to = dw.as_mut_ptr().add((3 * i + j) * channels + c);
                            put(load::<L>(to, count).plus(sum), to, count);
                        }
                    }
                }
            }
        }
    }
}

/// H
struct OfCotangents;

impl OneWay<2, 4> for OfCotangents {
    #[inline(always)]
    unsafe fn times<L: Lanes>([a, b]: [L; 2]) -> [L; 4] {
        // SAFETY: the caller's.
        unsafe {
            let (zero, half) = (L::splat(0.0), L::splat(0.5));
            [a, zero.plus_product(half, a.plus(b)), zero.plus_product(half, a.minus(b)), b]
        }
    }
}

/// Eᵀ
struct ToTaps;

impl OneWay<4, 3> for ToTaps {
    #[inline(always)]
    unsafe fn times<L: Lanes>([a, b, c, d]: [L; 4]) -> [L; 3] {
        // SAFETY: the caller's.
        unsafe { [a.plus(b).plus(c), b.minus(c), b.plus(c).minus(d)] }
    }
}
