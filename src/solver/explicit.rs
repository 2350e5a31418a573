//! One step of any explicit Runge–Kutta method, and its pullback.
//!
//! Forward: Yᵢ = y + h Σ_{j<i} aᵢⱼ kⱼ, kᵢ = f(t + cᵢh, Yᵢ) in the compute dtype; y⁺ = y + h Σ bᵢ kᵢ in the accumulate
//! dtype. Pullback of λ, for i = s … 1: κᵢ = h (bᵢ λ + Σ_{j>i} aⱼᵢ μⱼ), μᵢ = (∂f/∂y)ᵀκᵢ at Yᵢ, θ̄ += (∂f/∂θ)ᵀκᵢ; at
//! last dL/dy = λ + Σ μᵢ.

use super::bare;
use super::stages::{Pullbacks, Stages, StepAt};
use super::tableau::Tableau;
use super::watch::Watch;
use super::{EstimatedStep, Slope, Solver, Step};
use crate::State;
use crate::account::Category;
use crate::error::{OdeError, Result};
use crate::field::{Linearization, sum};
use std::fmt::Debug;

/// An explicit Runge–Kutta method is its tableau.
///
/// ```
/// use candle_ode::prelude::*;
///
/// // A method of one's own: implement this for a type, or hand a `Tableau` to `Ode::solver`.
/// let third = Tableau::new("Ralston 3", 3, &[&[0.5], &[0.0, 0.75]], &[2. / 9., 1. / 3., 4. / 9.])?;
/// assert_eq!(Solver::order(&third), 3);
/// # Ok::<(), OdeError>(())
/// ```
pub trait ExplicitRungeKutta: Debug + Send + Sync + 'static {
    /// The coefficients.
    fn tableau(&self) -> &Tableau;
}

impl ExplicitRungeKutta for Tableau {
    fn tableau(&self) -> &Tableau {
        self
    }
}

/// How many linearisations of a step live at once in the backward pass. The gradients are the same to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StageMemory {
    /// All s: s evaluations a step (each inside a linearisation), s live graphs.
    #[default]
    All,
    /// One: 2s − 1 evaluations a step, one live graph.
    One,
}

impl<M: ExplicitRungeKutta> Solver for M {
    fn name(&self) -> &str {
        ExplicitRungeKutta::tableau(self).name()
    }

    fn order(&self) -> usize {
        ExplicitRungeKutta::tableau(self).order()
    }

    fn nodes(&self) -> &[f64] {
        ExplicitRungeKutta::tableau(self).nodes()
    }

    fn tableau(&self) -> Option<&Tableau> {
        Some(ExplicitRungeKutta::tableau(self))
    }

    fn step(&self, stages: &Stages<'_>, at: &StepAt<'_>, y: &State) -> Result<Step> {
        let tableau = ExplicitRungeKutta::tableau(self);
        if let Some(layers) = stages.bare(&[y])
            && let Some(step) = bare::step(tableau, layers, stages, at, y)?
        {
            return Ok(step);
        }
        Ok(stepped(tableau, stages, at, y, None, &used(tableau))?.0)
    }

    fn linearized_step(&self, stages: &Stages<'_>, at: &StepAt<'_>, y: &State) -> Result<Option<(Step, Linearized)>> {
        let tableau = ExplicitRungeKutta::tableau(self);
        let mut watch = Watch::new(tableau);
        let all = linearizations(tableau, stages, at, y, |i, point| watch.point(tableau, at, i, point))?;
        let terms = weighted(at.h, tableau.weights().iter().copied(), values(&all));
        let y = sum(Some(y), &terms, stages.accumulate())?;
        let finite = watch.finite(&y, values(&all))?;
        Ok(Some((Step { y, finite }, Linearized(all))))
    }

    fn pullback_linearized(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        linearized: &Linearized,
        lambda: &State,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State> {
        let tableau = ExplicitRungeKutta::tableau(self);
        let mus = pull(tableau, stages, at, Points::Kept(linearized), (1.0, lambda), pullbacks)?;
        sum(Some(lambda), &cotangents(&mus), stages.accumulate())
    }

    fn estimate_order(&self) -> Option<usize> {
        ExplicitRungeKutta::tableau(self)
            .embedded_order()
            .map(|order| order.min(ExplicitRungeKutta::tableau(self).order()))
    }

    fn estimated_step(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        first: Option<&Slope>,
    ) -> Result<EstimatedStep> {
        let tableau = ExplicitRungeKutta::tableau(self);
        let (weights, matter) = estimate(tableau)?;
        let (step, slopes) = stepped(tableau, stages, at, y, first, &matter)?;
        let terms = weighted(at.h, weights.iter().copied(), states(&slopes));
        let error = sum(None, &terms, stages.accumulate())?.detach();
        let first_same_as_last = tableau.is_fsal() && slopes.last().is_some_and(Option::is_some);
        Ok(EstimatedStep { step, error, weights, slopes, first_same_as_last })
    }

    fn interpolated(&self, theta: f64) -> Option<Tableau> {
        Some(ExplicitRungeKutta::tableau(self).interpolated(theta))
    }

    fn pullback(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: State,
        lambda: &State,
        memory: StageMemory,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State> {
        let tableau = ExplicitRungeKutta::tableau(self);
        if let (Some(layers), StageMemory::All) = (stages.bare(&[&y, lambda]), memory) {
            return bare::pullback(tableau, layers, stages, at, y, lambda, pullbacks);
        }
        let points = Points::new(tableau, stages, at, &y, memory)?;
        drop(y);
        let mus = pull(tableau, stages, at, points, (1.0, lambda), pullbacks)?;
        sum(Some(lambda), &cotangents(&mus), stages.accumulate())
    }
}

/// μᵢ by stage, for the cotangent `factor`·λ of the increment h Σ bᵢ kᵢ; θ̄ goes through `pullbacks`.
pub(super) fn pull(
    tableau: &Tableau,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    mut points: Points<'_>,
    (factor, lambda): (f64, &State),
    pullbacks: &mut Pullbacks<'_>,
) -> Result<Vec<Option<Slope>>> {
    let mut mus: Vec<Option<Slope>> = (0..tableau.stages()).map(|_| None).collect();
    for i in stages_used(tableau).rev() {
        let _span = tracing::trace_span!(target: "candle_ode", "stage", index = i).entered();
        let Some(linearization) = points.take(tableau, stages, at, i)? else { continue };
        let of_lambda = std::iter::once((factor * tableau.weights()[i], Some(lambda)));
        let of_later = (i + 1..tableau.stages()).map(|j| (tableau.a(j, i), mus[j].as_ref().map(Slope::state)));
        let (coefficients, states): (Vec<_>, Vec<_>) = of_lambda.chain(of_later).unzip();
        let kappa = sum(None, &weighted(at.h, coefficients, states), stages.accumulate())?;
        let kappa = Slope::new(kappa, Category::Cotangents);
        let mu = pullbacks.pull(linearization.get(), at, i, kappa.state())?;
        mus[i] = Some(Slope::new(mu, Category::Cotangents));
    }
    Ok(mus)
}

/// The terms of Σ μᵢ.
pub(super) fn cotangents(mus: &[Option<Slope>]) -> Vec<(f64, &State)> {
    mus.iter().flatten().map(|mu| (1.0, mu.state())).collect()
}

/// The terms of factor · h Σ bᵢ kᵢ.
pub(super) fn increment<'a>(
    tableau: &Tableau,
    at: &StepAt<'_>,
    factor: f64,
    slopes: impl IntoIterator<Item = Option<&'a State>>,
) -> Vec<(f64, &'a State)> {
    weighted(factor * at.h, tableau.weights().iter().copied(), slopes)
}

/// A step by the stages that `matter`, with their slopes.
fn stepped(
    tableau: &Tableau,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    y: &State,
    first: Option<&Slope>,
    matter: &[bool],
) -> Result<(Step, Vec<Option<Slope>>)> {
    let mut watch = Watch::new(tableau);
    let slopes = slopes(tableau, stages, at, y, first, matter, |i, point, _| watch.point(tableau, at, i, point))?;
    let terms = weighted(at.h, tableau.weights().iter().copied(), states(&slopes));
    let y = sum(Some(y), &terms, stages.accumulate())?;
    let finite = watch.finite(&y, states(&slopes))?;
    Ok((Step { y, finite }, slopes))
}

pub(super) fn states(slopes: &[Option<Slope>]) -> impl Iterator<Item = Option<&State>> {
    slopes.iter().map(|k| k.as_ref().map(Slope::state))
}

/// By stage, dᵢ = bᵢ − b̂ᵢ, and whether it matters for y⁺ or for the estimate of its error.
pub(crate) fn estimate(tableau: &Tableau) -> Result<(Vec<f64>, Vec<bool>)> {
    let Some(embedded) = tableau.embedded() else {
        return Err(OdeError::NoErrorEstimate { solver: tableau.name().to_owned() });
    };
    let weights: Vec<f64> = tableau.weights().iter().zip(embedded).map(|(b, embedded)| b - embedded).collect();
    let mut matter = used(tableau);
    matter.iter_mut().zip(&weights).for_each(|(matters, weight)| *matters |= *weight != 0.0);
    Ok((weights, matter))
}

/// By stage, whether it matters for y⁺.
pub(super) fn used(tableau: &Tableau) -> Vec<bool> {
    (0..tableau.stages()).map(|i| tableau.is_used(i)).collect()
}

/// The stages that matter for y⁺.
pub(super) fn stages_used(tableau: &Tableau) -> impl DoubleEndedIterator<Item = usize> {
    (0..tableau.stages()).filter(|&i| tableau.is_used(i))
}

/// k₁ … of the stages that `matter`, the first of them taken from `first` if it is known; `see` is shown each other
/// stage state and its slope.
pub(super) fn slopes(
    tableau: &Tableau,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    y: &State,
    first: Option<&Slope>,
    matter: &[bool],
    mut see: impl FnMut(usize, &State, &State) -> Result<()>,
) -> Result<Vec<Option<Slope>>> {
    let mut slopes: Vec<Option<Slope>> = Vec::with_capacity(matter.len());
    for (i, matters) in matter.iter().enumerate() {
        let known = first.filter(|_| i == 0);
        if !matters || known.is_some() {
            slopes.push(known.cloned());
            continue;
        }
        let _span = tracing::trace_span!(target: "candle_ode", "stage", index = i).entered();
        let point = stage_state(tableau, at, y, i, |j| slopes[j].as_ref().map(Slope::state))?;
        let k = stages.slope(at, i, &point)?;
        see(i, &point, &k)?;
        slopes.push(Some(Slope::new(k, Category::Stages)));
    }
    Ok(slopes)
}

fn linearizations(
    tableau: &Tableau,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    y: &State,
    mut see: impl FnMut(usize, &State) -> Result<()>,
) -> Result<Vec<Option<Box<dyn Linearization>>>> {
    let mut all: Vec<Option<Box<dyn Linearization>>> = Vec::with_capacity(tableau.stages());
    for i in 0..tableau.stages() {
        let linearization = if tableau.is_used(i) {
            let _span = tracing::trace_span!(target: "candle_ode", "stage", index = i).entered();
            let point = stage_state(tableau, at, y, i, |j| all[j].as_ref().map(|f| f.value()))?;
            let linearization = stages.linearize(at, i, &point)?;
            see(i, &point)?;
            Some(linearization)
        } else {
            None
        };
        all.push(linearization);
    }
    Ok(all)
}

/// The linearisations of a step, by stage: all that its pullback needs.
pub struct Linearized(Vec<Option<Box<dyn Linearization>>>);

impl Debug for Linearized {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} linearisations", self.0.iter().flatten().count())
    }
}

/// The error of a solver that cannot keep linearisations.
pub(crate) fn no_linearizations(solver: &str) -> OdeError {
    OdeError::Unsupported {
        what: format!("keeping the linearisations of the steps of {solver}"),
        instead: "use an explicit Runge–Kutta method, or keep states alone",
    }
}

/// kᵢ by stage.
fn values(all: &[Option<Box<dyn Linearization>>]) -> impl Iterator<Item = Option<&State>> {
    all.iter().map(|f| f.as_ref().map(|f| f.value()))
}

/// What the backward pass holds of the stages of a step.
pub(super) enum Points<'a> {
    All(Vec<Option<Box<dyn Linearization>>>),
    Kept(&'a Linearized),
    One { y: State, slopes: Vec<Option<Slope>> },
}

/// The linearisation of one stage.
pub(super) enum Taken<'a> {
    Own(Box<dyn Linearization>),
    Kept(&'a dyn Linearization),
}

impl Taken<'_> {
    fn get(&self) -> &dyn Linearization {
        match self {
            Self::Own(linearization) => linearization.as_ref(),
            Self::Kept(linearization) => *linearization,
        }
    }
}

impl<'a> Points<'a> {
    /// What is needed to pull a cotangent back through the stages.
    pub(super) fn new(
        tableau: &Tableau,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        memory: StageMemory,
    ) -> Result<Self> {
        // The slope of the last stage that matters would be of no use.
        let last = stages_used(tableau).last().unwrap_or(0);
        Self::below(tableau, stages, at, y, memory, last)
    }

    /// The same with all slopes, for those who need the [`increment`] too.
    pub(super) fn with_slopes(
        tableau: &Tableau,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        memory: StageMemory,
    ) -> Result<Self> {
        Self::below(tableau, stages, at, y, memory, tableau.stages())
    }

    fn below(
        tableau: &Tableau,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        memory: StageMemory,
        end: usize,
    ) -> Result<Self> {
        Ok(match memory {
            StageMemory::All => Self::All(linearizations(tableau, stages, at, y, |_, _| Ok(()))?),
            StageMemory::One => Self::One {
                y: y.clone(),
                slopes: slopes(tableau, stages, at, y, None, &used(tableau)[..end], |_, _, _| Ok(()))?,
            },
        })
    }

    /// kᵢ by stage.
    pub(super) fn slopes(&self) -> Vec<Option<&State>> {
        match self {
            Self::All(all) | Self::Kept(Linearized(all)) => values(all).collect(),
            Self::One { slopes, .. } => slopes.iter().map(|k| k.as_ref().map(Slope::state)).collect(),
        }
    }

    /// The linearisation of stage i, which is needed no more afterwards (nor is its slope).
    fn take(&mut self, tableau: &Tableau, stages: &Stages<'_>, at: &StepAt<'_>, i: usize) -> Result<Option<Taken<'a>>> {
        match self {
            Self::All(all) => Ok(all[i].take().map(Taken::Own)),
            Self::Kept(Linearized(all)) => Ok(all[i].as_deref().map(Taken::Kept)),
            Self::One { y, slopes } => {
                slopes.truncate(i);
                let point = stage_state(tableau, at, y, i, |j| slopes[j].as_ref().map(Slope::state))?;
                Ok(Some(Taken::Own(stages.linearize(at, i, &point)?)))
            }
        }
    }
}

/// Yᵢ in the dtype of the step.
fn stage_state<'a>(
    tableau: &Tableau,
    at: &StepAt<'_>,
    y: &State,
    i: usize,
    slope: impl Fn(usize) -> Option<&'a State>,
) -> Result<State> {
    sum(Some(y), &weighted(at.h, (0..i).map(|j| tableau.a(i, j)), (0..i).map(slope)), at.dtype)
}

/// The terms h·c·x that are not structurally zero.
pub(super) fn weighted<'a>(
    h: f64,
    coefficients: impl IntoIterator<Item = f64>,
    states: impl IntoIterator<Item = Option<&'a State>>,
) -> Vec<(f64, &'a State)> {
    let pairs = coefficients.into_iter().zip(states);
    pairs.filter(|(c, _)| *c != 0.0).filter_map(|(c, state)| state.map(|state| (h * c, state))).collect()
}
