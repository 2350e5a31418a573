//! Which states are kept, and which are computed again: a schedule is an iterator of [`Action`]s.
//!
//! y₀ is the solve's input: it is always at hand and takes no slot. The forward pass takes the actions of a
//! [`Sweep`] as it goes, since it may not know how many steps there will be; the backward pass those of
//! [`Schedule::reversal`]. Between the two the state from which the last step starts is at hand as well.

mod checkpoints;
mod ends;
mod reversal;
mod simulate;

pub use checkpoints::Checkpoints;
pub use ends::{InputOnly, KeepAll};
pub use reversal::Reversal;
pub use simulate::{Simulated, simulate, simulate_slots};

use std::fmt;

/// One thing to do. A state is named by its step: state n is that from which step n starts, and state 0 is y₀.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Computes steps `from` … `to − 1`, from state `from` to state `to`.
    Advance {
        /// The state at hand.
        from: usize,
        /// The state reached.
        to: usize,
    },
    /// Keeps the state that has just been reached in a slot.
    Keep(usize),
    /// Brings a kept state back, or y₀.
    Restore(usize),
    /// Pulls the cotangent back through this step, whose start is at hand.
    Reverse(usize),
    /// Frees the slot of a state.
    Drop(usize),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Advance { from, to } => write!(f, "advance {from} -> {to}"),
            Self::Keep(state) => write!(f, "keep {state}"),
            Self::Restore(state) => write!(f, "restore {state}"),
            Self::Reverse(step) => write!(f, "reverse {step}"),
            Self::Drop(state) => write!(f, "drop {state}"),
        }
    }
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Slot {
    /// A state: the step that starts at it is evaluated again where it is reversed, which is part of its pullback.
    #[default]
    State,
    /// A state with the stages of the step that led to it, linearised: that step is reversed without an evaluation.
    Stages,
}

/// Decides during the forward pass.
pub trait Sweep: fmt::Debug + Send + Sync {
    /// What to do now that state `state` ≥ 1 has been reached and another step follows: `Drop`s of kept states, then
    /// `Keep(state)` or nothing. Called once for each state, in order.
    fn reached(&mut self, state: usize) -> Vec<Action>;
}

/// Which states are kept and which are computed again.
///
/// ```
/// use candle_ode::schedule::{Checkpoints, Schedule, simulate};
///
/// let schedule = Checkpoints::new(2);
/// let text: Vec<String> = schedule.actions(6).map(|action| action.to_string()).collect();
/// assert_eq!(text[..4], ["advance 0 -> 1", "keep 1", "advance 1 -> 3", "keep 3"]);
/// let simulated = simulate(schedule.actions(6), 6)?;
/// assert_eq!((simulated.recomputed, simulated.most_slots), (2, 2));
/// # Ok::<(), candle_ode::OdeError>(())
/// ```
pub trait Schedule: fmt::Debug + Send + Sync + 'static {
    /// The forward pass over `steps` steps, or over a number that is not known yet.
    fn sweep(&self, steps: Option<usize>) -> Box<dyn Sweep>;

    /// The backward pass over `steps` steps, of which the states `kept` (ascending, y₀ not among them) are in slots.
    /// What was at hand at the end of the forward pass still is if `at_last`.
    fn reversal(&self, kept: &[usize], steps: usize, at_last: bool) -> Box<dyn Iterator<Item = Action> + Send>;

    /// What its slots hold.
    fn slot(&self) -> Slot {
        Slot::State
    }

    /// Whether what is at hand at the end of the forward pass stays at hand: the state from which the last step starts,
    /// or with [`Slot::Stages`] that at which it ends.
    fn keeps_last(&self) -> bool {
        true
    }

    /// Both passes over a number of steps that is known ahead.
    fn actions(&self, steps: usize) -> Box<dyn Iterator<Item = Action> + Send> {
        both(self, steps, Some(steps))
    }

    /// Both passes over `steps` steps that the forward pass did not know to be so many.
    fn actions_online(&self, steps: usize) -> Box<dyn Iterator<Item = Action> + Send> {
        both(self, steps, None)
    }
}

fn both<S: Schedule + ?Sized>(
    schedule: &S,
    steps: usize,
    known: Option<usize>,
) -> Box<dyn Iterator<Item = Action> + Send> {
    let (kept, mut sweep) = kept(schedule, steps, known);
    let last = match schedule.slot() {
        Slot::State => steps.saturating_sub(1),
        Slot::Stages => steps,
    };
    let advanced = sweep.iter().filter_map(|action| match action {
        Action::Advance { to, .. } => Some(*to),
        _ => None,
    });
    let from = advanced.max().unwrap_or(0);
    sweep.extend((from < last).then_some(Action::Advance { from, to: last }));
    Box::new(sweep.into_iter().chain(schedule.reversal(&kept, steps, schedule.keeps_last())))
}

/// What is in slots after a forward pass over `steps` steps, and the actions of that pass up to the last of them.
pub(crate) fn kept<S: Schedule + ?Sized>(
    schedule: &S,
    steps: usize,
    known: Option<usize>,
) -> (Vec<usize>, Vec<Action>) {
    let mut sweep = schedule.sweep(known);
    let (mut kept, mut actions, mut from) = (vec![], vec![], 0);
    for state in 1..steps {
        for action in sweep.reached(state) {
            if from < state {
                actions.push(Action::Advance { from, to: state });
                from = state;
            }
            match action {
                Action::Drop(dropped) => kept.retain(|kept| *kept != dropped),
                _ => kept.push(state),
            }
            actions.push(action);
        }
    }
    (kept, actions)
}
