//! A reversible solver over any explicit Runge–Kutta method: its steps can be undone, so nothing need be kept.
//!
//! With the increment Ψ_h(t, x) = h Σ bᵢ kᵢ of the base method and a coupling c ∈ (0, 1), the pair (y, z), z₀ = y₀,
//! goes
//!
//! y⁺ = c y + (1 − c) z + Ψ_h(t, z),  z⁺ = z − Ψ₋ₕ(t + h, y⁺),
//!
//! and back: z = z⁺ + Ψ₋ₕ(t + h, y⁺), y = c⁻¹ y⁺ + (1 − c⁻¹) z − c⁻¹ Ψ_h(t, z). Pullback: ȳ* = ȳ⁺ − (∂Ψ₋ₕ/∂y⁺)ᵀ z̄⁺,
//! ȳ = c ȳ*, z̄ = z̄⁺ + (1 − c) ȳ* + (∂Ψ_h/∂z)ᵀ ȳ*.

use super::carried::{joined, split};
use super::explicit::{
    ExplicitRungeKutta, Points, StageMemory, cotangents, estimate, increment, pull, slopes, states, used, weighted,
};
use super::stages::{Pullbacks, Stages, StepAt};
use super::watch::finite_stage;
use super::{EstimatedStep, Slope, Solver, Step, Tableau};
use crate::State;
use crate::account::{Category, Owned};
use crate::error::{OdeError, Result};
use crate::field::{Finite, sum};

/// A solver whose steps can be undone: what [`Reconstruct`](crate::Reconstruct) goes backwards with.
pub trait Reversal: Solver {
    /// What was carried at the start of a step and its cotangent, from what was carried at its end, `y`, and its
    /// cotangent `lambda`. Linearises f once where value and pullback can share it. Both are given away so that they
    /// can be dropped on the way. λ's bytes are no longer announced: whoever undoes the step announces what it holds of
    /// them.
    ///
    /// # Errors
    /// Whatever the vector field reports, with its place.
    fn undo(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: State,
        lambda: State,
        memory: StageMemory,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<(State, State)>;

    /// By how much rounding may grow when a step is undone: c⁻¹.
    fn growth(&self) -> f64;

    /// The explicit method that a pair is coupled over, of a [`Reversible`]: what [`Ode::plan`](crate::Ode::plan) goes
    /// by.
    fn base(&self) -> Option<&Tableau> {
        None
    }
}

/// McCallum and Foster's reversible solver over a base method, which keeps its order.
///
/// A step costs 2s evaluations of the s stages that matter, forwards and backwards, and 2s pullbacks. It carries two
/// states, y and z, in the accumulate dtype; f runs in any compute dtype. On y′ = αy it is stable on the negative real
/// axis up to about |αh| = 1 − c, and rounding grows by up to c⁻¹ per undone step.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_ode::prelude::*;
///
/// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
/// let y0 = Var::new(&[1f64], &Device::Cpu)?;
/// let ode = Ode::new(&field).solver(Reversible::new(Midpoint)).span(0.0, 1.0).steps(1000).adjoint(Reconstruct::default());
/// let solution = ode.solve(y0.as_tensor())?;
/// let dy0 = solution.last().sum_all()?.backward()?.get(&y0).unwrap().to_vec1::<f64>()?[0];
/// assert!((dy0 - (-1f64).exp()).abs() < 1e-6);
/// assert_eq!(solution.trajectory_bytes(), 2 * 8);                    // the last y and z, whatever the number of steps
/// assert!(solution.stats().drift.unwrap() < 1e-12);
/// # Ok::<(), OdeError>(())
/// ```
///
/// # Reference
/// S. McCallum, J. Foster, *Efficient, Accurate and Stable Gradients for Neural ODEs*, arXiv 2410.11648, §3.
#[derive(Clone, Debug)]
pub struct Reversible<M> {
    base: M,
    coupling: f64,
    name: String,
    nodes: Vec<f64>,
}

impl<M: ExplicitRungeKutta> Reversible<M> {
    /// Over `base`, with c = 0.999.
    pub fn new(base: M) -> Self {
        let tableau = base.tableau();
        let name = format!("Reversible({})", tableau.name());
        let back = tableau.nodes().iter().map(|c| 1.0 - c);
        let nodes = tableau.nodes().iter().copied().chain(back).collect();
        Self { base, coupling: 0.999, name, nodes }
    }

    /// Another coupling c. A smaller one is stable for longer steps, and multiplies rounding by c⁻¹ for each step that
    /// is undone.
    ///
    /// # Errors
    /// Unless 0 < c < 1.
    pub fn coupling(self, c: f64) -> Result<Self> {
        if c > 0.0 && c < 1.0 {
            return Ok(Self { coupling: c, ..self });
        }
        let hint = "the coupling of a reversible solver lies between 0 and 1, both excluded; 0.999 fits most problems";
        Err(OdeError::Setting { setting: "Reversible::coupling", value: c.to_string(), hint })
    }

    /// The step that Ψ₋ₕ makes, with the later half of the stages.
    fn back<'a>(&self, at: &StepAt<'a>) -> StepAt<'a> {
        at.reversed(self.base.tableau().stages())
    }

    /// A step, with the slopes of Ψ_h at the stages that `matter`, the first taken from `first` if it is known.
    fn stepped(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        first: Option<&Slope>,
        matter: &[bool],
    ) -> Result<(Step, Vec<Option<Slope>>)> {
        let tableau = self.base.tableau();
        let [y, z] = split(y);
        let mut finite = vec![Finite::default(); self.nodes.len()];
        let (ahead_finite, back_finite) = finite.split_at_mut(tableau.stages());
        let of_ahead = slopes(tableau, stages, at, &z, first, matter, |i, point, k| {
            ahead_finite[i] = finite_stage(at, point, k)?;
            Ok(())
        })?;
        let y = self.ahead(stages, at, &y, &z, states(&of_ahead).collect())?;
        let back = self.back(at);
        let of_back = slopes(tableau, stages, &back, &y, None, &used(tableau), |i, point, k| {
            back_finite[i] = finite_stage(&back, point, k)?;
            Ok(())
        })?;
        let z = self.across(stages, &back, &z, -1.0, states(&of_back).collect())?;
        Ok((Step { y: joined([y, z]), finite }, of_ahead))
    }

    /// y⁺ from the slopes at z. Written as y + (1 − c)(z − y) + Ψ, where z − y is small, it loses less to rounding.
    fn ahead(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        z: &State,
        k: Vec<Option<&State>>,
    ) -> Result<State> {
        let apart = 1.0 - self.coupling;
        let terms = [(apart, z), (-apart, y)].into_iter().chain(increment(self.base.tableau(), at, 1.0, k));
        sum(Some(y), &terms.collect::<Vec<_>>(), stages.accumulate())
    }

    /// z⁺ or z from the other and the slopes at y⁺: `factor` is −1 ahead and 1 back.
    fn across(
        &self,
        stages: &Stages<'_>,
        back: &StepAt<'_>,
        z: &State,
        factor: f64,
        k: Vec<Option<&State>>,
    ) -> Result<State> {
        sum(Some(z), &increment(self.base.tableau(), back, factor, k), stages.accumulate())
    }

    /// ȳ* from the points at y⁺.
    fn pull_across(
        &self,
        stages: &Stages<'_>,
        back: &StepAt<'_>,
        points: Points,
        [y_bar, z_bar]: [&State; 2],
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State> {
        let mus = pull(self.base.tableau(), stages, back, points, (-1.0, z_bar), pullbacks)?;
        sum(Some(y_bar), &cotangents(&mus), stages.accumulate())
    }

    /// (ȳ, z̄) from the points at z, ȳ* and z̄⁺.
    fn pull_ahead(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        points: Points,
        star: &State,
        z_bar: &State,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<State> {
        let mus = pull(self.base.tableau(), stages, at, points, (1.0, star), pullbacks)?;
        let mut of_z = vec![(1.0 - self.coupling, star)];
        of_z.extend(cotangents(&mus));
        let z_bar = sum(Some(z_bar), &of_z, stages.accumulate())?;
        Ok(joined([sum(None, &[(self.coupling, star)], stages.accumulate())?, z_bar]))
    }
}

impl<M: ExplicitRungeKutta> Solver for Reversible<M> {
    fn name(&self) -> &str {
        &self.name
    }

    fn order(&self) -> usize {
        self.base.tableau().order()
    }

    fn nodes(&self) -> &[f64] {
        &self.nodes
    }

    fn carries(&self) -> usize {
        2
    }

    fn reversal(&self) -> Option<&dyn Reversal> {
        Some(self)
    }

    fn step(&self, stages: &Stages<'_>, at: &StepAt<'_>, y: &State) -> Result<Step> {
        Ok(self.stepped(stages, at, y, None, &used(self.base.tableau()))?.0)
    }

    fn estimate_order(&self) -> Option<usize> {
        self.base.estimate_order()
    }

    /// The error is that of Ψ_h(t, z) by the embedded weights of the base method.
    fn estimated_step(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: &State,
        first: Option<&Slope>,
    ) -> Result<EstimatedStep> {
        let (weights, matter) = estimate(self.base.tableau())?;
        let (step, slopes) = self.stepped(stages, at, y, first, &matter)?;
        let terms = weighted(at.h, weights.iter().copied(), states(&slopes));
        let error = sum(None, &terms, stages.accumulate())?.detach();
        Ok(EstimatedStep { step, error, weights, slopes, first_same_as_last: false })
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
        let tableau = self.base.tableau();
        let ([y, z], bars, back) = (split(&y), split(lambda), self.back(at));
        let first = Points::with_slopes(tableau, stages, at, &z, memory)?;
        let ahead = self.ahead(stages, at, &y, &z, first.slopes())?;
        drop(y);
        // With one linearisation at a time the slopes at z are found again, once y⁺ is done with.
        let first = (memory == StageMemory::All).then_some(first);
        let points = Points::new(tableau, stages, &back, &ahead, memory)?;
        drop(ahead);
        let star = self.pull_across(stages, &back, points, bars.each_ref(), pullbacks)?;
        let points = match first {
            Some(points) => points,
            None => Points::new(tableau, stages, at, &z, memory)?,
        };
        drop(z);
        self.pull_ahead(stages, at, points, &star, &bars[1], pullbacks)
    }
}

impl<M: ExplicitRungeKutta> Reversal for Reversible<M> {
    fn undo(
        &self,
        stages: &Stages<'_>,
        at: &StepAt<'_>,
        y: State,
        lambda: State,
        memory: StageMemory,
        pullbacks: &mut Pullbacks<'_>,
    ) -> Result<(State, State)> {
        let tableau = self.base.tableau();
        let ([ahead, across], back) = (split(&y), self.back(at));
        let [y_bar, z_bar] = split(&lambda).map(|bar| Slope::new(bar, Category::Cotangents));
        drop((y, lambda));
        let points = Points::with_slopes(tableau, stages, &back, &ahead, memory)?;
        let z = self.across(stages, &back, &across, 1.0, points.slopes())?;
        let _z = Owned::new(Category::Stages, z.held_bytes());
        drop(across);
        let star = self.pull_across(stages, &back, points, [y_bar.state(), z_bar.state()], pullbacks)?;
        let star = Slope::new(star, Category::Cotangents);
        drop(y_bar);
        let points = Points::with_slopes(tableau, stages, at, &z, memory)?;
        let (inverse, apart) = (1.0 / self.coupling, 1.0 / self.coupling - 1.0);
        let terms = [(apart, &ahead), (-apart, &z)].into_iter();
        let terms: Vec<_> = terms.chain(increment(tableau, at, -inverse, points.slopes())).collect();
        let y = sum(Some(&ahead), &terms, stages.accumulate())?;
        let _y = Owned::new(Category::Stages, y.held_bytes());
        drop(terms);
        drop(ahead);
        let lambda = self.pull_ahead(stages, at, points, star.state(), z_bar.state(), pullbacks)?;
        Ok((joined([y, z]), lambda))
    }

    fn growth(&self) -> f64 {
        1.0 / self.coupling
    }

    fn base(&self) -> Option<&Tableau> {
        Some(self.base.tableau())
    }
}
