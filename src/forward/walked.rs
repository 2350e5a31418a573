//! What a forward pass leaves behind, and what an adjoint makes of it.

use super::Forward;
use crate::State;
use crate::adjoint::{
    Adjoint, Anchors, Backsolved, Chosen, Discrete, Moments, Passes, Reconstructed, Recorded, Reverse,
};
use crate::error::{OdeError, Result};
use crate::scaling::AdjointScaling;
use crate::solver::{Clock, StageMemory};
use crate::trajectory::Trajectory;
use candle_core::DType;
use std::sync::Mutex;

/// What a forward pass leaves behind.
pub(crate) struct Walked {
    /// (grid index, state), in the order of the grid; the last one always.
    pub(crate) outputs: Vec<(usize, State)>,
    pub(crate) trajectory: Option<Trajectory>,
    pub(crate) anchors: Option<Anchors>,
    /// The steps that were taken.
    pub(crate) clock: Clock,
    pub(super) dtypes: Vec<DType>,
}

impl Walked {
    /// The ends of the steps that were taken, the start included.
    pub(crate) fn times(&self) -> &[f64] {
        &self.clock.times()[..=self.dtypes.len()]
    }
}

/// What a backward pass is to be.
#[derive(Clone)]
pub(crate) struct Wanted<'a> {
    pub(crate) adjoint: &'a Adjoint,
    pub(crate) scaling: AdjointScaling,
    /// The tensors of times to differentiate, given the times of the steps.
    pub(crate) moments: &'a (dyn Fn(&[f64]) -> Vec<Moments> + Sync),
}

/// A finished forward pass.
pub(crate) struct Finished {
    /// The ends of the steps that were taken, the start included.
    pub(crate) times: Vec<f64>,
    /// (grid index, state), in the order of the grid; the last one always.
    pub(crate) outputs: Vec<(usize, State)>,
    /// The way back, if it was wanted.
    pub(crate) back: Option<Box<dyn Reverse>>,
}

impl Forward<'_> {
    /// Goes forward from `start`, with what is `wanted` of a way back.
    pub(crate) fn solve(self, start: &State, outputs: &[f64], wanted: Option<Wanted<'_>>) -> Result<Finished> {
        let (mut walked, forward) = self.run(start, outputs)?;
        let (times, outputs) = (walked.times().to_vec(), std::mem::take(&mut walked.outputs));
        let back = match wanted {
            Some(Wanted { adjoint, scaling, moments }) => {
                Some(forward.reverse(walked, start, adjoint, scaling, moments(&times))?)
            }
            None => None,
        };
        Ok(Finished { times, outputs, back })
    }

    /// What `adjoint` needs of a finished pass from `start` to go backwards.
    fn reverse(
        self,
        walked: Walked,
        start: &State,
        adjoint: &Adjoint,
        scaling: AdjointScaling,
        moments: Vec<Moments>,
    ) -> Result<Box<dyn Reverse>> {
        let (solver, start, times) = (self.solver.clone(), start.detach(), walked.times().to_vec());
        let Walked { trajectory, anchors, clock, dtypes, .. } = walked;
        Ok(match (adjoint, trajectory, anchors) {
            (Adjoint::Discrete(Discrete { stage_memory, .. }), Some(trajectory), _) => {
                let mut passes = self.passes(clock, dtypes, scaling, moments);
                passes.on_buffers &= *stage_memory == StageMemory::All;
                Box::new(Recorded::new(passes, solver, trajectory, *stage_memory))
            }
            (Adjoint::Reconstruct(adjoint), _, Some(anchors)) => {
                let passes = self.passes(clock, dtypes, scaling, moments);
                Box::new(Reconstructed { passes, solver, start, anchors, memory: adjoint.stage_memory })
            }
            (Adjoint::Backsolve(adjoint), _, Some(end)) => match &adjoint.tolerances {
                Some(tolerances) => {
                    let tableau = adjoint.tableau(solver.as_ref())?;
                    let (tolerances, controller) = (tolerances.clone(), adjoint.controller.clone());
                    let passes = self.passes(clock, dtypes, scaling, moments);
                    Box::new(Chosen { passes, solver, tableau, tolerances, controller, times, start, end })
                }
                None => {
                    let back = adjoint.back(solver.as_ref(), &times)?;
                    let clock = Clock::with_breaks(&back.grid, back.tableau.nodes(), clock.breaks(), start.device());
                    let steps = dtypes.iter().rev();
                    let dtypes = steps.flat_map(|dtype| std::iter::repeat_n(*dtype, back.substeps)).collect();
                    let passes = self.passes(clock, dtypes, scaling, moments);
                    Box::new(Backsolved { passes, solver, back, start, end })
                }
            },
            _ => {
                let what = "a backward pass of which nothing was kept".into();
                return Err(OdeError::Unsupported { what, instead: "this is a bug of candle-ode, please report it" });
            }
        })
    }

    fn passes(self, clock: Clock, dtypes: Vec<DType>, scaling: AdjointScaling, moments: Vec<Moments>) -> Passes {
        let on_buffers = self.runs_on_buffers() && moments.is_empty();
        let Self { field, precision, seed, casts, counters, .. } = self;
        let redo = Mutex::new(None);
        Passes { field, casts, seed, clock, dtypes, precision, scaling, moments, on_buffers, counters, redo }
    }
}
