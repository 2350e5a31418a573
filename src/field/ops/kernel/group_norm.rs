//! Group norms of images that lie pixel by pixel, `(images, pixels, channels)`.
//!
//! Of an image, each group of neighbouring channels has a mean and a variance. With s = 1 / √(variance + ε),
//! x̂ = s (x − mean), w and b by channel, and means over a group:
//!
//! | here | formula |
//! |---|---|
//! | [`moments`] | mean and s |
//! | [`normalise`] | y = f(w x̂ + b) |
//! | [`pull_norm`] | dx = s (w g − mean(w g) − x̂ mean(w g x̂)); Σ g x̂ and Σ g over the pixels |
//!
//! Means are counted from the group's first element, so that a large one costs no digits. Channels lie in the lanes of
//! vectors; sums over pixels are made of blocks of them.

use super::held::Held;
use super::machine::{Machine, Path, Work};
use super::shares::{OF_OTHERS, parts};
use super::view::ViewMut;
use crate::field::ops::Activation;
use crate::workers::share;
use std::ops::Range;

/// Pixels in a block of a sum.
const BLOCK: usize = 32;

/// Numbers for each channel in the [`space`] of a share.
const OF_CHANNELS: usize = 8;

/// Images of one size, and groups of their channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grouped {
    /// Lines of an image.
    pub(crate) height: usize,
    /// Pixels of a line.
    pub(crate) width: usize,
    /// Channels of a pixel; groups of as many.
    pub(crate) channels: usize,
    /// Groups.
    pub(crate) groups: usize,
}

/// Where the images of a result are, in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Before the first pixel of an image.
    pub(crate) first: usize,
    /// From a pixel to the next.
    pub(crate) pixel: usize,
    /// From a line to the next.
    pub(crate) line: usize,
    /// From an image to the next.
    pub(crate) image: usize,
}

/// What a channel is multiplied by, w, and what is added, b.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Affine<'a> {
    /// w, or ones.
    pub(crate) weight: Option<&'a [f32]>,
    /// b, or zeros.
    pub(crate) bias: Option<&'a [f32]>,
}

impl Grouped {
    fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Elements of an image.
    fn image(&self) -> usize {
        self.pixels() * self.channels
    }

    /// Channels of a group.
    fn together(&self) -> usize {
        self.channels / self.groups
    }

    /// Floats of [`moments`] for each image.
    pub(crate) fn moments(&self) -> usize {
        2 * self.groups
    }

    /// A number for each group, of `of(group)`, at each of its channels.
    #[inline(always)]
    fn spread(&self, to: &mut [f32], of: impl Fn(usize) -> f32) {
        for (group, to) in to.chunks_exact_mut(self.together()).enumerate() {
            to.fill(of(group));
        }
    }

    /// The sum over a group of what there is for its channels, over its elements.
    #[inline(always)]
    fn mean(&self, group: usize, of_channels: &[f32]) -> f32 {
        let channels = &of_channels[group * self.together()..(group + 1) * self.together()];
        channels.iter().sum::<f32>() / (self.pixels() * self.together()) as f32
    }
}

/// The images that threads take.
pub(crate) fn shares_of_images(images: usize, sizes: &Grouped) -> Vec<Range<usize>> {
    // An element is worth some multiplications in a product.
    parts(images, (1, 16 * sizes.image(), OF_OTHERS))
}

/// Floats of space that each share needs.
pub(crate) fn space(sizes: &Grouped) -> usize {
    (OF_CHANNELS + sizes.width) * sizes.channels
}

/// The parts of what has `each` elements an image, and of the space, for every share.
fn split<'a, T>(
    images: &[Range<usize>],
    (each, values): (usize, &'a mut [T]),
    (sizes, space): (&Grouped, &'a mut [f32]),
) -> impl Iterator<Item = (&'a mut [T], &'a mut [f32])> {
    let count = images.last().map_or(0, |images| images.end);
    assert_eq!((values.len(), space.len()), (count * each, images.len() * self::space(sizes)));
    let parts = ViewMut::new(values, count, each, each).split(images.iter().map(Range::len));
    parts.into_iter().map(ViewMut::into_slice).zip(space.chunks_exact_mut(self::space(sizes)))
}

/// The mean of each group of each image, counted from the group's first element, and, behind those of an image, its s.
pub(crate) fn moments<T: Held>(
    images: &[Range<usize>],
    sizes: Grouped,
    eps: f64,
    x: &[T],
    to: &mut [f32],
    space: &mut [f32],
) {
    let jobs = images.iter().zip(split(images, (sizes.moments(), to), (&sizes, space)));
    share(jobs, |(images, (to, space))| {
        let x = &x[images.start * sizes.image()..images.end * sizes.image()];
        T::path(Path::best()).run(Moments { sizes, eps: eps as f32, x, to, space });
    });
}

/// y = f(w x̂ + b), of the images' [`moments`], at their `place`.
pub(crate) fn normalise<T: Held>(
    images: &[Range<usize>],
    sizes: Grouped,
    (x, moments): (&[T], &[f32]),
    behind: (Affine<'_>, Activation),
    (to, place): (&mut [T], Place),
    space: &mut [f32],
) {
    let jobs = images.iter().zip(split(images, (place.image, to), (&sizes, space)));
    share(jobs, |(images, (to, space))| {
        let x = &x[images.start * sizes.image()..images.end * sizes.image()];
        let moments = &moments[images.start * sizes.moments()..images.end * sizes.moments()];
        T::path(Path::best()).run(Normalise { sizes, x, moments, behind, to, place, space });
    });
}

/// dx in place of g, the cotangent of w x̂ + b; for each image Σ g x̂ of every channel and, behind them, Σ g.
pub(crate) fn pull_norm<T: Held>(
    images: &[Range<usize>],
    sizes: Grouped,
    (x, moments): (&[T], &[f32]),
    weight: Option<&[f32]>,
    (g, sums): (&mut [T], &mut [f32]),
    space: &mut [f32],
) {
    let sums = ViewMut::new(sums, g.len() / sizes.image(), 2 * sizes.channels, 2 * sizes.channels);
    let sums = sums.split(images.iter().map(Range::len)).into_iter().map(ViewMut::into_slice);
    let jobs = images.iter().zip(sums).zip(split(images, (sizes.image(), g), (&sizes, space)));
    share(jobs, |((images, sums), (g, space))| {
        let x = &x[images.start * sizes.image()..images.end * sizes.image()];
        let moments = &moments[images.start * sizes.moments()..images.end * sizes.moments()];
        T::path(Path::best()).run(Pull { sizes, x, moments, weight, g, sums, space });
    });
}

/// Rows of the space, each as long as there are channels.
#[inline(always)]
fn rows<const N: usize>(space: &mut [f32], channels: usize) -> [&mut [f32]; N] {
    let mut rows = space.chunks_exact_mut(channels);
    std::array::from_fn(|_| rows.next().unwrap_or_default())
}

/// The first element of each group at its channels: what means are counted from.
#[inline(always)]
fn origins<T: Held>(sizes: &Grouped, x: &[T], to: &mut [f32]) {
    sizes.spread(to, |group| x[group * sizes.together()].wide());
}

/// By channel, the sum over the pixels of f(x, a, b) for two numbers of each channel.
#[inline(always)]
fn sum<T: Held>(x: &[T], [a, b]: [&[f32]; 2], total: &mut [f32], block: &mut [f32], f: impl Fn(f32, f32, f32) -> f32) {
    let channels = total.len();
    total.fill(0.0);
    for pixels in x.chunks(BLOCK * channels) {
        block.fill(0.0);
        for pixel in pixels.chunks_exact(channels) {
            for (((sum, x), a), b) in block.iter_mut().zip(pixel).zip(a).zip(b) {
                *sum += f(x.wide(), *a, *b);
            }
        }
        add(total, block);
    }
}

#[inline(always)]
fn add(total: &mut [f32], block: &[f32]) {
    total.iter_mut().zip(block).for_each(|(total, block)| *total += block);
}

/// [`moments`] of the images of one thread.
pub(super) struct Moments<'a, T> {
    pub(super) sizes: Grouped,
    pub(super) eps: f32,
    pub(super) x: &'a [T],
    pub(super) to: &'a mut [f32],
    pub(super) space: &'a mut [f32],
}

impl<T: Held> Work for Moments<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(self) {
        let Self { sizes, eps, x, to, space } = self;
        let [origin, mean, total, block] = rows(space, sizes.channels);
        for (x, to) in x.chunks_exact(sizes.image()).zip(to.chunks_exact_mut(sizes.moments())) {
            let (means, scales) = to.split_at_mut(sizes.groups);
            origins(&sizes, x, origin);
            sum(x, [origin, origin], total, block, |x, origin, _| x - origin);
            means.iter_mut().enumerate().for_each(|(group, mean)| *mean = sizes.mean(group, total));
            sizes.spread(mean, |group| means[group]);
            sum(x, [origin, mean], total, block, |x, origin, mean| {
                let x = x - origin - mean;
                x * x
            });
            for (group, scale) in scales.iter_mut().enumerate() {
                *scale = 1.0 / (sizes.mean(group, total) + eps).sqrt();
            }
        }
    }
}

/// [`normalise`] for the images of one thread.
pub(super) struct Normalise<'a, T> {
    pub(super) sizes: Grouped,
    pub(super) x: &'a [T],
    pub(super) moments: &'a [f32],
    pub(super) behind: (Affine<'a>, Activation),
    pub(super) to: &'a mut [T],
    pub(super) place: Place,
    pub(super) space: &'a mut [f32],
}

impl<T: Held> Work for Normalise<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(self) {
        let Self { sizes, x, moments, behind: (Affine { weight, bias }, then), to, place, space } = self;
        let (line, space) = space.split_at_mut(sizes.width * sizes.channels);
        let [origin, mean, scale, by, plus] = rows(space, sizes.channels);
        fill(by, weight, 1.0);
        fill(plus, bias, 0.0);
        let images = x.chunks_exact(sizes.image()).zip(to.chunks_exact_mut(place.image));
        for ((x, to), moments) in images.zip(moments.chunks_exact(sizes.moments())) {
            let (means, scales) = moments.split_at(sizes.groups);
            origins(&sizes, x, origin);
            sizes.spread(mean, |group| means[group]);
            sizes.spread(scale, |group| scales[group]);
            let lines = to[place.first..].chunks_mut(place.line);
            for (x, to) in x.chunks_exact(line.len()).zip(lines) {
                let pixels = x.chunks_exact(sizes.channels).zip(line.chunks_exact_mut(sizes.channels));
                for (x, y) in pixels {
                    let channels = x.iter().zip(&*origin).zip(&*mean).zip(&*scale).zip(&*by).zip(&*plus);
                    for (y, (((((x, origin), mean), scale), by), plus)) in y.iter_mut().zip(channels) {
                        *y = (x.wide() - origin - mean) * scale * by + plus;
                    }
                }
                then.value_in_place(line);
                for (y, to) in line.chunks_exact(sizes.channels).zip(to.chunks_mut(place.pixel)) {
                    to.iter_mut().zip(y).for_each(|(to, y)| *to = T::of(*y));
                }
            }
        }
    }
}

/// The values, or as many of the other.
#[inline(always)]
fn fill(to: &mut [f32], values: Option<&[f32]>, otherwise: f32) {
    match values {
        Some(values) => to.copy_from_slice(values),
        None => to.fill(otherwise),
    }
}

/// [`pull_norm`] for the images of one thread.
pub(super) struct Pull<'a, T> {
    pub(super) sizes: Grouped,
    pub(super) x: &'a [T],
    pub(super) moments: &'a [f32],
    pub(super) weight: Option<&'a [f32]>,
    pub(super) g: &'a mut [T],
    pub(super) sums: &'a mut [f32],
    pub(super) space: &'a mut [f32],
}

impl<T: Held> Work for Pull<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(self) {
        let Self { sizes, x, moments, weight, g, sums, space } = self;
        let channels = sizes.channels;
        let [origin, mean, scale, by, of_g, along, block, block_with_x] = rows(space, channels);
        fill(by, weight, 1.0);
        let images = x.chunks_exact(sizes.image()).zip(g.chunks_exact_mut(sizes.image()));
        let kept = moments.chunks_exact(sizes.moments()).zip(sums.chunks_exact_mut(2 * channels));
        for ((x, g), (moments, sums)) in images.zip(kept) {
            let (means, scales) = moments.split_at(sizes.groups);
            origins(&sizes, x, origin);
            sizes.spread(mean, |group| means[group]);
            sizes.spread(scale, |group| scales[group]);

            let (with_x, alone) = sums.split_at_mut(channels);
            with_x.fill(0.0);
            alone.fill(0.0);
            for (x, g) in x.chunks(BLOCK * channels).zip(g.chunks(BLOCK * channels)) {
                block.fill(0.0);
                block_with_x.fill(0.0);
                for (x, g) in x.chunks_exact(channels).zip(g.chunks_exact(channels)) {
                    let channels = x.iter().zip(g).zip(&*origin).zip(&*mean).zip(&*scale);
                    let sums = block.iter_mut().zip(&mut *block_with_x);
                    for ((alone, with_x), ((((x, g), origin), mean), scale)) in sums.zip(channels) {
                        *alone += g.wide();
                        *with_x += g.wide() * ((x.wide() - origin - mean) * scale);
                    }
                }
                add(alone, block);
                add(with_x, block_with_x);
            }

            let product = |to: &mut [f32], sums: &[f32]| {
                to.iter_mut().zip(&*by).zip(sums).for_each(|((to, by), sum)| *to = by * sum);
            };
            product(block, alone);
            sizes.spread(of_g, |group| sizes.mean(group, block));
            product(block, with_x);
            sizes.spread(along, |group| sizes.mean(group, block));
            for (x, g) in x.chunks_exact(channels).zip(g.chunks_exact_mut(channels)) {
                let of_channels = origin.iter().zip(&*mean).zip(&*scale).zip(&*by).zip(&*of_g).zip(&*along);
                for ((g, x), (((((origin, mean), scale), by), of_g), along)) in g.iter_mut().zip(x).zip(of_channels) {
                    let x = (x.wide() - origin - mean) * scale;
                    *g = T::of(scale * (g.wide() * by - of_g - x * along));
                }
            }
        }
    }
}
