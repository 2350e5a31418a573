//! Layers one after another, with values, tangents and, where a layer wants it, the time.

use super::chain::{self, Chain, Linked, Stacked};
use super::{Activation, ConcatConv2d, ConcatLinear, ConcatSquashLinear, Conv2d, GroupNorm, HyperLinear, Linear};
use crate::Time;
use crate::error::OdeError;
use crate::field::Tangent;
use crate::field::bare::{Bare, Site};
use candle_core::{Module, Result, Tensor};
use std::any::Any;
use std::fmt;

/// A layer that needs the time.
pub trait Timed {
    /// The layer's value at time `t`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit; whatever the device reports.
    fn forward_at(&self, t: &Time, x: &Tensor) -> Result<Tensor>;
}

/// Layers of this crate that may be all there is to a field ([`ModelField::of_layers`](crate::ModelField::of_layers)):
/// [`Sequential`] and [`Mlp`](super::Mlp). It cannot be implemented elsewhere.
pub trait Layers: Timed + Stacked + 'static {}

/// Layers one after another: the twin of [`candle_nn::Sequential`], with a tangent, and `Send` and `Sync`.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_ode::ops::{self, Activation};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let model = ops::seq()
///     .add(ops::linear(2, 16, vb.pp(0))?)
///     .add(Activation::Tanh)
///     .add(ops::linear(16, 2, vb.pp(1))?);
/// assert_eq!(model.forward(&Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?)?.dims(), [4, 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Default)]
pub struct Sequential {
    layers: Vec<Box<dyn Layer + Send + Sync>>,
}

/// An empty [`Sequential`].
pub fn seq() -> Sequential {
    Sequential::default()
}

impl Sequential {
    /// How many layers.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether there is no layer.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Appends a layer that does not see the time.
    #[allow(clippy::should_implement_trait)]
    pub fn add<L: Module + Tangent + Send + Sync + 'static>(self, layer: L) -> Self {
        self.append(Plain(layer))
    }

    /// Appends a layer that sees the time ([`ConcatLinear`](super::ConcatLinear), another `Sequential`, …).
    pub fn add_timed<L: Timed + Tangent + Send + Sync + 'static>(self, layer: L) -> Self {
        self.append(InTime(layer))
    }

    /// Appends a function. It has no tangent: asking for one is [`OdeError::NoTangent`], which names it by its place.
    pub fn add_fn<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static>(self, f: F) -> Self {
        let place = self.len();
        self.append(Closure { place, f })
    }

    fn append(mut self, layer: impl Layer + Send + Sync + 'static) -> Self {
        self.layers.push(Box::new(layer));
        self
    }

    pub(super) fn linked(&self) -> impl Iterator<Item = &dyn Linked> {
        self.layers.iter().map(|layer| layer.as_linked())
    }

    fn run(&self, t: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        chain::run(self.linked(), t, x)
    }

    fn push(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.layers.iter().try_fold((y.clone(), v.clone()), |(y, v), layer| layer.push(t, &y, &v))
    }
}

impl fmt::Debug for Sequential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sequential of {} layers", self.len())
    }
}

/// Without the time; an error if a layer needs it.
impl Module for Sequential {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(None, x)
    }
}

impl Timed for Sequential {
    fn forward_at(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        self.run(Some(t), x)
    }
}

impl Layers for Sequential {}

impl Stacked for Sequential {
    fn bare(&self, site: &Site<'_>) -> Option<Bare> {
        chain::bare(self.linked(), site)
    }
}

/// Inside a solve on the CPU linear layers (those of the time, too) and activations alone are one op, and so are all
/// directions; as with other layers, the field itself makes no backward pass through it.
impl Tangent for Sequential {
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (value, along) = self.tangents(t, y, &v.unsqueeze(0)?)?;
        Ok((value, along.squeeze(0)?))
    }

    fn tangents(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        chain::tangents(self.linked(), t, y, v, |v| self.push(t, y, v))
    }
}

/// What a `Sequential` holds.
trait Layer: Linked {
    fn as_linked(&self) -> &dyn Linked;
    fn push(&self, t: &Time, x: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)>;
}

/// The layer, if it is of that kind.
fn linked<L: Linked + 'static>(layer: &dyn Any) -> Option<&dyn Linked> {
    layer.downcast_ref::<L>().map(|layer| layer as &dyn Linked)
}

struct Plain<L>(L);

impl<L: Module + Tangent + 'static> Linked for Plain<L> {
    fn link(&self, t: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
        let kinds = [linked::<Linear>, linked::<Activation>, linked::<Conv2d>, linked::<GroupNorm>];
        kinds.iter().find_map(|linked| linked(&self.0)).is_some_and(|layer| layer.link(t, x, chain))
    }
    fn value(&self, _: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

impl<L: Module + Tangent + 'static> Layer for Plain<L> {
    fn as_linked(&self) -> &dyn Linked {
        self
    }
    fn push(&self, t: &Time, x: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.0.tangent(t, x, v)
    }
}

struct InTime<L>(L);

impl<L: Timed + Tangent + 'static> Linked for InTime<L> {
    fn link(&self, t: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
        let kinds =
            [linked::<ConcatLinear>, linked::<HyperLinear>, linked::<ConcatSquashLinear>, linked::<ConcatConv2d>];
        kinds.iter().find_map(|linked| linked(&self.0)).is_some_and(|layer| layer.link(t, x, chain))
    }
    fn value(&self, t: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        self.0.forward_at(t.ok_or_else(no_time)?, x)
    }
}

impl<L: Timed + Tangent + 'static> Layer for InTime<L> {
    fn as_linked(&self) -> &dyn Linked {
        self
    }
    fn push(&self, t: &Time, x: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.0.tangent(t, x, v)
    }
}

struct Closure<F> {
    place: usize,
    f: F,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Linked for Closure<F> {
    fn link(&self, _: Option<&Time>, _: &Tensor, _: &mut Chain) -> bool {
        false
    }
    fn value(&self, _: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        (self.f)(x)
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Layer for Closure<F> {
    fn as_linked(&self) -> &dyn Linked {
        self
    }
    fn push(&self, _: &Time, _: &Tensor, _: &Tensor) -> Result<(Tensor, Tensor)> {
        let field = format!("layer {} of a Sequential, a function,", self.place);
        Err(OdeError::NoTangent { field, wanted: "the tangent of the Sequential" }.into())
    }
}

/// The error of a layer in time that was called without one.
pub(super) fn no_time() -> candle_core::Error {
    OdeError::Unsupported {
        what: "calling a layer that sees the time without one".into(),
        instead: "call forward_at(t, x); inside a Sequential, add it with add_timed",
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check_tangent, noise, values};
    use super::super::{Activation, ConcatLinear, Linear};
    use super::*;
    use candle_core::Device;

    fn model() -> Sequential {
        let inner = seq().add_timed(ConcatLinear::new(noise(&[3, 6], 1), Some(noise(&[3], 2)))).add(Activation::Gelu);
        seq()
            .add(Linear::new(noise(&[5, 3], 3), None))
            .add(Activation::Tanh)
            .add_timed(inner)
            .add(Linear::new(noise(&[3, 3], 4), Some(noise(&[3], 5))))
    }

    #[test]
    fn tangents_match_pullbacks() {
        let t = Time::new(0.3, &Device::Cpu);
        let model = model();
        check_tangent(&model, &|args| model.forward_at(&t, &args[0]), &noise(&[4, 3], 6));
    }

    #[test]
    fn functions_have_values_but_no_tangent() {
        let model = seq().add(Activation::Tanh).add_fn(|x| x.sqr());
        let x = noise(&[4, 3], 6);
        assert_eq!(values(&model.forward(&x).unwrap())[0], values(&x)[0].tanh().powi(2));
        let error = OdeError::from(model.tangent(&Time::new(0.0, &Device::Cpu), &x, &x).unwrap_err());
        assert!(matches!(&error, OdeError::NoTangent { field, .. } if field.contains("layer 1")), "{error}");
    }

    #[test]
    fn a_layer_in_time_wants_the_time() {
        let error = OdeError::from(model().forward(&noise(&[4, 3], 6)).unwrap_err());
        assert!(matches!(error, OdeError::Unsupported { .. }), "{error}");
        assert!(seq().is_empty() && model().len() == 4);
    }
}
