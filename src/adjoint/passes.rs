//! A walk over the steps of a solve backwards, whatever was kept of them: cotangents are scaled against underflow, and
//! a pass that overflows is done again.

use super::Reversed;
use super::times::{Moments, gradients};
use crate::State;
use crate::error::{OdeError, PassKind, Result};
use crate::field::ops::combine;
use crate::field::{Fallback, Field, Finite, Gradients, Opened, Opening, VectorField, largest};
use crate::precision::Precision;
use crate::scaling::{AdjointScaling, Dynamic, PowerOfTwo, Rule};
use crate::solver::{
    Clock, Linearized, Pullbacks, Slopes, Solver, StageScale, Stages, StepAt, StepTimes, no_linearizations,
};
use crate::stats::{Counters, count};
use candle_core::DType;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

/// What the backward pass of every adjoint needs of a finished forward pass.
pub(crate) struct Passes {
    pub(crate) field: Arc<dyn Field>,
    pub(crate) casts: Arc<Fallback>,
    pub(crate) seed: u64,
    pub(crate) clock: Clock,
    /// The dtype in which each step evaluates the field.
    pub(crate) dtypes: Vec<DType>,
    pub(crate) precision: Precision,
    pub(crate) scaling: AdjointScaling,
    /// Tensors of times whose gradients are wanted; their slots come last.
    pub(crate) moments: Vec<Moments>,
    /// Whether steps may run on buffers: not where their pullbacks linearise one stage at a time, or give gradients of
    /// times.
    pub(crate) on_buffers: bool,
    pub(crate) counters: Arc<Counters>,
    /// What the first finished pass had to do; later ones do the same, to the same bits.
    pub(crate) redo: Mutex<Option<Redo>>,
}

/// How a pass differs from the plain one because of earlier overflows.
#[derive(Clone, Debug)]
pub(crate) struct Redo {
    headroom: i32,
    widened: BTreeSet<usize>,
}

/// How often a pass is done again before it is an error.
const PASSES: usize = 24;

impl Passes {
    /// Walks, as often as it takes. `walk` gives dL/dy0, or `None` if it has stopped because the pass
    /// [`is_lost`](Pass::is_lost).
    pub(crate) fn run(&self, mut walk: impl FnMut(&mut Pass<'_, '_>) -> Result<Option<State>>) -> Result<Reversed> {
        let _span = tracing::debug_span!(target: "candle_ode", "backward", steps = self.dtypes.len()).entered();
        let mut opened = Opened::new(&self.casts, self.field.as_ref(), Opening::Linearize, self.seed, &self.counters);
        let known = self.redo.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let fresh = || Redo { headroom: self.scaling.headroom(), widened: BTreeSet::new() };
        let Redo { mut headroom, mut widened } = known.unwrap_or_else(fresh);
        for _ in 0..PASSES {
            let mut pass = Pass {
                passes: self,
                opened: &mut opened,
                widened: &widened,
                powers: Rc::new(PowerOfTwo::new(headroom)),
                dynamic: None,
                gradients: self.no_gradients(),
                flags: vec![],
                times: vec![],
            };
            let y0 = walk(&mut pass)?;
            let Pass { gradients: sums, flags, times, .. } = pass;
            let (places, flags): (Vec<_>, Vec<_>) = flags.into_iter().unzip();
            let read = Finite::read(&flags)?;
            let bad: Vec<(usize, usize)> =
                places.into_iter().zip(read).filter(|(_, ok)| !ok).map(|(at, _)| at).collect();
            let first = match (bad.first(), y0) {
                (Some(first), _) => Some(*first),
                (None, Some(y0)) => {
                    self.scaling.learn(headroom);
                    *self.redo.lock().unwrap_or_else(PoisonError::into_inner) = Some(Redo { headroom, widened });
                    let mut sums = sums.into_sums();
                    // Fused layers add to the sums without a look at what they add.
                    let flags = sums.iter().flatten().map(combine::finite).collect::<candle_core::Result<Vec<_>>>()?;
                    if let Some(bad) = Finite::read(&flags)?.iter().position(|finite| !finite)
                        && let Some(sum) = sums.iter().flatten().nth(bad)
                    {
                        return Err(OdeError::SumOverflow { shape: sum.shape().clone(), dtype: sum.dtype() });
                    }
                    sums.extend(gradients(&self.moments, self.dtypes.len(), &times)?);
                    return Ok(Reversed { y0, sums });
                }
                (None, None) => None,
            };
            let Some((first, stage)) = first else { break };
            let redoable = |step: usize| self.dtypes[step].size_in_bytes() < 4 && !widened.contains(&step);
            // Once a value is not finite everything before it (in time) is poisoned too: only the first is at fault.
            if !redoable(first) {
                let at = self.clock.step(first, self.dtype(first, &widened));
                let hint = "check that the loss and its gradient are finite, and that the vector field is differentiable there";
                return Err(OdeError::Overflow { pass: PassKind::Backward, place: at.place(stage), hint });
            }
            widened.insert(first);
            count(&self.counters.redone_passes);
            count(&self.counters.redone_steps);
            headroom = (headroom + 1).min(AdjointScaling::MOST_HEADROOM);
        }
        let first = widened.first().copied().unwrap_or(0);
        let place = self.clock.step(first, self.dtype(first, &widened)).place(0);
        let hint = "use a wider compute dtype, or scale the loss down";
        Err(OdeError::Overflow { pass: PassKind::Backward, place, hint })
    }

    fn dtype(&self, step: usize, widened: &BTreeSet<usize>) -> DType {
        if widened.contains(&step) { DType::F32 } else { self.dtypes[step] }
    }

    fn stages<'a>(&'a self, field: &'a dyn VectorField) -> Stages<'a> {
        let stages = Stages::new(field, self.precision.accumulate_dtype(), &self.counters, Slopes::Cut);
        stages.on_buffers(self.on_buffers)
    }

    fn no_gradients(&self) -> Gradients {
        Gradients::new(self.casts.casts.leaves().len(), self.precision.accumulate_dtype())
    }
}

/// What a step is given away, unless it may be tried again.
pub(super) struct Given<T> {
    again: bool,
    value: Option<T>,
}

impl<T: Clone> Given<T> {
    pub(super) fn take(&mut self) -> Result<T> {
        let given = if self.again { self.value.clone() } else { self.value.take() };
        given.ok_or_else(|| OdeError::Unsupported {
            what: "pulling a step back twice".into(),
            instead: "this is a bug of candle-ode, please report it",
        })
    }
}

/// What an attempt at a step gives: what was asked for, per pullback the stage and whether it is finite, and the
/// cotangents of the step's times, if any are wanted.
type Attempt<T> = (T, Vec<(usize, Finite)>, Option<StepTimes>);

/// One walk over the steps.
pub(crate) struct Pass<'a, 'b> {
    passes: &'a Passes,
    opened: &'b mut Opened<'a>,
    widened: &'b BTreeSet<usize>,
    powers: Rc<PowerOfTwo>,
    dynamic: Option<Dynamic>,
    gradients: Gradients,
    /// (step, stage) and whether what came out of it is finite, in the order of the walk; without those known to be.
    flags: Vec<((usize, usize), Finite)>,
    /// Per step, the cotangents of its times, if any are wanted.
    times: Vec<(usize, StepTimes)>,
}

impl Pass<'_, '_> {
    /// Whether a value is already known not to be finite: the rest of the walk would be wasted.
    pub(crate) fn is_lost(&self) -> bool {
        self.flags.last().is_some_and(|(_, finite)| finite.known_bad())
    }

    /// A step of the forward pass once more, from `y` and in the dtype in which it was taken.
    pub(crate) fn advance(&mut self, solver: &dyn Solver, index: usize, y: &State) -> Result<State> {
        let passes = self.passes;
        let dtype = passes.dtypes[index];
        let at = passes.clock.step(index, dtype);
        let _span =
            tracing::debug_span!(target: "candle_ode", "step", index = index as u64, t = at.t, h = at.h).entered();
        count(&passes.counters.recomputed_steps);
        let field = self.opened.get(dtype)?;
        let stages = passes.stages(field);
        Ok(solver.step(&stages, &at, y)?.y)
    }

    /// The same, with the linearisations of the step, which are made in the dtype of this pass.
    pub(crate) fn advance_linearized(
        &mut self,
        solver: &dyn Solver,
        index: usize,
        y: &State,
    ) -> Result<(State, Linearized)> {
        let passes = self.passes;
        let (dtype, of_forward) = (passes.dtype(index, self.widened), passes.dtypes[index]);
        // A state stays what it was, whatever its step is linearised in.
        let after = if dtype == of_forward { None } else { Some(self.advance(solver, index, y)?) };
        let at = passes.clock.step(index, dtype);
        let _span =
            tracing::debug_span!(target: "candle_ode", "step", index = index as u64, t = at.t, h = at.h).entered();
        if after.is_none() {
            count(&passes.counters.recomputed_steps);
        }
        let field = self.opened.get(dtype)?;
        let stages = passes.stages(field);
        let made = solver.linearized_step(&stages, &at, y)?;
        let (step, linearized) = made.ok_or_else(|| no_linearizations(solver.name()))?;
        Ok((after.unwrap_or(step.y), linearized))
    }

    /// Whether some steps are pulled back in a wider dtype than they were made in.
    pub(crate) fn is_widened(&self) -> bool {
        !self.widened.is_empty()
    }

    /// Whether step `index` may be pulled back again with another scale.
    fn tries_again(&self, index: usize) -> bool {
        self.passes.scaling.tries_again(self.passes.dtype(index, self.widened))
    }

    /// `value` for step `index`, which is given it once or as often as it is tried.
    pub(super) fn given<T: Clone>(&self, index: usize, value: T) -> Given<T> {
        Given { again: self.tries_again(index), value: Some(value) }
    }

    /// Notes whether something that step `index` left behind is finite, unless it is known to be.
    pub(crate) fn note(&mut self, index: usize, finite: Finite) {
        if !finite.known_good() {
            self.flags.push(((index, 0), finite));
        }
    }

    /// Pulls `lambda` back through a step: `pull` is given the stages, the step, λ and a place to take its cotangents
    /// to, and may be asked again with another scale.
    pub(crate) fn step<T>(
        &mut self,
        index: usize,
        lambda: State,
        mut pull: impl FnMut(&Stages<'_>, &StepAt<'_>, State, &mut Pullbacks<'_>) -> Result<T>,
    ) -> Result<T> {
        let passes = self.passes;
        let dtype = passes.dtype(index, self.widened);
        let at = passes.clock.step(index, dtype);
        let _span =
            tracing::debug_span!(target: "candle_ode", "step", index = index as u64, t = at.t, h = at.h).entered();
        let scale = match passes.scaling.rule {
            _ if self.tries_again(index) => return self.dynamically(&at, &lambda, pull),
            Rule::PerStep if dtype != DType::F64 && dtype != DType::F32 => {
                StageScale::FromCotangent(self.powers.clone())
            }
            Rule::Static(s) => StageScale::Fixed(s),
            _ => StageScale::Fixed(1.0),
        };
        self.flagged(&at, scale, |stages, at, pullbacks| pull(stages, at, lambda, pullbacks))
    }

    /// As [`step`](Self::step), for a step that is not on the clock of the passes, and that may be thrown away: also
    /// says whether all of it is finite, and gives its sums of dL/dθ, which count once they are [`taken`](Self::take).
    pub(crate) fn attempt<T>(
        &mut self,
        at: &StepAt<'_>,
        pull: impl FnOnce(&Stages<'_>, &StepAt<'_>, &mut Pullbacks<'_>) -> Result<T>,
    ) -> Result<(T, bool, Gradients)> {
        let _span =
            tracing::debug_span!(target: "candle_ode", "step", index = at.index as u64, t = at.t, h = at.h).entered();
        let scale = match self.passes.scaling.rule {
            Rule::PerStep | Rule::Dynamic if at.dtype.size_in_bytes() < 4 => {
                StageScale::FromCotangent(self.powers.clone())
            }
            Rule::Static(s) => StageScale::Fixed(s),
            _ => StageScale::Fixed(1.0),
        };
        let mut of_step = self.passes.no_gradients();
        let (pulled, finite, _) = self.pulled(at, scale, &mut of_step, pull)?;
        let flags: Vec<Finite> = finite.into_iter().map(|(_, finite)| finite).collect();
        let finite = Finite::read(&flags)?.into_iter().all(|ok| ok);
        Ok((pulled, finite, of_step))
    }

    /// Adds the sums of an attempt.
    pub(crate) fn take(&mut self, of_step: Gradients) -> Result<()> {
        Ok(self.gradients.absorb(of_step)?)
    }

    /// The reference rule: one S a step, halved and the step redone as long as it overflows.
    fn dynamically<T>(
        &mut self,
        at: &StepAt<'_>,
        lambda: &State,
        mut pull: impl FnMut(&Stages<'_>, &StepAt<'_>, State, &mut Pullbacks<'_>) -> Result<T>,
    ) -> Result<T> {
        let passes = self.passes;
        let mut pull = |stages: &Stages<'_>, at: &StepAt<'_>, pullbacks: &mut Pullbacks<'_>| {
            pull(stages, at, lambda.clone(), pullbacks)
        };
        let size = largest(lambda)?;
        if !size.is_finite() || size == 0.0 && self.dynamic.is_none() {
            // No scale helps a cotangent that is not finite. A zero means that no output that the loss uses has been
            // reached yet: a scale found here would fit nothing.
            return self.flagged(at, StageScale::Fixed(1.0), pull);
        }
        let batch = lambda.tensors().first().and_then(|x| x.dims().first().copied()).unwrap_or(1);
        let mut rule = match self.dynamic.take() {
            Some(rule) => rule,
            None => Dynamic::new(at.dtype, lambda.numel(), batch, size),
        };
        for _ in 0..Dynamic::ATTEMPTS {
            let mut of_step = passes.no_gradients();
            let (pulled, finite, times) = self.pulled(at, StageScale::Fixed(rule.scale), &mut of_step, &mut pull)?;
            let flags: Vec<Finite> = finite.into_iter().map(|(_, finite)| finite).collect();
            if Finite::read(&flags)?.into_iter().all(|ok| ok) {
                self.gradients.absorb(of_step)?;
                self.times.extend(times.map(|times| (at.index, times)));
                if rule.finished_step(size) {
                    count(&passes.counters.scale_changes);
                }
                self.dynamic = Some(rule);
                return Ok(pulled);
            }
            rule.overflowed();
            count(&passes.counters.scale_changes);
            count(&passes.counters.redone_steps);
        }
        Err(OdeError::ScalingExhausted { step: at.index, time: at.t, scale: rule.scale, redone: Dynamic::ATTEMPTS })
    }

    /// One attempt that counts, its flags noted.
    fn flagged<T>(
        &mut self,
        at: &StepAt<'_>,
        scale: StageScale,
        pull: impl FnOnce(&Stages<'_>, &StepAt<'_>, &mut Pullbacks<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut gradients = std::mem::take(&mut self.gradients);
        let pulled = self.pulled(at, scale, &mut gradients, pull);
        self.gradients = gradients;
        let (pulled, finite, times) = pulled?;
        self.times.extend(times.map(|times| (at.index, times)));
        let open = finite.into_iter().filter(|(_, finite)| !finite.known_good());
        self.flags.extend(open.map(|(stage, finite)| ((at.index, stage), finite)));
        Ok(pulled)
    }

    fn pulled<T>(
        &mut self,
        at: &StepAt<'_>,
        scale: StageScale,
        gradients: &mut Gradients,
        pull: impl FnOnce(&Stages<'_>, &StepAt<'_>, &mut Pullbacks<'_>) -> Result<T>,
    ) -> Result<Attempt<T>> {
        let passes = self.passes;
        let field = self.opened.get(at.dtype)?;
        gradients.bind(field.leaves());
        let times = !passes.moments.is_empty();
        let stages = passes.stages(field).with_times(times);
        let mut pullbacks = Pullbacks::new(gradients, scale, &passes.counters).with_times(times);
        let pulled = pull(&stages, at, &mut pullbacks)?;
        let (finite, times) = pullbacks.finish();
        Ok((pulled, finite, times))
    }
}
