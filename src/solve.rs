//! The front door: [`Ode`] is set up, [`Ode::solve`] goes forward, [`Solution`] is part of Candle's graph.

mod course;
mod dense;
mod moments;
mod planned;
mod solution;
mod start;

pub use solution::{Solution, odeint};

use crate::State;
use crate::adjoint::Adjoint;
use crate::controller::{Controller, Tolerance};
use crate::error::{OdeError, Result};
use crate::field::{Fallback, Field, Opening};
use crate::forward::{Checked, Finished, Forward, Observer, OnOverflow, StepInfo, Wanted};
use crate::memory::plan::Known;
use crate::precision::Precision;
use crate::scaling::AdjointScaling;
use crate::solver::{Rk4, Solver};
use crate::stats::{Counters, add};
use crate::tiles::{self, Cut, Tiles};
use crate::time::position;
use crate::trajectory::schedule::Slot;
use candle_core::Tensor;
use dense::Dense;
use moments::TimeTensors;
use start::{check_start, default_precision};
use std::ops::ControlFlow;
use std::sync::Arc;

/// An initial value problem dy/dt = f(t, y; θ) with all its settings. Solve it as often as you like.
///
/// | setting | default |
/// |---|---|
/// | solver | [`Rk4`] |
/// | span, steps | none: give [`span`](Self::span) and [`steps`](Self::steps) or [`tolerances`](Self::tolerances), or [`grid`](Self::grid) |
/// | precision | F64 for an F64 y0, else F32 |
/// | adjoint | [`Discrete`](crate::Discrete) |
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
    cut: Cut,
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
            cut: Cut::default(),
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
    /// The gradient is that of the steps: the ends of equal steps move with both ends of the span; of adaptive steps
    /// the first and the last move and the others are constant. f must depend on its time through
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
    /// The gradient is that of the steps that were accepted, at constant times. A step reads one number from the
    /// device.
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
    /// both sides see [`Time::value`](crate::Time::value) strictly on their own side. Those outside of the span do not
    /// matter.
    pub fn discontinuities(mut self, times: &[f64]) -> Self {
        self.discontinuities = times.to_vec();
        self
    }

    /// Keeps the state after each step in the solution, for [`Solution::at`]: N + 1 states in the accumulate dtype.
    pub fn dense(mut self) -> Self {
        self.dense = true;
        self
    }

    /// Output times are interpolated as by [`Solution::at`], and shape no step: adaptive steps go over them, and with
    /// fixed steps they need not be grid points. Worth it where they lie closer than the steps.
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

    /// The same with a 1-d tensor for adaptive steps, which receives its gradient from `loss.backward()`: the steps end
    /// at the output times, which move. See [`span_tensors`](Self::span_tensors); an end of the span that is an output
    /// time gets no gradient of its own.
    pub fn save_at_tensor(mut self, times: &Tensor) -> Self {
        self.time_tensors.outputs = Some(times.clone());
        self
    }

    /// The dtypes of field, trajectory and sums.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = Some(precision);
        self
    }

    /// How gradients come back: [`Discrete`](crate::Discrete), [`Reconstruct`](crate::Reconstruct),
    /// [`Backsolve`](crate::Backsolve) or [`Unrolled`](crate::Unrolled).
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

    /// The rows of the batch that go through a pass together, at most, for a field that is declared
    /// [row-wise](crate::ModelField::row_wise). What a pass needs beside the trajectory (the stages and linearisations
    /// of a step) is that of one tile a thread.
    ///
    /// By default, on a CPU, at most 256 rows and at most as many as have 8192 elements of the state, the number of
    /// tiles a power of two if there are so many rows; on other devices, and where a solve cannot be cut (adaptive
    /// steps, whose lengths all rows share; an observer; [`Unrolled`](crate::Unrolled); times with gradients), all
    /// rows. The sums over the batch are made tile by tile, so the tile moves the last bits of dL/dθ. The states and
    /// dL/dy0 of a row stay what they are, as far as f's matrix products do.
    pub fn tile(mut self, rows: usize) -> Self {
        self.cut.rows = Some(rows);
        self
    }

    /// How many threads the tiles of a solve on a CPU run on; by default one per core, or `RAYON_NUM_THREADS`. Changes
    /// no bit of any result.
    ///
    /// Where the batch is not cut, layers of this crate share their larger products among as many, and wait for the
    /// next one for half a millisecond before they sleep. Without a number they leave cores to other solves that share
    /// theirs, and nothing is shared on a thread of rayon's. ([`Unrolled`](crate::Unrolled) does not limit its backward
    /// pass, which is Candle's.)
    pub fn threads(mut self, threads: usize) -> Self {
        self.cut.threads = Some(threads);
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
        let copy = crate::graph::widened(&y0, precision.accumulate_dtype());
        let compute = precision.compute_dtype();
        let casts = if unrolled {
            self.field.params().cast_tracked(&self.inputs, compute, &device)?
        } else {
            self.field.params().cast(&self.inputs, compute, &device)?
        };
        add(&counters.casts, casts.count());
        let keeping = self.adjoint.keeping(precision)?;
        let anchors = self.adjoint.anchors(self.solver.as_ref())?;
        let linearizes = tracked && keeping.as_ref().is_some_and(|keeping| keeping.schedule.slot() == Slot::Stages);
        if linearizes {
            self.check_linearizes(of_times, keeping.as_ref().is_some_and(|keeping| keeping.levels.is_some()))?;
        }
        let opening = match (unrolled, linearizes) {
            (true, _) => Opening::Track,
            (false, true) => Opening::Linearize,
            (false, false) => Opening::Evaluate,
        };
        let forward = Forward {
            field: self.field.clone(),
            solver: self.solver.clone(),
            course,
            every: self.dense || self.interpolate,
            precision,
            seed: self.seed,
            casts: Arc::new(Fallback::new(casts, self.inputs.clone())),
            opening,
            keeping: keeping.filter(|_| tracked),
            anchors: anchors.filter(|_| tracked),
            overflow: self.overflow,
            checked: Checked { writes: true, determinism: self.check_determinism },
            observer: self.observer.as_deref(),
            counters: counters.clone(),
        };
        let scaling = self.scaling.clone().unwrap_or_else(|| AdjointScaling::default_for(compute));
        let moments = |times: &[f64]| self.moments(times);
        let wanted = (tracked && !unrolled).then_some(Wanted { adjoint: &self.adjoint, scaling, moments: &moments });
        let (Finished { times, outputs: mut reached, back }, counters) = match self.tiles(&start)? {
            Some(tiles) => tiles.forward(&forward, &start, &outputs, wanted)?,
            None => (tiles::whole(self.cut.threads, forward, &start, &outputs, wanted)?, vec![counters]),
        };
        let trajectory_bytes = back.as_ref().map_or(0, |back| back.bytes());
        let second_level_bytes = back.as_ref().map_or(0, |back| back.bytes_away());
        if let Some(back) = back {
            trainable.extend(moments(&times).into_iter().map(|moments| Some(moments.tensor)));
            let indices: Vec<usize> = reached.iter().map(|(n, _)| *n).collect();
            reached = indices.into_iter().zip(crate::graph::attach(reached, &start, trainable, back, copy)?).collect();
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
            let found = position(&times, t).and_then(|n| reached.binary_search_by_key(&n, |(n, _)| *n).ok());
            match (found, &dense) {
                (Some(n), _) => states.push((t, reached[n].1.clone())),
                (None, Some(dense)) if self.interpolate && dense.covers(t) => states.push((t, dense.at(t)?)),
                (None, _) => {}
            }
        }
        let (at, states) = states.into_iter().unzip();
        Ok(Solution { states, times: at, last, end, counters, trajectory_bytes, second_level_bytes, dense })
    }

    /// Whether the linearisations of steps can be kept.
    fn check_linearizes(&self, of_times: bool, on_two_levels: bool) -> Result<()> {
        let refuse = |what: &str| {
            let what = format!("keeping the linearisations of steps {what}");
            Err(OdeError::Unsupported { what, instead: "keep states alone: leave out .with_stages()" })
        };
        match () {
            () if self.is_adaptive() => refuse("of adaptive length"),
            () if of_times => refuse("whose times have gradients"),
            () if on_two_levels => refuse("on two levels of storage"),
            () => Ok(()),
        }
    }

    /// The tiles that the batch is cut into, if it is.
    fn tiles(&self, start: &State) -> Result<Option<Tiles>> {
        let against = match &self.adjoint {
            _ if self.is_adaptive() => Some("with adaptive steps, whose lengths all rows share"),
            _ if self.observer.is_some() => Some("with an observer, which sees whole states"),
            _ if self.time_tensors.is_tracked() => Some("with gradients of times"),
            Adjoint::Unrolled(_) => Some("with Unrolled"),
            _ => None,
        };
        self.cut.tiles(start, self.field.is_row_wise(), against)
    }
}
