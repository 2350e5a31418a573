//! y = x ∗ w + b by minimal filtering.

use super::{OneWay, POINTS, apart, blocks, both_ways, first_result, fits, load, load_square, put, transform};
use crate::field::ops::Activation;
use crate::field::ops::kernel::held::Held;
use crate::field::ops::kernel::lanes::Lanes;
use crate::field::ops::kernel::machine::{Machine, Path, Work};
use crate::field::ops::kernel::packed::{PANEL, Packed};
use crate::field::ops::kernel::scheme::Single;
use crate::field::ops::kernel::shares::{OF_OTHERS, parts};
use crate::field::ops::kernel::tile::{Left, Right, by_height, store, tile};
use crate::field::ops::kernel::view::ViewMut;
use crate::field::ops::kernel::windows::{Looks, Windows};
use crate::workers::share;
use std::ops::Range;

/// G w Gᵀ at a point, for w(tap).
pub(crate) fn of_kernel(point: usize, w: impl Fn(usize) -> f32) -> f32 {
    const G: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    let (row, column) = (G[point / 4], G[point % 4]);
    let terms = (0..9).map(|tap| (row[tap / 3] * column[tap % 3], tap)).filter(|(factor, _)| *factor != 0.0);
    terms.map(|(factor, tap)| factor * w(tap)).sum()
}

/// The images that threads take, for so many outputs.
pub(crate) fn shares_of_images(looks: &Looks, outputs: usize) -> Vec<Range<usize>> {
    let results = looks.windows[0] * looks.windows[1];
    parts(looks.images, (1, results * outputs * POINTS / 4 * looks.channels, OF_OTHERS))
}

/// Floats of space that [`convolve_in_tiles`] needs for each share.
pub(crate) fn space(channels: usize, outputs: usize) -> usize {
    POINTS * (apart(channels) + apart(padded(outputs)))
}

/// The width of all panels.
fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PANEL / 2)
}

/// y = f(x ∗ w + b) for x that [`fits`], w `(16 · channels, outputs)` transformed by [`of_kernel`], point by point; the
/// images [shared](shares_of_images) among threads.
pub(crate) fn convolve_in_tiles(
    images: Vec<Range<usize>>,
    x: Windows<'_, f32>,
    w: &Packed<f32>,
    behind: (Option<&[f32]>, Activation),
    out: ViewMut<'_, f32>,
    space: &mut [f32],
) {
    let (path, results) = (f32::path(Path::best()), x.looks().windows[0] * x.looks().windows[1]);
    let each = self::space(x.looks().channels, w.columns());
    assert_eq!(space.len(), images.len() * each);
    let outs = out.split(images.iter().map(|images| images.len() * results));
    share(images.into_iter().zip(outs).zip(space.chunks_exact_mut(each)), |((images, out), space)| {
        convolve_in_tiles_on(path, x.part(images), w, behind, out, space);
    });
}

/// [`convolve_in_tiles`] on a path that this CPU has.
pub(in crate::field::ops::kernel) fn convolve_in_tiles_on(
    path: Path,
    x: Windows<'_, f32>,
    w: &Packed<f32>,
    (bias, then): (Option<&[f32]>, Activation),
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
    path.run(Convolve { x, w, bias, then, out, v, m });
}

struct Convolve<'a> {
    x: Windows<'a, f32>,
    w: &'a Packed<f32>,
    bias: Option<&'a [f32]>,
    then: Activation,
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
        for piece in self.out.pieces() {
            self.then.value_in_place(piece);
        }
    }
}

impl Convolve<'_> {
    /// The products of so many tiles at a point.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; there are at most [`TILES`](super::TILES), and v and m are as long as they
    /// need.
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
    /// The CPU has the instructions of `L`; there are such tiles, [`TILES`](super::TILES) at most, and m is as long as
    /// they need.
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
                    let m = load_square::<L, 4>(from, [4 * apart(stride), apart(stride)], L::WIDTH);
                    let bias = match self.bias {
                        Some(bias) => load(bias.as_ptr().add(c), count),
                        None => L::splat(0.0),
                    };
                    for (i, line) in both_ways::<ToResults, _, 4, 2>(m).into_iter().enumerate() {
                        for (j, result) in line.into_iter().enumerate() {
                            let to = self.out.row(pixel + i * looks.windows[1] + j)[c..].as_mut_ptr();
                            put(result.plus(bias), to, count);
                        }
                    }
                }
            }
        }
    }
}

/// Aᵀ
struct ToResults;

impl OneWay<4, 2> for ToResults {
    #[inline(always)]
    unsafe fn times<L: Lanes>([a, b, c, d]: [L; 4]) -> [L; 2] {
        // SAFETY: the caller's.
        unsafe { [a.plus(b).plus(c), b.minus(c).minus(d)] }
    }
}
