//! What a forward pass keeps as it goes, and hands over to the backward pass.

use super::Keeping;
use super::codec::Encodes;
use super::schedule::{Action, Slot, Sweep};
use super::slots::Slots;
use crate::State;
use crate::error::{OdeError, Result};
use crate::field::Finite;
use candle_core::DType;

/// The trajectory of one forward pass.
///
/// y₀ is the layer's input and costs nothing; the end of the last step is the solve's output.
#[derive(Debug)]
pub(crate) struct Trajectory {
    pub(crate) keeping: Keeping,
    pub(crate) start: State,
    pub(crate) slots: Slots,
    /// States that the schedule keeps; the start of the last step may be in `slots` beside them.
    pub(crate) scheduled: Vec<usize>,
    sweep: Box<dyn Sweep>,
    /// What the sweep has said of a state before it was reached.
    ahead: Option<(usize, Vec<Action>)>,
}

impl Trajectory {
    /// An empty one from `start` (accumulate dtype) over `steps` steps, if they are known.
    pub(crate) fn new(keeping: Keeping, start: &State, steps: Option<usize>, accumulate: DType) -> Self {
        let slots = Slots::new(keeping.codec.clone(), accumulate, keeping.levels.clone());
        let sweep = keeping.schedule.sweep(steps);
        Self { keeping, start: start.detach(), slots, scheduled: vec![], sweep, ahead: None }
    }

    /// What is handed out for a step that has led to `after`.
    pub(crate) fn whole(&self, after: &State) -> Result<State> {
        self.slots.whole(after)
    }

    /// Whether the linearisations of the step to state `n` are to be kept, which is the last if `is_last`.
    pub(crate) fn linearizes(&mut self, n: usize, is_last: bool) -> bool {
        if self.keeping.schedule.slot() == Slot::State {
            return false;
        }
        if is_last {
            return self.keeping.schedule.keeps_last();
        }
        let actions = self.reached(n);
        let keeps = actions.contains(&Action::Keep(n));
        self.ahead = Some((n, actions));
        keeps
    }

    /// What the schedule says of state `n`.
    fn reached(&mut self, n: usize) -> Vec<Action> {
        match self.ahead.take() {
            Some((known, actions)) if known == n => actions,
            _ => self.sweep.reached(n),
        }
    }

    /// The step from `before` has led to `after`, state `n`, and another step follows: gives the state to go on from,
    /// and whether its encoding is finite. `exactly` is asked whether to keep it without rounding.
    pub(crate) fn reach(
        &mut self,
        n: usize,
        before: &State,
        after: State,
        exactly: impl FnMut(&Finite) -> Result<bool>,
    ) -> Result<(State, Finite)> {
        let mut keep = false;
        for action in self.reached(n) {
            match action {
                Action::Drop(dropped) => {
                    self.slots.drop_state(dropped)?;
                    self.scheduled.retain(|state| *state != dropped);
                }
                Action::Keep(state) if state == n => keep = true,
                other => {
                    let why = "a forward pass drops states and keeps the one it has reached";
                    return Err(OdeError::IllegalAction { index: n, action: other.to_string(), why });
                }
            }
        }
        self.scheduled.extend(keep.then_some(n));
        self.slots.reach(n, before, after, keep, exactly)
    }

    /// The last step was that from `before`, state `n`: keeps it, if it is wanted and not kept yet.
    pub(crate) fn finish(
        &mut self,
        n: usize,
        before: &State,
        exactly: impl FnMut(&Finite) -> Result<bool>,
    ) -> Result<Finite> {
        match n > 0 && self.keeping.schedule.keeps_last() && self.keeping.schedule.slot() == Slot::State {
            true => self.slots.keep(n, before, exactly),
            false => Ok(Finite::default()),
        }
    }

    /// What the codec is given.
    pub(crate) fn encodes(&self) -> Encodes {
        self.keeping.codec.encodes()
    }

    /// The dtype entries are kept in.
    pub(crate) fn dtype(&self) -> DType {
        self.slots.dtype()
    }
}
