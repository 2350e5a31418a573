//! A Candle model as a vector field: rebuilt over casts of its parameters, otherwise unchanged.

use super::bare::{Bare, Site};
use super::linearized::{Graph, Layered};
use super::params::{Casts, Params};
use super::session::{Call, Ran, Session};
use super::{Field, Linearization, Opening, VectorField, connected, draw};
use crate::error::{OdeError, Result};
use crate::field::ops::{Layers, combine, cuda_kernels};
use crate::{State, Time};
use candle_core::{DType, Device, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{VarBuilder, VarMap};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A vector field made of a Candle model that is written against a `VarBuilder`.
///
/// The masters stay in the caller's `VarMap`, in their own dtype. Once per solve they are cast to the compute dtype,
/// and the model is built over the casts: once for the forward and once for the backward pass.
///
/// ```
/// use candle_core::{Device, Result, Tensor};
/// use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
/// use candle_ode::prelude::*;
///
/// struct Velocity(Linear);
/// impl Velocity {
///     fn new(vb: VarBuilder) -> Result<Self> {
///         Ok(Self(linear(2, 2, vb.pp("out"))?))
///     }
///     fn forward(&self, t: &Tensor, y: &Tensor) -> Result<Tensor> {
///         self.0.forward(&y.broadcast_mul(t)?)
///     }
/// }
///
/// let vars = VarMap::new();
/// let field = ModelField::new(&vars, &Device::Cpu, |vb| Velocity::new(vb), |m, t: &Time, y| m.forward(&t.like(y)?, y))?;
/// assert_eq!(field.params().names().collect::<Vec<_>>(), ["out.bias", "out.weight"]);
/// # Ok::<(), OdeError>(())
/// ```
#[derive(Clone)]
pub struct ModelField {
    model: Arc<dyn Constructor>,
    params: Params,
    probed: Arc<AtomicBool>,
    learned: Arc<Learned>,
    rows: Rows,
}

/// What is known of the rows of a batch.
#[derive(Clone, Default)]
struct Rows {
    independent: bool,
    checked: Arc<AtomicBool>,
}

impl ModelField {
    /// A field over a state of one tensor. Parameters that `vars` does not hold yet are created in F32.
    ///
    /// # Errors
    /// Whatever `build` reports.
    pub fn new<M: 'static>(
        vars: &VarMap,
        device: &Device,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
        eval: impl Fn(&M, &Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::new_in(DType::F32, vars, device, build, eval)
    }

    /// As [`new`](Self::new), with the dtype in which missing parameters are created (F64, say).
    ///
    /// # Errors
    /// Whatever `build` reports.
    pub fn new_in<M: 'static>(
        masters: DType,
        vars: &VarMap,
        device: &Device,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
        eval: impl Fn(&M, &Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Self> {
        let vb = VarBuilder::from_varmap(vars, masters, device);
        Self::from_var_builder(vb, build, move |m, t, y, _| eval(m, t, y.single()?).map(State::from))
    }

    /// A field over a state of several tensors, with inputs: tensors given to each solve by
    /// [`Ode::inputs`](crate::Ode::inputs), in the compute dtype, with gradients.
    ///
    /// # Errors
    /// Whatever `build` reports.
    pub fn with_inputs<M: 'static>(
        vars: &VarMap,
        device: &Device,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
        eval: impl Fn(&M, &Time, &State, &[Tensor]) -> candle_core::Result<State> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::from_var_builder(VarBuilder::from_varmap(vars, DType::F32, device), build, eval)
    }

    /// A field over a state of several tensors.
    ///
    /// # Errors
    /// Whatever `build` reports.
    pub fn with_state<M: 'static>(
        vars: &VarMap,
        device: &Device,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
        eval: impl Fn(&M, &Time, &State) -> candle_core::Result<State> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::with_inputs(vars, device, build, move |m, t, y, _| eval(m, t, y))
    }

    /// A field over the tensors of any `VarBuilder`: memory-mapped safetensors for inference, or a `VarMap` in the
    /// dtype of the builder. The most general constructor; `eval` is given the time, the state and the inputs.
    ///
    /// # Errors
    /// Whatever `build` reports.
    pub fn from_var_builder<M: 'static>(
        vb: VarBuilder<'static>,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
        eval: impl Fn(&M, &Time, &State, &[Tensor]) -> candle_core::Result<State> + Send + Sync + 'static,
    ) -> Result<Self> {
        let params = recorded(vb, &build)?;
        let model = Arc::new(Closures { build, eval: Arc::new(eval) });
        Ok(Self { model, params, probed: Arc::default(), learned: Arc::default(), rows: Rows::default() })
    }

    /// A field over a state of one tensor that is layers of this crate and nothing else: f(t, y) is their value.
    ///
    /// That nothing else sees what the layers are given and make lets fixed steps of explicit Runge–Kutta methods, and
    /// their pullbacks, run on buffers that serve one step after another: a step then makes a tensor of the state it
    /// leads to, and backwards of λ, and of nothing else, and what it works in is counted as scratch. Values and
    /// gradients are those of a closure that calls the layers, to the bit (as long as a scale brings no number below
    /// the normal ones of F32). So it is on the CPU in F32, F16 and BF16 with sums in F32, for layers that can be one
    /// op: linear ones, with the time beside their input or without, or convolutions with group norms, and activations;
    /// with all stages of a step linearised at once and kept states. Anything else runs as in [`new`](Self::new).
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_ode::ops::{Activation, Mlp};
    /// use candle_ode::prelude::*;
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let field = ModelField::of_layers(vb, |vb| Mlp::new(&[2, 64, 2], Activation::Tanh, vb))?.row_wise();
    /// let y0 = Tensor::ones((256, 2), DType::F32, &Device::Cpu)?;
    /// let solution = Ode::new(&field).span(0.0, 1.0).steps(8).solve(&y0)?;
    /// assert_eq!(solution.last().dims(), [256, 2]);
    /// # Ok::<(), OdeError>(())
    /// ```
    ///
    /// States are `(…, features)`, or images `(batch, channels, height, width)`, of the shape that the first layer
    /// takes and the last one gives; of inputs it sees none.
    ///
    /// # Errors
    /// Whatever `build` reports; solves of a state of several tensors are [`OdeError::Unsupported`].
    pub fn of_layers<L: Layers>(
        vb: VarBuilder<'static>,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<L> + Send + Sync + 'static,
    ) -> Result<Self> {
        let params = recorded(vb, &build)?;
        let model = Arc::new(OfLayers(build));
        Ok(Self { model, params, probed: Arc::default(), learned: Arc::default(), rows: Rows::default() })
    }

    /// A closure as a field: nothing to build.
    pub(super) fn without_parameters(
        eval: impl Fn(&(), &Time, &State, &[Tensor]) -> candle_core::Result<State> + Send + Sync + 'static,
    ) -> Self {
        let model = Arc::new(Closures { build: |_: VarBuilder<'static>| Ok(()), eval: Arc::new(eval) });
        let probed = Arc::new(AtomicBool::new(true));
        Self { model, params: Params::default(), probed, learned: Arc::default(), rows: Rows::default() }
    }

    /// The same field, with the parameters whose name satisfies `frozen` fixed: no gradient, no cost.
    pub fn freeze(mut self, frozen: impl Fn(&str) -> bool) -> Self {
        self.params.0.iter_mut().for_each(|param| param.frozen |= frozen(&param.name));
        self
    }

    /// The same field, with the parameters whose name satisfies `keep` left in F32 when f runs in F16 or BF16 (the
    /// weights of a norm, say). The model must accept that.
    pub fn keep_f32(mut self, keep: impl Fn(&str) -> bool) -> Self {
        self.params.0.iter_mut().for_each(|param| param.keep_f32 |= keep(&param.name));
        self
    }

    /// The same field, which stops gradients on purpose (a `detach`, a straight-through estimator): its pullback is
    /// taken as it is. Otherwise the first linearisation of a field is compared with a difference quotient of f, since
    /// some ops cut Candle's graph without a word.
    pub fn stops_gradients(mut self) -> Self {
        let connected = AtomicBool::new(true);
        self.learned = Arc::new(Learned { connected, needs_graph: true, ..Learned::default() });
        self
    }

    /// The same field, declared to treat the rows of a batch (dimension 0 of every tensor of the state) independently.
    ///
    /// On a CPU a solve then takes the batch in tiles of rows, each on a thread of its own and in that core's cache:
    /// see [`Ode::tile`](crate::Ode::tile); the model is built for each tile and pass. What couples rows (a batch norm,
    /// a mean over the batch) or depends on their number (a dropout mask, noise that is not drawn
    /// [`by_row`](draw::Stream::by_row)) is found at the first evaluation and is
    /// [`OdeError::NotRowWise`]; inputs with a row for each do not fit a tile.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.tanh()).row_wise();
    /// let y0 = Tensor::ones((1024, 64), DType::F32, &Device::Cpu)?;
    /// let solution = Ode::new(&field).span(0.0, 1.0).steps(8).solve(&y0)?;
    /// assert_eq!(solution.tiles(), 8);                                   // of 128 rows
    ///
    /// let coupled = FnField::new(|_: &Time, y: &Tensor| y.broadcast_sub(&y.mean_keepdim(0)?)).row_wise();
    /// let error = Ode::new(&coupled).span(0.0, 1.0).steps(8).solve(&y0).unwrap_err();
    /// assert!(matches!(error, OdeError::NotRowWise { .. }));
    /// # Ok::<(), OdeError>(())
    /// ```
    pub fn row_wise(mut self) -> Self {
        self.rows.independent = true;
        self
    }

    /// The parameters the model asked for.
    pub fn params(&self) -> &Params {
        &self.params
    }
}

impl Field for ModelField {
    fn params(&self) -> &Params {
        &self.params
    }

    fn open(&self, casts: &Casts, opening: Opening, seed: u64) -> Result<Box<dyn VectorField>> {
        let casts = match opening {
            Opening::Evaluate => casts.detached(),
            Opening::Probe => casts.copied()?,
            Opening::Linearize | Opening::Track => casts.clone(),
        };
        let vb = casts.var_builder();
        let model = draw::seeded(seed, || self.model.build(vb))
            .map_err(|source| OdeError::Build { dtype: casts.dtype(), source })?;
        let source = Source { constructor: self.model.clone(), seed, learned: self.learned.clone() };
        let on_cuda = casts.device().is_cuda() && cuda_kernels();
        let has_kernels = opening != Opening::Track && (casts.device().is_cpu() || on_cuda);
        let session = has_kernels.then(|| casts.session(opening == Opening::Linearize));
        Ok(Box::new(OpenModel { model, casts, source, session, bare: OnceCell::new() }))
    }

    fn needs_probe(&self) -> bool {
        !self.probed.load(Ordering::Relaxed)
    }

    fn probed(&self) {
        self.probed.store(true, Ordering::Relaxed);
    }

    fn is_layers(&self) -> bool {
        self.model.is_layers()
    }

    fn is_row_wise(&self) -> bool {
        self.rows.independent
    }

    fn needs_row_check(&self) -> bool {
        self.rows.independent && !self.rows.checked.load(Ordering::Relaxed)
    }

    fn rows_checked(&self) {
        self.rows.checked.store(true, Ordering::Relaxed);
    }
}

/// Builds the model of a field, with its type forgotten.
pub(super) trait Constructor: Send + Sync {
    /// Whether what it builds is layers and nothing else.
    fn is_layers(&self) -> bool {
        false
    }

    fn build(&self, vb: VarBuilder<'static>) -> candle_core::Result<Box<dyn Model>>;
}

struct Closures<B, E> {
    build: B,
    eval: Arc<E>,
}

impl<M, B, E> Constructor for Closures<B, E>
where
    M: 'static,
    B: Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync,
    E: Fn(&M, &Time, &State, &[Tensor]) -> candle_core::Result<State> + Send + Sync + 'static,
{
    fn build(&self, vb: VarBuilder<'static>) -> candle_core::Result<Box<dyn Model>> {
        Ok(Box::new(Built { model: (self.build)(vb)?, eval: self.eval.clone() }))
    }
}

/// A built model, with its type forgotten. Lives on one thread.
pub(super) trait Model {
    fn eval(&self, t: &Time, y: &State, inputs: &[Tensor]) -> candle_core::Result<State>;

    /// The layers that it consists of, if it consists of nothing else.
    fn bare(&self, site: &Site<'_>) -> Option<Bare> {
        let _ = site;
        None
    }
}

struct OfLayers<B>(B);

impl<L: Layers, B> Constructor for OfLayers<B>
where
    B: Fn(VarBuilder<'static>) -> candle_core::Result<L> + Send + Sync,
{
    fn is_layers(&self) -> bool {
        true
    }

    fn build(&self, vb: VarBuilder<'static>) -> candle_core::Result<Box<dyn Model>> {
        Ok(Box::new(Only((self.0)(vb)?)))
    }
}

/// Layers, and nothing else.
struct Only<L>(L);

impl<L: Layers> Model for Only<L> {
    fn eval(&self, t: &Time, y: &State, _: &[Tensor]) -> candle_core::Result<State> {
        self.0.forward_at(t, y.single()?).map(State::from)
    }

    fn bare(&self, site: &Site<'_>) -> Option<Bare> {
        self.0.bare(site)
    }
}

struct Built<M, E> {
    model: M,
    eval: Arc<E>,
}

impl<M, E: Fn(&M, &Time, &State, &[Tensor]) -> candle_core::Result<State>> Model for Built<M, E> {
    fn eval(&self, t: &Time, y: &State, inputs: &[Tensor]) -> candle_core::Result<State> {
        (self.eval)(&self.model, t, y, inputs)
    }
}

struct OpenModel {
    model: Box<dyn Model>,
    casts: Casts,
    source: Source,
    /// Nothing where Candle's own graph is wanted.
    session: Option<Arc<Session>>,
    /// The layers that it consists of, once they have been asked for.
    bare: OnceCell<Option<Bare>>,
}

/// Where an open model came from.
struct Source {
    constructor: Arc<dyn Constructor>,
    seed: u64,
    learned: Arc<Learned>,
}

/// What has been seen of a field.
#[derive(Default)]
struct Learned {
    /// Its pullback is that of f.
    connected: AtomicBool,
    /// f is layers of ours from y to dy/dt, with nothing beside them.
    is_layers: AtomicBool,
    /// Only a graph shows where it stops gradients: tensors that nothing tracks are detached by name alone.
    needs_graph: bool,
}

impl OpenModel {
    /// f(t, y), and the layers of ours that ran last.
    fn call(&self, t: &Time, y: &State, call: Call) -> candle_core::Result<(State, Option<Ran>)> {
        let eval = || self.model.eval(t, y, self.casts.inputs());
        let (value, ran) = match &self.session {
            Some(session) => session.open(call, eval),
            None => (Session::shut(eval), None),
        };
        Ok((value?, ran))
    }

    /// Once in the life of a field: see [`connected`].
    fn check_connected(&self, t: &Time, y: &State) -> candle_core::Result<()> {
        let Source { constructor, seed, learned } = &self.source;
        if !learned.connected.load(Ordering::Relaxed) {
            connected::check(constructor.as_ref(), &self.casts, *seed, t, y)?;
            learned.connected.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// f with its pullback by the layers alone, without a graph, if they are all there is to it.
    fn linearize_layers(&self, t: &Time, y: &State) -> candle_core::Result<Option<Layered>> {
        let can_run =
            self.session.is_some() && self.casts.dtype() != DType::F64 && !y.tensors().iter().any(Tensor::track_op);
        let Learned { is_layers, needs_graph, .. } = &*self.source.learned;
        if !can_run || *needs_graph || !is_layers.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let (value, ran) = self.call(t, y, Call::Layers)?;
        Ok(ran.and_then(|ran| Layered::between(y, &value, ran)))
    }
}

impl VectorField for OpenModel {
    fn eval(&self, t: &Time, y: &State) -> candle_core::Result<State> {
        Ok(self.call(t, y, Call::Value)?.0)
    }

    fn linearize(&self, t: &Time, y: &State) -> candle_core::Result<Box<dyn Linearization>> {
        if let Some(linearization) = self.linearize_layers(t, y)? {
            return Ok(Box::new(linearization));
        }
        let leaf = |x: &Tensor| if x.is_variable() { Ok(x.clone()) } else { combine::leaf(x, x.dtype()) };
        let y = y.try_map(leaf)?;
        self.check_connected(t, &y)?;
        let (output, ran) = self.call(t, &y, Call::Graph)?;
        let is_layers = ran.and_then(|ran| Layered::between(&y, &output, ran)).is_some();
        self.source.learned.is_layers.store(is_layers, Ordering::Relaxed);
        let wanted = self.casts.leaves().iter().filter(|leaf| leaf.is_variable()).cloned();
        let times = t.leaves();
        let wanted = y.tensors().iter().cloned().chain(wanted).chain(times).collect();
        Ok(Box::new(Graph::new(y, output, wanted)))
    }

    fn bare(&self, y: &State) -> Option<&Bare> {
        let ([y], Some(session)) = (y.tensors(), &self.session) else { return None };
        if self.source.learned.needs_graph {
            return None;
        }
        // A state of one dimension is a row, a number is none.
        let row = if y.rank() > 1 { &y.dims()[1..] } else { y.dims() };
        if row.is_empty() {
            return None;
        }
        let made = self.bare.get_or_init(|| {
            let like = Tensor::zeros([&[1], row].concat(), self.casts.dtype(), y.device()).ok()?;
            self.model.bare(&Site { session, x: &like })
        });
        made.as_ref().filter(|bare| bare.row() == row)
    }

    fn leaves(&self) -> &[Tensor] {
        self.casts.leaves()
    }
}

/// The parameters that a model asks of its `VarBuilder`, which is built once to see.
fn recorded<M>(
    vb: VarBuilder<'static>,
    build: &dyn Fn(VarBuilder<'static>) -> candle_core::Result<M>,
) -> Result<Params> {
    let (device, dtype) = (vb.device().clone(), vb.dtype());
    let recorder = Recorder { source: vb, seen: Arc::default() };
    let seen = recorder.seen.clone();
    let recording = VarBuilder::from_backend(Box::new(recorder), dtype, device);
    draw::seeded(0, || build(recording)).map_err(|source| OdeError::Build { dtype, source })?;
    let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(Params::new(seen))
}

/// Notes which tensors a model asks of its `VarBuilder`.
struct Recorder {
    source: VarBuilder<'static>,
    seen: Arc<Mutex<BTreeMap<String, Tensor>>>,
}

impl Recorder {
    fn note(&self, name: &str, tensor: &Tensor) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), tensor.clone());
    }
}

impl SimpleBackend for Recorder {
    fn get(
        &self,
        shape: candle_core::Shape,
        name: &str,
        init: candle_nn::Init,
        dtype: DType,
        _: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.source.get_with_hints_dtype(shape, name, init, dtype)?;
        self.note(name, &tensor);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.source.get_unchecked_dtype(name, dtype)?;
        self.note(name, &tensor);
        Ok(tensor)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.source.contains_tensor(name)
    }
}
