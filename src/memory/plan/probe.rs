//! What one evaluation, one linearisation and one pullback of a field cost in heap, measured at the start of a solve.
//!
//! The first round warms up (packing buffers of matrix products, thread-locals) and does not count; of the others the
//! least counts, since a thread that joins late takes its buffers then. No step is made.

use crate::State;
use crate::account::{Category, alive_here, at_most};
use crate::error::Result;
use crate::field::ops::combine;
use crate::field::{Casts, Field, Gradients, Linearization, Opening};
use crate::memory::meter::{Held, TrackingAllocator, held};
use crate::scaling::{AdjointScaling, PowerOfTwo, Rule};
use crate::solver::{Clock, Pullbacks, Slopes, StageScale, Stages, Tableau, bare};
use crate::stats::Counters;
use crate::workers::sharing;
use candle_core::{DType, Shape, Tensor};
use std::rc::Rc;

/// Rounds of which the least counts.
const ROUNDS: usize = 3;

/// Bytes of a field at one shape. All but `casts`, `sums`, `time` and `layers` are zero where
/// nothing counts the heap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Costs {
    /// Parameters and inputs in the compute dtype that are copies: exact.
    pub(super) casts: usize,
    /// Sums of dL/dθ: exact.
    pub(super) sums: usize,
    /// A stage's time on the device, in the dtypes in which the field asks for it: exact.
    pub(super) time: usize,
    /// What the layers of the field hold of their own: exact.
    pub(super) layers: Layers,
    /// What goes with the casts that is not in them: handles, names.
    pub(super) casts_beside: usize,
    /// The model, opened for evaluations and for linearisations, with what a session of it has once it is warm.
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
    /// Of steps that run on buffers, where they do.
    pub(super) bare: Option<BareSteps>,
}

/// Steps that run on buffers: see [`VectorField::bare`](crate::VectorField::bare).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BareSteps {
    /// Scratch of a session that has taken such a step: one that evaluates, and one that linearises.
    pub(super) step: usize,
    pub(super) advance: usize,
    /// Of one that has pulled such a step back, alone and after others were taken.
    pub(super) pullback: usize,
    pub(super) after_advance: usize,
    /// At most during a step and during its pullback beside that, their results included. These are zero where nothing
    /// counts the heap.
    pub(super) step_most: usize,
    pub(super) pullback_most: usize,
}

/// Scratch of a field's layers: weights packed once per solve and once per backward pass, and buffers that one call
/// hands on to the next, of which a session has as many as it ever needed at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layers {
    /// Weights, packed by the first evaluation, and anew while a pass linearises.
    pub(super) packed: usize,
    pub(super) packed_back: usize,
    /// Buffers for an evaluation, for a linearisation, for each further one that lives beside it, for an evaluation
    /// while linearisations are kept, and for a pullback: after such an evaluation, and without one.
    pub(super) evaluation: usize,
    pub(super) linearisation: usize,
    pub(super) further: usize,
    pub(super) beside: usize,
    pub(super) pullback: usize,
    pub(super) pullback_alone: usize,
    /// Of the buffers of such pullbacks, those of a size that linearisations take afterwards.
    pub(super) reused: usize,
    pub(super) reused_alone: usize,
    /// What a pullback needs for a moment: sums in F32, on their way into those in F64.
    pub(super) moment: usize,
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
    /// Whether the forward pass keeps linearisations: its session is one that linearises.
    pub(super) linearizes: bool,
    /// The method whose steps run on buffers, if the field can.
    pub(super) tableau: Option<&'a Tableau>,
    /// Threads among which kernels share their work, if it is said how many.
    pub(super) threads: Option<usize>,
}

/// What costs depend on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Key {
    shapes: Vec<Shape>,
    /// With whether they have gradients.
    inputs: Vec<(Shape, DType, bool)>,
    dtypes: (DType, DType),
    scaling: &'static str,
    tracked: bool,
    linearizes: bool,
    tableau: Option<String>,
    threads: Option<usize>,
}

impl Probed<'_> {
    pub(super) fn key(&self) -> Key {
        Key {
            shapes: self.start.tensors().iter().map(|x| x.shape().clone()).collect(),
            inputs: self.inputs.iter().map(|x| (x.shape().clone(), x.dtype(), x.track_op())).collect(),
            dtypes: (self.compute, self.accumulate),
            scaling: self.scaling.name(),
            tracked: self.tracked,
            linearizes: self.linearizes,
            tableau: self.tableau.map(|tableau| format!("{tableau:?}")),
            threads: self.threads,
        }
    }

    pub(super) fn measure(&self) -> Result<Costs> {
        let rounds = if TrackingAllocator::is_installed() { ROUNDS } else { 0 };
        let round = || sharing(self.threads, || self.round());
        let mut costs = round()?;
        for n in 0..rounds {
            let round = round()?;
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

        let point = self.start.detach().try_map(|x| combine::combine(Some(x), &[], self.compute))?;
        self.evaluate(&casts, &point, &counters, &mut costs)?;
        if self.tracked {
            self.linearise(&casts, &point, &counters, &mut costs)?;
            self.bare_pullback(&casts, &mut costs)?;
        }
        costs.time = self.clock.bytes() / self.clock.len();
        Ok(costs)
    }

    fn evaluate(&self, casts: &Casts, point: &State, counters: &Counters, costs: &mut Costs) -> Result<()> {
        let before = alive_here(Category::Scratch);
        let times = self.clock.bytes();
        let (model, held) = held_by(|| self.field.open(casts, Opening::Evaluate, self.seed))?;
        let at = self.clock.step(0, self.compute);
        let stages = Stages::new(model.as_ref(), self.accumulate, counters, Slopes::Cut);
        // The first evaluation uploads the column of times, packs weights and makes buffers.
        let ((), warm) = held_by(|| stages.slope(&at, 0, point).map(drop))?;
        let grown = |before: i64, times: usize| {
            let columns = self.clock.bytes() - times;
            grown_since(before).saturating_sub(columns)
        };
        let all = grown(before, times);
        let (slope, evaluation) = held_by(|| stages.slope(&at, 0, point))?;
        costs.evaluation = evaluation.most;
        drop(slope);
        let stepped = self.bare_step(&stages)?.map(|most| (most, grown(before, times)));
        costs.evaluated_model = held.kept + warm.kept.saturating_sub(all);
        drop(model);
        costs.layers.packed = grown(before, times);
        costs.layers.evaluation = all.saturating_sub(costs.layers.packed);
        costs.bare = stepped.map(|(step_most, all)| BareSteps {
            step: all.saturating_sub(costs.layers.packed),
            step_most,
            ..BareSteps::default()
        });
        Ok(())
    }

    /// Takes a step on buffers, if the field can: at most that takes so many bytes beside them.
    fn bare_step(&self, stages: &Stages<'_>) -> Result<Option<usize>> {
        let start = self.start.detach();
        let (Some(tableau), Some(layers)) = (self.tableau, stages.bare(&[&start])) else { return Ok(None) };
        let at = self.clock.step(0, self.compute);
        let step = || held_by(|| bare::step(tableau, layers, stages, &at, &start));
        step()?;
        Ok(Some(step()?.1.most))
    }

    /// The same, and a pullback.
    fn bare_pullback(&self, casts: &Casts, costs: &mut Costs) -> Result<()> {
        let (Some(tableau), Some(mut found)) = (self.tableau, costs.bare) else { return Ok(()) };
        let (packed, counters) = (costs.layers.packed_back, Counters::default());
        for advances in [false, true] {
            let (before, times) = (alive_here(Category::Scratch), self.clock.bytes());
            let model = self.field.open(casts, Opening::Linearize, self.seed)?;
            let at = self.clock.step(0, self.compute);
            let stages = Stages::new(model.as_ref(), self.accumulate, &counters, Slopes::Cut);
            let grown = || grown_since(before).saturating_sub(self.clock.bytes() - times + packed);
            if advances {
                self.bare_step(&stages)?;
                found.advance = grown();
            }
            let mut gradients = Gradients::new(casts.leaves().len(), self.accumulate);
            gradients.bind(model.leaves());
            let lambda = self.start.detach();
            let Some(layers) = stages.bare(&[&lambda]) else { return Ok(()) };
            let mut pull = || {
                let mut pullbacks = Pullbacks::new(&mut gradients, self.scale(), &counters);
                let y = lambda.clone();
                held_by(|| bare::pullback(tableau, layers, &stages, &at, y, &lambda, &mut pullbacks))
            };
            pull()?;
            found.pullback_most = pull()?.1.most;
            let all = grown();
            if advances { found.after_advance = all } else { found.pullback = all }
        }
        costs.bare = Some(found);
        Ok(())
    }

    fn linearise(&self, casts: &Casts, point: &State, counters: &Counters, costs: &mut Costs) -> Result<()> {
        let before = alive_here(Category::Scratch);
        let grown = || grown_since(before);
        let (model, held) = held_by(|| self.field.open(casts, Opening::Linearize, self.seed))?;
        let at = self.clock.step(0, self.compute);
        let stages = Stages::new(model.as_ref(), self.accumulate, counters, Slopes::Cut);
        // A cotangent of ordinary size, in storage of its own as in a solve.
        let kappa = self.start.detach().try_map(|x| combine::combine(Some(x), &[(0.5, x)], self.accumulate))?;
        let mut gradients = Gradients::new(casts.leaves().len(), self.accumulate);
        gradients.bind(model.leaves());
        let pull = |gradients: &mut Gradients, linearization: &dyn Linearization| {
            let mut pullbacks = Pullbacks::new(gradients, self.scale(), counters);
            pullbacks.pull(linearization, &at, 0, &kappa)
        };
        // The layers make their buffers, and the first pullback the sums.
        let (needed, warm) = held_by(|| {
            // In the order in which a session that keeps linearisations needs them.
            let evaluate = || if self.linearizes { stages.slope(&at, 0, point).map(drop) } else { Ok(()) };
            evaluate()?;
            let zero = grown().saturating_sub(casts.packed_back());
            let first = stages.linearize(&at, 0, point)?;
            let packed = casts.packed_back();
            let one = grown().saturating_sub(packed);
            let second = stages.linearize(&at, 0, point)?;
            let two = grown().saturating_sub(packed);
            evaluate()?;
            let beside = grown().saturating_sub(packed);
            drop(pull(&mut gradients, second.as_ref())?);
            let all = grown().saturating_sub(packed);
            // Where linearisations are kept, others are made after a pullback.
            let more = (0..if self.linearizes { 2 } else { 0 }).map(|_| stages.linearize(&at, 0, point));
            let more = more.collect::<Result<Vec<_>>>()?;
            let four = grown().saturating_sub(packed);
            drop((first, second, more));
            costs.layers.packed_back = packed;
            Ok::<_, crate::OdeError>([zero, one, two, beside, all, four])
        })?;
        costs.sums = gradients.bytes();
        let (linearization, steady) = held_by(|| stages.linearize(&at, 0, point))?;
        (costs.linearisation, costs.linearised) = (steady.most, steady.kept);
        let pulling = || held_by(|| pull(&mut gradients, linearization.as_ref()));
        let (pulled, moment) = at_most(Category::Scratch, pulling);
        let (mu, steady) = pulled?;
        costs.layers.moment = moment;
        drop((mu, linearization));
        costs.pullback = steady.most;
        costs.linearised_model =
            held.kept + warm.kept.saturating_sub(needed[5] + costs.layers.packed_back + costs.sums);
        drop(model);
        let [zero, one, two, beside, all, four] = needed;
        let evaluation = if self.linearizes { zero } else { costs.layers.evaluation };
        let differences = (one, two.saturating_sub(one), beside.saturating_sub(two), all.saturating_sub(beside));
        let layers = &mut costs.layers;
        layers.evaluation = evaluation;
        (layers.linearisation, layers.further, layers.beside, layers.pullback) = differences;
        layers.reused = (2 * layers.further).saturating_sub(four.saturating_sub(all));
        (layers.pullback_alone, layers.reused_alone) = (layers.pullback, layers.reused);
        if self.linearizes {
            let (pullback, two_more) = self.pull_alone(casts, point, counters)?;
            layers.pullback_alone = pullback;
            layers.reused_alone = (2 * layers.further).saturating_sub(two_more);
        }
        Ok(())
    }

    /// Buffers for the pullback of a session that has evaluated nothing while its linearisations live, and for two more
    /// of them after it.
    fn pull_alone(&self, casts: &Casts, point: &State, counters: &Counters) -> Result<(usize, usize)> {
        let model = self.field.open(casts, Opening::Linearize, self.seed)?;
        let at = self.clock.step(0, self.compute);
        let stages = Stages::new(model.as_ref(), self.accumulate, counters, Slopes::Cut);
        let mut gradients = Gradients::new(casts.leaves().len(), self.accumulate);
        gradients.bind(model.leaves());
        drop(stages.slope(&at, 0, point)?);
        let kept = [stages.linearize(&at, 0, point)?, stages.linearize(&at, 0, point)?];
        let before = alive_here(Category::Scratch);
        let kappa = self.start.try_map(|x| combine::combine(Some(x), &[(0.5, x)], self.accumulate))?;
        drop(Pullbacks::new(&mut gradients, self.scale(), counters).pull(kept[1].as_ref(), &at, 0, &kappa)?);
        let pullback = grown_since(before);
        drop(kappa);
        let _more = [stages.linearize(&at, 0, point)?, stages.linearize(&at, 0, point)?];
        Ok((pullback, grown_since(before).saturating_sub(pullback)))
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
        let bare = self.bare.map(|bare| BareSteps { step_most: 0, pullback_most: 0, ..bare });
        Self { casts: self.casts, sums: self.sums, time: self.time, layers: self.layers, bare, ..Self::default() }
    }

    fn least(&self, other: &Self) -> Self {
        Self {
            casts_beside: self.casts_beside.min(other.casts_beside),
            evaluated_model: self.evaluated_model.min(other.evaluated_model),
            linearised_model: self.linearised_model.min(other.linearised_model),
            state_beside: self.state_beside.min(other.state_beside),
            evaluation: self.evaluation.min(other.evaluation),
            linearisation: self.linearisation.min(other.linearisation),
            linearised: self.linearised.min(other.linearised),
            pullback: self.pullback.min(other.pullback),
            bare: self.bare.zip(other.bare).map(|(bare, other)| BareSteps {
                step_most: bare.step_most.min(other.step_most),
                pullback_most: bare.pullback_most.min(other.pullback_most),
                ..bare
            }),
            ..self.exact()
        }
    }
}

/// Scratch that this thread has more of than `before`.
fn grown_since(before: i64) -> usize {
    usize::try_from(alive_here(Category::Scratch) - before).unwrap_or(0)
}
