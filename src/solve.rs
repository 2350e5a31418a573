//! The front door: [`Ode`] is set up, [`Ode::solve`] goes forward, [`Solution`] is part of Candle's graph.

mod dense;
mod moments;

use crate::State;
use crate::adjoint::{Adjoint, Discrete};
use crate::controller::{Controller, Tolerance, Tolerances};
use crate::error::{OdeError, Result};
use crate::field::{Fallback, Field, Opening};
use crate::forward::{Adaptive, Checked, Course, Forward, Observer, OnOverflow, StepInfo};
use crate::memory::plan::{Known, Planned};
use crate::memory::{Choice, Choices, MemoryPlan};
use crate::precision::Precision;
use crate::scaling::AdjointScaling;
use crate::solver::{Clock, Rk4, Solver};
use crate::stats::{Counters, Stats, add};
use crate::time::TimeGrid;
use candle_core::{DType, Tensor};
use dense::Dense;
use moments::TimeTensors;
use std::ops::ControlFlow;
use std::sync::Arc;

/// An initial value problem dy/dt = f(t, y; θ) with all its settings. Solve it as often as you like.
///
/// | setting | default |
/// |---|---|
/// | solver | [`Rk4`] |
/// | span, steps | none: give [`span`](Self::span) and [`steps`](Self::steps) or [`tolerances`](Self::tolerances), or [`grid`](Self::grid) |
/// | precision | F64 for an F64 y0, else F32 |
/// | adjoint | [`Discrete`] |
/// | scaling | [`AdjointScaling::per_step`] for F16, none otherwise |
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_ode::prelude::*;
///
/// let field = FnField::new(|t: &Time, y: &Tensor| y.broadcast_mul(&t.like(y)?));       // dy/dt = t y
/// let y0 = Var::new(&[1f32, 2.], &Device::Cpu)?;
/// let solution = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(16).solve(y0.as_tensor())?;
/// let grads = solution.last().sum_all()?.backward()?;
/// let dy0 = grads.get(&y0).unwrap().to_vec1::<f32>()?;                                  // e^½ for both
/// assert!((dy0[0] - 0.5f32.exp()).abs() < 1e-4);
/// # Ok::<(), OdeError>(())
/// ```
#[derive(Clone)]
pub struct Ode {
    field: Arc<dyn Field>,
    solver: Arc<dyn Solver>,
    span: Option<(f64, f64)>,
    steps: usize,
    grid: Option<Vec<f64>>,
    tolerances: Option<(Tolerance, Tolerance)>,
    controller: Option<Controller>,
    save_at: Vec<f64>,
    discontinuities: Vec<f64>,
    dense: bool,
    interpolate: bool,
    time_tensors: TimeTensors,
    precision: Option<Precision>,
    adjoint: Adjoint,
    scaling: Option<AdjointScaling>,
    overflow: OnOverflow,
    inputs: Vec<Tensor>,
    seed: u64,
    tracked: bool,
    check_determinism: bool,
    observer: Option<Arc<Observer>>,
    known: Arc<Known>,
}

impl Ode {
    /// A problem over `field`, which is cloned (cheaply).
    pub fn new<F: Field + Clone>(field: &F) -> Self {
        Self {
            field: Arc::new(field.clone()),
            solver: Arc::new(Rk4),
            span: None,
            steps: 0,
            grid: None,
            tolerances: None,
            controller: None,
            save_at: vec![],
            discontinuities: vec![],
            dense: false,
            interpolate: false,
            time_tensors: TimeTensors::default(),
            precision: None,
            adjoint: Adjoint::default(),
            scaling: None,
            overflow: OnOverflow::default(),
            inputs: vec![],
            seed: 0,
            tracked: true,
            check_determinism: true,
            observer: None,
            known: Arc::default(),
        }
    }

    /// The solver that makes the steps.
    pub fn solver(mut self, solver: impl Solver) -> Self {
        self.solver = Arc::new(solver);
        self
    }

    /// From `t0` to `t1`, which may lie before `t0`.
    pub fn span(mut self, t0: f64, t1: f64) -> Self {
        self.span = Some((t0, t1));
        self.time_tensors.span = None;
        self
    }

    /// The same with 0-d tensors, which receive their gradients from `loss.backward()`.
    ///
    /// The gradient is that of the steps: the ends of equal steps move with both ends of the span; of adaptive steps the
    /// first and the last move and the others are constant. f must depend on its time through
    /// [`Time::tensor`](crate::Time::tensor) or [`Time::like`](crate::Time::like). Needs
    /// [`Discrete`](crate::Discrete) and an explicit Runge–Kutta method.
    ///
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    /// let (t0, t1) = (Var::new(0f64, &Device::Cpu)?, Var::new(1f64, &Device::Cpu)?);
    /// let ode = Ode::new(&field).span_tensors(&t0, &t1).steps(100);
    /// let grads = ode.solve(Tensor::new(&[1f64], &Device::Cpu)?)?.last().sum_all()?.backward()?;
    /// let dt1 = grads.get(&t1).unwrap().to_scalar::<f64>()?;
    /// assert!((dt1 + (-1f64).exp()).abs() < 1e-8);                   // d e^(−t₁)/dt₁
    /// # Ok::<(), OdeError>(())
    /// ```
    pub fn span_tensors(mut self, t0: &Tensor, t1: &Tensor) -> Self {
        self.time_tensors.span = Some([t0.clone(), t1.clone()]);
        self
    }

    /// So many equal steps over the span.
    pub fn steps(mut self, steps: usize) -> Self {
        self.steps = steps;
        self
    }

    /// The ends of the steps, the start included; replaces span and steps.
    pub fn grid(mut self, times: &[f64]) -> Self {
        self.grid = Some(times.to_vec());
        self.time_tensors.grid = None;
        self
    }

    /// The same with a 1-d tensor, which receives its gradient from `loss.backward()`: see
    /// [`span_tensors`](Self::span_tensors).
    pub fn grid_tensor(mut self, times: &Tensor) -> Self {
        self.time_tensors.grid = Some(times.clone());
        self
    }

    /// Steps as long as the tolerances allow, instead of [`steps`](Self::steps): the estimated error of each is at most
    /// atol + rtol·|y|, in the norm of the [`Controller`]. Needs a solver with an error estimate (Heun, Ralston, Bosh3,
    /// Dopri5, Tsit5, a tableau with embedded weights). Each is a number, or given by component: see [`Tolerance`].
    ///
    /// The gradient is that of the steps that were accepted, at constant times. A step reads one number from the device.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    /// let y0 = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
    /// let solution = Ode::new(&field).solver(Dopri5).span(0.0, 2.0).tolerances(1e-4, 1e-6).save_at(&[0.3, 2.0]).solve(&y0)?;
    /// assert_eq!(solution.times(), [0.3, 2.0]);
    /// println!("{} steps, {} rejected", solution.stats().accepted_steps, solution.stats().rejected_steps);
    /// # Ok::<(), OdeError>(())
    /// ```
    pub fn tolerances(mut self, rtol: impl Into<Tolerance>, atol: impl Into<Tolerance>) -> Self {
        self.tolerances = Some((rtol.into(), atol.into()));
        self
    }

    /// How the lengths of adaptive steps are chosen. Without [`tolerances`](Self::tolerances) they are 1e-3 and 1e-6.
    pub fn controller(mut self, controller: Controller) -> Self {
        self.controller = Some(controller);
        self
    }

    /// Times at which f jumps as a function of t. Adaptive steps end there, fixed ones must; the stages of the steps on
    /// both sides see [`Time::value`](crate::Time::value) strictly on their own side.
    pub fn discontinuities(mut self, times: &[f64]) -> Self {
        self.discontinuities = times.to_vec();
        self
    }

    /// Keeps the state after each step in the solution, for [`Solution::at`]: N + 1 states in the accumulate dtype.
    pub fn dense(mut self) -> Self {
        self.dense = true;
        self
    }

    /// Output times are interpolated as by [`Solution::at`], and shape no step: adaptive steps go over them, and with fixed
    /// steps they need not be grid points. Worth it where they lie closer than the steps.
    pub fn interpolate(mut self) -> Self {
        self.interpolate = true;
        self
    }

    /// Times whose states [`Solution::states`] hands out; by default the end alone. Adaptive steps end there, and with
    /// fixed steps they must be grid points, unless they are [interpolated](Self::interpolate).
    pub fn save_at(mut self, times: &[f64]) -> Self {
        self.save_at = times.to_vec();
        self.time_tensors.outputs = None;
        self
    }

    /// The same with a 1-d tensor for adaptive steps, which receives its gradient from `loss.backward()`: the steps end at
    /// the output times, which move. See [`span_tensors`](Self::span_tensors); an end of the span that is an output time
    /// gets no gradient of its own.
    pub fn save_at_tensor(mut self, times: &Tensor) -> Self {
        self.time_tensors.outputs = Some(times.clone());
        self
    }

    /// The dtypes of field, trajectory and sums.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = Some(precision);
        self
    }

    /// How gradients come back: [`Discrete`], [`Reconstruct`](crate::Reconstruct), [`Backsolve`](crate::Backsolve) or
    /// [`Unrolled`](crate::Unrolled).
    pub fn adjoint(mut self, adjoint: impl Into<Adjoint>) -> Self {
        self.adjoint = adjoint.into();
        self
    }

    /// How cotangents are scaled in the backward pass.
    pub fn scaling(mut self, scaling: AdjointScaling) -> Self {
        self.scaling = Some(scaling);
        self
    }

    /// What to do when the forward pass overflows.
    pub fn on_overflow(mut self, overflow: OnOverflow) -> Self {
        self.overflow = overflow;
        self
    }

    /// Tensors that the field is given in the compute dtype and that gradients flow to: see
    /// [`ModelField::with_inputs`](crate::ModelField::with_inputs).
    pub fn inputs(mut self, inputs: &[Tensor]) -> Self {
        self.inputs = inputs.to_vec();
        self
    }

    /// The seed of dropout masks and noise, fixed during a solve. Change it from one training step to the next.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Keeps nothing and joins nothing to Candle's graph.
    pub fn no_grad(mut self) -> Self {
        self.tracked = false;
        self
    }

    /// Whether the first evaluation is made twice and compared to the bit (on by default).
    pub fn check_determinism(mut self, check: bool) -> Self {
        self.check_determinism = check;
        self
    }

    /// Shows each finished step to `observer`, which may stop the solve: the solution then ends there.
    pub fn on_step(mut self, observer: impl Fn(StepInfo<'_>) -> ControlFlow<()> + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Solves from `y0`: a tensor, or a [`State`] of several.
    ///
    /// Every evaluation of f, and y itself, is checked for NaN and infinity without reading from the device before the
    /// pass is over. Masters that are changed between the solve and `loss.backward()` follow Candle's own rule: what
    /// was cast for this solve (any parameter whose dtype is not the compute dtype) keeps its old value, and what was
    /// not is seen with its new one, so step the optimiser after the backward pass.
    ///
    /// # Errors
    /// Any [`OdeError`] that names what is wrong with the settings, y0, the parameters or the field.
    pub fn solve(&self, y0: impl Into<State>) -> Result<Solution> {
        self.with_times_read()?.solve_from(y0.into())
    }

    fn solve_from(&self, y0: State) -> Result<Solution> {
        if let Some(fitting) = self.within_budget(&y0)? {
            return fitting.solve_from(y0);
        }
        let precision = self.precision.unwrap_or_else(|| default_precision(&y0));
        precision.check(y0.device())?;
        check_start(&y0)?;
        if let Some((index, &value)) = self.save_at.iter().enumerate().find(|(_, t)| !t.is_finite()) {
            return Err(OdeError::NonFiniteTime { index, value });
        }
        let (course, outputs) = self.course(&y0, precision.accumulate_dtype())?;
        let _span = tracing::debug_span!(target: "candle_ode", "solve", steps = course.steps()).entered();
        let counters = Arc::new(Counters::default());
        let device = y0.device().clone();
        let mut trainable = self.field.params().trainable(&self.inputs);
        let of_times = self.tracked && self.time_tensors.is_tracked();
        if of_times {
            self.check_moments(&device)?;
        }
        let tracked = self.tracked && (y0.is_tracked() || of_times || trainable.iter().any(Option::is_some));
        let unrolled = tracked && matches!(self.adjoint, Adjoint::Unrolled(_));
        let start = crate::graph::widen(&y0, precision.accumulate_dtype())?;
        let compute = precision.compute_dtype();
        let casts = if unrolled {
            self.field.params().cast_tracked(&self.inputs, compute, &device)?
        } else {
            self.field.params().cast(&self.inputs, compute, &device)?
        };
        add(&counters.casts, casts.count());
        let keeping = self.adjoint.keeping(precision)?;
        let anchors = self.adjoint.anchors(self.solver.as_ref())?;
        let forward = Forward {
            field: self.field.clone(),
            solver: self.solver.clone(),
            course,
            every: self.dense || self.interpolate,
            precision,
            seed: self.seed,
            casts: Fallback::new(casts, self.inputs.clone()),
            opening: if unrolled { Opening::Track } else { Opening::Evaluate },
            keeping: keeping.filter(|_| tracked),
            anchors: anchors.filter(|_| tracked),
            overflow: self.overflow,
            checked: Checked { determinism: self.check_determinism },
            observer: self.observer.as_deref(),
            counters: counters.clone(),
        };
        let (mut walked, forward) = forward.run(&start, &outputs)?;
        let times = walked.times().to_vec();
        let mut reached: Vec<(usize, State)> = std::mem::take(&mut walked.outputs);
        let mut trajectory_bytes = 0;
        if tracked && !unrolled {
            let scaling = self.scaling.clone().unwrap_or_else(|| AdjointScaling::default_for(compute));
            let moments = self.moments(&times);
            trainable.extend(moments.iter().map(|moments| Some(moments.tensor.clone())));
            let kept = forward.reverse(walked, &start, &self.adjoint, scaling, moments)?;
            trajectory_bytes = kept.bytes();
            let indices: Vec<usize> = reached.iter().map(|(n, _)| *n).collect();
            reached = indices.into_iter().zip(crate::graph::attach(reached, &start, trainable, kept)?).collect();
        }
        let Some((end, last)) = reached.last().map(|(n, y)| (times[*n], y.clone())) else {
            return Err(OdeError::NoSteps);
        };
        let dense = if self.dense || self.interpolate {
            Some(Dense::new(self, reached.iter().map(|(n, y)| (times[*n], y.clone())).unzip()))
        } else {
            None
        };
        // In the order they were asked for, as far as they were reached.
        let wanted = if outputs.is_empty() { vec![end] } else { outputs };
        let mut states: Vec<(f64, State)> = Vec::with_capacity(wanted.len());
        for t in wanted {
            let found = reached.iter().find(|(n, _)| times[*n] == t);
            match (found, &dense) {
                (Some((_, y)), _) => states.push((t, y.clone())),
                (None, Some(dense)) if self.interpolate && dense.covers(t) => states.push((t, dense.at(t)?)),
                (None, _) => {}
            }
        }
        let (at, states) = states.into_iter().unzip();
        Ok(Solution { states, times: at, last, end, counters, trajectory_bytes, dense })
    }

    /// Where the steps come from, and the output times as they are met.
    fn course(&self, y0: &State, accumulate: DType) -> Result<(Course, Vec<f64>)> {
        if (self.dense || self.interpolate) && self.solver.interpolated(0.5).is_none() {
            return Err(dense::without(self.solver.name()));
        }
        if self.is_adaptive() {
            return Ok((Course::Adaptive(Box::new(self.adaptive(y0, accumulate)?)), self.save_at.clone()));
        }
        let grid = self.time_grid()?;
        let on_grid = |times: &[f64]| -> Result<Vec<f64>> {
            times.iter().map(|&t| grid.index_of(t).map(|n| grid.times()[n])).collect()
        };
        let outputs = if self.interpolate { self.inside(grid.times())? } else { on_grid(&self.save_at)? };
        let breaks = on_grid(&self.discontinuities)?;
        Ok((Course::Grid(Clock::with_breaks(&grid, self.solver.nodes(), &breaks, y0.device())), outputs))
    }

    /// The output times, which must lie between the ends of `times`.
    fn inside(&self, times: &[f64]) -> Result<Vec<f64>> {
        let ends = (times[0], times[times.len() - 1]);
        let (least, most) = (ends.0.min(ends.1), ends.0.max(ends.1));
        match self.save_at.iter().find(|t| !(least..=most).contains(*t)) {
            None => Ok(self.save_at.clone()),
            Some(t) => {
                let hint = "output times lie in the span";
                Err(OdeError::Setting { setting: "save_at", value: t.to_string(), hint })
            }
        }
    }

    fn is_adaptive(&self) -> bool {
        self.tolerances.is_some() || self.controller.is_some()
    }

    fn adaptive(&self, y0: &State, accumulate: DType) -> Result<Adaptive> {
        let wrong = |setting, value: String, hint| Err(OdeError::Setting { setting, value, hint });
        if self.grid.is_some() || self.steps != 0 {
            let value = if self.grid.is_some() { "given".into() } else { self.steps.to_string() };
            let hint = "steps are either given (.steps(n), .grid(..)) or chosen (.tolerances(..), .controller(..)): leave one out";
            return wrong(if self.grid.is_some() { "grid" } else { "steps" }, value, hint);
        }
        let Some((start, end)) = self.span else {
            return wrong("span", "unset".into(), "call .span(t0, t1)");
        };
        TimeGrid::new(vec![start, end])?;
        let inside = |t: f64| (start.min(end)..=start.max(end)).contains(&t);
        self.inside(&[start, end])?;
        for (index, &value) in self.discontinuities.iter().enumerate() {
            if !value.is_finite() {
                return Err(OdeError::NonFiniteTime { index, value });
            }
        }
        let breaks: Vec<f64> = self.discontinuities.iter().copied().filter(|t| inside(*t)).collect();
        let outputs: &[f64] = if self.interpolate { &[] } else { &self.save_at };
        let mut stops: Vec<f64> = outputs.iter().chain(&breaks).copied().filter(|t| *t != start).chain([end]).collect();
        stops.sort_by(|a, b| if end > start { a.total_cmp(b) } else { b.total_cmp(a) });
        stops.dedup();
        let controller = self.controller.clone().unwrap_or_default();
        controller.check()?;
        let default = (Tolerance::Scalar(1e-3), Tolerance::Scalar(1e-6));
        let (rtol, atol) = self.tolerances.as_ref().unwrap_or(&default);
        let tolerances = Tolerances::new(rtol, atol, controller.norm.clone(), y0, accumulate)?;
        Ok(Adaptive { start, end, stops, breaks, controller, tolerances })
    }

    /// The bytes that [`solve`](Self::solve) from `y0` and its backward pass will take, and how often the field will be
    /// called, without solving.
    ///
    /// The field is evaluated, linearised and pulled back at y0 a few times, once per shape and dtypes in the life of this
    /// value and its clones; the rest is arithmetic. Nothing else should allocate meanwhile.
    ///
    /// # Errors
    /// As [`solve`](Self::solve); [`OdeError::Unsupported`] for what cannot be planned: solvers that are not explicit,
    /// adaptive steps, dense output, and adjoints other than [`Discrete`](crate::Discrete).
    pub fn plan(&self, y0: impl Into<State>) -> Result<MemoryPlan> {
        let y0: State = y0.into();
        let precision = self.precision.unwrap_or_else(|| default_precision(&y0));
        precision.check(y0.device())?;
        check_start(&y0)?;
        if let Some(chosen) = self.within_budget(&y0)? {
            return chosen.plan(y0);
        }
        if self.is_adaptive() {
            return unplanned("adaptive steps");
        }
        if self.dense || self.interpolate {
            return unplanned("dense output");
        }
        let read = self.with_times_read()?;
        let grid = read.time_grid()?;
        let discrete = match &self.adjoint {
            Adjoint::Discrete(discrete) => discrete,
            Adjoint::Reconstruct(_) => return unplanned("Reconstruct"),
            Adjoint::Backsolve(_) => return unplanned("Backsolve"),
            Adjoint::Unrolled(_) => return unplanned("Unrolled"),
        };
        let trainable = self.field.params().trainable(&self.inputs);
        let mut outputs = read.save_at.iter().map(|&t| grid.index_of(t)).collect::<Result<Vec<_>>>()?;
        outputs.push(grid.steps());
        outputs.sort_unstable();
        outputs.dedup();
        let Some(keeping) = self.adjoint.keeping(precision)? else { return unplanned("this adjoint") };
        let planned = Planned {
            field: self.field.as_ref(),
            solver: self.solver.as_ref(),
            grid: &grid,
            outputs,
            precision,
            scaling: self.scaling.clone().unwrap_or_else(|| AdjointScaling::default_for(precision.compute_dtype())),
            memory: discrete.stage_memory,
            keeping,
            inputs: &self.inputs,
            seed: self.seed,
            tracked: self.tracked
                && (y0.is_tracked() || trainable.iter().any(Option::is_some) || self.time_tensors.is_tracked()),
            checks: if self.check_determinism { 2 } else { usize::from(self.field.needs_probe()) },
            known: &self.known,
        };
        planned.plan(&y0)
    }

    /// The choices that a [`budget`](Discrete::budget) has, each with its plan: the fewest calls of the field first.
    ///
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.tanh());
    /// let y0 = Var::ones((64, 32), candle_core::DType::F32, &Device::Cpu)?;
    /// let choices = Ode::new(&field).span(0.0, 1.0).steps(64).choices(y0.as_tensor())?;
    /// println!("{choices}");
    /// let (first, last) = (&choices.0[0], choices.0.last().unwrap());
    /// assert!(first.calls() < last.calls());
    /// # Ok::<(), OdeError>(())
    /// ```
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn choices(&self, y0: impl Into<State>) -> Result<Choices> {
        let y0: State = y0.into();
        if self.is_adaptive() {
            return unplanned("adaptive steps");
        }
        let steps = self.with_times_read()?.time_grid()?.steps();
        let discrete = match &self.adjoint {
            Adjoint::Discrete(discrete) => discrete.take_budget().map_or_else(|| discrete.clone(), |(_, plain)| plain),
            _ => Discrete::default(),
        };
        let planned = discrete.choices(steps).into_iter().map(|(name, adjoint)| {
            let plan = self.clone().adjoint(adjoint.clone()).plan(&y0)?;
            Ok(Choice { name, adjoint, plan })
        });
        Ok(Choices::new(planned.collect::<Result<_>>()?))
    }

    /// Itself with what fits the budget, if there is one.
    fn within_budget(&self, y0: &State) -> Result<Option<Self>> {
        let Adjoint::Discrete(discrete) = &self.adjoint else { return Ok(None) };
        if !self.tracked {
            return Ok(None);
        }
        let Some((budget, plain)) = discrete.take_budget() else { return Ok(None) };
        let shapes: Vec<_> =
            y0.tensors().iter().chain(&self.inputs).map(|x| (x.dims(), x.dtype(), x.track_op())).collect();
        let (grid, solver) = ((self.span, self.steps, &self.grid), self.solver.name());
        let precision = (self.precision, self.scaling.as_ref().map(AdjointScaling::name));
        let settings = format!("{shapes:?} {grid:?} {solver} {precision:?} {:?} {plain:?} {budget}", self.save_at);
        let chosen = self.known.choose(settings, || Ok(self.choices(y0)?.within(budget)?.adjoint.clone()))?;
        Ok(Some(self.clone().adjoint(chosen)))
    }

    fn time_grid(&self) -> Result<TimeGrid> {
        match (&self.grid, self.span) {
            (Some(times), _) => TimeGrid::new(times.clone()),
            (None, Some((t0, t1))) => TimeGrid::uniform(t0, t1, self.steps),
            (None, None) => Err(OdeError::Setting {
                setting: "span",
                value: "unset".into(),
                hint: "call .span(t0, t1).steps(n), or .grid(&times)",
            }),
        }
    }
}

/// What a plan does not know.
fn unplanned<T>(what: &str) -> Result<T> {
    let what = format!("planning the memory of {what}");
    Err(OdeError::Unsupported { what, instead: "plan Discrete over given steps, or measure it with MemoryProfiler" })
}

/// F64 for a state in F64, else F32.
fn default_precision(y0: &State) -> Precision {
    if y0.tensors().iter().any(|x| x.dtype() == DType::F64) { Precision::F64 } else { Precision::F32 }
}

/// What can be said about y0 before anything runs.
fn check_start(y0: &State) -> Result<()> {
    if y0.is_empty() {
        let hint = "a state needs at least one tensor";
        return Err(OdeError::Setting { setting: "y0", value: "no tensors".into(), hint });
    }
    for (tensor, x) in y0.tensors().iter().enumerate() {
        if !x.dtype().is_float() || !matches!(x.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            let what = format!("tensor {tensor} of y0");
            let hint = "a state is F16, BF16, F32 or F64; convert it with .to_dtype(..)";
            return Err(OdeError::UnsupportedDType { what, dtype: x.dtype(), hint });
        }
        if x.elem_count() == 0 {
            return Err(OdeError::EmptyState { tensor, shape: x.shape().clone() });
        }
        if !x.device().same_device(y0.device()) {
            let what = format!("tensor {tensor} of y0");
            let (expected, found) = (y0.device().location(), x.device().location());
            return Err(OdeError::DeviceMismatch { what, expected, found });
        }
    }
    let flags = y0.tensors().iter().map(crate::field::ops::combine::finite).collect::<candle_core::Result<Vec<_>>>()?;
    let read = crate::field::Finite::read(&flags)?;
    match read.iter().position(|finite| !finite) {
        None => Ok(()),
        Some(tensor) => {
            let (index, value) = crate::field::first_non_finite(&y0[tensor])?;
            Err(OdeError::NonFiniteState { tensor, index, value })
        }
    }
}

/// What a solve hands out: states in the accumulate dtype, in Candle's graph if anything tracked was reachable.
#[derive(Debug)]
pub struct Solution {
    states: Vec<State>,
    times: Vec<f64>,
    last: State,
    end: f64,
    counters: Arc<Counters>,
    trajectory_bytes: usize,
    dense: Option<Dense>,
}

impl Solution {
    /// y at the end; of a state of several tensors the first (see [`last_state`](Self::last_state)).
    pub fn last(&self) -> &Tensor {
        &self.last[0]
    }

    /// The whole state at the end.
    pub fn last_state(&self) -> &State {
        &self.last
    }

    /// The states asked for by [`Ode::save_at`], in that order; the last alone if none was.
    pub fn states(&self) -> &[State] {
        &self.states
    }

    /// The times of [`states`](Self::states).
    pub fn times(&self) -> &[f64] {
        &self.times
    }

    /// y at any time of the solve, if [`Ode::dense`] was asked for: by the solver's interpolant (Dopri5 and Tsit5 have one
    /// of order 4, others Hermite's cubic of order 3), as part of Candle's graph like the states of
    /// [`states`](Self::states).
    ///
    /// Costs the evaluations of one step, and their linearisations and pullbacks in a backward pass: a step is taken again
    /// with other weights, so that nothing but its start was kept.
    ///
    /// ```
    /// use candle_core::{Tensor, Var};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    /// let y0 = Var::new(&[1f64], &candle_core::Device::Cpu)?;
    /// let solution = Ode::new(&field).solver(Tsit5).span(0.0, 3.0).tolerances(1e-7, 1e-7).dense().solve(y0.as_tensor())?;
    /// let y = solution.at(1.234)?.single()?.clone();
    /// assert!((y.to_vec1::<f64>()?[0] - (-1.234f64).exp()).abs() < 1e-6);
    /// let dy0 = y.sum_all()?.backward()?.get(&y0).unwrap().to_vec1::<f64>()?[0];
    /// assert!((dy0 - (-1.234f64).exp()).abs() < 1e-6);
    /// # Ok::<(), OdeError>(())
    /// ```
    ///
    /// # Errors
    /// [`OdeError::Setting`] without [`Ode::dense`], or for a time that the solve has not reached.
    pub fn at(&self, t: f64) -> Result<State> {
        let wrong = |hint| Err(OdeError::Setting { setting: "Solution::at", value: t.to_string(), hint });
        match &self.dense {
            None => wrong("ask for it with Ode::dense(), which keeps the state after each step"),
            Some(dense) if !dense.covers(t) => wrong("the solve has not been there"),
            Some(dense) => dense.at(t),
        }
    }

    /// Where the solve ended: the end of the span, or where the observer stopped it.
    pub fn end(&self) -> f64 {
        self.end
    }

    /// What has been done so far, the backward passes included.
    pub fn stats(&self) -> Stats {
        self.counters.snapshot()
    }

    /// Bytes of the trajectory kept for the backward pass.
    pub fn trajectory_bytes(&self) -> usize {
        self.trajectory_bytes
    }
}

/// The torchdiffeq-shaped shortcut: solves over `times`, which are the steps, and hands out the state at each.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_ode::prelude::*;
///
/// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
/// let solution = odeint(&field, &Tensor::ones(3, candle_core::DType::F32, &Device::Cpu)?, &[0.0, 0.1, 0.2], Heun)?;
/// assert_eq!(solution.states().len(), 3);
/// # Ok::<(), OdeError>(())
/// ```
///
/// # Errors
/// As [`Ode::solve`].
pub fn odeint<F: Field + Clone>(
    field: &F,
    y0: impl Into<State>,
    times: &[f64],
    solver: impl Solver,
) -> Result<Solution> {
    Ode::new(field).solver(solver).grid(times).save_at(times).solve(y0)
}
