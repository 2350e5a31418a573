//! A given number of slots, used as well as they can be.

use super::reversal::{least_steps, split};
use super::{Action, Reversal, Schedule, Slot, Sweep};

/// At most `slots` states in slots at any time, and as few steps computed again as that allows: optimal where the
/// number of steps is known ahead. Where it is not, the forward pass keeps every kth state and doubles k whenever the
/// slots are full, and the backward pass is optimal for what is left then.
///
/// Slots may hold states alone, or states with the stages of the steps that led to them ([`with_stages`]).
///
/// # Reference
/// A. Griewank, A. Walther, Algorithm 799: *revolve*, ACM Trans. Math. Softw. 26 (2000), for states; H. Zhang, W. Zhao,
/// arXiv 2206.01298, for states with stages, where y₀ takes a slot, which it does not here.
///
/// [`with_stages`]: Self::with_stages
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoints {
    slots: usize,
    slot: Slot,
}

impl Checkpoints {
    /// With so many slots; none means that every step is reached from y₀.
    pub const fn new(slots: usize) -> Self {
        Self { slots, slot: Slot::State }
    }

    /// Slots that hold the linearised stages of a step beside the state it led to: their pullback evaluates nothing.
    pub const fn with_stages(mut self) -> Self {
        self.slot = Slot::Stages;
        self
    }

    /// How many slots.
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// The steps that are computed again for a solve of `steps` steps: no schedule with as many slots needs fewer.
    pub fn recomputed(&self, steps: usize) -> usize {
        match self.slot {
            Slot::State => least_steps(steps, self.slots) - steps.saturating_sub(1),
            Slot::Stages => least_steps(steps + 1, self.slots) - steps,
        }
    }
}

impl Schedule for Checkpoints {
    fn sweep(&self, steps: Option<usize>) -> Box<dyn Sweep> {
        let Some(steps) = steps else { return Box::new(Thinned { slots: self.slots, stride: 1, kept: vec![] }) };
        let (mut base, mut free) = (0, self.slots);
        let mut left = if self.slot == Slot::Stages { steps + 1 } else { steps };
        let mut ahead = vec![];
        while free > 0 && left > 2 {
            let by = split(left, free);
            base += by;
            left -= by;
            free -= 1;
            ahead.push(base);
        }
        ahead.reverse();
        Box::new(Planned { ahead })
    }

    fn reversal(&self, kept: &[usize], steps: usize, at_last: bool) -> Box<dyn Iterator<Item = Action> + Send> {
        Box::new(Reversal::new(self.slot, kept, steps, self.slots, at_last))
    }

    fn slot(&self) -> Slot {
        self.slot
    }
}

/// States that are known ahead, last first.
#[derive(Debug)]
struct Planned {
    ahead: Vec<usize>,
}

impl Sweep for Planned {
    fn reached(&mut self, state: usize) -> Vec<Action> {
        self.ahead.pop_if(|next| *next == state).map(Action::Keep).into_iter().collect()
    }
}

/// Every `stride`th state, and every second of them dropped whenever the slots are full.
#[derive(Debug)]
struct Thinned {
    slots: usize,
    stride: usize,
    kept: Vec<usize>,
}

impl Sweep for Thinned {
    fn reached(&mut self, state: usize) -> Vec<Action> {
        let mut actions = vec![];
        if self.slots == 0 || !state.is_multiple_of(self.stride) {
            return actions;
        }
        while self.kept.len() == self.slots {
            self.stride *= 2;
            let (kept, dropped) = self.kept.iter().partition(|kept| kept.is_multiple_of(self.stride));
            self.kept = kept;
            let dropped: Vec<usize> = dropped;
            actions.extend(dropped.into_iter().map(Action::Drop));
        }
        if state.is_multiple_of(self.stride) {
            self.kept.push(state);
            actions.push(Action::Keep(state));
        }
        actions
    }
}
