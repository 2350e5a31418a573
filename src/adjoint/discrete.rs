//! The discrete adjoint: reverses the steps that were taken, from states that were kept or are computed again.

use super::lambda::Lambda;
use super::passes::{Given, Pass, Passes};
use super::{Reverse, Reversed};
use crate::State;
use crate::error::{OdeError, Result};
use crate::solver::{Linearized, Solver, StageMemory, fold, lift, zeros_like};
use crate::trajectory::schedule::{Action, Slot};
use crate::trajectory::{AtHand, Encoded, Keeping, Slots, Trajectory};
use std::sync::{Arc, Mutex, PoisonError};

/// Everything the backward pass needs of a finished forward pass.
pub(crate) struct Recorded {
    passes: Passes,
    solver: Arc<dyn Solver>,
    memory: StageMemory,
    keeping: Keeping,
    start: State,
    /// Nothing once it has been consumed.
    kept: Mutex<Option<Slots>>,
    scheduled: Vec<usize>,
}

impl Recorded {
    pub(crate) fn new(passes: Passes, solver: Arc<dyn Solver>, trajectory: Trajectory, memory: StageMemory) -> Self {
        let Trajectory { keeping, start, slots, scheduled, .. } = trajectory;
        Self { passes, solver, memory, keeping, start, kept: Mutex::new(Some(slots)), scheduled }
    }
}

impl Reverse for Recorded {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        let share = || -> Result<Slots> {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let slots = if self.keeping.consume { kept.take() } else { kept.as_mut().map(Slots::share) };
            slots.ok_or(OdeError::Consumed { steps: self.passes.dtypes.len() })
        };
        let mut first = Some(share()?);
        let emptied = first.as_ref().map(Slots::emptied);
        self.passes.run(|pass| {
            // A pass that is done again after its trajectory was freed computes it again; and so does one whose
            // linearisations were made in a dtype that overflows.
            let is_of_use = !(pass.is_widened() && self.keeping.schedule.slot() == Slot::Stages);
            let slots = match (first.take().filter(|_| is_of_use), &emptied) {
                (Some(slots), _) => slots,
                (None, Some(emptied)) if self.keeping.consume || !is_of_use => emptied.emptied(),
                (None, _) => share()?,
            };
            self.walk(pass, slots, cotangents)
        })
    }

    fn bytes(&self) -> usize {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, Slots::bytes)
    }

    fn bytes_away(&self) -> usize {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, Slots::bytes_away)
    }
}

impl Recorded {
    /// `None` if a value is already known not to be finite: the rest of the walk would be wasted.
    fn walk(&self, pass: &mut Pass<'_, '_>, mut slots: Slots, cotangents: &[(usize, State)]) -> Result<Option<State>> {
        let (solver, accumulate) = (self.solver.as_ref(), self.passes.precision.accumulate_dtype());
        let mut lambda = Lambda::default();
        let mut waiting = cotangents.iter().rev().peekable();
        // The steps after the last output used by the loss cost nothing.
        let steps = cotangents.last().map_or(0, |(at, _)| *at);
        let held = slots.states();
        let is_held = |n: &usize| held.binary_search(n).is_ok();
        let kept: Vec<usize> = self.scheduled.iter().copied().filter(|n| *n < steps && is_held(n)).collect();
        // A step is reversed from its start, or from its end where its linearisations are kept there.
        let with_stages = self.keeping.schedule.slot() == Slot::Stages;
        let needed = |step: usize| if with_stages { step + 1 } else { step };
        let last = needed(steps.saturating_sub(1));
        let mut linearized = if steps > 0 { slots.linearized(last) } else { None };
        let is_at_last = steps > 0 && (last == 0 || if with_stages { linearized.is_some() } else { is_held(&last) });
        let mut at_hand = if is_at_last && !with_stages { Some(self.restore(&mut slots, last)?) } else { None };
        if !kept.contains(&last) {
            slots.drop_state(last)?;
        }
        let mut actions = self.keeping.schedule.reversal(&kept, steps, is_at_last).peekable();
        // Schedules are an open set: where one stands, and how many steps it has yet to reverse.
        let (mut position, mut left, mut index) = (is_at_last.then_some(last), steps, 0);
        let illegal =
            |index, action: Action, why| Err(OdeError::IllegalAction { index, action: action.to_string(), why });
        while let Some(action) = actions.next() {
            index += 1;
            match action {
                Action::Advance { from, to } => {
                    if position != Some(from) || to <= from || to > needed(left - 1) {
                        return illegal(
                            index - 1,
                            action,
                            "it goes from the state at hand to one before the last to reverse",
                        );
                    }
                    position = Some(to);
                    let _span = tracing::debug_span!(target: "candle_ode", "recompute", from, to).entered();
                    let Some(start) = at_hand.take() else { return illegal(index - 1, action, NOTHING_AT_HAND) };
                    let mut y = start.state()?;
                    // It may be the state itself, which is not needed once a step has been made from it.
                    drop(start);
                    for n in from..to {
                        let keep = n + 1 == to && actions.peek() == Some(&Action::Keep(to));
                        let after = match with_stages && n + 1 == to {
                            true => {
                                let (after, made) = pass.advance_linearized(solver, n, &y)?;
                                let made = Arc::new(made);
                                if keep {
                                    slots.keep_linearized(to, made.clone());
                                }
                                linearized = Some(made);
                                after
                            }
                            false => pass.advance(solver, n, &y)?,
                        };
                        let (next, finite) = slots.reach(n + 1, &y, after, keep, |finite| Ok(finite.known_bad()))?;
                        pass.note(n, finite);
                        y = next;
                    }
                    at_hand = Some(AtHand::State(y));
                }
                // Kept as it was reached.
                Action::Keep(_) => {}
                Action::Restore(n) => {
                    at_hand = Some(self.restore(&mut slots, n)?);
                    linearized = slots.linearized(n);
                    position = Some(n);
                }
                Action::Drop(n) => slots.drop_state(n)?,
                Action::Reverse(n) => {
                    if position != Some(needed(n)) || n + 1 != left {
                        return illegal(
                            index - 1,
                            action,
                            "it is not the last step to reverse, or does not start at hand",
                        );
                    }
                    (position, left) = (None, n);
                    while let Some((_, cotangent)) = waiting.next_if(|(at, _)| *at == n + 1) {
                        lambda.add(&lift(solver, cotangent, accumulate)?, accumulate)?;
                    }
                    let mut from = match (linearized.take(), at_hand.take()) {
                        (Some(kept), _) => PulledFrom::Linearized(kept),
                        (None, Some(AtHand::State(y))) => PulledFrom::State(pass.given(n, y)),
                        (None, Some(AtHand::Kept(encoded))) => PulledFrom::Kept(encoded),
                        (None, None) => return illegal(index - 1, action, NOTHING_AT_HAND),
                    };
                    let Some(state) = lambda.take() else { continue };
                    lambda.set(pass.step(n, state, |stages, at, lambda, pullbacks| {
                        let y = match &mut from {
                            PulledFrom::Linearized(kept) => {
                                return solver.pullback_linearized(stages, at, kept, &lambda, pullbacks);
                            }
                            PulledFrom::State(y) => y.take()?,
                            PulledFrom::Kept(encoded) => encoded.state()?,
                        };
                        solver.pullback(stages, at, y, &lambda, self.memory, pullbacks)
                    })?);
                    if pass.is_lost() {
                        return Ok(None);
                    }
                }
            }
        }
        if left > 0 {
            return illegal(index, Action::Reverse(left - 1), "the schedule ends before every step is reversed");
        }
        for (_, cotangent) in waiting {
            lambda.add(&lift(solver, cotangent, accumulate)?, accumulate)?;
        }
        let lambda = match lambda.take() {
            Some(state) => state,
            None => zeros_like(&self.start, accumulate)?,
        };
        fold(solver, &lambda, accumulate).map(Some)
    }

    fn restore(&self, slots: &mut Slots, n: usize) -> Result<AtHand> {
        if n == 0 { Ok(AtHand::State(self.start.clone())) } else { slots.restore(n) }
    }
}

/// From what a step is pulled back.
enum PulledFrom {
    State(Given<State>),
    Kept(Encoded),
    Linearized(Arc<Linearized>),
}

const NOTHING_AT_HAND: &str = "no state is at hand; check the schedule with candle_ode::schedule::simulate";
