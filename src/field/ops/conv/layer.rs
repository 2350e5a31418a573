//! Layers over images: what convolutions and norms have in common.

use super::convolution::Convolution;
use super::frame::Frame;
use super::image_norm::ImageNorm;
use super::method::Convolved;
use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::chain::Parameter;
use crate::field::ops::kernel::Held;
use crate::field::session::{Matrix, Session};
use candle_core::{Result, bail};

/// A layer over images of one size, and what is done with its result.
#[derive(Clone, Debug)]
pub(in crate::field::ops) enum ImageLayer {
    Convolution(Convolution),
    Norm(ImageNorm),
}

/// What the pullback of a layer needs, beside the images it was given.
#[derive(Debug)]
pub(super) enum Kept<T> {
    Nothing,
    /// What was activated, where f′ is a function of that.
    Activated(Matrix<T>),
    /// Mean and scale of each group of each image.
    Moments(Matrix<f32>),
}

impl ImageLayer {
    /// Channels, height and width of the images it is given.
    pub(in crate::field::ops) fn given(&self) -> [usize; 3] {
        match self {
            Self::Convolution(convolution) => convolution.given(),
            Self::Norm(norm) => norm.shape(),
        }
    }

    /// Channels, height and width of those it makes.
    pub(in crate::field::ops) fn made(&self) -> [usize; 3] {
        match self {
            Self::Convolution(convolution) => convolution.made(),
            Self::Norm(norm) => norm.shape(),
        }
    }

    /// The norm, if it is one.
    pub(in crate::field::ops) fn as_norm(&self) -> Option<&ImageNorm> {
        match self {
            Self::Convolution(_) => None,
            Self::Norm(norm) => Some(norm),
        }
    }

    pub(in crate::field::ops) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let parameters = match self {
            Self::Convolution(convolution) => convolution.parameters(),
            Self::Norm(norm) => norm.parameters(),
        };
        parameters.into_iter().flatten()
    }

    /// What is done with its result.
    pub(super) fn then(&self) -> Activation {
        match self {
            Self::Convolution(convolution) => convolution.then,
            Self::Norm(norm) => norm.then,
        }
    }

    pub(in crate::field::ops) fn then_mut(&mut self) -> &mut Activation {
        match self {
            Self::Convolution(convolution) => &mut convolution.then,
            Self::Norm(norm) => &mut norm.then,
        }
    }

    /// So many images in the frames that it looks at.
    pub(super) fn frame<T: Held>(&self, images: usize) -> Frame {
        match self {
            Self::Convolution(convolution) => convolution.frame::<T>(images),
            Self::Norm(norm) => norm.frame(images),
        }
    }

    /// The same where they are filled, with the time that it sees: this one, or that which it was made for.
    pub(super) fn frame_at<T: Held>(&self, images: usize, time: Option<f64>) -> Frame {
        let beyond = match self {
            Self::Convolution(convolution) => convolution.time.map(|own| time.unwrap_or(own) as f32),
            Self::Norm(_) => None,
        };
        Frame { beyond, ..self.frame::<T>(images) }
    }

    /// Its pixels, in the frames that the `next` one looks at if there is one, and what the pullback needs, if it
    /// `saves`.
    pub(super) fn value<T: Convolved>(
        &self,
        session: &Session,
        (images, framed): (usize, &[T]),
        next: Option<Frame>,
        saves: bool,
    ) -> Result<(Matrix<T>, Kept<T>)> {
        match self {
            Self::Convolution(convolution) => {
                let (y, activated) = convolution.value(session, (images, framed), saves)?;
                let framed = match next {
                    Some(next) => next.around_pixels(session, y),
                    None => y,
                };
                Ok((framed, activated.map_or(Kept::Nothing, Kept::Activated)))
            }
            Self::Norm(norm) => {
                let frame = next.unwrap_or_else(|| norm.frame(images));
                let moments = norm.moments(session, (images, framed));
                let y = norm.value(session, (images, framed), &moments, &frame)?;
                Ok((y, if saves { Kept::Moments(moments) } else { Kept::Nothing }))
            }
        }
    }

    /// Whether its pullback needs the value.
    pub(super) fn needs_value(&self) -> bool {
        match self {
            // What was activated is kept as the value is made.
            Self::Convolution(convolution) => convolution.then.keeps() != Keeps::Nothing,
            Self::Norm(norm) => norm.needs_value(),
        }
    }

    /// What the pullback needs, where the value is not wanted.
    pub(super) fn kept<T: Convolved>(&self, session: &Session, given: (usize, &[T])) -> Kept<T> {
        match self {
            Self::Convolution(_) => Kept::Nothing,
            Self::Norm(norm) => Kept::Moments(norm.moments(session, given)),
        }
    }

    /// From the cotangent of its pixels, which is not scaled, to that of what it was given: through the activation,
    /// too, where f′ is a function of what was activated.
    pub(super) fn pull<T: Convolved>(
        &self,
        session: &Session,
        mut g: Matrix<T>,
        given: (usize, &[T]),
        kept: &Kept<T>,
    ) -> Result<Matrix<T>> {
        match (self, kept) {
            (Self::Convolution(convolution), kept) => {
                if let Kept::Activated(activated) = kept {
                    convolution.then.times_slope(activated, &mut g);
                }
                convolution.pull(session, g, given)
            }
            (Self::Norm(norm), Kept::Moments(moments)) => norm.pull(session, g, given, moments),
            (Self::Norm(_), _) => bail!("a norm pulls back what it has evaluated"),
        }
    }
}
