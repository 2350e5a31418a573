//! The discrete adjoint: walks the kept steps backwards.

use super::{Reverse, Reversed};
use crate::State;
use crate::account::{Category, Owned};
use crate::error::{OdeError, PassKind, Result};
use crate::field::ops::combine;
use crate::field::{Fallback, Field, Finite, Gradients, Opened, Opening};
use crate::precision::Precision;
use crate::scaling::{AdjointScaling, Dynamic, PowerOfTwo, Rule};
use crate::solver::{Clock, Pullbacks, Solver, StageMemory, Stages, StepAt};
use crate::solver::{Slopes, StageScale, largest};
use crate::stats::{Counters, count};
use crate::trajectory::Trajectory;
use candle_core::DType;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

/// Everything the backward pass needs of a finished forward pass.
pub(crate) struct Recorded {
    pub(crate) field: Arc<dyn Field>,
    pub(crate) casts: Fallback,
    pub(crate) seed: u64,
    pub(crate) solver: Arc<dyn Solver>,
    pub(crate) clock: Clock,
    pub(crate) trajectory: Trajectory,
    /// The dtype in which each step evaluated the field.
    pub(crate) dtypes: Vec<DType>,
    pub(crate) precision: Precision,
    pub(crate) memory: StageMemory,
    pub(crate) scaling: AdjointScaling,
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

impl Reverse for Recorded {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        let _span = tracing::debug_span!(target: "candle_ode", "backward", steps = self.dtypes.len()).entered();
        let mut opened = Opened::new(&self.casts, self.field.as_ref(), Opening::Linearize, self.seed, &self.counters);
        let known = self.redo.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let fresh = || Redo { headroom: self.scaling.headroom(), widened: BTreeSet::new() };
        let Redo { mut headroom, mut widened } = known.unwrap_or_else(fresh);
        for _ in 0..PASSES {
            let powers = Rc::new(PowerOfTwo::new(headroom));
            let mut pass = Pass { solve: self, opened: &mut opened, widened: &widened, powers, flags: vec![] };
            let reversed = pass.run(cotangents)?;
            let (places, flags): (Vec<_>, Vec<_>) = std::mem::take(&mut pass.flags).into_iter().unzip();
            let read = Finite::read(&flags)?;
            let bad: Vec<(usize, usize)> =
                places.into_iter().zip(read).filter(|(_, ok)| !ok).map(|(at, _)| at).collect();
            let first = match (bad.first(), reversed) {
                (Some(first), _) => Some(*first),
                (None, Some(reversed)) => {
                    self.scaling.learn(headroom);
                    *self.redo.lock().unwrap_or_else(PoisonError::into_inner) = Some(Redo { headroom, widened });
                    return Ok(reversed);
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
}

impl Recorded {
    fn dtype(&self, step: usize, widened: &BTreeSet<usize>) -> DType {
        if widened.contains(&step) { DType::F32 } else { self.dtypes[step] }
    }
}

/// One walk over the steps.
struct Pass<'a, 'b> {
    solve: &'a Recorded,
    opened: &'b mut Opened<'a>,
    widened: &'b BTreeSet<usize>,
    powers: Rc<PowerOfTwo>,
    /// (step, stage) and whether what came out of it is finite, in the order of the walk.
    flags: Vec<((usize, usize), Finite)>,
}

impl Pass<'_, '_> {
    /// `None` if a value is already known not to be finite: the rest of the walk would be wasted.
    fn run(&mut self, cotangents: &[(usize, State)]) -> Result<Option<Reversed>> {
        let solve = self.solve;
        let accumulate = solve.precision.accumulate_dtype();
        let steps = solve.dtypes.len();
        let mut gradients = Gradients::new(solve.casts.casts.leaves().len(), accumulate);
        let mut lambda = Lambda::default();
        let mut waiting = cotangents.iter().rev().peekable();
        let mut dynamic = None;
        for n in (0..=steps).rev() {
            while let Some((_, cotangent)) = waiting.next_if(|(at, _)| *at == n) {
                lambda.add(cotangent, accumulate)?;
            }
            if n == 0 {
                break;
            }
            // Nothing has reached this time yet: the steps after the last output used by the loss cost nothing.
            let Some(state) = lambda.state.take() else { continue };
            lambda.set(self.step(n - 1, state, &mut gradients, &mut dynamic)?);
            if self.flags.last().is_some_and(|(_, finite)| finite.known_bad()) {
                return Ok(None);
            }
        }
        let y0 = match lambda.state.take() {
            Some(state) => state,
            None => crate::solver::zeros_like(&solve.trajectory.state(0, accumulate)?, accumulate)?,
        };
        Ok(Some(Reversed { y0, sums: gradients.into_sums() }))
    }

    fn step(
        &mut self,
        index: usize,
        lambda: State,
        gradients: &mut Gradients,
        dynamic: &mut Option<Dynamic>,
    ) -> Result<State> {
        let solve = self.solve;
        let dtype = solve.dtype(index, self.widened);
        let at = solve.clock.step(index, dtype);
        let _span =
            tracing::debug_span!(target: "candle_ode", "step", index = index as u64, t = at.t, h = at.h).entered();
        let y = solve.trajectory.state(index, solve.precision.accumulate_dtype())?;
        match solve.scaling.rule {
            Rule::Dynamic if dtype.size_in_bytes() < 4 => self.step_dynamically(&at, y, &lambda, gradients, dynamic),
            Rule::PerStep if dtype != DType::F64 && dtype != DType::F32 => {
                self.pull(&at, y, &lambda, gradients, StageScale::FromCotangent(self.powers.clone()))
            }
            Rule::Static(s) => self.pull(&at, y, &lambda, gradients, StageScale::Fixed(s)),
            _ => self.pull(&at, y, &lambda, gradients, StageScale::Fixed(1.0)),
        }
    }

    fn pull(
        &mut self,
        at: &StepAt<'_>,
        y: State,
        lambda: &State,
        gradients: &mut Gradients,
        scale: StageScale,
    ) -> Result<State> {
        let (lambda, finite) = self.pulled(at, y, lambda, gradients, scale)?;
        self.flags.extend(finite.into_iter().map(|(stage, finite)| ((at.index, stage), finite)));
        Ok(lambda)
    }

    fn pulled(
        &mut self,
        at: &StepAt<'_>,
        y: State,
        lambda: &State,
        gradients: &mut Gradients,
        scale: StageScale,
    ) -> Result<(State, Vec<(usize, Finite)>)> {
        let solve = self.solve;
        let field = self.opened.get(at.dtype)?;
        gradients.bind(field.leaves());
        let stages = Stages::new(field, solve.precision.accumulate_dtype(), &solve.counters, Slopes::Cut);
        let mut pullbacks = Pullbacks::new(gradients, scale, &solve.counters);
        let lambda = solve.solver.pullback(&stages, at, y, lambda, solve.memory, &mut pullbacks)?;
        Ok((lambda, pullbacks.into_finite()))
    }

    /// The reference rule: one S a step, halved and the step redone as long as it overflows.
    fn step_dynamically(
        &mut self,
        at: &StepAt<'_>,
        y: State,
        lambda: &State,
        gradients: &mut Gradients,
        dynamic: &mut Option<Dynamic>,
    ) -> Result<State> {
        let solve = self.solve;
        let size = largest(lambda)?;
        if !size.is_finite() || size == 0.0 && dynamic.is_none() {
            // No scale helps a cotangent that is not finite. A zero means that no output that the loss uses has been
            // reached yet: a scale found here would fit nothing.
            return self.pull(at, y, lambda, gradients, StageScale::Fixed(1.0));
        }
        let batch = y.tensors().first().and_then(|y| y.dims().first().copied()).unwrap_or(1);
        let rule = dynamic.get_or_insert_with(|| Dynamic::new(at.dtype, y.numel(), batch, size));
        for _ in 0..Dynamic::ATTEMPTS {
            let mut of_step = Gradients::new(solve.casts.casts.leaves().len(), solve.precision.accumulate_dtype());
            let (pulled, finite) = self.pulled(at, y.clone(), lambda, &mut of_step, StageScale::Fixed(rule.scale))?;
            let flags: Vec<Finite> = finite.into_iter().map(|(_, finite)| finite).collect();
            if Finite::read(&flags)?.into_iter().all(|ok| ok) {
                gradients.absorb(of_step)?;
                if rule.finished_step(size) {
                    count(&solve.counters.scale_changes);
                }
                return Ok(pulled);
            }
            rule.overflowed();
            count(&solve.counters.scale_changes);
            count(&solve.counters.redone_steps);
        }
        Err(OdeError::ScalingExhausted { step: at.index, time: at.t, scale: rule.scale, redone: Dynamic::ATTEMPTS })
    }
}

/// λ, with its bytes announced.
#[derive(Default)]
struct Lambda {
    state: Option<State>,
    owned: Option<Owned>,
}

impl Lambda {
    fn add(&mut self, cotangent: &State, accumulate: DType) -> Result<()> {
        let sum = match &self.state {
            None => cotangent.try_map(|x| combine::combine(Some(x), &[], accumulate))?,
            Some(lambda) => {
                let pairs = lambda.tensors().iter().zip(cotangent.tensors());
                let sums = pairs.map(|(lambda, x)| combine::combine(Some(lambda), &[(1.0, x)], accumulate));
                State::from(sums.collect::<candle_core::Result<Vec<_>>>()?)
            }
        };
        self.set(sum);
        Ok(())
    }

    fn set(&mut self, state: State) {
        let bytes = state.tensors().iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
        self.owned = Some(Owned::new(Category::Cotangents, bytes));
        self.state = Some(state);
    }
}
