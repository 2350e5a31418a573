//! Goes through the actions of a schedule without a solve, and says whether they are legal and what they cost.

use super::{Action, Slot};
use crate::error::{OdeError, Result};
use std::collections::BTreeSet;

/// What a schedule costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simulated {
    /// Steps that are computed, those of the forward pass included as far as the schedule needs them.
    pub advanced: usize,
    /// Steps that are computed more than once: what [`Stats::recomputed_steps`](crate::Stats) counts.
    pub recomputed: usize,
    /// The most slots in use at once.
    pub most_slots: usize,
}

/// Simulates a schedule whose slots hold states, over `steps` steps.
///
/// # Errors
/// [`OdeError::IllegalAction`] names the first action that is not legal: an advance, keep or reverse of a state that is
/// not at hand, a restore or drop of one that is not in a slot, a step reversed out of turn, a slot not freed.
pub fn simulate(actions: impl IntoIterator<Item = Action>, steps: usize) -> Result<Simulated> {
    simulate_slots(actions, steps, Slot::State)
}

/// The same for slots of either kind.
///
/// # Errors
/// As [`simulate`].
pub fn simulate_slots(actions: impl IntoIterator<Item = Action>, steps: usize, slot: Slot) -> Result<Simulated> {
    let (mut position, mut slots, mut left) = (Some(0), BTreeSet::new(), steps);
    // With stages, the state at hand has them unless it is y₀, to which no step has led.
    let needed = |step: usize| if slot == Slot::Stages { step + 1 } else { step };
    let mut simulated = Simulated { advanced: 0, recomputed: 0, most_slots: 0 };
    let mut count = 0;
    for (index, action) in actions.into_iter().enumerate() {
        count += 1;
        let why = match action {
            Action::Advance { from, .. } if position != Some(from) => Some("the state it starts from is not at hand"),
            Action::Advance { from, to } if to <= from || to > steps => Some("it does not go forward within the solve"),
            Action::Advance { from, to } => {
                simulated.advanced += to - from;
                position = Some(to);
                None
            }
            Action::Keep(state) if position != Some(state) => Some("the state is not at hand"),
            Action::Keep(0) => Some("y0 needs no slot"),
            Action::Keep(state) if !slots.insert(state) => Some("the state is in a slot already"),
            Action::Keep(_) => {
                simulated.most_slots = simulated.most_slots.max(slots.len());
                None
            }
            Action::Restore(state) if state > 0 && !slots.contains(&state) => Some("the state is not in a slot"),
            Action::Restore(state) => {
                position = Some(state);
                None
            }
            Action::Reverse(step) if step + 1 != left => Some("steps are reversed once each, last first"),
            Action::Reverse(step) if position != Some(needed(step)) => Some("the state it needs is not at hand"),
            Action::Reverse(step) => {
                (left, position) = (step, None);
                None
            }
            Action::Drop(state) if !slots.remove(&state) => Some("the state is not in a slot"),
            Action::Drop(_) => None,
        };
        if let Some(why) = why {
            return Err(OdeError::IllegalAction { index, action: action.to_string(), why });
        }
    }
    let unfinished = if left > 0 { Some("steps are left that are not reversed") } else { None };
    let unfinished = unfinished.or(if slots.is_empty() { None } else { Some("slots are left that are not freed") });
    if let Some(why) = unfinished {
        return Err(OdeError::IllegalAction { index: count, action: "the end".into(), why });
    }
    // The forward pass makes every step once; the last is part of the schedule only where its stages are.
    let once = if slot == Slot::Stages { steps } else { steps.saturating_sub(1) };
    simulated.recomputed = simulated.advanced.saturating_sub(once);
    Ok(simulated)
}
