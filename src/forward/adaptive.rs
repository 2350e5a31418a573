//! Steps whose lengths a controller chooses: tries a step, reads the norm of its estimated error (the one read from the
//! device a step), accepts it or tries a shorter one.

use super::{Forward, OnOverflow, with_end};
use crate::State;
use crate::account::Category;
use crate::controller::{AtFloor, Controller, Memory, Tolerances, initial_step};
use crate::error::{Interrupted, OdeError, Result};
use crate::field::ops::combine;
use crate::field::{Finite, Opened};
use crate::precision::unit_roundoff;
use crate::solver::{Clock, EstimatedStep, Slope, visible};
use crate::stats::count;
use crate::time::TimeGrid;
use candle_core::{DType, Device};

/// Where an adaptive solve goes and how.
#[derive(Clone, Debug)]
pub(crate) struct Adaptive {
    pub(crate) start: f64,
    pub(crate) end: f64,
    /// Times that are stepped to, in the order of the solve, the end included and the start not.
    pub(crate) stops: Vec<f64>,
    /// Times among them at which f jumps.
    pub(crate) breaks: Vec<f64>,
    pub(crate) controller: Controller,
    pub(crate) tolerances: Tolerances,
}

/// An accepted step.
pub(super) struct Accepted {
    pub(super) y: State,
    pub(super) dtype: DType,
    pub(super) error: f64,
}

/// One adaptive walk.
pub(super) struct Stepper<'a> {
    course: &'a Adaptive,
    device: Device,
    /// Order of the estimate, plus one.
    k: f64,
    /// The ends of the accepted steps, the start included.
    times: Vec<f64>,
    /// The length to try next.
    h: f64,
    memory: Memory,
    /// f at the start of the next step, where it is known.
    first: Option<Slope>,
    tried: usize,
    /// The errors of the last tries, oldest first.
    errors: Vec<f64>,
}

/// A step that was tried.
struct Trial {
    step: EstimatedStep,
    dtype: DType,
    /// NaN if anything is not finite.
    error: f64,
}

/// A step that ends this close to a stop, in its own lengths, ends there.
const STRETCH: f64 = 1.01;

/// How many errors an interrupted solve tells.
const TOLD: usize = 8;

/// An estimate of which the rounding of f explains this part is not brought down by shorter steps.
const EXPLAINED: f64 = 0.25;

impl<'a> Stepper<'a> {
    pub(super) fn new(forward: &Forward<'_>, course: &'a Adaptive, opened: &mut Opened<'_>, y: &State) -> Result<Self> {
        let solver = forward.solver.as_ref();
        let Some(order) = solver.estimate_order() else {
            return Err(OdeError::NoErrorEstimate { solver: solver.name().to_owned() });
        };
        let (k, span) = ((order + 1) as f64, (course.end - course.start).abs());
        let longest = course.controller.max_step.min(span);
        let mut stepper = Self {
            course,
            device: y.device().clone(),
            k,
            times: vec![course.start],
            h: longest,
            memory: Memory::new(),
            first: None,
            tried: 0,
            errors: vec![],
        };
        stepper.h = match course.controller.first_step {
            Some(h) => h.min(longest),
            None => stepper.hairer(forward, opened, &visible(solver, y), longest)?,
        };
        stepper.h = stepper.h.max(stepper.least_step());
        Ok(stepper)
    }

    /// The ends of the accepted steps, the start included.
    pub(super) fn times(&self) -> &[f64] {
        &self.times
    }

    /// The next step does not start quite where the last one ended: f is to be evaluated there.
    pub(super) fn forget_first(&mut self) {
        self.first = None;
    }

    /// Where the solve ends.
    pub(super) fn end(&self) -> f64 {
        self.course.end
    }

    /// The accepted steps, as a backward pass needs them.
    pub(super) fn into_clock(self, forward: &Forward<'_>, device: &Device) -> Result<Clock> {
        let grid = TimeGrid::new(self.times)?;
        Ok(Clock::with_breaks(&grid, forward.solver.nodes(), &self.course.breaks, device))
    }

    /// The next step from `y`, accepted. `outputs` are those of the solve so far, for an error to carry.
    pub(super) fn step(
        &mut self,
        forward: &Forward<'_>,
        opened: &mut Opened<'_>,
        y: &State,
        outputs: &[(usize, State)],
    ) -> Result<Accepted> {
        let (course, controller) = (self.course, &self.course.controller);
        let mut was_rejected = false;
        loop {
            self.tried += 1;
            let (end, clipped) = self.target();
            let h = (end - self.t()).abs();
            let trial = self.trial(forward, opened, end, y)?;
            self.tell(trial.error);
            let floor = match controller.floor {
                AtFloor::Error if trial.error <= 1.0 => 0.0,
                AtFloor::Error | AtFloor::Accept => self.floor(forward, &trial, h, y)?,
            };
            let bound = (floor / EXPLAINED).max(1.0);
            if trial.error > 1.0 && trial.error <= bound {
                if controller.floor == AtFloor::Error {
                    let reached = self.interrupted(forward, &trial, y, self.t(), outputs)?;
                    return Err(OdeError::ErrorFloor { h, error: trial.error, floor, dtype: trial.dtype, reached });
                }
                count(&forward.counters.floored_steps);
            }
            let error = trial.error / bound;
            let accept = error <= 1.0;
            if self.tried == controller.max_steps && !(accept && end == course.end) {
                let time = if accept { end } else { self.t() };
                let reached = self.interrupted(forward, &trial, y, time, outputs)?;
                return Err(OdeError::StepLimit { steps: self.tried, reached });
            }
            if accept {
                let most = if was_rejected { 1.0 } else { f64::INFINITY };
                let next = h * self.memory.accepted(controller, self.k, error).min(most);
                // A step cut short by a stop says little about the next: the longer proposal stands.
                self.h = if clipped { next.max(self.h) } else { next };
                self.h = self.h.min(controller.max_step).max(self.least_step());
                if !clipped {
                    self.memory.remember(error);
                }
                self.times.push(end);
                let EstimatedStep { step, mut slopes, first_same_as_last, .. } = trial.step;
                let last = if first_same_as_last { slopes.pop().flatten() } else { None };
                self.first = last.filter(|_| !course.breaks.contains(&end));
                return Ok(Accepted { y: step.y, dtype: trial.dtype, error: trial.error });
            }
            was_rejected = true;
            count(&forward.counters.rejected_steps);
            let least = self.least_step();
            // The length of a step is rounded to the resolution of the time.
            if h <= 1.5 * least {
                let reached = self.interrupted(forward, &trial, y, self.t(), outputs)?;
                return Err(OdeError::StepTooSmall { h: h.min(least), reached });
            }
            self.h = (h * Memory::rejected(controller, self.k, error)).max(least);
            self.first = trial.step.slopes.into_iter().next().flatten();
        }
    }

    fn t(&self) -> f64 {
        // There is always the start.
        self.times.last().copied().unwrap_or(self.course.start)
    }

    /// Where the next step ends, and whether a stop cuts it short.
    fn target(&self) -> (f64, bool) {
        let direction = (self.course.end - self.course.start).signum();
        let ahead = |stop: &&f64| (**stop - self.t()) * direction > 0.0;
        let stop = self.course.stops.iter().find(ahead).copied().unwrap_or(self.course.end);
        match self.h * STRETCH >= (stop - self.t()).abs() {
            true => (stop, true),
            false => (self.t() + direction * self.h, false),
        }
    }

    /// The shortest step that may be tried: the one asked for, and never below what the time can resolve.
    fn least_step(&self) -> f64 {
        let resolved = 16.0 * f64::EPSILON * self.t().abs().max(self.course.end.abs());
        self.course.controller.min_step.max(resolved)
    }

    /// One step to `end` in the compute dtype; again in F32 if it is not finite there and that is wanted.
    fn trial(&self, forward: &Forward<'_>, opened: &mut Opened<'_>, end: f64, y: &State) -> Result<Trial> {
        let compute = forward.precision.compute_dtype();
        let trial = self.trial_in(compute, forward, opened, end, y)?;
        let retry = forward.overflow == OnOverflow::Retry && compute.size_in_bytes() < 4 && !forward.is_tracking();
        if trial.error.is_nan() && retry {
            count(&forward.counters.redone_steps);
            return self.trial_in(DType::F32, forward, opened, end, y);
        }
        Ok(trial)
    }

    fn trial_in(
        &self,
        dtype: DType,
        forward: &Forward<'_>,
        opened: &mut Opened<'_>,
        end: f64,
        y: &State,
    ) -> Result<Trial> {
        let index = self.times.len() - 1;
        let clock = self.clock(forward, end)?.starting_at(index);
        let at = clock.step(index, dtype);
        let _span =
            tracing::debug_span!(target: "candle_ode", "step", index = index as u64, t = at.t, h = at.h).entered();
        let stages = forward.stages(opened, dtype)?;
        let first = self.first.as_ref().filter(|first| first.state().tensors().iter().all(|k| k.dtype() == dtype));
        let mut step = forward.solver.estimated_step(&stages, &at, y, first)?;
        let finite = with_end(std::mem::take(&mut step.step.finite), &step.step.y)?;
        let finite = finite.into_iter().fold(Finite::default(), Finite::and);
        let seen = |carried: &State| visible(forward.solver.as_ref(), carried);
        let error = self.course.tolerances.measure(&step.error, &seen(y), &seen(&step.step.y), finite)?;
        Ok(Trial { step, dtype, error })
    }

    fn clock(&self, forward: &Forward<'_>, end: f64) -> Result<Clock> {
        let grid = TimeGrid::new(vec![self.t(), end])?;
        Ok(Clock::with_breaks(&grid, forward.solver.nodes(), &self.course.breaks, &self.device))
    }

    /// The norm of what the rounding of f may add to an estimate: h Σ dᵢ kᵢ carries noise of up to h·u·Σ |dᵢ||kᵢ|,
    /// which shrinks no faster than the step.
    fn floor(&self, forward: &Forward<'_>, trial: &Trial, h: f64, y: &State) -> Result<f64> {
        let EstimatedStep { step, slopes, weights, .. } = &trial.step;
        let accumulate = forward.precision.accumulate_dtype();
        let u = unit_roundoff(trial.dtype);
        let mut noise: Option<State> = None;
        for (weight, slope) in weights.iter().zip(slopes) {
            let Some(slope) = slope.as_ref().filter(|_| *weight != 0.0) else { continue };
            let mut sizes = Vec::with_capacity(slope.state().len());
            for (n, k) in slope.state().tensors().iter().enumerate() {
                let size = k.detach().abs()?;
                let so_far = noise.as_ref().map(|noise| &noise[n]);
                sizes.push(combine::combine(so_far, &[(h * u * weight.abs(), &size)], accumulate)?);
            }
            noise = Some(State::from(sizes));
        }
        match noise {
            Some(noise) => {
                let seen = |carried: &State| visible(forward.solver.as_ref(), carried);
                self.course.tolerances.measure(&noise, &seen(y), &seen(&step.y), Finite::default())
            }
            None => Ok(0.0),
        }
    }

    /// The first length by Hairer's algorithm; keeps f(t₀, y₀), which costs nothing since the first step needs it.
    fn hairer(&mut self, forward: &Forward<'_>, opened: &mut Opened<'_>, y: &State, longest: f64) -> Result<f64> {
        let dtype = forward.precision.compute_dtype();
        let rounded = |y: &State| y.try_map(|x| combine::combine(Some(x), &[], dtype));
        let clock = self.clock(forward, self.course.end)?;
        let slope = forward.stages(opened, dtype)?.slope(&clock.step(0, dtype), 0, &rounded(y)?)?;
        self.first = Some(Slope::new(slope.clone(), Category::Stages));
        let (y, slope) = (y.detach(), slope.detach());
        let direction = (self.course.end - self.course.start).signum();
        initial_step(&self.course.tolerances, self.k, (self.least_step(), longest), &y, &slope, |h| {
            let clock = self.clock(forward, self.t() + direction * h)?;
            let moved = y.tensors().iter().zip(slope.tensors());
            let moved = moved.map(|(y, k)| combine::combine(Some(y), &[(direction * h, k)], dtype));
            let moved = State::from(moved.collect::<candle_core::Result<Vec<_>>>()?);
            let end = forward.solver.nodes().len();
            Ok(forward.stages(opened, dtype)?.slope(&clock.step(0, dtype), end, &moved)?.detach())
        })
    }

    fn tell(&mut self, error: f64) {
        if self.errors.len() == TOLD {
            self.errors.remove(0);
        }
        self.errors.push(error);
    }

    /// What a solve that cannot go on has to show; `time` is the end of the trial if that was accepted.
    fn interrupted(
        &self,
        forward: &Forward<'_>,
        trial: &Trial,
        y: &State,
        time: f64,
        outputs: &[(usize, State)],
    ) -> Result<Box<Interrupted>> {
        let seen = |carried: &State| visible(forward.solver.as_ref(), carried).detach();
        let (before, after) = (seen(y), seen(&trial.step.step.y));
        let worst = self.course.tolerances.worst(&trial.step.error, &before, &after)?;
        let (times, states) = outputs.iter().map(|(n, y)| (self.times[*n], y.detach())).unzip();
        let state = if time == self.t() { before } else { after };
        let steps = self.times.len() - 1 + usize::from(time != self.t());
        Ok(Box::new(Interrupted { time, state, times, states, steps, errors: self.errors.clone(), worst }))
    }
}
