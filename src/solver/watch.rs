//! Whether the stages of a step are finite.

use super::stages::StepAt;
use super::tableau::Tableau;
use crate::State;
use crate::error::Result;
use crate::field::{Finite, all_finite};
use candle_core::DType;

/// Watches the stages of a step. A slope that is not finite makes the sums not finite that it is a term of: where all
/// of these are known to be finite, slopes are not looked at by themselves.
pub(super) struct Watch {
    /// By stage that was evaluated, whether its state is finite, where that matters by itself.
    points: Vec<Option<Finite>>,
    /// By stage, whether a sum of which its slope is a term has been seen.
    summed: Vec<bool>,
    sums_are_finite: bool,
}

impl Watch {
    pub(super) fn new(tableau: &Tableau) -> Self {
        let summed = tableau.weights().iter().map(|weight| *weight != 0.0).collect();
        Self { points: vec![None; tableau.stages()], summed, sums_are_finite: true }
    }

    /// Stage `i` is evaluated at `point`.
    pub(super) fn point(&mut self, tableau: &Tableau, at: &StepAt<'_>, i: usize, point: &State) -> Result<()> {
        self.points[i] = Some(finite_point(at, point)?);
        for j in (0..i).filter(|&j| tableau.a(i, j) != 0.0) {
            self.summed[j] = true;
            self.sees(point);
        }
        Ok(())
    }

    fn sees(&mut self, sum: &State) {
        self.sums_are_finite &= sum.known_largest().is_some_and(|largest| !largest.is_nan());
    }

    /// By stage, for a step that has led to `y`.
    pub(super) fn finite<'a>(
        mut self,
        y: &State,
        slopes: impl Iterator<Item = Option<&'a State>>,
    ) -> Result<Vec<Finite>> {
        self.sees(y);
        let Self { points, summed, sums_are_finite } = self;
        let stages = points.into_iter().zip(summed).zip(slopes);
        let finite = stages.map(|((point, is_summed), slope)| match (point, slope) {
            (Some(point), Some(slope)) if !(is_summed && sums_are_finite) => Ok(point.and(all_finite(slope)?)),
            (point, _) => Ok(point.unwrap_or_default()),
        });
        finite.collect()
    }
}

/// Whether a stage came out finite.
pub(super) fn finite_stage(at: &StepAt<'_>, point: &State, k: &State) -> Result<Finite> {
    Ok(finite_point(at, point)?.and(all_finite(k)?))
}

/// Whether a stage state is finite, where it may have overflown: in F16. It may come out of f as finite nonsense:
/// tanh(∞) = 1.
fn finite_point(at: &StepAt<'_>, point: &State) -> Result<Finite> {
    if at.dtype == DType::F16 { all_finite(point) } else { Ok(Finite::default()) }
}
