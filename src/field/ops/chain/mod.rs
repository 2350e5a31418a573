//! Linear layers with activations between them as one op of Candle's graph, on a tile of rows and one thread.
//!
//! hₙ = fₙ(hₙ₋₁ Wₙᵀ + bₙ), h₀ = x `(…, in)`. Inside a solve (on CUDA see `cuda/chain.rs`), on the CPU, in F32, F16 and BF16, the layers of this crate
//! run in it: weights are packed once per solve, the activation is applied to the product while that is in registers, the
//! pullback multiplies by fₙ′ there too, and dL/dW is added in place to the F32 sums. Between its first and its last
//! tensor F16 is held in F32, so that it is rounded once for the whole chain; BF16 is rounded after each layer, unless the
//! layers are narrow.

mod along;
mod compute;
mod of_time;
mod order;
mod parameter;
mod pass;

use super::Activation;
use crate::Time;
use crate::field::session::{Call, Current, Ran, Session, WayBack};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use pass::{Saved, Saves};
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) use along::tangents;
pub(super) use compute::{AsStored, Compute, Widened, with_compute};
pub(super) use of_time::{by_ops, column, of_time};
pub(super) use order::Order;
pub(super) use parameter::{Parameter, with_elements};

/// A linear layer and what is done with its result.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) weight: Parameter,
    pub(super) bias: Option<Parameter>,
    /// Leading columns of W that the rows of x are multiplied with.
    pub(super) inputs: usize,
    /// Rows of W.
    pub(super) outputs: usize,
    /// The time, which multiplies the one column beyond.
    pub(super) beyond: Option<f64>,
    pub(super) then: Activation,
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
        if let Some(done) = chain.take().filter(|chain| !chain.links.is_empty()) {
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

/// Layers that may become one op.
pub(super) struct Chain {
    current: Current,
    links: Vec<Link>,
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
        Some(Self { current: Session::current().filter(|_| fits)?, links: vec![] })
    }

    /// Appends x W[:, ..inputs]ᵀ + b, with the time on the column beyond. Says whether it could.
    pub(super) fn linear(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, t: Option<&Time>) -> bool {
        let Ok((outputs, columns)) = weight.dims2() else { return false };
        let inputs = columns - usize::from(t.is_some()).min(columns);
        let before = self.links.last().map_or(x.dims().last().copied(), |link| Some(link.outputs));
        let fits = weight.dtype() == x.dtype() && before == Some(inputs) && inputs > 0 && outputs > 0;
        // On a GPU elements are counted in 32 bits.
        let rows = x.elem_count() / x.dims().last().copied().unwrap_or(1).max(1);
        let is_small = x.device().is_cpu() || rows.max(inputs) * outputs <= 1 << 31;
        if !(fits && is_small) || t.is_some_and(Time::is_tracked) {
            return false;
        }
        let Some((weight, bias)) = Parameter::of_layer(&self.current, x, weight, bias) else { return false };
        self.links.push(Link { weight, bias, inputs, outputs, beyond: t.map(Time::value), then: Activation::Identity });
        true
    }

    /// Appends an activation. Says whether it could.
    pub(super) fn activation(&mut self, activation: Activation) -> bool {
        match self.links.last_mut() {
            Some(Link { then: then @ Activation::Identity, .. }) => {
                *then = activation;
                true
            }
            _ => false,
        }
    }

    /// Its value; x itself where nothing has been appended.
    pub(super) fn run(self, x: &Tensor) -> Result<Tensor> {
        if self.links.is_empty() {
            return Ok(x.clone());
        }
        let x = x.contiguous()?;
        #[cfg(feature = "cuda")]
        if !x.device().is_cpu() {
            return super::cuda::run_chain(self.links, &x);
        }
        let (Current { session, call }, links) = (self.current, self.links);
        let saves = match call {
            _ if x.track_op() => Saves::Results,
            Call::Layers => Saves::All,
            Call::Value | Call::Graph => Saves::Nothing,
        };
        let (is_narrow, saved) = (Order::is_narrow(&links), Mutex::default());
        let layers = Layers { session, links, is_narrow, shape: x.shape().clone(), saves, saved };
        if saves == Saves::Nothing {
            return x.apply_op1_no_bwd(&layers);
        }
        let layers = Arc::new(layers);
        let value = if x.track_op() { x.apply_op1(Node(layers.clone())) } else { x.apply_op1_no_bwd(layers.as_ref()) }?;
        Session::ran(Ran { from: x.id(), to: value.id(), way_back: layers });
        Ok(value)
    }
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
    fn value<C: Compute>(&self, x: &[C::Stored], shape: &Shape) -> Result<(CpuStorage, Shape)> {
        let mut dims = shape.dims().to_vec();
        let (Some(last), Some(link)) = (dims.last_mut(), self.links.last()) else { bail!("a chain of no layers") };
        *last = link.outputs;
        let (value, saved) = pass::value::<C>(&self.session, &self.links, x, self.saves)?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = saved.map(|saved| Box::new(saved) as _);
        Ok((C::storage(value), Shape::from(dims)))
    }

    /// dL/dx; `x` is asked for unless all has been saved.
    fn pull_from(&self, x: Option<&Tensor>, value: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let cotangent = cotangent.contiguous()?;
        with_compute!(value.dtype(), self.is_narrow, C => self.pull_in::<C>(x, value, &cotangent))
    }

    fn pull_in<C: Compute>(&self, x: Option<&Tensor>, value: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(saved) = saved.as_ref().and_then(|saved| saved.downcast_ref::<Saved<C::Held>>()) else {
            bail!("a chain pulls back what it has evaluated")
        };
        let dx = pass::pull::<C>(&self.session, &self.links, saved, x, value, cotangent)?;
        Tensor::from_vec(dx, &self.shape, value.device())
    }
}

impl WayBack for Layers {
    fn pull(&self, value: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        self.pull_from(None, value, cotangent)
    }
}

impl CustomOp1 for Layers {
    fn name(&self) -> &'static str {
        "layers"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("a chain takes a contiguous tensor") };
        with_compute!(x.dtype(), self.is_narrow, C => {
            let x = <C as Compute>::Stored::cpu_storage_as_slice(x)?;
            self.value::<C>(&x[from..to], layout.shape())
        })
    }
}

/// The layers as a node of Candle's graph.
struct Node(Arc<Layers>);

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_fwd(x, layout)
    }

    fn bwd(&self, x: &Tensor, value: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.0.pull_from(Some(x), value, &grad.detach()).map(Some)
    }
}
