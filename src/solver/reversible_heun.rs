//! The reversible Heun method: z⁺ = 2y − z + h f(t, z), y⁺ = y + h/2 (f(t, z) + f(t + h, z⁺)), z₀ = y₀.
//!
//! Back: z = 2y⁺ − z⁺ − h f(t + h, z⁺), y = y⁺ − h/2 (f(t, z) + f(t + h, z⁺)). Pullback, with J at z and J⁺ at z⁺:
//! z̄* = z̄⁺ + h/2 J⁺ᵀȳ⁺, ȳ = ȳ⁺ + 2 z̄*, z̄ = Jᵀ(h/2 ȳ⁺ + h z̄*) − z̄*.

use super::carried::{joined, split};
use super::explicit::StageMemory;
use super::reversible::Reversal;
use super::slope::Slope;
use super::stages::{Pullbacks, Stages, StepAt};
use super::watch::finite_stage;
use super::{Solver, Step};
use crate::State;
use crate::account::{Category, Owned};
use crate::error::Result;
use crate::field::{Linearization, sum};

/// The reversible Heun method, order 2: two evaluations a step, forwards and backwards, and two pullbacks.
///
/// Undoing a step multiplies rounding by nothing, but the method damps nothing either: on y′ = αy it is stable for αh
/// on the imaginary axis up to ±i alone. [`Reversible`](crate::Reversible) is the safer choice.
///
/// # Reference
/// P. Kidger, J. Foster, X. Li, T. Lyons, *Efficient and Accurate Gradients for Neural SDEs*, arXiv 2105.13493,
/// Algorithm 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReversibleHeun;

impl ReversibleHeun {
    /// z⁺ from (y, z) and f(t, z); with −h and f(t + h, z⁺), z from (y⁺, z⁺).
    fn across(stages: &Stages<'_>, h: f64, y: &State, z: &State, k: &State) -> Result<State> {
        sum(None, &[(2.0, y), (-1.0, z), (h, k)], stages.accumulate())
    }

    fn trapezoid(stages: &Stages<'_>, h: f64, y: &State, k: [&State; 2]) -> Result<State> {
        sum(Some(y), &[(h / 2.0, k[0]), (h / 2.0, k[1])], stages.accumulate())
    }

    /// f at stage `stage` with its pullback.
    fn linearize(stages: &Stages<'_>, at: &StepAt<'_>, stage: usize, z: &State) -> Result<Box<dyn Linearization>> {
        let _span = tracing::trace_span!(target: "candle_ode", "stage", index = stage).entered();
        stages.linearize(at, stage, &sum(Some(z), &[], at.dtype)?)
    }

    /// z̄*.
    fn pull_end(
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        end: &dyn Linearization,
        [y_bar, z_bar]: [&State; 2],
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State> {
        let kappa = Slope::new(sum(None, &[(at.h / 2.0, y_bar)], stages.accumulate())?, Category::Cotangents);
        let mu = Slope::new(pullbacks.pull(end, at, 1, kappa.state())?, Category::Cotangents);
        sum(Some(z_bar), &[(1.0, mu.state())], stages.accumulate())
    }

    /// (ȳ, z̄).
    fn pull_start(
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        start: &dyn Linearization,
        y_bar: &State,
        star: &State,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State> {
        let kappa = sum(None, &[(at.h / 2.0, y_bar), (at.h, star)], stages.accumulate())?;
        let kappa = Slope::new(kappa, Category::Cotangents);
        let mu = Slope::new(pullbacks.pull(start, at, 0, kappa.state())?, Category::Cotangents);
        let y_bar = sum(Some(y_bar), &[(2.0, star)], stages.accumulate())?;
        Ok(joined([y_bar, sum(None, &[(1.0, mu.state()), (-1.0, star)], stages.accumulate())?]))
    }
}

impl Solver for ReversibleHeun {
    fn name(&self) -> &str {
        "ReversibleHeun"
    }

    fn order(&self) -> usize {
        2
    }

    fn nodes(&self) -> &[f64] {
        &[0.0, 1.0]
    }

    fn carries(&self) -> usize {
        2
    }

    fn reversal(&self) -> Option<&dyn Reversal> {
        Some(self)
    }

    fn step(&self, stages: &Stages<'_>, at: &StepAt<'_>, y: &State) -> Result<Step> {
        let slope = |stage: usize, z: &State| {
            let _span = tracing::trace_span!(target: "candle_ode", "stage", index = stage).entered();
            let point = sum(Some(z), &[], at.dtype)?;
            let k = stages.slope(at, stage, &point)?;
            let finite = finite_stage(at, &point, &k)?;
            Ok::<_, crate::OdeError>((Slope::new(k, Category::Stages), finite))
        };
        let [y, z] = split(y);
        let (start, start_finite) = slope(0, &z)?;
        let z = Self::across(stages, at.h, &y, &z, start.state())?;
        let (end, end_finite) = slope(1, &z)?;
        let y = Self::trapezoid(stages, at.h, &y, [start.state(), end.state()])?;
        Ok(Step { y: joined([y, z]), finite: vec![start_finite, end_finite] })
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
        let ([y, z], bars) = (split(&y), split(lambda));
        let (start, ahead) = match memory {
            StageMemory::All => {
                let start = Self::linearize(stages, at, 0, &z)?;
                let ahead = Self::across(stages, at.h, &y, &z, start.value())?;
                (Some(start), ahead)
            }
            StageMemory::One => {
                let k = stages.slope(at, 0, &sum(Some(&z), &[], at.dtype)?)?;
                (None, Self::across(stages, at.h, &y, &z, &k)?)
            }
        };
        drop(y);
        let end = Self::linearize(stages, at, 1, &ahead)?;
        drop(ahead);
        let star = Self::pull_end(stages, at, end.as_ref(), bars.each_ref(), pullbacks)?;
        drop(end);
        let start = match start {
            Some(start) => start,
            None => Self::linearize(stages, at, 0, &z)?,
        };
        Self::pull_start(stages, at, start.as_ref(), &bars[0], &star, pullbacks)
    }
}

impl Reversal for ReversibleHeun {
    fn undo(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: State,
        lambda: State,
        _: StageMemory,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<(State, State)> {
        let [ahead, across] = split(&y);
        let [y_bar, z_bar] = split(&lambda).map(|bar| Slope::new(bar, Category::Cotangents));
        drop((y, lambda));
        let end = Self::linearize(stages, at, 1, &across)?;
        let z = Self::across(stages, -at.h, &ahead, &across, end.value())?;
        let _z = Owned::new(Category::Stages, z.held_bytes());
        drop(across);
        let star = Self::pull_end(stages, at, end.as_ref(), [y_bar.state(), z_bar.state()], pullbacks)?;
        let star = Slope::new(star, Category::Cotangents);
        drop(z_bar);
        let of_end = Slope::new(end.value().clone(), Category::Stages);
        drop(end);
        let start = Self::linearize(stages, at, 0, &z)?;
        let y = Self::trapezoid(stages, -at.h, &ahead, [start.value(), of_end.state()])?;
        let _y = Owned::new(Category::Stages, y.held_bytes());
        drop((ahead, of_end));
        let lambda = Self::pull_start(stages, at, start.as_ref(), y_bar.state(), star.state(), pullbacks)?;
        Ok((joined([y, z]), lambda))
    }

    fn growth(&self) -> f64 {
        1.0
    }
}
