//! What a solver sees of the field: evaluations and linearisations at the stages of a step, checked and counted.

use crate::State;
use crate::error::{OdeError, Place, Result};
use crate::field::{Bare, Finite, Gradients, Linearization, VectorField, sink};
use crate::scaling::{PowerOfTwo, Scale};
use crate::stats::{self, Counters, count};
use crate::time::{Time, TimeGrid, TimeTable};
use candle_core::{DType, Device, Tensor};
use std::rc::Rc;
use std::sync::Arc;

/// The times of all stages of consecutive steps, and of the end of each, uploaded once.
#[derive(Clone, Debug)]
pub struct Clock {
    grid: TimeGrid,
    first: usize,
    stages: usize,
    breaks: Arc<[f64]>,
    table: Arc<TimeTable>,
}

impl Clock {
    /// Every t_n + c_i·h_n of a grid; c = 1 is the end of the step to the bit.
    pub fn new(grid: &TimeGrid, nodes: &[f64], device: &Device) -> Self {
        Self::with_breaks(grid, nodes, &[], device)
    }

    /// As [`new`](Self::new), where f jumps at `breaks`: the steps on both sides see times strictly on their own side.
    pub(crate) fn with_breaks(grid: &TimeGrid, nodes: &[f64], breaks: &[f64], device: &Device) -> Self {
        let steps = grid.times().windows(2);
        let times = steps.flat_map(|pair| stage_times(pair[0], pair[1], nodes, breaks)).collect();
        let table = Arc::new(TimeTable::new(times, device));
        Self { grid: grid.clone(), first: 0, stages: nodes.len() + 1, breaks: breaks.into(), table }
    }

    /// The same steps, the first of which has `index`: one step that is tried, say.
    pub(crate) fn starting_at(self, index: usize) -> Self {
        Self { first: index, ..self }
    }

    /// Step `index`, with `dtype` for its evaluations.
    pub fn step(&self, index: usize, dtype: DType) -> StepAt<'_> {
        let row = index - self.first;
        let (t, end) = (self.grid.times()[row], self.grid.times()[row + 1]);
        StepAt { index, t, h: end - t, dtype, first_stage: 0, clock: self }
    }

    /// Bytes of its times on the device, as far as a field has asked for them.
    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes()
    }

    /// How many times it holds.
    pub(crate) fn len(&self) -> usize {
        self.grid.steps() * self.stages
    }

    /// Times at which f jumps.
    pub(crate) fn breaks(&self) -> &[f64] {
        &self.breaks
    }

    /// The ends of the steps, the start included.
    pub(crate) fn times(&self) -> &[f64] {
        self.grid.times()
    }
}

/// t + c·h for each node and for the end, kept off an end at which f jumps.
fn stage_times<'a>(t: f64, end: f64, nodes: &'a [f64], breaks: &[f64]) -> impl Iterator<Item = f64> + use<'a> {
    let inward = |time: f64, up: bool| match (breaks.contains(&time), up) {
        (false, _) => None,
        (true, true) => Some(time.next_up()),
        (true, false) => Some(time.next_down()),
    };
    let forwards = end > t;
    let (from, to) = (inward(t, forwards), inward(end, !forwards));
    let (least, most) = if forwards { (from, to) } else { (to, from) };
    nodes.iter().copied().chain([1.0]).map(move |c| {
        let time = if c == 1.0 { end } else { t + c * (end - t) };
        let time = least.map_or(time, |least| time.max(least));
        most.map_or(time, |most| time.min(most))
    })
}

/// One step of a grid.
#[derive(Clone, Copy, Debug)]
pub struct StepAt<'a> {
    /// Its index, from 0.
    pub index: usize,
    /// Where it starts.
    pub t: f64,
    /// Its length, negative when time runs backwards.
    pub h: f64,
    /// The dtype in which this step evaluates the field.
    pub dtype: DType,
    /// How many stages of the step come before those that are counted from 0 here.
    first_stage: usize,
    clock: &'a Clock,
}

impl StepAt<'_> {
    /// The same step from its end to its start, with stages of its own that come after the `first` ones.
    pub(super) fn reversed(&self, first: usize) -> Self {
        Self { t: self.t + self.h, h: -self.h, first_stage: self.first_stage + first, ..*self }
    }

    /// The time of stage `stage`; the one after the last stage is the end of the step.
    pub fn time(&self, stage: usize) -> Time {
        let row = self.index - self.clock.first;
        self.clock.table.time(row * self.clock.stages + self.first_stage + stage)
    }

    /// Where in the solve stage `stage` of this step is.
    pub fn place(&self, stage: usize) -> Place {
        let counted = self.first_stage + stage;
        Place { step: self.index, stage: counted, time: self.time(stage).value(), dtype: self.dtype }
    }
}

/// The vector field as the stages of a step see it.
pub struct Stages<'a> {
    field: &'a dyn VectorField,
    accumulate: DType,
    counters: &'a Counters,
    slopes: Slopes,
    times: bool,
    on_buffers: bool,
}

/// What becomes of a slope that Candle tracks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slopes {
    /// It stays in Candle's graph.
    Keep,
    /// It is cut from Candle's graph.
    Cut,
    /// It is an error: nothing that was given to the field is tracked, so the field has captured something.
    Refuse,
}

impl<'a> Stages<'a> {
    pub(crate) fn new(field: &'a dyn VectorField, accumulate: DType, counters: &'a Counters, slopes: Slopes) -> Self {
        Self { field, accumulate, counters, slopes, times: false, on_buffers: true }
    }

    /// The same, with linearisations that give the cotangent of the time if `wanted`.
    pub(crate) fn with_times(self, wanted: bool) -> Self {
        Self { times: wanted, ..self }
    }

    /// The same, with steps that may run on buffers, or may not.
    pub(crate) fn on_buffers(self, may: bool) -> Self {
        Self { on_buffers: may, ..self }
    }

    /// The dtype in which y, λ and the cotangents are summed.
    pub fn accumulate(&self) -> DType {
        self.accumulate
    }

    /// f at a stage; `y` is in the dtype of the step.
    ///
    /// # Errors
    /// [`OdeError::Field`] with the place, or what is wrong with the result.
    pub fn slope(&self, at: &StepAt<'_>, stage: usize, y: &State) -> Result<State> {
        let _span = tracing::trace_span!(target: "candle_ode", "field").entered();
        count(&self.counters.evaluations);
        let place = at.place(stage);
        let slope = self.field.eval(&at.time(stage), y).map_err(|error| from_field(error, place))?;
        check_slope(y, &slope, place)?;
        if self.slopes == Slopes::Keep || !slope.is_tracked() {
            return Ok(slope);
        }
        if self.slopes == Slopes::Refuse {
            check_captured(self.field, &slope)?;
        }
        Ok(slope.detach())
    }

    /// The layers that the field consists of, if it is layers alone and steps from `states` can run them on buffers.
    pub(crate) fn bare(&self, states: &[&State]) -> Option<&Bare> {
        let is_plain = |state: &&State| {
            let [x] = state.tensors() else { return false };
            x.device().is_cpu() && x.dtype() == DType::F32 && x.elem_count() > 0 && !x.track_op()
        };
        let fits = self.on_buffers && !self.times && self.accumulate == DType::F32 && states.iter().all(is_plain);
        fits.then(|| states.first().and_then(|y| self.field.bare(y))).flatten()
    }

    /// As [`slope`](Self::slope), by `run` on buffers. It is not counted yet: see [`evaluated`](Self::evaluated).
    pub(super) fn bare_slope<T>(
        &self,
        at: &StepAt<'_>,
        stage: usize,
        run: impl FnOnce() -> candle_core::Result<T>,
    ) -> Result<T> {
        let _span = tracing::trace_span!(target: "candle_ode", "field").entered();
        run().map_err(|error| from_field(error, at.place(stage)))
    }

    /// So many slopes have been made on buffers.
    pub(super) fn evaluated(&self, slopes: usize) {
        stats::add(&self.counters.evaluations, slopes);
    }

    /// As [`linearize`](Self::linearize), by `run` on buffers.
    pub(super) fn bare_linearization<T>(
        &self,
        at: &StepAt<'_>,
        stage: usize,
        run: impl FnOnce() -> candle_core::Result<T>,
    ) -> Result<T> {
        let _span = tracing::trace_span!(target: "candle_ode", "linearise").entered();
        count(&self.counters.linearizations);
        run().map_err(|error| from_field(error, at.place(stage)))
    }

    /// f at a stage with its pullback; `y` is in the dtype of the step.
    ///
    /// # Errors
    /// As [`slope`](Self::slope).
    pub fn linearize(&self, at: &StepAt<'_>, stage: usize, y: &State) -> Result<Box<dyn Linearization>> {
        let _span = tracing::trace_span!(target: "candle_ode", "linearise").entered();
        count(&self.counters.linearizations);
        let place = at.place(stage);
        let time = if self.times { at.time(stage).tracked() } else { at.time(stage) };
        let linearization = self.field.linearize(&time, y).map_err(|error| from_field(error, place))?;
        check_slope(y, linearization.value(), place)?;
        Ok(linearization)
    }
}

/// A tracked result whose leaves are not all ours was reached through a captured tensor.
fn check_captured(field: &dyn VectorField, slope: &State) -> Result<()> {
    for tensor in slope.tensors().iter().filter(|x| x.track_op()) {
        for node in tensor.sorted_nodes() {
            if node.is_variable() && !field.leaves().iter().any(|leaf| leaf.id() == node.id()) {
                return Err(OdeError::Captured { shape: node.shape().clone(), dtype: node.dtype() });
            }
        }
    }
    Ok(())
}

/// An error of the field, with its place; errors that are ours already stay what they are.
fn from_field(error: candle_core::Error, place: Place) -> OdeError {
    match OdeError::from(error) {
        OdeError::Candle(source) => OdeError::Field { place, source },
        ours => ours,
    }
}

/// dy/dt must look like y.
fn check_slope(y: &State, slope: &State, place: Place) -> Result<()> {
    if y.len() != slope.len() {
        return Err(OdeError::StateLength { expected: y.len(), found: slope.len(), place });
    }
    for (tensor, (y, k)) in y.tensors().iter().zip(slope.tensors()).enumerate() {
        if y.shape() != k.shape() {
            let (expected, found) = (y.shape().clone(), k.shape().clone());
            return Err(OdeError::ShapeChanged { tensor, expected, found, place });
        }
        if y.dtype() != k.dtype() {
            return Err(OdeError::DTypeChanged { tensor, expected: y.dtype(), found: k.dtype(), place });
        }
        if !y.device().same_device(k.device()) {
            let what = format!("tensor {tensor} of f(t, y) at {place}");
            let (expected, found) = (y.device().location(), k.device().location());
            return Err(OdeError::DeviceMismatch { what, expected, found });
        }
    }
    Ok(())
}

/// How the scale of each pullback is chosen.
#[derive(Clone, Debug)]
pub(crate) enum StageScale {
    /// From the cotangent at hand.
    FromCotangent(Rc<PowerOfTwo>),
    /// The same for all.
    Fixed(f64),
}

/// The cotangents of a step's start and length, 0-d in the accumulate dtype; `None` for zero.
#[derive(Debug, Default)]
pub(crate) struct StepTimes {
    /// dL/dt at constant h: Σ t̄ᵢ.
    pub(crate) start: Option<Tensor>,
    /// dL/dh = Σ ⟨κᵢ, kᵢ⟩/h + Σ cᵢ t̄ᵢ, since κᵢ = h (bᵢ λ + Σ aⱼᵢ μⱼ).
    pub(crate) length: Option<Tensor>,
}

impl StepTimes {
    /// Those that are not zero, the start first.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.start.iter().chain(&self.length)
    }

    /// Adds what stage i, at the fraction cᵢ of the step, contributes.
    fn add(&mut self, t: Option<Tensor>, c: f64, h: f64, kappa: &State, slope: &State) -> Result<()> {
        for (kappa, k) in kappa.tensors().iter().zip(slope.tensors()) {
            let product = (kappa * k.to_dtype(kappa.dtype())?)?.sum_all()?;
            add(&mut self.length, 1.0 / h, &product)?;
        }
        if let Some(t) = t {
            add(&mut self.length, c, &t)?;
            add(&mut self.start, 1.0, &t)?;
        }
        Ok(())
    }
}

/// sum += c·x.
fn add(sum: &mut Option<Tensor>, c: f64, x: &Tensor) -> Result<()> {
    let term = (x * c)?;
    *sum = Some(match sum.take() {
        None => term,
        Some(sum) => (sum + term)?,
    });
    Ok(())
}

/// Where a solver takes the cotangents of a step: scales them, pulls them back, sums dL/dθ, notes overflow.
pub struct Pullbacks<'a> {
    gradients: &'a mut Gradients,
    scale: StageScale,
    counters: &'a Counters,
    /// Per pullback, in the order they were made: the stage, and whether the result is finite.
    finite: Vec<(usize, Finite)>,
    times: Option<StepTimes>,
}

impl<'a> Pullbacks<'a> {
    pub(crate) fn new(gradients: &'a mut Gradients, scale: StageScale, counters: &'a Counters) -> Self {
        Self { gradients, scale, counters, finite: vec![], times: None }
    }

    /// The same, summing the cotangents of the times of the step if `wanted`.
    pub(crate) fn with_times(self, wanted: bool) -> Self {
        Self { times: wanted.then(StepTimes::default), ..self }
    }

    /// (∂f/∂y)ᵀκ in the accumulate dtype; (∂f/∂θ)ᵀκ is added to the sums.
    ///
    /// # Errors
    /// [`OdeError::Field`] with the place.
    pub fn pull(
        &mut self,
        linearization: &dyn Linearization,
        at: &StepAt<'_>,
        stage: usize,
        kappa: &State,
    ) -> Result<State> {
        self.pull_into_sums(linearization, at, stage, kappa)
    }

    /// (∂f/∂y)ᵀκ alone: (∂f/∂θ)ᵀκ is not added to the sums.
    ///
    /// # Errors
    /// As [`pull`](Self::pull).
    pub(crate) fn pull_state(
        &mut self,
        linearization: &dyn Linearization,
        at: &StepAt<'_>,
        stage: usize,
        kappa: &State,
    ) -> Result<State> {
        self.gradients.ignore(true);
        let pulled = self.pull_into_sums(linearization, at, stage, kappa);
        self.gradients.ignore(false);
        pulled
    }

    fn pull_into_sums(
        &mut self,
        linearization: &dyn Linearization,
        at: &StepAt<'_>,
        stage: usize,
        kappa: &State,
    ) -> Result<State> {
        let _span = tracing::trace_span!(target: "candle_ode", "pullback").entered();
        count(&self.counters.pullbacks);
        let scale = match &self.scale {
            StageScale::FromCotangent(powers) => powers.scale(kappa)?,
            StageScale::Fixed(s) => Scale::Host(*s),
        };
        let pulled =
            linearization.pull(kappa, &scale, self.gradients).map_err(|error| from_field(error, at.place(stage)))?;
        self.finite.push((at.place(stage).stage, pulled.finite));
        if let Some(times) = &mut self.times {
            let c = (at.time(stage).value() - at.t) / at.h;
            times.add(pulled.t, c, at.h, kappa, linearization.value())?;
        }
        Ok(pulled.y)
    }

    /// As [`pull`](Self::pull) for a cotangent on buffers, which is `largest`: runs `pull` with the scale. Says whether
    /// what was added to the sums is finite; the result is for the caller to look at, and to [`note`](Self::note).
    pub(super) fn pull_bare(
        &mut self,
        at: &StepAt<'_>,
        stage: usize,
        largest: f64,
        pull: impl FnOnce(f64) -> candle_core::Result<()>,
    ) -> Result<Finite> {
        let _span = tracing::trace_span!(target: "candle_ode", "pullback").entered();
        count(&self.counters.pullbacks);
        let scale = match &self.scale {
            StageScale::FromCotangent(powers) => powers.below(largest),
            StageScale::Fixed(s) => *s,
        };
        self.gradients.set_scale(&Scale::Host(scale));
        let (pulled, sums) = sink::open(std::mem::take(self.gradients), || pull(scale));
        *self.gradients = sums;
        pulled.map_err(|error| from_field(error, at.place(stage)))?;
        Ok(self.gradients.take_finite())
    }

    /// Notes whether what a pullback has given is finite.
    pub(super) fn note(&mut self, at: &StepAt<'_>, stage: usize, finite: Finite) {
        self.finite.push((at.place(stage).stage, finite));
    }

    /// Per pullback, the stage and whether the result is finite; and the cotangents of the times, if they are wanted.
    pub(crate) fn finish(self) -> (Vec<(usize, Finite)>, Option<StepTimes>) {
        (self.finite, self.times)
    }
}

/// A tensor of zeros for each tensor of `like`, in `dtype`.
pub(crate) fn zeros_like(like: &State, dtype: DType) -> Result<State> {
    Ok(like.try_map(|x| Tensor::zeros(x.shape(), dtype, x.device()))?)
}
