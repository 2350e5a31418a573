//! What one evaluation, one linearisation and one pullback of a field cost in heap, measured at the start of a solve.
//!
//! The first round warms up (packing buffers of matrix products, thread-locals) and does not count; of the others the
//! least counts, since a thread that joins late takes its buffers then. No step is made.

use crate::State;
use crate::error::Result;
use crate::field::ops::combine;
use crate::field::{Casts, Field, Gradients, Opening};
use crate::memory::meter::{Held, TrackingAllocator, held};
use crate::scaling::{AdjointScaling, PowerOfTwo, Rule};
use crate::solver::{Clock, Pullbacks, Slopes, StageScale, Stages};
use crate::stats::Counters;
use candle_core::{DType, Shape, Tensor};
use std::rc::Rc;

/// Rounds of which the least counts.
const ROUNDS: usize = 3;

/// Bytes of a field at one shape. All but `casts`, `sums` and `time` are zero where nothing counts the heap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Costs {
    /// Parameters and inputs in the compute dtype that are copies: exact.
    pub(super) casts: usize,
    /// Sums of dL/dθ: exact.
    pub(super) sums: usize,
    /// A stage's time on the device, in the dtypes in which the field asks for it: exact.
    pub(super) time: usize,
    /// What goes with the casts and sums that is not in them: handles, names.
    pub(super) casts_beside: usize,
    pub(super) sums_beside: usize,
    /// The model, opened for evaluations and for linearisations.
    pub(super) evaluated_model: usize,
    pub(super) linearised_model: usize,
    /// What a state of one pass takes beside its elements.
    pub(super) state_beside: usize,
    /// At most during an evaluation, its value included.
    pub(super) evaluation: usize,
    /// At most during a linearisation, and what stays until it is dropped.
    pub(super) linearisation: usize,
    pub(super) linearised: usize,
    /// At most during a pullback, its result included.
    pub(super) pullback: usize,
}

/// What a probe is made of.
pub(super) struct Probed<'a> {
    pub(super) field: &'a dyn Field,
    pub(super) inputs: &'a [Tensor],
    pub(super) start: &'a State,
    pub(super) clock: &'a Clock,
    pub(super) compute: DType,
    pub(super) accumulate: DType,
    pub(super) scaling: &'a AdjointScaling,
    pub(super) seed: u64,
    /// Whether a backward pass follows.
    pub(super) tracked: bool,
}

/// What costs depend on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Key {
    shapes: Vec<Shape>,
    inputs: Vec<(Shape, DType)>,
    dtypes: (DType, DType),
    scaling: &'static str,
    tracked: bool,
}

impl Probed<'_> {
    pub(super) fn key(&self) -> Key {
        Key {
            shapes: self.start.tensors().iter().map(|x| x.shape().clone()).collect(),
            inputs: self.inputs.iter().map(|x| (x.shape().clone(), x.dtype())).collect(),
            dtypes: (self.compute, self.accumulate),
            scaling: self.scaling.name(),
            tracked: self.tracked,
        }
    }

    pub(super) fn measure(&self) -> Result<Costs> {
        let rounds = if TrackingAllocator::is_installed() { ROUNDS } else { 0 };
        let mut costs = self.round()?;
        for n in 0..rounds {
            let round = self.round()?;
            costs = if n == 0 { round } else { costs.least(&round) };
        }
        Ok(if rounds == 0 { costs.exact() } else { costs })
    }

    fn round(&self) -> Result<Costs> {
        let mut costs = Costs::default();
        let counters = Counters::default();
        let device = self.start.device();
        let (casts, held) = held(|| self.field.params().cast(self.inputs, self.compute, device))?;
        costs.casts = casts.bytes();
        costs.casts_beside = held.kept.saturating_sub(costs.casts);
        costs.state_beside = self.beside()?;

        let (model, held) = held_by(|| self.field.open(&casts, Opening::Evaluate, self.seed))?;
        costs.evaluated_model = held.kept;
        let at = self.clock.step(0, self.compute);
        let point = self.start.detach().try_map(|x| combine::combine(Some(x), &[], self.compute))?;
        let stages = Stages::new(model.as_ref(), self.accumulate, &counters, Slopes::Cut);
        // The column of times is uploaded by the first evaluation.
        stages.slope(&at, 0, &point)?;
        let (slope, held) = held_by(|| stages.slope(&at, 0, &point))?;
        costs.evaluation = held.most;
        drop(slope);
        if self.tracked {
            self.linearise(&casts, &point, &counters, &mut costs)?;
        }
        costs.time = self.clock.bytes() / self.clock.len();
        Ok(costs)
    }

    fn linearise(&self, casts: &Casts, point: &State, counters: &Counters, costs: &mut Costs) -> Result<()> {
        let (model, held) = held_by(|| self.field.open(casts, Opening::Linearize, self.seed))?;
        costs.linearised_model = held.kept;
        let at = self.clock.step(0, self.compute);
        let stages = Stages::new(model.as_ref(), self.accumulate, counters, Slopes::Cut);
        let (linearization, held) = held_by(|| stages.linearize(&at, 0, point))?;
        (costs.linearisation, costs.linearised) = (held.most, held.kept);
        // A cotangent of ordinary size, in storage of its own as in a solve.
        let kappa = self.start.detach().try_map(|x| combine::combine(Some(x), &[(0.5, x)], self.accumulate))?;
        let mut gradients = Gradients::new(casts.leaves().len(), self.accumulate);
        gradients.bind(model.leaves());
        let pull = |gradients: &mut Gradients| {
            let mut pullbacks = Pullbacks::new(gradients, self.scale(), counters);
            pullbacks.pull(linearization.as_ref(), &at, 0, &kappa)
        };
        // The first pullback makes the sums.
        let (mu, first) = held_by(|| pull(&mut gradients))?;
        drop(mu);
        let (mu, steady) = held_by(|| pull(&mut gradients))?;
        drop(mu);
        costs.pullback = steady.most;
        costs.sums = gradients.bytes();
        costs.sums_beside = first.kept.saturating_sub(steady.kept).saturating_sub(costs.sums);
        Ok(())
    }

    fn scale(&self) -> StageScale {
        let half = self.compute.size_in_bytes() < 4;
        match self.scaling.rule {
            Rule::PerStep if half => StageScale::FromCotangent(Rc::new(PowerOfTwo::new(0))),
            Rule::Static(s) => StageScale::Fixed(s),
            Rule::Dynamic if half => StageScale::Fixed(0.5),
            _ => StageScale::Fixed(1.0),
        }
    }

    fn beside(&self) -> Result<usize> {
        let copy = || self.start.detach().try_map(|x| combine::combine(Some(x), &[(0.5, x)], self.accumulate));
        let (copy, held) = held_by(copy)?;
        Ok(held.kept.saturating_sub(copy.bytes(self.accumulate)))
    }
}

/// As [`held`], for whatever error.
fn held_by<T, E: Into<crate::OdeError>>(run: impl FnOnce() -> std::result::Result<T, E>) -> Result<(T, Held)> {
    held(|| run().map_err(Into::into))
}

impl Costs {
    /// What follows from shapes alone.
    fn exact(&self) -> Self {
        Self { casts: self.casts, sums: self.sums, time: self.time, ..Self::default() }
    }

    fn least(&self, other: &Self) -> Self {
        Self {
            casts_beside: self.casts_beside.min(other.casts_beside),
            sums_beside: self.sums_beside.min(other.sums_beside),
            evaluated_model: self.evaluated_model.min(other.evaluated_model),
            linearised_model: self.linearised_model.min(other.linearised_model),
            state_beside: self.state_beside.min(other.state_beside),
            evaluation: self.evaluation.min(other.evaluation),
            linearisation: self.linearisation.min(other.linearisation),
            linearised: self.linearised.min(other.linearised),
            pullback: self.pullback.min(other.pullback),
            ..self.exact()
        }
    }
}
