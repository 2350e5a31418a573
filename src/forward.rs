//! The forward pass: steps over the grid, keeps what the backward pass needs, checks what it is given.

use crate::State;
use crate::adjoint::{Adjoint, Anchors, Backsolved, Discrete, Passes, Reconstructed, Recorded, Reverse};
use crate::error::{OdeError, PassKind, Result};
use crate::field::ops::combine;
use crate::field::{Casts, Fallback, Field, Finite, Opened, Opening, VectorField, on_host};
use crate::precision::{Precision, largest_finite};
use crate::scaling::AdjointScaling;
use crate::solver::{Clock, Slopes, Solver, Stages, carry, visible};
use crate::stats::{Counters, count};
use crate::time::TimeGrid;
use crate::trajectory::{Keeping, Trajectory};
use candle_core::{DType, Tensor};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

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
}

/// Sees each step; `Break` stops the solve.
pub(crate) type Observer = dyn Fn(StepInfo<'_>) -> ControlFlow<()> + Send + Sync;

/// Which of the checks on the first evaluation are wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Checked {
    pub(crate) determinism: bool,
}

/// The settings of one forward pass.
pub(crate) struct Forward<'a> {
    pub(crate) field: Arc<dyn Field>,
    pub(crate) solver: Arc<dyn Solver>,
    pub(crate) clock: Clock,
    pub(crate) grid: &'a TimeGrid,
    pub(crate) precision: Precision,
    pub(crate) seed: u64,
    pub(crate) casts: Fallback,
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

/// What a forward pass leaves behind.
pub(crate) struct Walked {
    /// (grid index, state), in the order of the grid; the last one always.
    pub(crate) outputs: Vec<(usize, State)>,
    pub(crate) trajectory: Option<Trajectory>,
    pub(crate) anchors: Option<Anchors>,
    dtypes: Vec<DType>,
}

impl Walked {
    /// Steps that were taken.
    pub(crate) fn steps(&self) -> usize {
        self.dtypes.len()
    }
}

impl Forward<'_> {
    /// What `adjoint` needs of a finished pass from `start` to go backwards.
    pub(crate) fn reverse(
        self,
        walked: Walked,
        start: &State,
        adjoint: &Adjoint,
        scaling: AdjointScaling,
    ) -> Result<Box<dyn Reverse>> {
        let (solver, start, steps) = (self.solver.clone(), start.detach(), walked.steps());
        Ok(match (adjoint, walked) {
            (Adjoint::Discrete(Discrete { stage_memory, .. }), Walked { trajectory: Some(trajectory), dtypes, .. }) => {
                let passes = self.passes(dtypes, scaling);
                Box::new(Recorded::new(passes, solver, trajectory, *stage_memory))
            }
            (Adjoint::Reconstruct(adjoint), Walked { anchors: Some(anchors), dtypes, .. }) => {
                let passes = self.passes(dtypes, scaling);
                Box::new(Reconstructed { passes, solver, start, anchors, memory: adjoint.stage_memory })
            }
            (Adjoint::Backsolve(adjoint), Walked { anchors: Some(end), dtypes, .. }) => {
                let back = adjoint.back(solver.as_ref(), self.grid, steps)?;
                let clock = Clock::new(&back.grid, back.tableau.nodes(), start.device());
                let dtypes = dtypes.iter().rev().flat_map(|dtype| std::iter::repeat_n(*dtype, back.substeps)).collect();
                let passes = Passes { clock, ..self.passes(dtypes, scaling) };
                Box::new(Backsolved { passes, solver, back, start, end })
            }
            _ => {
                let what = "a backward pass of which nothing was kept".into();
                return Err(OdeError::Unsupported { what, instead: "this is a bug of candle-ode, please report it" });
            }
        })
    }

    fn passes(self, dtypes: Vec<DType>, scaling: AdjointScaling) -> Passes {
        let Self { field, clock, precision, seed, casts, counters, .. } = self;
        Passes { field, casts, seed, clock, dtypes, precision, scaling, counters, redo: Mutex::new(None) }
    }
}

/// Steps that need more than the compute or storage dtype, as far as is known.
#[derive(Default)]
struct Wide {
    steps: BTreeSet<usize>,
    entries: BTreeSet<usize>,
}

/// One thing that may not be finite.
#[derive(Clone, Copy)]
enum Suspect {
    Slope { step: usize, stage: usize },
    Entry { step: usize },
}

impl<'a> Forward<'a> {
    /// Walks the grid from `start` (accumulate dtype), handing out the states at `outputs` and the last.
    pub(crate) fn run(self, start: &State, outputs: &[usize]) -> Result<(Walked, Self)> {
        let _span = tracing::debug_span!(target: "candle_ode", "forward", steps = self.grid.steps()).entered();
        let mut wide = Wide::default();
        let walked = {
            let probed = if self.field.needs_probe() { Some(self.probe(start)?) } else { None };
            let mut opened = Opened::new(&self.casts, self.field.as_ref(), self.opening, self.seed, &self.counters);
            self.check_first(&mut opened, start, probed)?;
            loop {
                let mut suspects = vec![];
                let walked = self.walk(&mut opened, start, outputs, &mut wide, &mut suspects)?;
                let (places, flags): (Vec<_>, Vec<_>) = suspects.into_iter().unzip();
                let read = Finite::read(&flags)?;
                match places.into_iter().zip(read).find(|(_, finite)| !finite) {
                    None => break walked,
                    Some((suspect, _)) => self.widen(suspect, &mut wide)?,
                }
            }
        };
        Ok((walked, self))
    }

    fn walk(
        &self,
        opened: &mut Opened<'_>,
        start: &State,
        outputs: &[usize],
        wide: &mut Wide,
        suspects: &mut Vec<(Suspect, Finite)>,
    ) -> Result<Walked> {
        let tracking = self.opening == Opening::Track;
        let solver = self.solver.as_ref();
        let mut y = carry(solver, &if tracking { start.clone() } else { start.detach() });
        let mut walked = Walked {
            outputs: outputs.contains(&0).then(|| (0, visible(solver, &y))).into_iter().collect(),
            trajectory: None,
            anchors: self.anchors.map(|every| Anchors::new(every, self.precision.accumulate_dtype())),
            dtypes: vec![],
        };
        let steps = self.grid.steps();
        let accumulate = self.precision.accumulate_dtype();
        walked.trajectory = self.keeping.clone().map(|keeping| Trajectory::new(keeping, &y, Some(steps), accumulate));
        for n in 0..steps {
            let after = self.step(opened, n, &y, wide, suspects)?;
            walked.dtypes.push(self.dtype(n, wide));
            count(&self.counters.accepted_steps);
            let (t, h) = (self.grid.times()[n + 1], self.grid.times()[n + 1] - self.grid.times()[n]);
            let whole = |after: &State| match &walked.trajectory {
                Some(trajectory) => trajectory.whole(after),
                None => Ok(after.clone()),
            };
            let stop = match self.observer {
                Some(observer) => {
                    observer(StepInfo { index: n, t, h, y: &visible(solver, &whole(&after)?) }).is_break()
                }
                None => false,
            };
            let is_last = stop || n + 1 == steps;
            if is_last || outputs.contains(&(n + 1)) {
                walked.outputs.push((n + 1, visible(solver, &whole(&after)?)));
            }
            if let Some(anchors) = &mut walked.anchors {
                anchors.see(n + 1, &after, is_last);
            }
            y = match &mut walked.trajectory {
                Some(trajectory) if is_last => {
                    self.finish(trajectory, n, &y, wide, suspects)?;
                    break;
                }
                Some(trajectory) => self.keep(trajectory, n, &y, after, wide, suspects)?,
                None if is_last => break,
                None => after,
            };
        }
        Ok(walked)
    }

    /// One step; again in F32 if it is known to overflow and that is wanted.
    fn step(
        &self,
        opened: &mut Opened<'_>,
        n: usize,
        y: &State,
        wide: &mut Wide,
        suspects: &mut Vec<(Suspect, Finite)>,
    ) -> Result<State> {
        loop {
            let dtype = self.dtype(n, wide);
            let at = self.clock.step(n, dtype);
            let _span =
                tracing::debug_span!(target: "candle_ode", "step", index = n as u64, t = at.t, h = at.h).entered();
            let slopes = match self.opening {
                Opening::Track => Slopes::Keep,
                Opening::Evaluate | Opening::Probe | Opening::Linearize => Slopes::Refuse,
            };
            let stages = Stages::new(opened.get(dtype)?, self.precision.accumulate_dtype(), &self.counters, slopes);
            let step = self.solver.step(&stages, &at, y)?;
            let mut finite = step.finite;
            let end = step.y.tensors().iter().map(combine::finite).collect::<candle_core::Result<Vec<_>>>()?;
            // Whatever the solver says of its stages, the end of the step counts with the last of them.
            let last = finite.pop().unwrap_or_default();
            finite.push(end.into_iter().fold(last, Finite::and));
            if let Some(stage) = finite.iter().position(Finite::known_bad) {
                self.widen(Suspect::Slope { step: n, stage }, wide)?;
                continue;
            }
            let found = finite.into_iter().enumerate().filter(|(_, finite)| !finite.known_good());
            suspects.extend(found.map(|(stage, finite)| (Suspect::Slope { step: n, stage }, finite)));
            return Ok(step.y);
        }
    }

    /// Goes on from the state `after` step `n`, which started at `before`, and keeps it if the schedule says so.
    fn keep(
        &self,
        trajectory: &mut Trajectory,
        n: usize,
        before: &State,
        after: State,
        wide: &mut Wide,
        suspects: &mut Vec<(Suspect, Finite)>,
    ) -> Result<State> {
        let dtype = trajectory.dtype();
        let (y, finite) = trajectory.reach(n + 1, before, after, |finite| self.exactly(n, dtype, finite, wide))?;
        suspects.extend((!finite.known_good()).then_some((Suspect::Entry { step: n }, finite)));
        Ok(y)
    }

    /// Keeps the state from which step `n`, the last, has started.
    fn finish(
        &self,
        trajectory: &mut Trajectory,
        n: usize,
        before: &State,
        wide: &mut Wide,
        suspects: &mut Vec<(Suspect, Finite)>,
    ) -> Result<()> {
        let Some(step) = n.checked_sub(1) else { return Ok(()) };
        let dtype = trajectory.dtype();
        let finite = trajectory.finish(n, before, |finite| self.exactly(step, dtype, finite, wide))?;
        suspects.extend((!finite.known_good()).then_some((Suspect::Entry { step }, finite)));
        Ok(())
    }

    /// Whether what step `n` left behind is kept in the accumulate dtype: it does not fit the codec, or the step itself
    /// needed more than the compute dtype.
    fn exactly(&self, n: usize, kept: DType, finite: &Finite, wide: &mut Wide) -> Result<bool> {
        if finite.known_bad() && !wide.entries.contains(&n) {
            self.widen(Suspect::Entry { step: n }, wide)?;
        }
        Ok(wide.entries.contains(&n) || wide.steps.contains(&n) && kept.size_in_bytes() < 4)
    }

    /// Notes that something needs a wider dtype, or says that it cannot have one.
    fn widen(&self, suspect: Suspect, wide: &mut Wide) -> Result<()> {
        let retry = self.overflow == OnOverflow::Retry;
        match suspect {
            Suspect::Slope { step, stage } => {
                let dtype = self.dtype(step, wide);
                if retry && dtype.size_in_bytes() < 4 && !matches!(self.opening, Opening::Track) {
                    count(&self.counters.redone_steps);
                    wide.steps.insert(step);
                    return Ok(());
                }
                let hint = match dtype {
                    DType::F16 | DType::BF16 => {
                        "use .on_overflow(OnOverflow::Retry), Precision::BF16 or a smaller step"
                    }
                    _ => "the solution grows beyond all bounds, or f has a pole: use smaller steps, or look at f there",
                };
                let place = self.clock.step(step, dtype).place(stage);
                Err(OdeError::Overflow { pass: PassKind::Forward, place, hint })
            }
            Suspect::Entry { step } if retry => {
                wide.entries.insert(step);
                Ok(())
            }
            Suspect::Entry { step } => {
                // Integers have scales in F32.
                let kept = self.keeping.as_ref().map(|keeping| keeping.codec.dtype());
                let dtype = kept.filter(DType::is_float).unwrap_or(DType::F32);
                let time = self.grid.times()[step + 1];
                Err(OdeError::StorageOverflow { step, time, dtype, largest: largest_finite(dtype) })
            }
        }
    }

    fn dtype(&self, step: usize, wide: &Wide) -> DType {
        if wide.steps.contains(&step) { DType::F32 } else { self.precision.compute_dtype() }
    }

    /// Once in the life of a field: opens it over copies of its parameters, evaluates it, and looks whether it wrote to
    /// them. Gives the first slope, to be compared with that of the field as it is built for the pass.
    fn probe(&self, start: &State) -> Result<State> {
        count(&self.counters.probes);
        let field = self.field.open(&self.casts.casts, Opening::Probe, self.seed)?;
        let slope = self.first_slope(field.as_ref(), start)?;
        check_unchanged(field.leaves(), &self.casts.casts)?;
        self.field.probed();
        Ok(slope)
    }

    /// The first evaluation, twice: same bits, nothing captured.
    fn check_first(&self, opened: &mut Opened<'_>, start: &State, probed: Option<State>) -> Result<()> {
        if !self.checked.determinism {
            return Ok(());
        }
        count(&self.counters.determinism_checks);
        let field = opened.get(self.precision.compute_dtype())?;
        let first = self.first_slope(field, start)?;
        let second = match probed {
            Some(slope) => slope,
            None => self.first_slope(field, start)?,
        };
        check_same_bits(self.grid.times()[0], &first, &second)
    }

    fn first_slope(&self, field: &dyn VectorField, start: &State) -> Result<State> {
        let compute = self.precision.compute_dtype();
        let at = self.clock.step(0, compute);
        let y = start.detach().try_map(|x| combine::combine(Some(x), &[], compute))?;
        // The unrolled graph reaches captured tensors by itself.
        let slopes = if self.opening == Opening::Track { Slopes::Cut } else { Slopes::Refuse };
        Stages::new(field, self.precision.accumulate_dtype(), &self.counters, slopes).slope(&at, 0, &y)
    }
}

/// The copies that a probe was given must still hold what they were copied from.
fn check_unchanged(copies: &[Tensor], casts: &Casts) -> Result<()> {
    for ((copy, cast), name) in copies.iter().zip(casts.leaves()).zip(casts.names()) {
        if first_difference(copy, cast)?.is_some() {
            return Err(OdeError::ParameterChanged { name: name.clone() });
        }
    }
    Ok(())
}

fn check_same_bits(time: f64, first: &State, second: &State) -> Result<()> {
    for (tensor, (a, b)) in first.tensors().iter().zip(second.tensors()).enumerate() {
        if let Some((index, first, second)) = first_difference(a, b)? {
            return Err(OdeError::NotDeterministic { time, tensor, index, first, second });
        }
    }
    Ok(())
}

/// The first element that differs in its bits, as (flat index, value, value).
fn first_difference(a: &Tensor, b: &Tensor) -> Result<Option<(usize, f64, f64)>> {
    let values = |x: &Tensor| on_host(x)?.to_vec1::<f64>();
    let (a, b) = (values(a)?, values(b)?);
    let found = a.iter().zip(&b).position(|(a, b)| a.to_bits() != b.to_bits());
    Ok(found.map(|index| (index, a[index], b[index])))
}
