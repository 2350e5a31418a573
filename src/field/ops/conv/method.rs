//! How a convolution is summed, and the kernels for each way.

use crate::field::ops::kernel::{
    Epilogue, Looks, POINTS, Packed, View, ViewMut, Windows, add_outer_in_tiles, add_outer_windows, convolve,
    convolve_in_tiles, fits, of_kernel, space, space_of_sums,
};
use crate::field::session::{Session, Tile};
use half::bf16;

/// How the products of a convolution are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// One for each element of the kernel.
    Direct,
    /// 16 where that takes 36: minimal filtering.
    Filtered,
}

impl Method {
    /// Channels that do not fill a vector.
    const FEW: usize = 16;

    /// Rows of the packed kernel for each channel.
    pub(super) fn points(self, taps: usize) -> usize {
        match self {
            Self::Direct => taps,
            Self::Filtered => POINTS,
        }
    }

    /// The packed kernel at a point, for w(tap).
    pub(super) fn of_kernel(self, point: usize, w: impl Fn(usize) -> f32) -> f32 {
        match self {
            Self::Direct => w(point),
            Self::Filtered => of_kernel(point, w),
        }
    }
}

/// Elements with kernels for convolutions. BF16 is convolved directly: the sums of pixels would have to be rounded.
pub(super) trait Convolved: Tile {
    /// The faster method for images that are looked at so.
    fn method(looks: &Looks, outputs: usize) -> Method;
    /// y = x ∗ w + b, w packed for the method.
    fn convolve(
        method: Method,
        session: &Session,
        x: Windows<'_, Self>,
        w: &Packed<Self>,
        bias: Option<&[f32]>,
        out: ViewMut<'_, Self>,
    );
    /// dw += gᵀ x for dw `(outputs, taps · channels)`.
    fn add_outer(method: Method, session: &Session, g: View<'_, Self>, x: Windows<'_, Self>, dw: ViewMut<'_, f32>);
}

impl Convolved for f32 {
    fn method(looks: &Looks, outputs: usize) -> Method {
        if fits(looks) && looks.channels.min(outputs) >= Method::FEW { Method::Filtered } else { Method::Direct }
    }

    fn convolve(
        method: Method,
        session: &Session,
        x: Windows<'_, f32>,
        w: &Packed<f32>,
        bias: Option<&[f32]>,
        out: ViewMut<'_, f32>,
    ) {
        match method {
            Method::Direct => convolve(x, w, &Epilogue { bias, ..Epilogue::default() }, out),
            Method::Filtered => {
                let mut space = Self::spare(session).matrix(1, space(x.looks().channels, w.columns()));
                convolve_in_tiles(x, w, bias, out, &mut space);
            }
        }
    }

    fn add_outer(method: Method, session: &Session, g: View<'_, f32>, x: Windows<'_, f32>, dw: ViewMut<'_, f32>) {
        match method {
            Method::Direct => Self::spare(session).with_scratch(|scratch| add_outer_windows(g, x, dw, scratch)),
            Method::Filtered => {
                let mut space = Self::spare(session).matrix(1, space_of_sums(x.looks().channels, g.columns()));
                add_outer_in_tiles(g, x, dw, &mut space);
            }
        }
    }
}

impl Convolved for bf16 {
    fn method(_: &Looks, _: usize) -> Method {
        Method::Direct
    }

    fn convolve(
        _: Method,
        _: &Session,
        x: Windows<'_, Self>,
        w: &Packed<Self>,
        bias: Option<&[f32]>,
        out: ViewMut<'_, Self>,
    ) {
        convolve(x, w, &Epilogue { bias, ..Epilogue::default() }, out);
    }

    fn add_outer(_: Method, session: &Session, g: View<'_, Self>, x: Windows<'_, Self>, dw: ViewMut<'_, f32>) {
        Self::spare(session).with_scratch(|scratch| add_outer_windows(g, x, dw, scratch));
    }
}
