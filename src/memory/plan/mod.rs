//! What a solve and its backward pass will take, said before anything runs.
//!
//! The bytes this crate owns follow from shapes alone. What a field takes is measured once per shape: an evaluation, a
//! linearisation and its pullback at y0 (no step is made). The two are put together by walking through both passes
//! without allocating anything.

mod back;
mod choices;
mod ghost;
mod probe;
mod session;
mod slots;
mod step;
mod tally;
mod undone;
mod walk;
mod whole;

pub use choices::{Choice, Choices};
pub(crate) use probe::{Costs, Key};

use super::composition::{Composition, Part};
use super::meter::held;
use crate::State;
use crate::account::Category;
use crate::adjoint::{Back, Discrete};
use crate::error::{OdeError, Result};
use crate::field::Field;
use crate::precision::Precision;
use crate::scaling::AdjointScaling;
use crate::solver::{Clock, Reversal, Solver, StageMemory, Tableau};
use crate::tiles::Tiles;
use crate::time::TimeGrid;
use crate::trajectory::Keeping;
use candle_core::{Device, Tensor};
use probe::Probed;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use undone::Way;
use walk::ClockBytes;

/// Predicted bytes of one solve and its backward pass, above what is live before it, and how often the field is called.
/// The field's masters are live before it: they are owned, and taken out of the baseline in [`at_peak`](Self::at_peak).
///
/// It is a plan of a solve of a field that has been solved before, for a loss that hands back one cotangent of each
/// output: what the loss itself takes is not in it, nor what an overflow would make it do again. What Candle takes
/// while it is handed the gradients is: it has each of them three times for a moment.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_ode::account::Category;
/// use candle_ode::memory::TrackingAllocator;
/// use candle_ode::prelude::*;
///
/// #[global_allocator]
/// static HEAP: TrackingAllocator = TrackingAllocator::system();
///
/// # fn main() -> candle_ode::Result<()> {
/// let field = FnField::new(|_: &Time, y: &Tensor| y.tanh());
/// let y0 = Var::ones((64, 32), candle_core::DType::F32, &Device::Cpu)?;
/// let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(16).precision(Precision::F16);
/// let plan = ode.plan(y0.as_tensor())?;
/// assert_eq!(plan.owned(Category::Trajectory), 15 * 64 * 32 * 2);
/// assert_eq!((plan.linearizations, plan.pullbacks), (64, 64));
/// assert!(plan.peak.unwrap() > plan.owned_peak);
/// assert_eq!(ode.solve(y0.as_tensor())?.trajectory_bytes() as u64, plan.trajectory);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The highest heap above what is live before the solve; `None` where no
    /// [`TrackingAllocator`](super::TrackingAllocator) counts, or off the CPU.
    pub peak: Option<u64>,
    /// What is live at that moment; without a count of the heap, the moment at which most is owned.
    pub at_peak: Composition,
    /// The most bytes this crate owns at once.
    pub owned_peak: u64,
    /// Bytes of the trajectory at the end of the forward pass.
    pub trajectory: u64,
    /// Evaluations of the field, those of checks included and those in linearisations not.
    pub evaluations: usize,
    /// Linearisations of the field.
    pub linearizations: usize,
    /// Pullbacks through a linearisation.
    pub pullbacks: usize,
    /// Steps computed again in the backward pass.
    pub recomputed_steps: usize,
    /// Tiles that the batch is cut into: see [`Ode::tile`](crate::Ode::tile). The counts above are those of a tile, as
    /// in [`Solution::stats`](crate::Solution::stats).
    pub tiles: usize,
    /// Threads that the tiles run on; 1 where the batch is not cut. On one, the bytes are what will be measured. On
    /// several, where each of them is when is not known: the trajectory is what it is, and peaks are bounds, with all
    /// threads at their highest at once.
    pub threads: usize,
    owned: [u64; Category::ALL.len()],
}

impl MemoryPlan {
    /// The most bytes of a category that are owned at once.
    pub fn owned(&self, category: Category) -> u64 {
        self.owned[category as usize]
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tiles, threads, .. } = self;
        let at_most = if *threads > 1 { " at most" } else { "" };
        match self.peak {
            Some(peak) => writeln!(f, "peak{at_most} {peak} bytes, of which:")?,
            None => writeln!(f, "owned at most {} bytes (the heap is not counted), of which:", self.owned_peak)?,
        }
        for (part, bytes) in self.at_peak.iter().filter(|(part, bytes)| *part != Part::Baseline && *bytes != 0) {
            writeln!(f, "  {:12} {bytes}", part.name())?;
        }
        if *tiles > 1 {
            writeln!(f, "{tiles} tiles on {threads} threads, of each:")?;
        }
        let Self { evaluations, linearizations, pullbacks, recomputed_steps, .. } = self;
        write!(
            f,
            "{evaluations} evaluations, {linearizations} linearisations, {pullbacks} pullbacks, {recomputed_steps} steps \
             computed again"
        )
    }
}

/// What is known already: costs of a field, and choices made within a budget.
#[derive(Debug, Default)]
pub(crate) struct Known {
    costs: Mutex<Vec<(Key, Costs)>>,
    chosen: Mutex<Vec<(String, Fitting)>>,
}

/// What fits a budget: an adjoint, and the rows of a tile.
pub(crate) type Fitting = (Discrete, Option<usize>);

impl Known {
    /// The choice for these settings, made when it is first asked for.
    pub(crate) fn choose(&self, settings: String, choose: impl FnOnce() -> Result<Fitting>) -> Result<Fitting> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, fitting)) = chosen.iter().find(|(of, _)| *of == settings) {
            return Ok(fitting.clone());
        }
        let fitting = choose()?;
        chosen.push((settings, fitting.clone()));
        Ok(fitting)
    }
}

/// How a planned solve goes backwards.
pub(crate) enum PlannedAdjoint {
    /// Over states that are kept.
    Kept(Keeping),
    /// Undoing steps, from what is kept after so many of them each.
    Undone(usize),
    /// Solving backwards.
    Backwards(Back),
}

/// The settings of a solve, as far as bytes depend on them.
pub(crate) struct Planned<'a> {
    pub(crate) field: &'a dyn Field,
    pub(crate) solver: &'a dyn Solver,
    pub(crate) grid: &'a TimeGrid,
    /// Grid points that are handed out, the last of them the end.
    pub(crate) outputs: Vec<usize>,
    /// Those of them that the loss uses.
    pub(crate) used: Vec<usize>,
    pub(crate) precision: Precision,
    pub(crate) scaling: AdjointScaling,
    pub(crate) memory: StageMemory,
    pub(crate) adjoint: PlannedAdjoint,
    /// The tiles of the batch, if it is cut.
    pub(crate) tiles: Option<Tiles>,
    /// Threads among which kernels share their work where it is not, if it is said how many.
    pub(crate) threads: Option<usize>,
    pub(crate) inputs: &'a [Tensor],
    pub(crate) seed: u64,
    /// Whether a backward pass follows.
    pub(crate) tracked: bool,
    /// Whether it gives gradients of times.
    pub(crate) times: bool,
    /// Evaluations made to check the field.
    pub(crate) checks: usize,
    pub(crate) known: &'a Known,
}

impl Planned<'_> {
    /// The tableau that the solver is made of, and whether it couples two states over it.
    fn made_of(&self) -> Result<(&Tableau, bool)> {
        let coupled = || self.solver.reversal().and_then(Reversal::base);
        let kept = matches!(self.adjoint, PlannedAdjoint::Kept(_));
        match (self.solver.tableau(), coupled()) {
            (Some(tableau), _) => Ok((tableau, false)),
            (None, Some(tableau)) if !kept => Ok((tableau, true)),
            _ => Err(OdeError::Unsupported {
                what: format!("planning the memory of {} with this adjoint", self.solver.name()),
                instead: "explicit Runge-Kutta methods can be planned, and Reversible(..) with Reconstruct or Backsolve; \
                          measure others with MemoryProfiler",
            }),
        }
    }

    /// The way back of a solve that is solved backwards, with the bytes of its times.
    fn way<'a>(&self, back: &'a Back, device: &Device, time: usize) -> Result<Way<'a>> {
        let (clock, held) = held(|| Ok(Clock::new(&back.grid, back.tableau.nodes(), device)))?;
        let clock = ClockBytes { host: held.kept + 8 * back.grid.times().len(), device: clock.len() * time };
        Ok(Way { tableau: &back.tableau, substeps: back.substeps, clock })
    }

    /// The costs of the field, measured unless they are known for these shapes and dtypes.
    fn costs(&self, start: &State, clock: &Clock) -> Result<Costs> {
        let probed = Probed {
            field: self.field,
            inputs: self.inputs,
            start,
            clock,
            compute: self.precision.compute_dtype(),
            accumulate: self.precision.accumulate_dtype(),
            scaling: &self.scaling,
            seed: self.seed,
            tracked: self.tracked,
            linearizes: self.keeps().linearizes(),
            tableau: self.solver.tableau().filter(|_| self.field.is_layers() && !self.keeps().linearizes()),
            // Tiles share nothing.
            threads: if self.tiles.is_some() { Some(1) } else { self.threads },
        };
        let key = probed.key();
        let mut known = self.known.costs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, costs)) = known.iter().find(|(of, _)| *of == key) {
            return Ok(*costs);
        }
        let costs = probed.measure()?;
        known.push((key, costs));
        Ok(costs)
    }
}
