//! The choices there are for one solve, each with its plan: what a table shows and a budget picks from.

use super::MemoryPlan;
use crate::account::Category;
use crate::adjoint::Discrete;
use crate::error::{OdeError, Result};
use std::cmp::Reverse;
use std::fmt;

/// One way of keeping a trajectory, and what it takes.
#[derive(Clone, Debug)]
pub struct Choice {
    /// What it is, in words.
    pub name: String,
    /// The adjoint to ask for.
    pub adjoint: Discrete,
    /// The rows of a tile to ask for ([`Ode::tile`](crate::Ode::tile)); `None` where the batch is not cut.
    pub tile: Option<usize>,
    /// What it takes.
    pub plan: MemoryPlan,
    /// Bytes of an element of what is kept: the fewer, the more is rounded.
    pub(crate) width: usize,
}

impl Choice {
    /// The bytes a budget is held against: the peak (of tiles on several threads a bound of it), or where the heap is
    /// not counted what is owned beside the masters.
    pub fn bytes(&self) -> u64 {
        self.plan.peak.unwrap_or(self.plan.owned_peak - self.plan.owned(Category::Parameters))
    }

    /// Calls of the field, all alike; in tiles, those of one.
    pub fn calls(&self) -> usize {
        self.plan.evaluations + self.plan.linearizations + self.plan.pullbacks
    }
}

/// Choices side by side, the one with the fewest calls of the field first, and of as many the one that rounds least,
/// then the one with the largest tile; printed, a table.
#[derive(Clone, Debug)]
pub struct Choices(pub Vec<Choice>);

impl Choices {
    pub(crate) fn new(mut choices: Vec<Choice>) -> Self {
        let rows = |choice: &Choice| choice.tile.unwrap_or(usize::MAX);
        choices.sort_by_key(|choice| (choice.calls(), Reverse(choice.width), Reverse(rows(choice)), choice.bytes()));
        Self(choices)
    }

    /// The first that needs at most `budget` bytes.
    ///
    /// # Errors
    /// [`OdeError::Budget`] with the smallest budget that would do.
    pub fn within(&self, budget: u64) -> Result<&Choice> {
        if let Some(choice) = self.0.iter().find(|choice| choice.bytes() <= budget) {
            return Ok(choice);
        }
        let least = self.0.iter().min_by_key(|choice| choice.bytes());
        let (smallest, choice) = least.map_or((0, String::new()), |least| (least.bytes(), least.name.clone()));
        Err(OdeError::Budget { budget, smallest, choice })
    }
}

impl fmt::Display for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|choice| choice.name.chars().count()).max().unwrap_or(0).max("choice".len());
        write!(
            f,
            "{:width$} {:>14} {:>14} {:>10} {:>10}",
            "choice", "bytes", "trajectory", "calls of f", "recomputed"
        )?;
        for choice in &self.0 {
            let MemoryPlan { trajectory, recomputed_steps, .. } = choice.plan;
            let (bytes, calls) = (choice.bytes(), choice.calls());
            write!(f, "\n{:width$} {bytes:>14} {trajectory:>14} {calls:>10} {recomputed_steps:>10}", choice.name)?;
        }
        Ok(())
    }
}
