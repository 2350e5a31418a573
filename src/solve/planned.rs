//! What a solve will take, before it runs; and what a byte budget makes of its settings.

use super::Ode;
use super::start::{check_start, default_precision};
use crate::State;
use crate::adjoint::{Adjoint, Discrete};
use crate::error::{OdeError, Result};
use crate::memory::plan::{Planned, PlannedAdjoint};
use crate::memory::{Choice, Choices, MemoryPlan};
use crate::scaling::AdjointScaling;
use crate::solver::StageMemory;
use crate::trajectory::schedule::Slot;

impl Ode {
    /// The bytes that [`solve`](Self::solve) from `y0` and its backward pass will take, and how often the field will be
    /// called, without solving.
    ///
    /// The loss is taken to use the states asked for by [`save_at`](Self::save_at), or the last if none was.
    ///
    /// The field is evaluated, linearised and pulled back at y0 a few times, once per shape and dtypes in the life of
    /// this value and its clones, and one that is layers alone
    /// ([`ModelField::of_layers`](crate::ModelField::of_layers)) at the stages of a step, once per method, too; the
    /// rest is arithmetic. Nothing else should allocate meanwhile.
    ///
    /// # Errors
    /// As [`solve`](Self::solve); [`OdeError::Unsupported`] for what cannot be planned: adaptive steps, whose number is
    /// not known, dense output, [`Unrolled`](crate::Unrolled), and solvers that are not explicit, except
    /// [`Reversible`](crate::Reversible) with [`Reconstruct`](crate::Reconstruct) or [`Backsolve`](crate::Backsolve).
    pub fn plan(&self, y0: impl Into<State>) -> Result<MemoryPlan> {
        let y0: State = y0.into();
        let precision = self.precision.unwrap_or_else(|| default_precision(&y0));
        precision.check(y0.device())?;
        check_start(&y0)?;
        if let Some(chosen) = self.within_budget(&y0)? {
            return chosen.plan(y0);
        }
        if let Some(what) = self.without_plan() {
            return unplanned(what);
        }
        let read = self.with_times_read()?;
        let grid = read.time_grid()?;
        let (memory, adjoint) = match (&self.adjoint, self.adjoint.keeping(precision)?) {
            (Adjoint::Discrete(discrete), Some(keeping)) => (discrete.stage_memory, PlannedAdjoint::Kept(keeping)),
            (Adjoint::Reconstruct(reconstruct), _) => {
                (reconstruct.stage_memory, PlannedAdjoint::Undone(reconstruct.spacing(self.solver.as_ref())?))
            }
            (Adjoint::Backsolve(backsolve), _) if backsolve.tolerances.is_some() => {
                return unplanned("Backsolve by tolerances of its own");
            }
            (Adjoint::Backsolve(backsolve), _) => {
                let back = backsolve.back(self.solver.as_ref(), grid.times())?;
                (StageMemory::All, PlannedAdjoint::Backwards(back))
            }
            _ => return unplanned("Unrolled"),
        };
        if let PlannedAdjoint::Kept(keeping) = &adjoint
            && keeping.schedule.slot() == Slot::Stages
        {
            self.check_linearizes(self.time_tensors.is_tracked(), keeping.levels.is_some())?;
        }
        let trainable = self.field.params().trainable(&self.inputs);
        let mut used = read.save_at.iter().map(|&t| grid.index_of(t)).collect::<Result<Vec<_>>>()?;
        if used.is_empty() {
            used.push(grid.steps());
        }
        used.sort_unstable();
        used.dedup();
        let ends = used.last() == Some(&grid.steps());
        let outputs = used.iter().copied().chain((!ends).then(|| grid.steps())).collect();
        let planned = Planned {
            field: self.field.as_ref(),
            solver: self.solver.as_ref(),
            grid: &grid,
            outputs,
            used,
            precision,
            scaling: self.scaling.clone().unwrap_or_else(|| AdjointScaling::default_for(precision.compute_dtype())),
            memory,
            adjoint,
            tiles: self.tiles(&y0)?,
            threads: self.cut.threads,
            inputs: &self.inputs,
            seed: self.seed,
            tracked: self.tracked
                && (y0.is_tracked() || trainable.iter().any(Option::is_some) || self.time_tensors.is_tracked()),
            times: self.time_tensors.is_tracked(),
            checks: if self.check_determinism { 2 } else { usize::from(self.field.needs_probe()) },
            known: &self.known,
        };
        planned.plan(&y0)
    }

    /// The choices that a [`budget`](Discrete::budget) has, each with its plan: the fewest calls of the field first.
    ///
    /// ```
    /// use candle_core::{Device, Tensor, Var};
    /// use candle_ode::prelude::*;
    ///
    /// let field = FnField::new(|_: &Time, y: &Tensor| y.tanh());
    /// let y0 = Var::ones((64, 32), candle_core::DType::F32, &Device::Cpu)?;
    /// let choices = Ode::new(&field).span(0.0, 1.0).steps(64).choices(y0.as_tensor())?;
    /// println!("{choices}");
    /// let (first, last) = (&choices.0[0], choices.0.last().unwrap());
    /// assert!(first.calls() < last.calls());
    /// # Ok::<(), OdeError>(())
    /// ```
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn choices(&self, y0: impl Into<State>) -> Result<Choices> {
        let y0: State = y0.into();
        if self.is_adaptive() {
            return unplanned("adaptive steps");
        }
        let steps = self.with_times_read()?.time_grid()?.steps();
        let discrete = match &self.adjoint {
            Adjoint::Discrete(discrete) => discrete.take_budget().map_or_else(|| discrete.clone(), |(_, plain)| plain),
            _ => Discrete::default(),
        };
        let linearizes = self.solver.tableau().is_some() && !self.time_tensors.is_tracked();
        let precision = self.precision.unwrap_or_else(|| default_precision(&y0));
        let mut choices = vec![];
        for tile in self.rows_to_choose_from(&y0)? {
            for (name, adjoint) in discrete.choices(steps, linearizes, tile.is_some()) {
                let name = tile.map_or_else(|| name.clone(), |rows| format!("{name}, tiles of {rows}"));
                let ode = tile.into_iter().fold(self.clone(), Self::tile);
                let plan = ode.adjoint(adjoint.clone()).plan(&y0)?;
                let width = adjoint.keeping(precision).codec.dtype().size_in_bytes();
                choices.push(Choice { name, adjoint, tile, plan, width });
            }
        }
        Ok(Choices::new(choices))
    }

    /// The rows of tiles among which a budget may choose: those asked for, or the default and smaller ones.
    fn rows_to_choose_from(&self, y0: &State) -> Result<Vec<Option<usize>>> {
        let Some(tiles) = self.tiles(y0)? else { return Ok(vec![None]) };
        match self.cut.rows {
            Some(rows) => Ok(vec![Some(rows)]),
            None => {
                let smaller = std::iter::successors(Some(tiles.rows()), |rows| (*rows > 1).then(|| rows.div_ceil(4)));
                Ok(smaller.take(3).map(Some).collect())
            }
        }
    }

    /// Itself with what fits the budget, if there is one.
    pub(super) fn within_budget(&self, y0: &State) -> Result<Option<Self>> {
        let Adjoint::Discrete(discrete) = &self.adjoint else { return Ok(None) };
        if !self.tracked {
            return Ok(None);
        }
        let Some((budget, plain)) = discrete.take_budget() else { return Ok(None) };
        if let Some(what) = self.without_plan() {
            let what = format!("a budget of {budget} bytes for {what}, whose memory cannot be planned,");
            return Err(OdeError::Unsupported { what, instead: "say how many states to keep: .checkpoints(c)" });
        }
        let shapes: Vec<_> =
            y0.tensors().iter().chain(&self.inputs).map(|x| (x.dims(), x.dtype(), x.track_op())).collect();
        let (grid, solver) = ((self.span, self.steps, &self.grid), self.solver.name());
        let precision = (self.precision, self.scaling.as_ref().map(AdjointScaling::name));
        // On more threads more is live at once.
        let (outputs, cut) = (&self.save_at, (self.cut, self.tiles(y0)?.map_or(1, |tiles| tiles.on_threads())));
        let settings = format!("{shapes:?} {grid:?} {solver} {precision:?} {outputs:?} {cut:?} {plain:?} {budget}");
        let fitting = || self.choices(y0)?.within(budget).map(|choice| (choice.adjoint.clone(), choice.tile));
        let (adjoint, tile) = self.known.choose(settings, fitting)?;
        Ok(Some(tile.into_iter().fold(self.clone().adjoint(adjoint), Self::tile)))
    }

    /// What of it cannot be planned.
    fn without_plan(&self) -> Option<&'static str> {
        match () {
            () if self.is_adaptive() => Some("adaptive steps"),
            () if self.dense || self.interpolate => Some("dense output"),
            () => None,
        }
    }
}

/// What a plan does not know.
fn unplanned<T>(what: &str) -> Result<T> {
    let what = format!("planning the memory of {what}");
    let instead = "plan Discrete, Reconstruct or Backsolve over given steps (.steps(n), .grid(..)), or measure it with MemoryProfiler";
    Err(OdeError::Unsupported { what, instead })
}
