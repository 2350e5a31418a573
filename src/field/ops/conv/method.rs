//! How a convolution is summed, and the kernels for each way.

use crate::field::ops::Activation;
use crate::field::ops::kernel::{
    Epilogue, Looks, Packed, Then, View, ViewMut, Windows, add_outer_windows, convolve, winograd,
};
use crate::field::session::{Buffered, Session, Tile};
use half::bf16;

/// How the products of a convolution are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::field::ops) enum Method {
    /// One for each element of the kernel.
    Direct,
    /// 16 where that takes 36: minimal filtering.
    Filtered,
}

impl Method {
    /// Channels on both sides, and results in an image, from which on filtering is faster: it has more weights to read.
    const ENOUGH: (usize, usize) = (16, 64);

    /// Rows of the packed kernel for each channel.
    pub(super) fn points(self, taps: usize) -> usize {
        match self {
            Self::Direct => taps,
            Self::Filtered => winograd::POINTS,
        }
    }

    /// The packed kernel at a point, for w(tap).
    pub(super) fn of_kernel(self, point: usize, w: impl Fn(usize) -> f32) -> f32 {
        match self {
            Self::Direct => w(point),
            Self::Filtered => winograd::of_kernel(point, w),
        }
    }
}

/// b, if there is one, and f.
pub(in crate::field::ops) type Behind<'a> = (Option<&'a [f32]>, Activation);

/// Elements with kernels for convolutions: what is provided is the direct one.
pub(in crate::field::ops) trait Convolved: Tile {
    /// The faster method for images that are looked at so.
    fn method(_: &Looks, _: usize) -> Method {
        Method::Direct
    }

    /// y = f(x ∗ w + b), w packed for the method.
    fn convolve(
        _: Method,
        _: &Session,
        x: Windows<'_, Self>,
        w: &Packed<Self>,
        behind: Behind<'_>,
        out: ViewMut<'_, Self>,
    ) {
        directly(x, w, behind, out);
    }

    /// dw += gᵀ x for dw `(outputs, taps · channels)`.
    fn add_outer(_: Method, session: &Session, g: View<'_, Self>, x: Windows<'_, Self>, dw: ViewMut<'_, f32>) {
        add_outer_directly(session, g, x, dw);
    }
}

/// The sums of pixels that filtering multiplies would have to be rounded.
impl Convolved for bf16 {}

impl Convolved for f32 {
    fn method(looks: &Looks, outputs: usize) -> Method {
        let (channels, results) = Method::ENOUGH;
        let is_large = looks.channels.min(outputs) >= channels && looks.windows[0] * looks.windows[1] >= results;
        if is_large && winograd::fits(looks) { Method::Filtered } else { Method::Direct }
    }

    fn convolve(
        method: Method,
        session: &Session,
        x: Windows<'_, f32>,
        w: &Packed<f32>,
        behind: Behind<'_>,
        out: ViewMut<'_, f32>,
    ) {
        match method {
            Method::Direct => directly(x, w, behind, out),
            Method::Filtered => {
                let images = winograd::shares_of_images(x.looks(), w.columns());
                let space = images.len() * winograd::space(x.looks().channels, w.columns());
                winograd::convolve_in_tiles(images, x, w, behind, out, &mut Self::spare(session).matrix(1, space));
            }
        }
    }

    fn add_outer(method: Method, session: &Session, g: View<'_, f32>, x: Windows<'_, f32>, dw: ViewMut<'_, f32>) {
        match method {
            Method::Direct => add_outer_directly(session, g, x, dw),
            Method::Filtered => {
                let outputs = winograd::shares_of_outputs(x.looks(), g.columns());
                let space = outputs.iter().map(|part| winograd::space_of_sums(x.looks().channels, part.len())).sum();
                winograd::add_outer_in_tiles(outputs, g, x, dw, &mut Self::spare(session).matrix(1, space));
            }
        }
    }
}

fn directly<T: Tile>(x: Windows<'_, T>, w: &Packed<T>, (bias, then): Behind<'_>, out: ViewMut<'_, T>) {
    convolve(x, w, &Epilogue { bias, then: Then::activation(then), ..Epilogue::default() }, out);
}

fn add_outer_directly<T: Tile>(session: &Session, g: View<'_, T>, x: Windows<'_, T>, dw: ViewMut<'_, f32>) {
    T::spare(session).with_scratch(|scratch| add_outer_windows(g, x, dw, scratch));
}
