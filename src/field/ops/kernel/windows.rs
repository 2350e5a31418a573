//! The left-hand operands of products: rows in memory, whole or in segments, which may overlap.

use super::held::Held;
use super::view::View;
use std::ops::Range;

/// Rows that are multiplied: row r is `segments` pieces of `depth` elements, `apart` from each other, the first one at
/// `start(r)`.
///
/// # Safety
/// The pieces of every row lie in `values`.
pub(super) unsafe trait Rows<T>: Copy {
    fn values(&self) -> &[T];
    fn rows(&self) -> usize;
    fn segments(&self) -> usize;
    fn depth(&self) -> usize;
    fn apart(&self) -> usize;
    fn start(&self, row: usize) -> usize;
}

// SAFETY: a view is made only of rows that lie in its slice.
unsafe impl<T: Held> Rows<T> for View<'_, T> {
    #[inline(always)]
    fn values(&self) -> &[T] {
        self.slice()
    }
    #[inline(always)]
    fn rows(&self) -> usize {
        View::rows(self)
    }
    #[inline(always)]
    fn segments(&self) -> usize {
        1
    }
    #[inline(always)]
    fn depth(&self) -> usize {
        self.columns()
    }
    #[inline(always)]
    fn apart(&self) -> usize {
        0
    }
    #[inline(always)]
    fn start(&self, row: usize) -> usize {
        row * self.stride()
    }
}

/// How images `(images, height, width, channels)` are looked at through windows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looks {
    /// Images.
    pub(crate) images: usize,
    /// Height and width of an image.
    pub(crate) size: [usize; 2],
    /// Channels; for BF16 an even number.
    pub(crate) channels: usize,
    /// Height and width of a window.
    pub(crate) kernel: [usize; 2],
    /// Pixels from a window to the next, in both directions.
    pub(crate) stride: usize,
    /// Windows in a column and in a row of an image.
    pub(crate) windows: [usize; 2],
}

/// Windows of images as rows of a matrix `(images · windows, kernel · channels)`, in one segment for each row of the
/// window.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Windows<'a, T> {
    values: &'a [T],
    looks: Looks,
}

impl<'a, T: Held> Windows<'a, T> {
    /// # Panics
    /// If there is no window, one reaches beyond its image, or the slice is too short.
    pub(crate) fn new(values: &'a [T], looks: Looks) -> Self {
        let Looks { images, size, channels, kernel, stride, windows } = looks;
        let fits = |n: usize| windows[n] > 0 && (windows[n] - 1) * stride + kernel[n] <= size[n];
        assert!(fits(0) && fits(1) && images * size[0] * size[1] * channels <= values.len(), "{looks:?}");
        assert!(channels.is_multiple_of(T::DEPTH), "{looks:?}");
        Self { values, looks }
    }

    pub(crate) fn looks(&self) -> &Looks {
        &self.looks
    }

    /// Those of some of the images.
    pub(super) fn part(&self, images: Range<usize>) -> Self {
        let looks = Looks { images: images.len(), ..self.looks };
        Self::new(&self.values[images.start * looks.image()..], looks)
    }

    /// The pixels of an image.
    pub(super) fn image(&self, n: usize) -> &'a [T] {
        &self.values[n * self.looks.image()..][..self.looks.image()]
    }
}

impl Looks {
    /// Elements from an image to the next.
    pub(super) fn image(&self) -> usize {
        self.size[0] * self.row()
    }

    /// Elements from a row of pixels to the next.
    pub(super) fn row(&self) -> usize {
        self.size[1] * self.channels
    }
}

// SAFETY: `new` has seen that the last windows lie in their image and the images in the slice.
unsafe impl<T: Held> Rows<T> for Windows<'_, T> {
    #[inline(always)]
    fn values(&self) -> &[T] {
        self.values
    }
    #[inline(always)]
    fn rows(&self) -> usize {
        self.looks.images * self.looks.windows[0] * self.looks.windows[1]
    }
    #[inline(always)]
    fn segments(&self) -> usize {
        self.looks.kernel[0]
    }
    #[inline(always)]
    fn depth(&self) -> usize {
        self.looks.kernel[1] * self.looks.channels
    }
    #[inline(always)]
    fn apart(&self) -> usize {
        self.looks.row()
    }
    #[inline(always)]
    fn start(&self, row: usize) -> usize {
        let Looks { stride, windows, channels, .. } = self.looks;
        let (line, x) = (row / windows[1], row % windows[1]);
        let (image, y) = (line / windows[0], line % windows[0]);
        image * self.looks.image() + y * stride * self.looks.row() + x * stride * channels
    }
}
