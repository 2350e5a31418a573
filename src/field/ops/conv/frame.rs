//! Images pixel by pixel `(images, height, width, channels)`, by themselves and in frames of zeros.

use crate::field::ops::Activation;
use crate::field::ops::kernel::group_norm::Place;
use crate::field::ops::kernel::{Held, Looks, View, ViewMut, transpose};
use crate::field::session::{Matrix, Session, Tile};

/// Images in frames of zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) images: usize,
    /// Height and width, and channels, which may be more than the images have.
    pub(super) size: [usize; 2],
    pub(super) channels: usize,
    /// Row and column of an image's first pixel.
    pub(super) at: [usize; 2],
    /// Height, width and channels of an image.
    pub(super) inner: [usize; 3],
    /// What every pixel of an image has behind its channels.
    pub(super) beyond: Option<f32>,
}

impl Frame {
    /// The windows of a kernel on the frames.
    pub(super) fn looks(&self, kernel: [usize; 2], stride: usize, windows: [usize; 2]) -> Looks {
        let Self { images, size, channels, .. } = *self;
        Looks { images, size, channels, kernel, stride, windows }
    }

    /// Where the pixels of the images are.
    pub(super) fn place(&self) -> Place {
        let Self { size, channels, at, .. } = *self;
        let (line, image) = (size[1] * channels, size[0] * size[1] * channels);
        Place { first: at[0] * line + at[1] * channels, pixel: channels, line, image }
    }

    /// Where the lines of the images begin, in elements.
    fn lines(&self) -> impl Iterator<Item = usize> + use<> {
        let Self { images, size, channels, at, inner: [height, ..], .. } = *self;
        let rows = (0..images).flat_map(move |image| (0..height).map(move |y| image * size[0] + at[0] + y));
        rows.map(move |row| (row * size[1] + at[1]) * channels)
    }

    /// The frames, whose images are still to be written.
    pub(super) fn around<T: Tile>(&self, session: &Session) -> Matrix<T> {
        let Self { images, size, channels, inner: [_, width, inner], .. } = *self;
        let mut frames = T::spare(session).matrix(images * size[0] * size[1], channels);
        if channels != inner {
            frames.fill(T::default());
            if let Some(beyond) = self.beyond {
                let pixels = self.lines().flat_map(|start| (0..width).map(move |x| start + x * channels));
                pixels.for_each(|pixel| frames[pixel + inner] = T::of(beyond));
            }
            return frames;
        }
        let mut end = 0;
        for start in self.lines() {
            frames[end..start].fill(T::default());
            end = start + width * channels;
        }
        frames[end..].fill(T::default());
        frames
    }

    /// Images whose planes are given, channel by channel.
    pub(super) fn of_planes<T: Tile>(&self, session: &Session, planes: View<'_, T>) -> Matrix<T> {
        let [height, width, channels] = self.inner;
        let mut frames = self.around(session);
        for (line, start) in self.lines().enumerate() {
            let (image, y) = (line / height, line % height);
            let line = planes.part(image * channels..(image + 1) * channels, y * width..(y + 1) * width);
            transpose(line, ViewMut::new(&mut frames[start..], width, channels, self.channels));
        }
        frames
    }

    /// Images whose pixels are given, and nothing between them: those, if they need no frame.
    pub(super) fn around_pixels<T: Tile>(&self, session: &Session, pixels: Matrix<T>) -> Matrix<T> {
        let [height, width, channels] = self.inner;
        let needs_none = self.size == [height, width] && self.channels == channels;
        if needs_none { pixels } else { self.of_pixels(session, pixels.view()) }
    }

    /// Images whose pixels are given, line by line; lines may be longer than the images are wide.
    pub(super) fn of_pixels<T: Tile>(&self, session: &Session, pixels: View<'_, T>) -> Matrix<T> {
        let [height, width, channels] = self.inner;
        let mut frames = self.around(session);
        let apart = pixels.rows() / (self.images * height);
        for (line, start) in self.lines().enumerate() {
            let line = pixels.part(line * apart..line * apart + width, 0..channels);
            if channels == self.channels {
                let count = width * channels;
                frames[start..start + count].copy_from_slice(&line.slice()[..count]);
            } else {
                for (x, to) in frames[start..].chunks_exact_mut(self.channels).enumerate().take(width) {
                    to[..channels].copy_from_slice(line.row(x));
                }
            }
        }
        frames
    }

    /// g ← g f′, pixel by pixel, for f′ a function of the images in `frames`.
    pub(super) fn times_slope<T: Held>(&self, then: Activation, frames: &[T], g: &mut [T]) {
        let [_, width, channels] = self.inner;
        for (start, g) in self.lines().zip(g.chunks_exact_mut(width * channels)) {
            if channels == self.channels {
                then.times_slope(&frames[start..start + width * channels], g);
            } else {
                let pixels = frames[start..].chunks_exact(self.channels).zip(g.chunks_exact_mut(channels));
                pixels.for_each(|(kept, g)| then.times_slope(&kept[..channels], g));
            }
        }
    }
}

/// The pixels of images whose planes are given, so many channels in each.
pub(super) fn pixels_of<T: Tile>(session: &Session, planes: View<'_, T>, channels: usize) -> Matrix<T> {
    let count = planes.columns();
    let mut pixels = T::spare(session).matrix(planes.rows() / channels * count, channels);
    for (image, to) in pixels.chunks_exact_mut(count * channels).enumerate() {
        let from = planes.part(image * channels..(image + 1) * channels, 0..count);
        transpose(from, ViewMut::new(to, count, channels, channels));
    }
    pixels
}

/// The planes of images, of so many pixels each, that are given pixel by pixel.
pub(super) fn planes_of<T: Tile>(pixels: View<'_, T>, count: usize, planes: &mut [T]) {
    let channels = pixels.columns();
    for (n, image) in planes.chunks_exact_mut(channels * count).enumerate() {
        let from = pixels.part(n * count..(n + 1) * count, 0..channels);
        transpose(from, ViewMut::new(image, channels, count, count));
    }
}
