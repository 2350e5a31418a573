//! What a solve and its backward pass will take, said before anything runs.
//!
//! The bytes this crate owns follow from shapes alone. What a field takes is measured once per shape: an evaluation, a
//! linearisation and its pullback at y0 (no step is made). The two are put together by walking through both passes
//! without allocating anything.

mod choices;
mod ghost;
mod probe;
mod slots;
mod step;
mod tally;
mod undone;
mod walk;

pub use choices::{Choice, Choices};
pub(crate) use probe::{Costs, Key};

use super::composition::{Composition, Part};
use super::meter::{TrackingAllocator, held};
use crate::State;
use crate::account::Category;
use crate::adjoint::{Back, Discrete};
use crate::error::{OdeError, Result};
use crate::field::Field;
use crate::precision::Precision;
use crate::scaling::AdjointScaling;
use crate::solver::{Clock, Reversal, Solver, StageMemory, Tableau};
use crate::time::TimeGrid;
use crate::trajectory::{Codec, Encodes, Keeping, Kept, States};
use candle_core::{Device, Shape, Tensor};
use probe::Probed;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use undone::Way;
use walk::{ClockBytes, Counts, Keeps, Sizes, Solve};

/// Predicted bytes of one solve and its backward pass, above what is live before it, and how often the field is called.
/// The field's masters are live before it: they are owned, and taken out of the baseline in [`at_peak`](Self::at_peak).
///
/// It is a plan of a solve of a field that has been solved before, for a loss that hands back one cotangent of each
/// output: what the loss itself takes is not in it, nor what an overflow would make it do again.
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
        match self.peak {
            Some(peak) => writeln!(f, "peak {peak} bytes, of which:")?,
            None => writeln!(f, "owned at most {} bytes (the heap is not counted), of which:", self.owned_peak)?,
        }
        for (part, bytes) in self.at_peak.iter().filter(|(part, bytes)| *part != Part::Baseline && *bytes != 0) {
            writeln!(f, "  {:12} {bytes}", part.name())?;
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
    chosen: Mutex<Vec<(String, Discrete)>>,
}

impl Known {
    /// The choice for these settings, made when it is first asked for.
    pub(crate) fn choose(&self, settings: String, choose: impl FnOnce() -> Result<Discrete>) -> Result<Discrete> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, discrete)) = chosen.iter().find(|(of, _)| *of == settings) {
            return Ok(discrete.clone());
        }
        let discrete = choose()?;
        chosen.push((settings, discrete.clone()));
        Ok(discrete)
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
    pub(crate) precision: Precision,
    pub(crate) scaling: AdjointScaling,
    pub(crate) memory: StageMemory,
    pub(crate) adjoint: PlannedAdjoint,
    pub(crate) inputs: &'a [Tensor],
    pub(crate) seed: u64,
    /// Whether a backward pass follows.
    pub(crate) tracked: bool,
    /// Evaluations made to check the field.
    pub(crate) checks: usize,
    pub(crate) known: &'a Known,
}

impl Planned<'_> {
    /// The plan of a solve from `y0`.
    pub(crate) fn plan(&self, y0: &State) -> Result<MemoryPlan> {
        let (tableau, coupled) = self.made_of()?;
        let (compute, accumulate) = (self.precision.compute_dtype(), self.precision.accumulate_dtype());
        let (start, widened) = held(|| crate::graph::widen(&y0.detach(), accumulate))?;
        let (clock, clocked) = held(|| Ok(Clock::new(self.grid, self.solver.nodes(), y0.device())))?;
        let costs = self.costs(&start, &clock)?;
        let shapes: Vec<Shape> = start.tensors().iter().map(|x| x.shape().clone()).collect();
        let exact: Arc<dyn Codec> = Arc::new(States(accumulate));
        let codec = match &self.adjoint {
            PlannedAdjoint::Kept(keeping) => &keeping.codec,
            PlannedAdjoint::Undone(_) | PlannedAdjoint::Backwards(_) => &exact,
        };
        let entry = codec.bytes(&shapes);
        let ((kept, _), encoded) = held(|| codec.encode(&start))?;
        let (decoded, decoding) = held(|| codec.decode(&kept, accumulate))?;
        drop((kept, decoded));
        // A state that is kept as it is has a handle of its own.
        let (_, handle) = held(|| exact.encode(&start))?;
        let encodes = codec.encodes();
        // Anything else makes an entry of its own.
        let entry_is_state =
            encodes == Encodes::States && codec.dtype() == accumulate && entry == start.bytes(accumulate);
        let sizes = Sizes {
            accumulate: start.bytes(accumulate),
            compute: start.bytes(compute),
            entry,
            entry_beside: encoded.kept.saturating_sub(entry) + Kept::BESIDE,
            handle: handle.kept + Kept::BESIDE,
            encoding: encoded.most,
            decoding: decoding.most,
            encodes,
            entry_is_state,
            same_dtype: compute == accumulate,
            widened: widened.kept,
            clock: ClockBytes { host: clocked.kept + 8 * self.grid.times().len(), device: clock.len() * costs.time },
            parameters: self.field.params().bytes(),
        };
        let keeps = match &self.adjoint {
            _ if !self.tracked => Keeps::Nothing,
            PlannedAdjoint::Kept(keeping) => Keeps::States(keeping.schedule.as_ref(), keeping.consume),
            PlannedAdjoint::Undone(every) => Keeps::Anchors(*every),
            PlannedAdjoint::Backwards(_) => Keeps::Anchors(usize::MAX),
        };
        let mut solve = Solve {
            tableau,
            coupled,
            memory: self.memory,
            keeps,
            costs,
            sizes,
            steps: self.grid.steps(),
            heap: Default::default(),
            counts: Counts::default(),
            sums: None,
            live: 0,
            goes_back: false,
            packed: None,
            packed_back: None,
            session: vec![],
        };
        let mut walked = solve.forward(&self.outputs, self.checks);
        let trajectory = walked.trajectory();
        match (keeps, &self.adjoint) {
            (Keeps::Nothing, _) => {}
            (Keeps::States(schedule, consume), _) => solve.backward(&mut walked, &self.outputs, (schedule, consume))?,
            (_, PlannedAdjoint::Backwards(back)) => {
                let way = self.way(back, y0.device(), costs.time)?;
                solve.solve_backwards(&mut walked, &self.outputs, &way);
            }
            _ => solve.undo_all(&walked, &self.outputs),
        }
        let counts_heap = TrackingAllocator::is_installed() && y0.device().is_cpu();
        let (tally, counts) = (solve.heap.tally(), solve.counts);
        Ok(MemoryPlan {
            peak: counts_heap.then_some(tally.highest().total() as u64),
            at_peak: tally.highest(),
            owned_peak: tally.owned_total_peak(),
            trajectory: trajectory as u64,
            evaluations: counts.evaluations,
            linearizations: counts.linearizations,
            pullbacks: counts.pullbacks,
            recomputed_steps: counts.recomputed_steps,
            owned: Category::ALL.map(|category| tally.owned_peak(category)),
        })
    }

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
