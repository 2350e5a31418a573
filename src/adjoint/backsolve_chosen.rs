//! The continuous adjoint over steps that it chooses itself: a controller looks at the estimated errors of y and λ.

use super::backsolve::Found;
use super::drift::Drifts;
use super::lambda::Lambda;
use super::passes::{Pass, Passes};
use super::{Anchors, Reverse, Reversed};
use crate::State;
use crate::controller::{Controller, Memory, Tolerance, Tolerances};
use crate::error::{Interrupted, OdeError, Result};
use crate::field::{Finite, all_finite, largest, sum};
use crate::solver::{Clock, Solver, Tableau, estimate, visible, zeros_like};
use crate::stats::count;
use crate::time::TimeGrid;
use candle_core::DType;
use std::sync::Arc;

/// Everything the backward pass needs of a finished forward pass.
pub(crate) struct Chosen {
    pub(crate) passes: Passes,
    pub(crate) solver: Arc<dyn Solver>,
    pub(crate) tableau: Tableau,
    pub(crate) tolerances: (Tolerance, Tolerance),
    pub(crate) controller: Controller,
    /// The ends of the steps of the solve, the start included.
    pub(crate) times: Vec<f64>,
    /// y0, accumulate dtype.
    pub(crate) start: State,
    /// What was carried at the end, alone.
    pub(crate) end: Anchors,
}

impl Reverse for Chosen {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        let end = visible(self.solver.as_ref(), self.end.last()?);
        self.passes.run(|pass| self.walk(pass, end.clone(), cotangents))
    }

    fn bytes(&self) -> usize {
        self.end.bytes()
    }
}

/// A step that ends this close to a stop, in its own lengths, ends there.
const STRETCH: f64 = 1.01;

/// How many errors an interrupted way back tells.
const TOLD: usize = 8;

/// Where the way back stands.
struct Here {
    t: f64,
    y: State,
    lambda: Lambda,
    /// The largest component of λ so far.
    size: f64,
    /// The length to try next.
    h: f64,
    memory: Memory,
    steps: usize,
    tried: usize,
    errors: Vec<f64>,
}

impl Chosen {
    fn walk(&self, pass: &mut Pass<'_, '_>, y: State, cotangents: &[(usize, State)]) -> Result<Option<State>> {
        let accumulate = self.passes.precision.accumulate_dtype();
        let (start, last) = (self.times[0], self.times.len() - 1);
        // The solve's own last step is a first guess.
        let h = self.controller.first_step.unwrap_or((self.times[last] - self.times[last - 1]).abs());
        let mut here = Here {
            t: self.times[last],
            y,
            lambda: Lambda::default(),
            size: 0.0,
            h: h.min(self.controller.max_step),
            memory: Memory::new(),
            steps: 0,
            tried: 0,
            errors: vec![],
        };
        let tolerances = self.prepared(&here.y, accumulate)?;
        let mut waiting = cotangents.iter().rev().peekable();
        loop {
            while let Some((_, cotangent)) = waiting.next_if(|(n, _)| self.times[*n] == here.t) {
                here.lambda.add(cotangent, accumulate)?;
            }
            if here.t == start {
                break;
            }
            // f may jump, and λ jumps where the loss has seen y.
            let output = waiting.peek().map_or(start, |(n, _)| self.times[*n]);
            let stop = self.passes.clock.breaks().iter().copied().fold(output, |stop, jump| {
                let between = (jump - here.t) * (jump - stop) < 0.0;
                if between { jump } else { stop }
            });
            while here.t != stop {
                self.step(pass, &mut here, stop, &tolerances)?;
            }
        }
        let mut drifts = Drifts::default();
        drifts.compare(&here.y, &self.start)?;
        drifts.report(&self.passes.counters)?;
        match here.lambda.take() {
            Some(state) => Ok(Some(state)),
            None => zeros_like(&here.y, accumulate).map(Some),
        }
    }

    /// Those of y, then those of λ: the same.
    fn prepared(&self, y: &State, accumulate: DType) -> Result<Tolerances> {
        let twice = |tolerance: &Tolerance| match tolerance {
            Tolerance::Scalar(scalar) => Tolerance::Scalar(*scalar),
            Tolerance::PerComponent(state) => Tolerance::PerComponent(joined(state, state)),
        };
        let (rtol, atol) = (twice(&self.tolerances.0), twice(&self.tolerances.1));
        Tolerances::new(&rtol, &atol, self.controller.norm.clone(), &joined(y, y), accumulate)
    }

    /// One accepted step towards `stop`.
    fn step(&self, pass: &mut Pass<'_, '_>, here: &mut Here, stop: f64, tolerances: &Tolerances) -> Result<()> {
        let (controller, counters) = (&self.controller, &self.passes.counters);
        let accumulate = self.passes.precision.accumulate_dtype();
        let lambda = match here.lambda.take() {
            Some(state) => state,
            None => zeros_like(&here.y, accumulate)?,
        };
        here.size = here.size.max(largest(&lambda)?);
        let k = self.tableau.embedded_order().map_or(1, |order| order.min(self.tableau.order())) as f64 + 1.0;
        let mut was_rejected = false;
        loop {
            let left = (stop - here.t).abs();
            // What the time can resolve.
            let least = controller.min_step.max(16.0 * f64::EPSILON * here.t.abs().max(stop.abs()));
            here.h = here.h.max(least);
            let clipped = here.h * STRETCH >= left;
            let end = if clipped { stop } else { here.t + (stop - here.t).signum() * here.h };
            let h = (end - here.t).abs();
            let tried = self.attempt(pass, here, &lambda, end, tolerances)?;
            here.tell(tried.error);
            here.tried += 1;
            let accept = tried.error <= 1.0;
            let interrupted = || here.interrupted(&tried, &lambda, tolerances);
            if here.tried == controller.max_steps && !(accept && end == self.times[0]) {
                return Err(OdeError::StepLimit { steps: here.tried, reached: interrupted()? });
            }
            if accept {
                let most = if was_rejected { 1.0 } else { f64::INFINITY };
                let next = h * here.memory.accepted(controller, k, tried.error).min(most);
                // A step cut short by a stop says little about the next: the longer proposal stands.
                here.h = if clipped { next.max(here.h) } else { next }.min(controller.max_step);
                if !clipped {
                    here.memory.remember(tried.error);
                }
                count(&counters.back_steps);
                pass.take(tried.sums)?;
                (here.t, here.y, here.steps) = (end, tried.y, here.steps + 1);
                here.lambda.set(tried.lambda);
                return Ok(());
            }
            if h <= 1.5 * least {
                return Err(OdeError::StepTooSmall { h: h.min(least), reached: interrupted()? });
            }
            was_rejected = true;
            count(&counters.rejected_back_steps);
            here.h = (h * Memory::rejected(controller, k, tried.error)).max(least);
        }
    }

    /// A step to `end` in the compute dtype; in F32 if it is not finite there.
    fn attempt(
        &self,
        pass: &mut Pass<'_, '_>,
        here: &Here,
        lambda: &State,
        end: f64,
        tolerances: &Tolerances,
    ) -> Result<Tried> {
        let compute = self.passes.precision.compute_dtype();
        let tried = self.attempt_in(compute, pass, here, lambda, end, tolerances)?;
        if tried.error.is_nan() && compute.size_in_bytes() < 4 {
            count(&self.passes.counters.redone_steps);
            return self.attempt_in(DType::F32, pass, here, lambda, end, tolerances);
        }
        Ok(tried)
    }

    fn attempt_in(
        &self,
        dtype: DType,
        pass: &mut Pass<'_, '_>,
        here: &Here,
        lambda: &State,
        end: f64,
        tolerances: &Tolerances,
    ) -> Result<Tried> {
        let (tableau, accumulate) = (&self.tableau, self.passes.precision.accumulate_dtype());
        let (weights, matter) = estimate(tableau)?;
        let grid = TimeGrid::new(vec![here.t, end])?;
        let clock = Clock::with_breaks(&grid, tableau.nodes(), self.passes.clock.breaks(), here.y.device());
        let clock = clock.starting_at(here.steps);
        let at = clock.step(here.steps, dtype);
        let from = [&here.y, lambda];
        let ((y, moved, errors), finite, sums) = pass.attempt(&at, |stages, at, pullbacks| {
            let found = Found::at(tableau, stages, at, &matter, from, pullbacks)?;
            let (y, moved) = found.moved(tableau, at.h, from)?;
            Ok((y, moved, found.errors(tableau, at.h, &weights, accumulate)?))
        })?;
        // λ in units of its largest component.
        let unit = if here.size > 0.0 { 1.0 / here.size } else { 1.0 };
        let scaled = |lambda: &State| sum(None, &[(unit, lambda)], accumulate);
        let error = joined(&errors[0], &scaled(&errors[1])?);
        let after = joined(&y, &scaled(&moved)?);
        let before = joined(&here.y, &scaled(lambda)?);
        let finite = Finite::Host(finite).and(all_finite(&after)?);
        let norm = tolerances.measure(&error, &before, &after, finite)?;
        Ok(Tried { y, lambda: moved, sums, error: norm, estimate: error, after, before })
    }
}

/// A step that was tried.
struct Tried {
    y: State,
    lambda: State,
    sums: crate::field::Gradients,
    /// In tolerances; NaN if anything is not finite.
    error: f64,
    /// Of y and λ together: the estimate, and where it leads.
    estimate: State,
    before: State,
    after: State,
}

impl Here {
    fn tell(&mut self, error: f64) {
        if self.errors.len() == TOLD {
            self.errors.remove(0);
        }
        self.errors.push(error);
    }

    fn interrupted(&self, tried: &Tried, lambda: &State, tolerances: &Tolerances) -> Result<Box<Interrupted>> {
        let worst = tolerances.worst(&tried.estimate, &tried.before, &tried.after)?;
        let (time, state, errors) = (self.t, joined(&self.y, lambda).detach(), self.errors.clone());
        Ok(Box::new(Interrupted { time, state, times: vec![], states: vec![], steps: self.steps, errors, worst }))
    }
}

/// y and λ in a row.
fn joined(y: &State, lambda: &State) -> State {
    State::from(y.tensors().iter().chain(lambda.tensors()).cloned().collect::<Vec<_>>())
}
