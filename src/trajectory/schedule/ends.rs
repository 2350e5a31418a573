//! The two ends between which all schedules lie: everything is kept, or nothing but the input.

use super::{Action, Reversal, Schedule, Slot, Sweep};

/// Keeps every state: N − 1 entries for N steps, nothing computed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeepAll;

impl Schedule for KeepAll {
    fn sweep(&self, _: Option<usize>) -> Box<dyn Sweep> {
        Box::new(Everything)
    }

    fn reversal(&self, kept: &[usize], steps: usize, at_last: bool) -> Box<dyn Iterator<Item = Action> + Send> {
        Box::new(Reversal::new(Slot::State, kept, steps, usize::MAX, at_last))
    }
}

#[derive(Debug)]
struct Everything;

impl Sweep for Everything {
    fn reached(&mut self, state: usize) -> Vec<Action> {
        vec![Action::Keep(state)]
    }
}

/// Keeps nothing in the forward pass; the backward pass goes forward once more and keeps every state then: N − 1 steps
/// computed again, N − 1 entries while the backward pass runs.
///
/// Where the solve runs in tiles ([`Ode::tile`](crate::Ode::tile)) this is tile replay: a tile at a time is gone
/// through once more and keeps its states, N · tile entries a thread in place of N · batch.
///
/// In a network of several solves the memory is O(number of solves) + O(N), not their product.
///
/// # Reference
/// A. Gholami, K. Keutzer, G. Biros, *ANODE*, arXiv 1902.10298, §V.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InputOnly;

impl Schedule for InputOnly {
    fn sweep(&self, _: Option<usize>) -> Box<dyn Sweep> {
        Box::new(Nothing)
    }

    fn keeps_last(&self) -> bool {
        false
    }

    fn reversal(&self, kept: &[usize], steps: usize, at_last: bool) -> Box<dyn Iterator<Item = Action> + Send> {
        Box::new(Reversal::new(Slot::State, kept, steps, usize::MAX, at_last))
    }
}

#[derive(Debug)]
struct Nothing;

impl Sweep for Nothing {
    fn reached(&mut self, _: usize) -> Vec<Action> {
        vec![]
    }
}
