//! The forward pass: steps over the grid or as a controller says, keeps what the backward pass needs, checks what it is
//! given.

mod adaptive;
mod first;
mod pace;
mod walked;

pub(crate) use adaptive::Adaptive;
use adaptive::Stepper;
pub(crate) use pace::Course;
use pace::{Pace, Taken};
pub(crate) use walked::{Finished, Walked, Wanted};

use crate::State;
use crate::adjoint::Anchors;
use crate::error::{OdeError, PassKind, Result};
use crate::field::{Fallback, Field, Finite, Opened, Opening, all_finite};
use crate::precision::{Precision, largest_finite};
use crate::solver::{Clock, Linearized, Slopes, Solver, Stages, Step, StepAt, carry, no_linearizations, visible};
use crate::stats::{Counters, count};
use crate::trajectory::schedule::Slot;
use crate::trajectory::{Keeping, Trajectory};
use candle_core::DType;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

/// What to do when the forward pass overflows in half precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnOverflow {
    /// An error that names the first step, time and stage.
    #[default]
    Error,
    /// The step is done again with f in F32, and its state kept in F32.
    Retry,
}

/// What an observer sees after each step.
#[derive(Clone, Copy, Debug)]
pub struct StepInfo<'a> {
    /// The step, from 0.
    pub index: usize,
    /// Model time at its end.
    pub t: f64,
    /// Its length.
    pub h: f64,
    /// The state at its end, in the accumulate dtype.
    pub y: &'a State,
    /// The norm of its scaled error, where steps are adaptive.
    pub error: Option<f64>,
}

/// Sees each step; `Break` stops the solve.
pub(crate) type Observer = dyn Fn(StepInfo<'_>) -> ControlFlow<()> + Send + Sync;

/// Which of the checks on the first evaluation are wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked {
    pub(crate) writes: bool,
    pub(crate) determinism: bool,
}

/// The settings of one forward pass.
#[derive(Clone)]
pub(crate) struct Forward<'a> {
    pub(crate) field: Arc<dyn Field>,
    pub(crate) solver: Arc<dyn Solver>,
    pub(crate) course: Course,
    /// Whether the state after each step is handed out.
    pub(crate) every: bool,
    pub(crate) precision: Precision,
    pub(crate) seed: u64,
    pub(crate) casts: Arc<Fallback>,
    pub(crate) opening: Opening,
    /// How states are kept; `None` if nothing is.
    pub(crate) keeping: Option<Keeping>,
    /// After how many steps what is carried is kept, and the end, for those who go backwards from it.
    pub(crate) anchors: Option<usize>,
    pub(crate) overflow: OnOverflow,
    pub(crate) checked: Checked,
    pub(crate) observer: Option<&'a Observer>,
    pub(crate) counters: Arc<Counters>,
}

/// What does not fit its dtype, and what may not.
#[derive(Default)]
struct Doubts {
    /// Steps that need more than the compute dtype, as far as is known.
    wide_steps: BTreeSet<usize>,
    /// Steps after which states need more than the storage dtype, as far as is known.
    wide_entries: BTreeSet<usize>,
    /// Flags of this walk that have yet to be read.
    flags: Vec<(Suspect, Finite)>,
}

/// One thing that may not be finite.
#[derive(Clone, Copy)]
enum Suspect {
    Slope { step: usize, stage: usize },
    Entry { step: usize },
}

impl<'a> Forward<'a> {
    /// Walks from `start` (accumulate dtype), handing out the states at the times `outputs` and the last.
    pub(crate) fn run(self, start: &State, outputs: &[f64]) -> Result<(Walked, Self)> {
        let _span = tracing::debug_span!(target: "candle_ode", "forward", steps = self.course.steps()).entered();
        let mut doubts = Doubts::default();
        let walked = {
            let mut opened = self.opened();
            self.check_first(&mut opened, start)?;
            loop {
                let walked = self.walk(&mut opened, start, outputs, &mut doubts)?;
                let (places, flags): (Vec<_>, Vec<_>) = doubts.flags.drain(..).unzip();
                let read = Finite::read(&flags)?;
                match places.into_iter().zip(read).find(|(_, finite)| !finite) {
                    None => break walked,
                    Some((suspect, _)) => self.widen(suspect, &walked.clock, &mut doubts)?,
                }
            }
        };
        Ok((walked, self))
    }

    /// The field, to be opened when it is first asked for.
    fn opened(&self) -> Opened<'_> {
        Opened::new(&self.casts, self.field.as_ref(), self.opening, self.seed, &self.counters)
    }

    fn walk(&self, opened: &mut Opened<'_>, start: &State, outputs: &[f64], doubts: &mut Doubts) -> Result<Walked> {
        let solver = self.solver.as_ref();
        let mut y = carry(solver, &if self.is_tracking() { start.clone() } else { start.detach() });
        let (steps, accumulate) = (self.course.steps(), self.precision.accumulate_dtype());
        let keeping = self.keeping.clone();
        let mut trajectory = keeping.map(|keeping| Trajectory::new(keeping, &y, steps, accumulate));
        let mut anchors = self.anchors.map(|every| Anchors::new(every, accumulate));
        let mut reached: Vec<(usize, State)> = vec![];
        // Each step asks, however many outputs there are.
        let mut sorted = outputs.to_vec();
        sorted.sort_by(f64::total_cmp);
        let is_output = |t: f64| sorted.get(sorted.partition_point(|output| *output < t)) == Some(&t);
        if self.every || is_output(self.course.ends().0) {
            reached.push((0, visible(solver, &y)));
        }
        let mut dtypes = vec![];
        let mut pace = match &self.course {
            Course::Grid(clock) => Pace::Grid(clock),
            Course::Adaptive(adaptive) => Pace::Adaptive(Box::new(Stepper::new(self, adaptive, opened, &y)?)),
        };
        for n in 0.. {
            let (after, error) = match &mut pace {
                Pace::Grid(clock) => {
                    let is_last = n + 2 == clock.times().len();
                    let linearizes = trajectory.as_mut().is_some_and(|kept| kept.linearizes(n + 1, is_last));
                    let (after, linearized) = self.step(opened, clock, n, &y, linearizes, doubts)?;
                    if let (Some(trajectory), Some(linearized)) = (&mut trajectory, linearized) {
                        trajectory.slots.keep_linearized(n + 1, linearized);
                    }
                    dtypes.push(self.dtype(n, doubts));
                    (after, None)
                }
                Pace::Adaptive(stepper) => {
                    let accepted = stepper.step(self, opened, &y, &reached)?;
                    dtypes.push(accepted.dtype);
                    (accepted.y, Some(accepted.error))
                }
            };
            count(&self.counters.accepted_steps);
            let (from, t) = pace.ends(n);
            let whole = |after: &State| match &trajectory {
                Some(trajectory) => Ok(visible(solver, &trajectory.whole(after)?)),
                None => Ok::<_, OdeError>(visible(solver, after)),
            };
            let stop = match self.observer {
                Some(observer) => observer(StepInfo { index: n, t, h: t - from, y: &whole(&after)?, error }).is_break(),
                None => false,
            };
            let is_last = stop || Some(t) == pace.end();
            if is_last || self.every || is_output(t) {
                reached.push((n + 1, whole(&after)?));
            }
            if let Some(anchors) = &mut anchors {
                anchors.see(n + 1, &after, is_last);
            }
            y = match &mut trajectory {
                Some(trajectory) => {
                    let taken = Taken { n, pace: &pace, dtypes: &dtypes };
                    if is_last {
                        self.finish(trajectory, &taken, &y, doubts)?;
                        break;
                    }
                    let next = self.keep(trajectory, &taken, &y, after, doubts)?;
                    pace.goes_on_from(trajectory.encodes());
                    next
                }
                None if is_last => break,
                None => after,
            };
        }
        let clock = pace.into_clock(self, start.device())?;
        Ok(Walked { outputs: reached, trajectory, anchors, clock, dtypes })
    }

    /// One step, with its linearisations if it is to be linearised; again in F32 if it is known to overflow and that is
    /// wanted.
    fn step(
        &self,
        opened: &mut Opened<'_>,
        clock: &Clock,
        n: usize,
        y: &State,
        linearizes: bool,
        doubts: &mut Doubts,
    ) -> Result<(State, Option<Arc<Linearized>>)> {
        loop {
            let dtype = self.dtype(n, doubts);
            let at = clock.step(n, dtype);
            let _span =
                tracing::debug_span!(target: "candle_ode", "step", index = n as u64, t = at.t, h = at.h).entered();
            let stages = self.stages(opened, dtype)?;
            let (step, linearized) = match linearizes {
                true => linearized_step(self.solver.as_ref(), &stages, &at, y)?,
                false => (self.solver.step(&stages, &at, y)?, None),
            };
            let finite = with_end(step.finite, &step.y)?;
            if let Some(stage) = finite.iter().position(Finite::known_bad) {
                self.widen(Suspect::Slope { step: n, stage }, clock, doubts)?;
                continue;
            }
            let found = finite.into_iter().enumerate().filter(|(_, finite)| !finite.known_good());
            doubts.flags.extend(found.map(|(stage, finite)| (Suspect::Slope { step: n, stage }, finite)));
            return Ok((step.y, linearized));
        }
    }

    /// The field as the stages of a step in `dtype` see it.
    fn stages<'b>(&'b self, opened: &'b mut Opened<'_>, dtype: DType) -> Result<Stages<'b>> {
        let slopes = if self.is_tracking() { Slopes::Keep } else { Slopes::Refuse };
        let stages = Stages::new(opened.get(dtype)?, self.precision.accumulate_dtype(), &self.counters, slopes);
        Ok(stages.on_buffers(self.runs_on_buffers()))
    }

    /// Whether steps may run on buffers: beside linearisations that are kept, they would need more of them than others.
    fn runs_on_buffers(&self) -> bool {
        self.keeping.as_ref().is_none_or(|keeping| keeping.schedule.slot() == Slot::State)
    }

    /// Whether the pass runs in Candle's own graph.
    fn is_tracking(&self) -> bool {
        self.opening == Opening::Track
    }

    /// Goes on from the state `after` the step just taken, which started at `before`, and keeps it if the schedule says
    /// so.
    fn keep(
        &self,
        trajectory: &mut Trajectory,
        taken: &Taken<'_>,
        before: &State,
        after: State,
        doubts: &mut Doubts,
    ) -> Result<State> {
        let (n, dtype) = (taken.n, trajectory.dtype());
        let exactly = |finite: &Finite| self.exactly(n, taken, dtype, finite, doubts);
        let (y, finite) = trajectory.reach(n + 1, before, after, exactly)?;
        if !finite.known_good() {
            doubts.flags.push((Suspect::Entry { step: n }, finite));
        }
        Ok(y)
    }

    /// Keeps the state from which the last step has started.
    fn finish(
        &self,
        trajectory: &mut Trajectory,
        taken: &Taken<'_>,
        before: &State,
        doubts: &mut Doubts,
    ) -> Result<()> {
        let Some(step) = taken.n.checked_sub(1) else { return Ok(()) };
        let dtype = trajectory.dtype();
        let exactly = |finite: &Finite| self.exactly(step, taken, dtype, finite, doubts);
        let finite = trajectory.finish(taken.n, before, exactly)?;
        if !finite.known_good() {
            doubts.flags.push((Suspect::Entry { step }, finite));
        }
        Ok(())
    }

    /// Whether what step `n` left behind is kept in the accumulate dtype: it does not fit the codec, or the step itself
    /// needed more than the compute dtype.
    fn exactly(&self, n: usize, taken: &Taken<'_>, kept: DType, finite: &Finite, doubts: &mut Doubts) -> Result<bool> {
        if finite.known_bad() && !doubts.wide_entries.contains(&n) {
            self.widen_entry(n, taken.pace.ends(n).1, doubts)?;
        }
        let was_widened = taken.dtypes[n] != self.precision.compute_dtype();
        Ok(doubts.wide_entries.contains(&n) || was_widened && kept.size_in_bytes() < 4)
    }

    /// Notes that something needs a wider dtype, or says that it cannot have one.
    fn widen(&self, suspect: Suspect, clock: &Clock, doubts: &mut Doubts) -> Result<()> {
        let (step, stage) = match suspect {
            Suspect::Slope { step, stage } => (step, stage),
            Suspect::Entry { step } => return self.widen_entry(step, clock.times()[step + 1], doubts),
        };
        let dtype = self.dtype(step, doubts);
        if self.overflow == OnOverflow::Retry && dtype.size_in_bytes() < 4 && !self.is_tracking() {
            count(&self.counters.redone_steps);
            doubts.wide_steps.insert(step);
            return Ok(());
        }
        let hint = match dtype {
            DType::F16 | DType::BF16 => "use .on_overflow(OnOverflow::Retry), Precision::BF16 or a smaller step",
            _ => "the solution grows beyond all bounds, or f has a pole: use smaller steps, or look at f there",
        };
        let place = clock.step(step, dtype).place(stage);
        Err(OdeError::Overflow { pass: PassKind::Forward, place, hint })
    }

    /// The same for the kept state after step `step`, at `time`.
    fn widen_entry(&self, step: usize, time: f64, doubts: &mut Doubts) -> Result<()> {
        if self.overflow == OnOverflow::Retry {
            doubts.wide_entries.insert(step);
            return Ok(());
        }
        let codec = self.keeping.as_ref().map(|keeping| (keeping.codec.dtype(), keeping.codec.largest()));
        let (dtype, largest) = codec.unwrap_or((DType::F32, largest_finite(DType::F32)));
        Err(OdeError::StorageOverflow { step, time, dtype, largest })
    }

    fn dtype(&self, step: usize, doubts: &Doubts) -> DType {
        if doubts.wide_steps.contains(&step) { DType::F32 } else { self.precision.compute_dtype() }
    }
}

/// A step with its linearisations.
fn linearized_step(
    solver: &dyn Solver,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    y: &State,
) -> Result<(Step, Option<Arc<Linearized>>)> {
    let (step, linearized) = solver.linearized_step(stages, at, y)?.ok_or_else(|| no_linearizations(solver.name()))?;
    Ok((step, Some(Arc::new(linearized))))
}

/// Whatever a solver says of its stages, the end of the step counts with the last of them.
fn with_end(mut finite: Vec<Finite>, end: &State) -> Result<Vec<Finite>> {
    let last = finite.pop().unwrap_or_default();
    finite.push(last.and(all_finite(end)?));
    Ok(finite)
}
