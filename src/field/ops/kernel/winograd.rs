//! 3 × 3 convolutions with 16 products where 36 are summed: Winograd's minimal filtering F(2 × 2, 3 × 3), in F32.
//!
//! An image is cut into tiles of 2 × 2 results, each of which sees 4 × 4 pixels d. With w the kernel and ∘ the product by
//! elements, summed over channels,
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
//! At each of the 16 points that is a product of matrices `(tiles, channels)`, of a few tiles at a time, so that they and
//! their results stay in the nearer caches. Sums are nine times shorter than those of 3 × 3 products, and round less.
//!
//! # Reference
//! A. Lavin, S. Gray, *Fast Algorithms for Convolutional Neural Networks*, arXiv 1509.09308.

use super::held::Held;
use super::lanes::Lanes;
use super::machine::{Machine, Path, Work};
use super::packed::{PANEL, Packed};
use super::scheme::Single;
use super::tile::{Left, Right, add, by_height, store, tile};
use super::view::{View, ViewMut};
use super::windows::{Looks, Windows};
use std::ops::Range;

/// Points at which products are made.
pub(crate) const POINTS: usize = 16;
/// Tiles that are taken at a time; with so many floats each, a line of the cache many times.
const TILES: usize = 16;

/// Whether images that are looked at so can be filtered so: windows of 3 × 3, one pixel apart, in even numbers.
pub(crate) fn fits(looks: &Looks) -> bool {
    looks.kernel == [3, 3] && looks.stride == 1 && looks.windows.iter().all(|n| n.is_multiple_of(2))
}

/// G w Gᵀ at a point, for w(tap).
pub(crate) fn of_kernel(point: usize, w: impl Fn(usize) -> f32) -> f32 {
    const G: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    let (row, column) = (G[point / 4], G[point % 4]);
    let terms = (0..9).map(|tap| (row[tap / 3] * column[tap % 3], tap)).filter(|(factor, _)| *factor != 0.0);
    terms.map(|(factor, tap)| factor * w(tap)).sum()
}

/// Elements from a point to the next, for so many a tile: an odd number of lines of the cache, so that the points of a tile
/// do not fall on the same ones.
#[inline(always)]
fn apart(elements: usize) -> usize {
    TILES * (elements | 1)
}

/// Floats of space that [`convolve_in_tiles`] needs.
pub(crate) fn space(channels: usize, outputs: usize) -> usize {
    POINTS * (apart(channels) + apart(padded(outputs)))
}

/// Floats of space that [`add_outer_in_tiles`] needs.
pub(crate) fn space_of_sums(channels: usize, outputs: usize) -> usize {
    POINTS * (apart(channels) + apart(outputs) + outputs * channels)
}

/// The width of all panels.
fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PANEL / 2)
}

/// y = x ∗ w + b for x that [`fits`], w `(16 · channels, outputs)` transformed by [`of_kernel`], point by point.
pub(crate) fn convolve_in_tiles(
    x: Windows<'_, f32>,
    w: &Packed<f32>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, f32>,
    space: &mut [f32],
) {
    convolve_in_tiles_on(f32::path(Path::best()), x, w, bias, out, space);
}

/// [`convolve_in_tiles`] on a path that this CPU has.
pub(super) fn convolve_in_tiles_on(
    path: Path,
    x: Windows<'_, f32>,
    w: &Packed<f32>,
    bias: Option<&[f32]>,
    out: ViewMut<'_, f32>,
    space: &mut [f32],
) {
    let (looks, outputs) = (*x.looks(), w.columns());
    let pixels = looks.images * looks.windows[0] * looks.windows[1];
    assert!(fits(&looks), "{looks:?}");
    assert_eq!((w.depth(), out.rows(), out.columns()), (POINTS * looks.channels, pixels, outputs));
    assert!(bias.is_none_or(|bias| bias.len() == outputs));
    let (v, m) = space.split_at_mut(POINTS * apart(looks.channels));
    assert!(m.len() >= POINTS * apart(padded(outputs)));
    path.run(Convolve { x, w, bias, out, v, m });
}

/// dw += gᵀ x for g `(pixels, outputs)`, the windows of x that [`fits`], and dw `(outputs, 9 · channels)`.
pub(crate) fn add_outer_in_tiles(g: View<'_, f32>, x: Windows<'_, f32>, dw: ViewMut<'_, f32>, space: &mut [f32]) {
    add_outer_in_tiles_on(f32::path(Path::best()), g, x, dw, space);
}

/// [`add_outer_in_tiles`] on a path that this CPU has.
pub(super) fn add_outer_in_tiles_on(
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
            // SAFETY: the 4 × 4 pixels of a tile lie in its image, and of each of them no more channels are touched than
            // there are.
            unsafe {
                let d: [[L; 4]; 4] = std::array::from_fn(|i| {
                    std::array::from_fn(|j| load(from.add(start + i * looks.row() + j * channels + c), count))
                });
                let rows: [[L; 4]; 4] = four(d);
                let to = v.as_mut_ptr().add(n * channels + c);
                for (i, row) in rows.into_iter().enumerate() {
                    let [a, b, c, d] = row;
                    let points = [a.minus(c), b.plus(c), c.minus(b), b.minus(d)];
                    for (j, point) in points.into_iter().enumerate() {
                        put(point, to.add((4 * i + j) * apart(channels)), count);
                    }
                }
            }
        }
    }
}

/// Bᵀ d.
#[inline(always)]
unsafe fn four<L: Lanes>([a, b, c, d]: [[L; 4]; 4]) -> [[L; 4]; 4] {
    // SAFETY: the caller's.
    unsafe {
        [
            std::array::from_fn(|j| a[j].minus(c[j])),
            std::array::from_fn(|j| b[j].plus(c[j])),
            std::array::from_fn(|j| c[j].minus(b[j])),
            std::array::from_fn(|j| b[j].minus(d[j])),
        ]
    }
}

struct Convolve<'a> {
    x: Windows<'a, f32>,
    w: &'a Packed<f32>,
    bias: Option<&'a [f32]>,
    out: ViewMut<'a, f32>,
    /// Transformed pixels.
    v: &'a mut [f32],
    /// Transformed results; rows are as long as all panels are wide.
    m: &'a mut [f32],
}

impl Work for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        for tiles in blocks(self.x.looks()) {
            // SAFETY: the CPU has the instructions, says the caller; the tiles are there, TILES at most, and
            // `convolve_in_tiles_on` has seen to the space.
            unsafe {
                transform::<M::Lanes>(&self.x, tiles.clone(), self.v);
                for point in 0..POINTS {
                    self.multiply::<M>(point, tiles.len());
                }
                self.finish::<M::Lanes>(tiles);
            }
        }
    }
}

impl Convolve<'_> {
    /// The products of so many tiles at a point.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; there are at most [`TILES`], and v and m are as long as they need.
    #[inline(always)]
    unsafe fn multiply<M: Machine>(&mut self, point: usize, tiles: usize) {
        let (channels, columns, width) = (self.x.looks().channels, self.w.columns(), M::Lanes::WIDTH);
        let stride = padded(columns);
        for first in (0..columns).step_by(PANEL) {
            let panel = self.w.panel(first);
            let mut row = 0;
            while row < tiles {
                row += by_height!(M::Lanes, tiles - row, HEIGHT => {
                    let mut at = 0;
                    while at < panel.width {
                        // SAFETY: both operands are as deep as there are channels at every point; results lie in the
                        // space of m, whose rows are as long as all panels are wide.
                        unsafe {
                            let from = self.v.as_ptr().add(point * apart(channels) + row * channels);
                            let a = Left::even(from, channels, 1);
                            let b = panel.values.as_ptr().add(point * channels * panel.width + at);
                            let b = Right { at: b, step: panel.width };
                            let to = self.m.as_mut_ptr().add(point * apart(stride) + row * stride + first + at);
                            let zero = |_, _| M::Lanes::splat(0.0);
                            if panel.width - at >= 2 * width {
                                let sums = tile::<Single<M::Lanes>, HEIGHT, 2, true>(channels, a, b, 0, zero);
                                store(sums, to, stride, width);
                                at += 2 * width;
                            } else {
                                let sums = tile::<Single<M::Lanes>, HEIGHT, 1, true>(channels, a, b, 0, zero);
                                store(sums, to, stride, width);
                                at += width;
                            }
                        }
                    }
                });
            }
        }
    }

    /// Aᵀ m A + b of those tiles.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`; there are such tiles, [`TILES`] at most, and m is as long as they need.
    #[inline(always)]
    unsafe fn finish<L: Lanes>(&mut self, tiles: Range<usize>) {
        let looks = *self.x.looks();
        let (outputs, stride) = (self.out.columns(), padded(self.out.columns()));
        for (n, tile) in tiles.enumerate() {
            let pixel = first_result(tile, &looks);
            for c in (0..outputs).step_by(L::WIDTH) {
                let count = outputs - c;
                // SAFETY: the points of a tile lie in the space; its four pixels are rows of the result, and of each no
                // more is touched than there is.
                unsafe {
                    let from = self.m.as_ptr().add(n * stride + c);
                    let m = |point: usize| L::load(from.add(point * apart(stride)));
                    let bias = match self.bias {
                        Some(bias) => load(bias.as_ptr().add(c), count),
                        None => L::splat(0.0),
                    };
                    let sums: [[L; 4]; 2] = [
                        std::array::from_fn(|j| m(j).plus(m(4 + j)).plus(m(8 + j))),
                        std::array::from_fn(|j| m(4 + j).minus(m(8 + j)).minus(m(12 + j))),
                    ];
                    for (i, [a, b, c_, d]) in sums.into_iter().enumerate() {
                        let to = self.out.row(pixel + i * looks.windows[1])[c..].as_mut_ptr();
                        put(a.plus(b).plus(c_).plus(bias), to, count);
                        let to = self.out.row(pixel + i * looks.windows[1] + 1)[c..].as_mut_ptr();
                        put(b.minus(c_).minus(d).plus(bias), to, count);
                    }
                }
            }
        }
    }
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
    /// The CPU has the instructions of `L`; there are such tiles, [`TILES`] at most, and h is as long as they need.
    #[inline(always)]
    unsafe fn transform_cotangents<L: Lanes>(&mut self, tiles: Range<usize>) {
        let (looks, outputs) = (*self.x.looks(), self.g.columns());
        for (n, tile) in tiles.enumerate() {
            let pixel = first_result(tile, &looks);
            for c in (0..outputs).step_by(L::WIDTH) {
                let count = outputs - c;
                // SAFETY: a tile's four pixels are rows of g, and of each no more is touched than there is; the points lie
                // in the space.
                unsafe {
                    let half = L::splat(0.5);
                    let zero = L::splat(0.0);
                    let mean = |a: L, b: L| zero.plus_product(half, a.plus(b));
                    let half_apart = |a: L, b: L| zero.plus_product(half, a.minus(b));
                    let at = |i: usize, j: usize| -> L {
                        load(self.g.row(pixel + i * looks.windows[1] + j).as_ptr().add(c), count)
                    };
                    let g: [[L; 2]; 2] = std::array::from_fn(|i| std::array::from_fn(|j| at(i, j)));
                    let rows: [[L; 2]; 4] = [
                        g[0],
                        std::array::from_fn(|j| mean(g[0][j], g[1][j])),
                        std::array::from_fn(|j| half_apart(g[0][j], g[1][j])),
                        g[1],
                    ];
                    let to = self.h.as_mut_ptr().add(n * outputs + c);
                    for (i, [a, b]) in rows.into_iter().enumerate() {
                        for (j, point) in [a, mean(a, b), half_apart(a, b), b].into_iter().enumerate() {
                            put(point, to.add((4 * i + j) * apart(outputs)), count);
                        }
                    }
                }
            }
        }
    }

    /// Adds the products of so many tiles at a point.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; there are at most [`TILES`], and v, h and S are as long as they need.
    #[inline(always)]
    unsafe fn add_products<M: Machine>(&mut self, point: usize, tiles: usize) {
        let (channels, outputs, width) = (self.x.looks().channels, self.g.columns(), M::Lanes::WIDTH);
        for column in (0..channels).step_by(2 * width) {
            let columns = channels - column;
            let mut row = 0;
            while row < outputs {
                row += by_height!(M::Lanes, outputs - row, HEIGHT => {
                    // SAFETY: row n of an operand is the tile's at this point; of the last vector no more lanes are touched
                    // than there are channels; the sums of the point are there.
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
                // SAFETY: the sums of an output at a point are as many as there are channels, as are its elements of dw at
                // a tap; of both no more are touched.
                unsafe {
                    let from = self.sums.as_ptr().add(n * channels + c);
                    let s = |i: usize, j: usize| load::<L>(from.add((4 * i + j) * outputs * channels), count);
                    let rows: [[L; 4]; 3] = [
                        std::array::from_fn(|j| s(0, j).plus(s(1, j)).plus(s(2, j))),
                        std::array::from_fn(|j| s(1, j).minus(s(2, j))),
                        std::array::from_fn(|j| s(1, j).plus(s(2, j)).minus(s(3, j))),
                    ];
                    for (i, [a, b, c_, d]) in rows.into_iter().enumerate() {
                        for (j, tap) in [a.plus(b).plus(c_), b.minus(c_), b.plus(c_).minus(d)].into_iter().enumerate() {
                            let to = dw.as_mut_ptr().add((3 * i + j) * channels + c);
                            put(load::<L>(to, count).plus(tap), to, count);
                        }
                    }
                }
            }
        }
    }
}
