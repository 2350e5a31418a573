//! How gradients come back.

mod backsolve;
mod backsolve_chosen;
mod discrete;
mod drift;
mod lambda;
mod passes;
mod reconstruct;
#[cfg(test)]
mod tests;
mod times;

pub use backsolve::Backsolve;
pub(crate) use backsolve::{Back, Backsolved};
pub(crate) use backsolve_chosen::Chosen;
pub(crate) use discrete::Recorded;
pub(crate) use passes::Passes;
pub use reconstruct::Reconstruct;
pub(crate) use reconstruct::{Anchors, Reconstructed};
pub(crate) use times::Moments;

use crate::Precision;
use crate::State;
use crate::error::Result;
use crate::solver::{Solver, StageMemory};
use crate::trajectory::schedule::{Checkpoints, InputOnly, KeepAll, Schedule};
use crate::trajectory::{
    Codec, Increments8, Increments16, Keeping, Movers, SecondLevel, States, TwoLevels, kept_bytes,
};
use candle_core::{Shape, Tensor};
use std::sync::Arc;

/// A finished forward pass that can be gone through backwards, as often as Candle asks.
pub(crate) trait Reverse: Send + Sync {
    /// The whole reverse pass. `cotangents` are dL/dy at grid points (index, state), in the order of the grid.
    ///
    /// # Errors
    /// Whatever the field reports, with its place; an overflow that no scaling helps.
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed>;

    /// Bytes that were kept for it on the device.
    fn bytes(&self) -> usize;

    /// Bytes that were kept for it on a second level of storage.
    fn bytes_away(&self) -> usize {
        0
    }
}

/// What a backward pass gives.
pub(crate) struct Reversed {
    /// dL/dy0, accumulate dtype.
    pub(crate) y0: State,
    /// Per slot, the sum of the gradient.
    pub(crate) sums: Vec<Option<Tensor>>,
}

/// The gradient of the steps that were taken (discretise-then-optimise): each step is linearised again at its start and
/// pulled back, last step first.
///
/// By default the start of every step but the first is kept, in the storage dtype: N − 1 states. A codec keeps them in
/// fewer bytes, a schedule keeps fewer of them and computes the others again, in the dtype in which they were computed
/// first. Costs s linearisations and s pullbacks a step, and s evaluations for each step computed again.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_ode::prelude::*;
/// use candle_ode::Increments8;
///
/// let field = FnField::new(|_: &Time, y: &Tensor| y.neg()?.tanh());
/// let y0 = Var::ones((4, 100), DType::F32, &Device::Cpu)?;
/// let ode = Ode::new(&field).span(0.0, 1.0).steps(32);
/// let bytes = |adjoint: Discrete| Ok::<_, OdeError>(ode.clone().adjoint(adjoint).solve(y0.as_tensor())?.trajectory_bytes());
///
/// assert_eq!(bytes(Discrete::default())?, 31 * 400 * 4);
/// assert_eq!(bytes(Discrete::default().codec(Increments8))?, 30 * (400 + 4 * 4) + 400 * 4);
/// assert_eq!(bytes(Discrete::default().checkpoints(5))?, (5 + 1) * 400 * 4);
/// # Ok::<(), OdeError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Discrete {
    pub(crate) stage_memory: StageMemory,
    codec: Option<Arc<dyn Codec>>,
    schedule: Option<Arc<dyn Schedule>>,
    consume: bool,
    budget: Option<u64>,
    any_codec: bool,
    levels: Option<(usize, SecondLevel, Movers)>,
}

impl Discrete {
    /// How many linearisations of a step live at once.
    pub fn stage_memory(mut self, memory: StageMemory) -> Self {
        self.stage_memory = memory;
        self
    }

    /// How kept states are encoded; by default [`States`] in the storage dtype of the precision.
    pub fn codec(mut self, codec: impl Codec) -> Self {
        self.codec = Some(Arc::new(codec));
        self
    }

    /// Which states are kept; by default all of them.
    pub fn schedule(mut self, schedule: impl Schedule) -> Self {
        self.schedule = Some(Arc::new(schedule));
        self
    }

    /// Keeps at most `slots` states, and the start of the last step, and computes as few steps again as that allows:
    /// see [`Checkpoints`].
    pub fn checkpoints(self, slots: usize) -> Self {
        self.schedule(Checkpoints::new(slots))
    }

    /// Keeps the linearisations of every step: the backward pass evaluates nothing, and so costs 2 evaluations' worth
    /// of work a stage where it otherwise costs 3, for s linearisations a step. With fewer slots:
    /// [`Checkpoints::with_stages`]. Needs an explicit Runge–Kutta method and given steps.
    pub fn keep_linearizations(self) -> Self {
        self.schedule(Checkpoints::new(usize::MAX).with_stages())
    }

    /// Two levels of storage: the latest `resident` entries of the trajectory stay on the device, earlier ones wait in
    /// `second` and are brought back, bit for bit, when the backward pass comes to them. In tiles each tile has so many
    /// on the device. Goes with every codec and schedule of states. Moves to a file are made between steps: nothing is
    /// computed meanwhile. Those to the [host](SecondLevel::Host) are made beside what is computed on CUDA, in
    /// page-locked memory that this setting and its clones keep from solve to solve. This has not run on a GPU yet.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use candle_ode::SecondLevel;
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.neg()?.tanh());
    /// let y0 = Var::ones((4, 100), DType::F32, &Device::Cpu)?;
    /// let adjoint = Discrete::default().two_levels(4, SecondLevel::temporary_file());
    /// let solution = Ode::new(&field).span(0.0, 1.0).steps(32).adjoint(adjoint).solve(y0.as_tensor())?;
    /// assert_eq!(solution.trajectory_bytes(), 4 * 400 * 4);
    /// assert_eq!(solution.second_level_bytes(), 27 * 400 * 4);
    /// solution.last().sum_all()?.backward()?;
    /// # Ok::<(), OdeError>(())
    /// ```
    pub fn two_levels(mut self, resident: usize, second: SecondLevel) -> Self {
        self.levels = Some((resident, second, Movers::default()));
        self
    }

    /// Takes, of all choices there are, the one with the fewest calls of the field whose peak fits into `bytes`: the
    /// linearisations of every step kept or of some, every state kept or as many checkpoints as there is room for, all
    /// stage linearisations of a step at once or one at a time. Where the solve runs in [tiles](crate::Ode::tile) and
    /// none was asked for, also smaller tiles, and tile replay ([`InputOnly`](crate::InputOnly)); the tile moves the
    /// last bits of dL/dθ. The codec stays what it is, unless [`any_codec`](Self::any_codec) lets it
    /// go; a schedule or a tile that was asked for stay too.
    ///
    /// The peak is that of [`Ode::plan`](crate::Ode::plan), which takes the loss to use the states that
    /// [`save_at`](crate::Ode::save_at) asks for, or the last; in tiles on several threads it is a bound. Where the
    /// heap is not counted the owned bytes have to fit. The choice is made once per shape, while nothing else should
    /// allocate. On more threads more is live at once: the tile that is chosen, and so the last bits of dL/dθ, depend
    /// on their number unless [`Ode::threads`](crate::Ode::threads) or a tile is given.
    ///
    /// Adaptive steps and dense output have no plan, and no budget: give [`checkpoints`](Self::checkpoints) there.
    pub fn budget(mut self, bytes: u64) -> Self {
        self.budget = Some(bytes);
        self
    }

    /// Lets a [`budget`](Self::budget) choose the codec too, if none was asked for: where every state does not fit,
    /// every increment in [16](Increments16) or [8 bits](Increments8) comes before steps that are computed again. They
    /// round what the gradient is pulled back at: 16 bits cost F32 nothing that is seen, 8 bits cost F16 nothing.
    pub fn any_codec(mut self) -> Self {
        self.any_codec = true;
        self
    }

    /// The budget, and itself without one.
    pub(crate) fn take_budget(&self) -> Option<(u64, Self)> {
        self.budget.map(|bytes| (bytes, Self { budget: None, ..self.clone() }))
    }

    /// The choices a budget has for `steps` steps, with their names. `linearizes` says whether linearisations can be
    /// kept, `in_tiles` whether the solve runs in tiles.
    pub(crate) fn choices(&self, steps: usize, linearizes: bool, in_tiles: bool) -> Vec<(String, Self)> {
        let stages = [(StageMemory::All, "all stages at once"), (StageMemory::One, "one stage at a time")];
        let both = |(name, discrete): (String, Self)| {
            stages.map(|(memory, words)| (format!("{name}, {words}"), discrete.clone().stage_memory(memory)))
        };
        if self.schedule.is_some() {
            return both(("as asked for".to_owned(), self.clone())).into();
        }
        // A ladder of slots: each rung about half as many again.
        let ladder = || std::iter::successors(Some(1_usize), |slots| Some(slots + slots.div_ceil(2)));
        let rungs = || ladder().take_while(|slots| slots + 2 < steps);
        let mut states = vec![("every state kept".to_owned(), self.clone())];
        states.extend(rungs().map(|slots| (format!("{slots} checkpoints"), self.clone().checkpoints(slots))));
        if self.any_codec && self.codec.is_none() {
            states.push(("every increment kept in 16 bits".to_owned(), self.clone().codec(Increments16)));
            states.push(("every increment kept in 8 bits".to_owned(), self.clone().codec(Increments8)));
        }
        states.extend(in_tiles.then(|| ("replayed".to_owned(), self.clone().schedule(InputOnly))));
        let mut choices: Vec<_> = states.into_iter().flat_map(both).collect();
        if linearizes && self.levels.is_none() {
            let slots = |slots| self.clone().schedule(Checkpoints::new(slots).with_stages());
            choices.push(("every step kept linearised".to_owned(), self.clone().keep_linearizations()));
            choices.extend(rungs().map(|rung| (format!("{rung} steps kept linearised"), slots(rung))));
        }
        choices
    }

    /// Frees each entry of the trajectory as soon as the backward pass has used it. A second backward pass over the
    /// same solve is [`OdeError::Consumed`](crate::OdeError::Consumed) then; a pass that overflows and has to be done
    /// again goes forward from y0 once more.
    pub fn consume(mut self) -> Self {
        self.consume = true;
        self
    }

    /// Bytes of the trajectory at the end of a forward pass of `steps` equal or given steps, for a state of tensors of
    /// these shapes: what [`Solution::trajectory_bytes`](crate::Solution::trajectory_bytes) will say, if nothing
    /// overflows and there is no budget. Reversible solvers carry two states, and keep twice that. Of [two
    /// levels](Self::two_levels) it is the first, on a GPU if the other is the host.
    pub fn trajectory_bytes(&self, shapes: &[Shape], steps: usize, precision: Precision) -> usize {
        kept_bytes(&self.keeping(precision), shapes, steps, true, precision.accumulate_dtype())
    }

    /// The same where the steps are as many as a controller needs, and turn out to be `steps`; of two levels at most.
    pub fn trajectory_bytes_online(&self, shapes: &[Shape], steps: usize, precision: Precision) -> usize {
        kept_bytes(&self.keeping(precision), shapes, steps, false, precision.accumulate_dtype())
    }

    pub(crate) fn keeping(&self, precision: Precision) -> Keeping {
        Keeping {
            codec: self.codec.clone().unwrap_or_else(|| Arc::new(States(precision.storage_dtype()))),
            schedule: self.schedule.clone().unwrap_or_else(|| Arc::new(KeepAll)),
            consume: self.consume,
            levels: self.levels.clone().map(|(resident, second, movers)| TwoLevels::new(resident, second, movers)),
        }
    }
}

/// Candle's own graph through every step: the oracle. Keeps every intermediate of every evaluation.
///
/// Candle's backward recurses, so long solves need a thread with a large stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unrolled;

/// Which of them.
#[derive(Clone, Debug)]
pub enum Adjoint {
    /// See [`Discrete`].
    Discrete(Discrete),
    /// See [`Reconstruct`].
    Reconstruct(Reconstruct),
    /// See [`Backsolve`].
    Backsolve(Backsolve),
    /// See [`Unrolled`].
    Unrolled(Unrolled),
}

impl Adjoint {
    /// How the forward pass keeps states, for those that go back over them.
    pub(crate) fn keeping(&self, precision: Precision) -> Result<Option<Keeping>> {
        let Self::Discrete(discrete) = self else { return Ok(None) };
        Ok(Some(discrete.keeping(precision)))
    }

    /// After how many steps what the solver carries is kept, by those who go backwards from the end; checks that they
    /// can.
    pub(crate) fn anchors(&self, solver: &dyn Solver) -> Result<Option<usize>> {
        match self {
            Self::Reconstruct(adjoint) => adjoint.spacing(solver).map(Some),
            Self::Backsolve(adjoint) => adjoint.tableau(solver).map(|_| Some(usize::MAX)),
            Self::Discrete(_) | Self::Unrolled(_) => Ok(None),
        }
    }
}

impl Default for Adjoint {
    fn default() -> Self {
        Self::Discrete(Discrete::default())
    }
}

impl From<Discrete> for Adjoint {
    fn from(adjoint: Discrete) -> Self {
        Self::Discrete(adjoint)
    }
}

impl From<Reconstruct> for Adjoint {
    fn from(adjoint: Reconstruct) -> Self {
        Self::Reconstruct(adjoint)
    }
}

impl From<Backsolve> for Adjoint {
    fn from(adjoint: Backsolve) -> Self {
        Self::Backsolve(adjoint)
    }
}

impl From<Unrolled> for Adjoint {
    fn from(adjoint: Unrolled) -> Self {
        Self::Unrolled(adjoint)
    }
}
