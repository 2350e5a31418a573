//! Convolutions, with group norms and activations before them, between them and behind, as one op of Candle's graph, on
//! a tile of images.
//!
//! Inside a solve on the CPU, in F32, F16 and BF16, directly or by minimal filtering ([`Method`]). From the first layer
//! to the last, images lie pixel by pixel, in frames of zeros where windows look at them: the windows of a frame are
//! rows of a matrix that is never made, since the kernels find them where they lie:
//!
//! | product | windows | by |
//! |---|---|---|
//! | y = x ∗ w + b | of x in a frame as wide as the padding | w, packed once per solve |
//! | dL/dx | of dL/dy, spread by the stride, in a frame of kernel − 1 − padding | w turned round, packed once per solve |
//! | dL/dw, added in place to the F32 sums | of x, kept from the forward pass | dL/dy |
//!
//! The framed x of a convolution holds the value of the activation before it, too, for the pullback through that. A norm
//! keeps what it is given, the pixels of the convolution before, and the mean and scale of each group; it writes its
//! result, activated, into the frame of the convolution behind it.

use super::frame::{pixels_of, planes_of};
use super::layer::{ImageLayer, Kept};
use super::method::Convolved;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::chain::{Compute, Order, elements, with_compute, with_elements};
use crate::field::ops::kernel::Held;
use crate::field::session::{Matrix, Session, WayBack};
use crate::field::sink;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

/// What the pullback of a layer needs.
pub(in crate::field::ops) struct Passed<T> {
    framed: Matrix<T>,
    kept: Kept<T>,
}

/// Writes the value of the layers at x, and at a time if it is not that they were chained at, if it is wanted, and gives what the pullback needs, if it will be asked
/// for.
pub(in crate::field::ops) fn value<C: Compute<Held: Convolved>>(
    (session, layers, time): (&Session, &[ImageLayer], Option<f64>),
    x: &[C::Stored],
    saves: bool,
    to: Option<&mut [C::Stored]>,
) -> Result<Option<Vec<Passed<C::Held>>>> {
    let (first, last) = (&layers[0], &layers[layers.len() - 1]);
    let [channels, height, width] = first.given();
    let images = x.len() / (channels * height * width);
    let mut saved = vec![];
    let mut save = |framed, kept| saved.extend(saves.then_some(Passed { framed, kept }));
    let mut framed = {
        let x = C::held(session, Order::Rows, x, images * channels);
        first.frame_at::<C::Held>(images, time).of_planes(session, x.view())
    };
    for (layer, next) in layers.iter().zip(&layers[1..]) {
        let (y, kept) = layer.value(session, (images, &framed), Some(next.frame_at::<C::Held>(images, time)), saves)?;
        save(std::mem::replace(&mut framed, y), kept);
    }
    let kept = match to {
        Some(to) => {
            let (y, kept) = last.value(session, (images, &framed), None, saves)?;
            store::<C>(session, last.made(), &y, to);
            kept
        }
        None => last.kept(session, (images, &framed)),
    };
    save(framed, kept);
    Ok(saves.then_some(saved))
}

/// Whether the pullback needs the value of the layers.
pub(in crate::field::ops) fn needs_value(layers: &[ImageLayer]) -> bool {
    layers.last().is_some_and(ImageLayer::needs_value)
}

/// Adds dL/dw and dL/db of every layer to the open sums, and writes S times dL/dx, for `grad` S times the
/// cotangent of the `value`, which is empty where it is not needed.
pub(in crate::field::ops) fn pull<C: Compute<Held: Convolved>>(
    (session, layers): (&Session, &[ImageLayer]),
    saved: &[Passed<C::Held>],
    (value, grad): (&[C::Stored], &[C::Stored]),
    to: &mut [C::Stored],
) -> Result<()> {
    let (first, last, scale) = (&layers[0], &layers[layers.len() - 1], sink::scale()? as f32);
    let [channels, height, width] = last.made();
    let images = grad.len() / (channels * height * width);
    let pixels = |planes: &[C::Stored]| {
        let planes = C::held(session, Order::Rows, planes, images * channels);
        pixels_of(session, planes.view(), channels)
    };
    let mut g = pixels(grad);
    multiply_by(&mut g, scale.recip());
    if last.then().keeps() == Keeps::Value {
        last.then().times_slope(&pixels(value), &mut g);
    }
    for (n, (layer, Passed { framed, kept })) in layers.iter().zip(saved).enumerate().rev() {
        g = layer.pull(session, g, (images, framed), kept)?;
        // What they look at is the value of the one before.
        let before = n.checked_sub(1).map(|n| layers[n].then()).filter(|then| then.keeps() == Keeps::Value);
        if let Some(before) = before {
            layer.frame::<C::Held>(images).times_slope(before, framed, &mut g);
        }
    }
    multiply_by(&mut g, scale);
    store::<C>(session, first.given(), &g, to);
    Ok(())
}

/// Stores the pixels of images of that shape, channel by channel.
fn store<C: Compute>(
    session: &Session,
    [channels, height, width]: [usize; 3],
    pixels: &Matrix<C::Held>,
    to: &mut [C::Stored],
) {
    let rows = to.len() / (height * width);
    debug_assert_eq!(pixels.len(), rows / channels * height * width * channels);
    C::store(session, Order::Rows, rows, to, |planes| planes_of(pixels.view(), height * width, planes));
}

fn multiply_by<T: Held>(values: &mut [T], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|value| *value = T::of(value.wide() * factor));
    }
}

/// Layers over a tensor of images one after another.
pub(in crate::field::ops) struct ImageLayers {
    session: Arc<Session>,
    layers: Vec<ImageLayer>,
    saves: bool,
    /// What the pullback needs, [`Passed`] of what tiles hold; from the forward pass on.
    saved: Mutex<Option<Box<dyn Any + Send + Sync>>>,
}

impl ImageLayers {
    /// At least one; `saves` says whether they will be pulled back.
    pub(in crate::field::ops) fn new(session: Arc<Session>, layers: Vec<ImageLayer>, saves: bool) -> Self {
        Self { session, layers, saves, saved: Mutex::default() }
    }

    fn value_of<C: Compute<Held: Convolved>>(&self, x: &[C::Stored]) -> Result<(CpuStorage, Shape)> {
        let elements = |image: [usize; 3]| image.iter().product::<usize>();
        let (given, made) = (self.layers[0].given(), self.layers[self.layers.len() - 1].made());
        let images = x.len() / elements(given);
        let mut y = vec![C::Stored::default(); images * elements(made)];
        let saved = value::<C>((&self.session, &self.layers, None), x, self.saves, Some(&mut y))?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = saved.map(|saved| Box::new(saved) as _);
        Ok((C::storage(y), Shape::from([&[images], &made[..]].concat())))
    }

    fn pull_from<C: Compute<Held: Convolved>>(&self, value: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(saved) = saved.as_ref().and_then(|saved| saved.downcast_ref::<Vec<Passed<C::Held>>>()) else {
            bail!("layers pull back what they have evaluated")
        };
        let shape = [&value.dims()[..1], &self.layers[0].given()].concat();
        let mut dx = vec![C::Stored::default(); shape.iter().product()];
        with_elements(value, |value| {
            with_elements(cotangent, |grad| pull::<C>((&self.session, &self.layers), saved, (value, grad), &mut dx))
        })?;
        Tensor::from_vec(dx, shape, value.device())
    }
}

impl WayBack for ImageLayers {
    fn pull(&self, _: Option<&Tensor>, value: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let cotangent = cotangent.detach().contiguous()?;
        with_compute!(value.dtype(), false, C => self.pull_from::<C>(value, &cotangent))
    }
}

impl CustomOp1 for ImageLayers {
    fn name(&self) -> &'static str {
        "layers over images"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        with_compute!(x.dtype(), false, C => self.value_of::<C>(elements(x, layout)?))
    }
}
