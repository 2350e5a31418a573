//! Linear layers with activations between them as one op of Candle's graph, on a tile of rows; or layers over images, of
//! which `conv/fused.rs` tells.
//!
//! hₙ = fₙ(hₙ₋₁ Wₙᵀ + bₙ), h₀ = x `(…, in)`. Inside a solve (on CUDA see `cuda/chain.rs`), on the CPU, in F32, F16 and
//! BF16, the layers of this crate run in it: parameters are packed once per solve, weights that are made of the time
//! once per evaluation, the activation is applied to the product while that is in registers, the pullback multiplies by
//! fₙ′ there too, and dL/dW is added in place to the F32 sums. Between its first and its last tensor F16 is held in
//! F32, so that it is rounded once for the whole chain; BF16 is rounded after each layer, unless the layers are narrow.

mod along;
mod bare;
mod compute;
mod given;
mod of_time;
mod order;
mod parameter;
mod pass;
mod weights;

use super::Activation;
use super::conv::fused::ImageLayers;
use super::conv::{Conv2d, Convolution, ImageLayer, ImageNorm};
use super::norm::Norm;
use crate::Time;
use crate::field::session::{Call, Current, Ran, Session, WayBack};
use crate::field::sink;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use given::Given;
use pass::{Pulled, Saved, Saves};
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) use along::tangents;
pub(super) use bare::{Stacked, bare};
pub(super) use compute::{AsStored, Compute, Widened, with_compute};
pub(super) use of_time::{by_ops, column, of_time};
pub(super) use order::Order;
pub(super) use parameter::Parameter;
pub(crate) use parameter::with_elements;
use weights::Ready;
pub(super) use weights::Weights;

/// A linear layer and what is done with its result.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) weights: Weights,
    /// Leading columns of W that the rows of x are multiplied with.
    pub(super) inputs: usize,
    /// Rows of W.
    pub(super) outputs: usize,
    pub(super) then: Activation,
    /// Where the layer lives as long as its session.
    ready: Option<Arc<Ready>>,
}

/// A layer that may become part of a chain.
pub(super) trait Linked {
    /// Appends itself to the chain for `x`. Says whether it could.
    fn link(&self, t: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool;

    /// Its value by itself.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    fn value(&self, t: Option<&Time>, x: &Tensor) -> Result<Tensor>;
}

/// The layers one after another, those that can be in chains.
pub(super) fn run<'a, L: Linked + ?Sized + 'a>(
    layers: impl IntoIterator<Item = &'a L>,
    t: Option<&Time>,
    x: &Tensor,
) -> Result<Tensor> {
    let (mut x, mut chain) = (x.clone(), Chain::start(x));
    for layer in layers {
        if chain.as_mut().is_some_and(|chain| layer.link(t, &x, chain)) {
            continue;
        }
        if let Some(done) = chain.take().filter(|chain| !chain.is_empty()) {
            x = done.run(&x)?;
            chain = Chain::start(&x);
            if chain.as_mut().is_some_and(|chain| layer.link(t, &x, chain)) {
                continue;
            }
        }
        x = layer.value(t, &x)?;
        chain = Chain::start(&x);
    }
    chain.map_or(Ok(x.clone()), |chain| chain.run(&x))
}

/// Layers that may become one op: linear ones, or convolutions and their norms, not both.
pub(super) struct Chain {
    current: Current,
    links: Vec<Link>,
    of_images: Vec<ImageLayer>,
    /// Weights that are no parameters, one tensor for each layer that has such.
    given: Vec<Tensor>,
    /// Whether Candle's graph is to lead back from the value.
    in_graph: bool,
}

impl Chain {
    /// An empty chain for `x`, if layers can be chained here: inside a solve, in a dtype and on a device with kernels.
    pub(super) fn start(x: &Tensor) -> Option<Self> {
        let has_kernels = matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
        #[cfg(feature = "cuda")]
        let runs = x.device().is_cpu() || super::cuda::runs(x);
        #[cfg(not(feature = "cuda"))]
        let runs = x.device().is_cpu();
        let fits = runs && has_kernels && x.rank() > 0 && x.elem_count() > 0;
        let mut current = Session::current().filter(|_| fits)?;
        let in_graph = current.call == Call::Graph;
        if in_graph && x.device().is_cpu() && !x.track_op() {
            // Parameters may be tracked: Candle will come back through one of them.
            current.call = Call::Value;
        }
        Some(Self { current, links: vec![], of_images: vec![], given: vec![], in_graph })
    }

    fn is_empty(&self) -> bool {
        self.links.is_empty() && self.of_images.is_empty()
    }

    /// Appends a convolution, with the time on the channel beyond those of x. Says whether it could.
    pub(super) fn convolution(&mut self, x: &Tensor, layer: &Conv2d, t: Option<&Time>) -> bool {
        if t.is_some_and(Time::is_tracked) {
            return false;
        }
        let made = |shape| Convolution::new(&self.current, x, shape, layer, t.map(Time::value));
        let made = self.images(x).and_then(made).map(ImageLayer::Convolution);
        self.append_to_images(made)
    }

    /// Appends a group norm, `of` images of that many channels and pixels, with w and b. Says whether it could.
    pub(super) fn norm(
        &mut self,
        x: &Tensor,
        of: impl FnOnce(usize, usize) -> Option<Norm>,
        parameters: (Option<&Tensor>, Option<&Tensor>),
    ) -> bool {
        let made = self.images(x).and_then(|shape @ [channels, height, width]| {
            ImageNorm::new(&self.current, x, shape, of(channels, height * width)?, parameters)
        });
        self.append_to_images(made.map(ImageLayer::Norm))
    }

    /// Channels, height and width of images that the next layer would be given.
    fn images(&self, x: &Tensor) -> Option<[usize; 3]> {
        let shape = match self.of_images.last() {
            Some(before) => Some(before.made()),
            None => x.dims4().ok().map(|(_, channels, height, width)| [channels, height, width]),
        };
        shape.filter(|_| self.links.is_empty())
    }

    fn append_to_images(&mut self, layer: Option<ImageLayer>) -> bool {
        let could = layer.is_some();
        self.of_images.extend(layer);
        could
    }

    /// Appends x W[:, ..inputs]ᵀ + b, with the time on the column beyond. Says whether it could.
    pub(super) fn linear(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, t: Option<&Time>) -> bool {
        let Ok((outputs, columns)) = weight.dims2() else { return false };
        let inputs = columns - usize::from(t.is_some()).min(columns);
        // On a GPU elements are counted in 32 bits.
        let rows = x.elem_count() / x.dims().last().copied().unwrap_or(1).max(1);
        let is_small = x.device().is_cpu() || rows.max(inputs) * outputs <= 1 << 31;
        let fits = weight.dtype() == x.dtype() && self.takes(x, inputs, outputs) && is_small;
        if !fits || t.is_some_and(Time::is_tracked) {
            return false;
        }
        let Some((weight, bias)) = Parameter::of_layer(&self.current, x, weight, bias) else { return false };
        let weights = Weights::Parameters { weight, bias, beyond: t.map(Time::value) };
        self.links.push(Link { weights, inputs, outputs, then: Activation::Identity, ready: None });
        true
    }

    /// Appends x Wᵀ + b where W `(outputs, inputs)` and, behind it, b are the elements of a tensor that is `made`, as
    /// of the time. Says whether it could.
    pub(super) fn given(
        &mut self,
        x: &Tensor,
        [outputs, inputs]: [usize; 2],
        made: impl FnOnce() -> Result<Tensor>,
    ) -> bool {
        self.append(x, [outputs, inputs], [outputs * inputs, outputs], made, |[weight, bias]| Weights::Given {
            weight,
            bias,
        })
    }

    /// Appends (x Wᵀ + b) ∘ gate + shift where gate and, behind it, shift are the elements of a tensor that is `made`.
    /// Says whether it could.
    pub(super) fn gated(
        &mut self,
        x: &Tensor,
        (weight, bias): (&Tensor, &Tensor),
        made: impl FnOnce() -> Result<Tensor>,
    ) -> bool {
        let (Ok(sizes), Some((weight, Some(bias)))) =
            (weight.dims2(), Parameter::of_layer(&self.current, x, weight, Some(bias)))
        else {
            return false;
        };
        self.append(x, sizes.into(), [sizes.0; 2], made, |[gate, shift]| Weights::Gated { weight, bias, gate, shift })
    }

    /// Appends a layer of so many outputs and inputs whose weights are two parts, of so many elements, of what is
    /// `made`, or are made of them.
    fn append(
        &mut self,
        x: &Tensor,
        [outputs, inputs]: [usize; 2],
        [first, second]: [usize; 2],
        made: impl FnOnce() -> Result<Tensor>,
        weights: impl FnOnce([Range<usize>; 2]) -> Weights,
    ) -> bool {
        if !(x.device().is_cpu() && self.takes(x, inputs, outputs)) {
            return false;
        }
        let before: usize = self.given.iter().map(Tensor::elem_count).sum();
        if before > 0 && before + first + second > Self::GIVEN {
            return false;
        }
        let fits = |made: &Tensor| made.dims() == [first + second] && made.dtype() == x.dtype();
        let Some(made) = made().ok().filter(fits) else { return false };
        let weights = weights([before..before + first, before + first..before + first + second]);
        self.links.push(Link { weights, inputs, outputs, then: Activation::Identity, ready: None });
        self.given.push(made);
        true
    }

    /// Whether a layer of that size goes on from the last one.
    fn takes(&self, x: &Tensor, inputs: usize, outputs: usize) -> bool {
        let before = self.links.last().map_or(x.dims().last().copied(), |link| Some(link.outputs));
        before == Some(inputs) && inputs > 0 && outputs > 0 && self.of_images.is_empty()
    }

    /// Elements that several layers of a chain are given at most: beyond, to put them into one tensor takes more than
    /// it saves.
    const GIVEN: usize = 1 << 14;

    /// All weights that are no parameters, and x, both as Candle's graph is to lead back to them: to parameters, if
    /// there is no other way, through x.
    fn operands(&mut self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let given = std::mem::take(&mut self.given);
        let given = match given.as_slice() {
            [] => None,
            [only] => Some(only.contiguous()?),
            several => Some(Tensor::cat(several, 0)?),
        };
        if !self.in_graph {
            return Ok((x.contiguous()?, given.map(|given| given.detach())));
        }
        let is_reached = x.track_op() || given.as_ref().is_some_and(Tensor::track_op);
        let of_images = self.of_images.iter().flat_map(ImageLayer::parameters);
        let mut parameters = self.links.iter().flat_map(|link| link.weights.parameters()).chain(of_images);
        match parameters.find(|parameter| !is_reached && x.device().is_cpu() && parameter.is_tracked()) {
            Some(parameter) => Ok((x.contiguous()?.apply_op2(&parameter.leaf, Through)?, given)),
            None => Ok((x.contiguous()?, given)),
        }
    }

    /// Appends an activation. Says whether it could.
    pub(super) fn activation(&mut self, activation: Activation) -> bool {
        let last = self.links.last_mut().map(|link| &mut link.then);
        match last.or(self.of_images.last_mut().map(ImageLayer::then_mut)) {
            Some(then @ Activation::Identity) => {
                *then = activation;
                true
            }
            _ => false,
        }
    }

    /// Its value; x itself where nothing has been appended.
    pub(super) fn run(mut self, x: &Tensor) -> Result<Tensor> {
        if self.is_empty() {
            return Ok(x.clone());
        }
        let norms: Option<Vec<_>> = self.of_images.iter().map(ImageLayer::as_norm).collect();
        if let Some(norms) = norms.filter(|norms| !norms.is_empty()) {
            // Without convolutions images are better left channel by channel.
            return norms.into_iter().try_fold(x.clone(), |x, norm| norm.alone(&x));
        }
        let (x, given) = self.operands(x)?;
        if !self.of_images.is_empty() {
            let saves = x.track_op() || self.current.call == Call::Layers;
            let layers = ImageLayers::new(self.current.session, self.of_images, saves);
            return if saves { run_to_pull(layers, &x) } else { x.apply_op1_no_bwd(&layers) };
        }
        #[cfg(feature = "cuda")]
        if !x.device().is_cpu() {
            return super::cuda::run_chain(self.links, &x);
        }
        let (Current { session, call }, links) = (self.current, self.links);
        let saves = match call {
            _ if x.track_op() || given.as_ref().is_some_and(Tensor::track_op) => Saves::Results,
            Call::Layers if given.is_none() => Saves::All,
            Call::Value | Call::Graph | Call::Layers => Saves::Nothing,
        };
        let (is_narrow, saved) = (Order::is_narrow(&links), Mutex::default());
        let layers = Layers { session, links, is_narrow, shape: x.shape().clone(), saves, saved };
        if let Some(given) = given {
            // Candle's graph leads on from what is given: the layers alone are not all there is to go back through.
            return if saves == Saves::Nothing {
                x.apply_op2_no_bwd(&given, &layers)
            } else {
                x.apply_op2(&given, layers)
            };
        }
        if saves == Saves::Nothing { x.apply_op1_no_bwd(&layers) } else { run_to_pull(layers, &x) }
    }
}

/// The value of layers that will be pulled back, by Candle's graph or by themselves.
fn run_to_pull<L: CustomOp1 + WayBack + 'static>(layers: L, x: &Tensor) -> Result<Tensor> {
    let layers = Arc::new(layers);
    let value = if x.track_op() { x.apply_op1(Node(layers.clone())) } else { x.apply_op1_no_bwd(layers.as_ref()) }?;
    Session::ran(Ran { from: x.id(), to: value.id(), way_back: layers });
    Ok(value)
}

/// The layers of a chain.
struct Layers {
    session: Arc<Session>,
    links: Vec<Link>,
    /// Whether BF16 is held in F32: whatever the number of rows, so that a row gives the same among any others.
    is_narrow: bool,
    /// Of x.
    shape: Shape,
    saves: Saves,
    /// What the pullback needs, [`Saved`] of what tiles hold; from the forward pass on.
    saved: Mutex<Option<Box<dyn Any + Send + Sync>>>,
}

impl Layers {
    fn value<C: Compute>(
        &self,
        x: &[C::Stored],
        shape: &Shape,
        given: Option<&[C::Stored]>,
    ) -> Result<(CpuStorage, Shape)> {
        let mut dims = shape.dims().to_vec();
        let (Some(last), Some(link)) = (dims.last_mut(), self.links.last()) else { bail!("a chain of no layers") };
        *last = link.outputs;
        let given = Given::new(&self.session, given);
        let shape = Shape::from(dims);
        let mut value = vec![C::Stored::default(); shape.elem_count()];
        let saved = pass::value::<C>((&self.session, &self.links, None), x, &given, self.saves, Some(&mut value))?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = saved.map(|saved| Box::new(saved) as _);
        Ok((C::storage(value), shape))
    }

    /// dL/dx, and dL/d(given) if there is such; `x` is asked for unless all has been saved.
    fn pull_from(
        &self,
        x: Option<&Tensor>,
        value: &Tensor,
        cotangent: &Tensor,
        given: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let cotangent = cotangent.detach().contiguous()?;
        with_compute!(value.dtype(), self.is_narrow, C => self.pull_in::<C>(x, value, &cotangent, given))
    }

    fn pull_in<C: Compute>(
        &self,
        x: Option<&Tensor>,
        value: &Tensor,
        cotangent: &Tensor,
        given: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(saved) = saved.as_ref().and_then(|saved| saved.downcast_ref::<Saved<C::Held>>()) else {
            bail!("a chain pulls back what it has evaluated")
        };
        let weights = Given::to_pull::<C::Stored>(&self.session, given)?;
        let mut dx = vec![C::Stored::default(); self.shape.elem_count()];
        let mut pull = |x: Option<&[C::Stored]>, value: &[C::Stored], grad: &[C::Stored]| {
            let layers = (&*self.session, &self.links[..], None);
            pass::pull::<C>(layers, saved, &weights, Pulled { x, value, grad }, &mut dx)
        };
        with_elements(value, |value| {
            with_elements(cotangent, |grad| match x {
                Some(x) => with_elements(x, |x| pull(Some(x), value, grad)),
                None => pull(None, value, grad),
            })
        })?;
        let of_given = weights.into_cotangent::<C::Stored>(sink::scale()?);
        let of_given = of_given.zip(given).map(|(of, given)| Tensor::from_vec(of, given.shape(), given.device()));
        Ok((Tensor::from_vec(dx, &self.shape, value.device())?, of_given.transpose()?))
    }
}

impl WayBack for Layers {
    fn pull(&self, x: Option<&Tensor>, value: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        Ok(self.pull_from(x, value, cotangent, None)?.0)
    }
}

impl CustomOp1 for Layers {
    fn name(&self) -> &'static str {
        "layers"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        with_compute!(x.dtype(), self.is_narrow, C => self.value::<C>(elements(x, layout)?, layout.shape(), None))
    }
}

/// With weights that it is given.
impl CustomOp2 for Layers {
    fn name(&self) -> &'static str {
        CustomOp1::name(self)
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, given: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        with_compute!(x.dtype(), self.is_narrow, C => {
            self.value::<C>(elements(x, lx)?, lx.shape(), Some(elements(given, lg)?))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        given: &Tensor,
        value: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (of_x, of_given) = self.pull_from(Some(x), value, grad, Some(given))?;
        Ok((x.track_op().then_some(of_x), of_given))
    }
}

/// Layers as a node of Candle's graph.
struct Node<L>(Arc<L>);

impl<L: CustomOp1 + WayBack> CustomOp1 for Node<L> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_fwd(x, layout)
    }

    fn bwd(&self, x: &Tensor, value: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.pull(Some(x), value, grad).map(Some)
    }
}

/// (x, a parameter) ↦ x, so that Candle's graph leads to layers on what nothing tracks: their gradients are in the open
/// sums.
struct Through;

impl CustomOp2 for Through {
    fn name(&self) -> &'static str {
        "through-a-parameter"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((x.to_dtype(layout, x.dtype())?, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((None, None))
    }
}

/// The elements of a contiguous operand.
pub(super) fn elements<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("a chain takes contiguous tensors") };
    Ok(&T::cpu_storage_as_slice(storage)?[from..to])
}
