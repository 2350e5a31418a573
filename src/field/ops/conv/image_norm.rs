//! A group norm beside convolutions, of images that lie pixel by pixel.

use super::frame::Frame;
use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::chain::Parameter;
use crate::field::ops::kernel::add_column_sums;
use crate::field::ops::kernel::group_norm::{self, Affine, Grouped, moments, normalise, pull_norm};
use crate::field::ops::norm::Norm;
use crate::field::session::{Buffered, Current, Matrix, Session, Tile};
use crate::field::sink;
use candle_core::{Module, Result, Tensor};
use std::ops::Range;

/// A norm of images of one size, and what is done with its result.
#[derive(Clone, Debug)]
pub(in crate::field::ops) struct ImageNorm {
    norm: Norm,
    weight: Option<Parameter>,
    bias: Option<Parameter>,
    sizes: Grouped,
    pub(super) then: Activation,
}

impl ImageNorm {
    /// The norm of images `(channels, height, width)`, if kernels of ours do it. `x` is what the chain begins with.
    pub(in crate::field::ops) fn new(
        current: &Current,
        x: &Tensor,
        [channels, height, width]: [usize; 3],
        norm: Norm,
        (weight, bias): (Option<&Tensor>, Option<&Tensor>),
    ) -> Option<Self> {
        if !(x.device().is_cpu() && norm.remove_mean) {
            return None;
        }
        let parameter = |leaf: Option<&Tensor>| match leaf {
            Some(leaf) => Parameter::of_features(current, x, leaf, channels).map(Some),
            None => Some(None),
        };
        let sizes = Grouped { height, width, channels, groups: norm.groups.per_sample };
        Some(Self { norm, weight: parameter(weight)?, bias: parameter(bias)?, sizes, then: Activation::Identity })
    }

    /// Whether its pullback needs its value: what was activated it makes again.
    pub(super) fn needs_value(&self) -> bool {
        self.then.keeps() == Keeps::Value
    }

    /// Channels, height and width of the images.
    pub(super) fn shape(&self) -> [usize; 3] {
        let Grouped { height, width, channels, .. } = self.sizes;
        [channels, height, width]
    }

    pub(super) fn parameters(&self) -> [Option<&Parameter>; 2] {
        [self.weight.as_ref(), self.bias.as_ref()]
    }

    /// So many images without a frame.
    pub(super) fn frame(&self, images: usize) -> Frame {
        let Grouped { height, width, channels, .. } = self.sizes;
        Frame { images, size: [height, width], channels, at: [0, 0], inner: [height, width, channels], beyond: None }
    }

    /// Its value by itself, channel by channel.
    pub(in crate::field::ops) fn alone(&self, x: &Tensor) -> Result<Tensor> {
        let [weight, bias] = self.parameters().map(|parameter| parameter.map(|parameter| &parameter.leaf));
        self.then.forward(&self.norm.forward(x, weight, bias)?)
    }

    /// Mean and scale of each group of each image.
    pub(super) fn moments<T: Tile>(&self, session: &Session, (images, x): (usize, &[T])) -> Matrix<f32> {
        let (shares, mut space) = self.shares(session, images);
        let mut found = f32::spare(session).matrix(images, self.sizes.moments());
        moments(&shares, self.sizes, self.norm.eps, x, &mut found, &mut space);
        found
    }

    /// Its pixels, in frames, of the [`moments`](Self::moments).
    pub(super) fn value<T: Tile>(
        &self,
        session: &Session,
        (images, x): (usize, &[T]),
        moments: &[f32],
        frame: &Frame,
    ) -> Result<Matrix<T>> {
        let mut y = frame.around(session);
        let parameters = self.floats(session)?;
        self.write(session, (images, x, moments), (&parameters, self.then), (&mut y, frame));
        Ok(y)
    }

    fn write<T: Tile>(
        &self,
        session: &Session,
        (images, x, moments): (usize, &[T], &[f32]),
        ([weight, bias], then): (&[Option<Matrix<f32>>; 2], Activation),
        (y, frame): (&mut [T], &Frame),
    ) {
        let (shares, mut space) = self.shares(session, images);
        let behind = (Affine { weight: weight.as_deref(), bias: bias.as_deref() }, then);
        normalise(&shares, self.sizes, (x, moments), behind, (y, frame.place()), &mut space);
    }

    /// From the cotangent of its pixels, as far as f′ is not a function of what was activated, which is not scaled, to
    /// that of x.
    pub(super) fn pull<T: Tile>(
        &self,
        session: &Session,
        mut g: Matrix<T>,
        (images, x): (usize, &[T]),
        moments: &[f32],
    ) -> Result<Matrix<T>> {
        let parameters = self.floats(session)?;
        if self.then.keeps() == Keeps::Input {
            let frame = self.frame(images);
            let (mut activated, identity) = (frame.around(session), Activation::Identity);
            self.write(session, (images, x, moments), (&parameters, identity), (&mut activated, &frame));
            self.then.times_slope(&activated, &mut g);
        }
        let (shares, mut space) = self.shares(session, images);
        let ([weight, _], channels) = (parameters, self.sizes.channels);
        let mut sums = f32::spare(session).matrix(images, 2 * channels);
        pull_norm(&shares, self.sizes, (x, moments), weight.as_deref(), (&mut g, &mut sums), &mut space);
        let tracked = self.parameters().map(|parameter| parameter.filter(|parameter| parameter.is_tracked()));
        if tracked.iter().any(Option::is_some) {
            let mut total = f32::spare(session).matrix(1, 2 * channels);
            total.fill(0.0);
            add_column_sums(sums.view(), &mut total);
            // A cotangent that is not finite shows in its sums.
            sink::note(total.iter().all(|sum| sum.is_finite()));
            for (parameter, sums) in tracked.iter().zip(total.chunks_exact(channels)) {
                parameter.map_or(Ok(()), |parameter| parameter.add(sums))?;
            }
        }
        Ok(g)
    }

    /// w and b.
    fn floats(&self, session: &Session) -> Result<[Option<Matrix<f32>>; 2]> {
        let [weight, bias] = self.parameters().map(|parameter| parameter.map(|parameter| parameter.in_f32(session)));
        Ok([weight.transpose()?, bias.transpose()?])
    }

    /// The images that threads take, and their space.
    fn shares(&self, session: &Session, images: usize) -> (Vec<Range<usize>>, Matrix<f32>) {
        let shares = group_norm::shares_of_images(images, &self.sizes);
        let space = f32::spare(session).matrix(shares.len(), group_norm::space(&self.sizes));
        (shares, space)
    }
}
