//! Where the steps of a solve come from.

use super::{Ode, dense};
use crate::State;
use crate::controller::{Tolerance, Tolerances};
use crate::error::{OdeError, Result};
use crate::forward::{Adaptive, Course};
use crate::solver::Clock;
use crate::time::TimeGrid;
use candle_core::DType;

impl Ode {
    /// Where the steps come from, and the output times as they are met.
    pub(super) fn course(&self, y0: &State, accumulate: DType) -> Result<(Course, Vec<f64>)> {
        if (self.dense || self.interpolate) && self.solver.interpolated(0.5).is_none() {
            return Err(dense::without(self.solver.name()));
        }
        if self.is_adaptive() {
            return Ok((Course::Adaptive(Box::new(self.adaptive(y0, accumulate)?)), self.save_at.clone()));
        }
        let grid = self.time_grid()?;
        let on_grid = |times: &[f64]| -> Result<Vec<f64>> {
            times.iter().map(|&t| grid.index_of(t).map(|n| grid.times()[n])).collect()
        };
        let outputs = if self.interpolate { self.inside(grid.times())? } else { on_grid(&self.save_at)? };
        let breaks = self.breaks_on(&grid)?;
        Ok((Course::Grid(Clock::with_breaks(&grid, self.solver.nodes(), &breaks, y0.device())), outputs))
    }

    /// The discontinuities on `grid`; those outside of the span do not matter.
    fn breaks_on(&self, grid: &TimeGrid) -> Result<Vec<f64>> {
        let (start, end) = (grid.times()[0], grid.times()[grid.steps()]);
        let mut breaks = vec![];
        for &t in self.finite_discontinuities()? {
            match grid.index_of(t) {
                Ok(n) => breaks.push(grid.times()[n]),
                Err(OdeError::OutputOffGrid { nearest, .. }) if between(start, end, t) => {
                    let (setting, value) = ("discontinuities", format!("{t} (nearest end of a step: {nearest})"));
                    let hint = "a step must end at each: put it on the grid with .grid(..), or choose the steps by .tolerances(..)";
                    return Err(OdeError::Setting { setting, value, hint });
                }
                Err(_) => {}
            }
        }
        Ok(breaks)
    }

    fn finite_discontinuities(&self) -> Result<&[f64]> {
        match self.discontinuities.iter().enumerate().find(|(_, t)| !t.is_finite()) {
            Some((index, &value)) => Err(OdeError::NonFiniteTime { index, value }),
            None => Ok(&self.discontinuities),
        }
    }

    /// The output times, which must lie between the ends of `times`.
    fn inside(&self, times: &[f64]) -> Result<Vec<f64>> {
        let (start, end) = (times[0], times[times.len() - 1]);
        match self.save_at.iter().find(|t| !between(start, end, **t)) {
            None => Ok(self.save_at.clone()),
            Some(t) => {
                let hint = "output times lie in the span";
                Err(OdeError::Setting { setting: "save_at", value: t.to_string(), hint })
            }
        }
    }

    pub(super) fn is_adaptive(&self) -> bool {
        self.tolerances.is_some() || self.controller.is_some()
    }

    fn adaptive(&self, y0: &State, accumulate: DType) -> Result<Adaptive> {
        let wrong = |setting, value: String, hint| Err(OdeError::Setting { setting, value, hint });
        if self.grid.is_some() || self.steps != 0 {
            let value = if self.grid.is_some() { "given".into() } else { self.steps.to_string() };
            let hint = "steps are either given (.steps(n), .grid(..)) or chosen (.tolerances(..), .controller(..)): leave one out";
            return wrong(if self.grid.is_some() { "grid" } else { "steps" }, value, hint);
        }
        let Some((start, end)) = self.span else {
            return wrong("span", "unset".into(), "call .span(t0, t1)");
        };
        TimeGrid::new(vec![start, end])?;
        self.inside(&[start, end])?;
        let breaks = self.finite_discontinuities()?.iter().copied();
        let breaks: Vec<f64> = breaks.filter(|t| between(start, end, *t)).collect();
        let outputs: &[f64] = if self.interpolate { &[] } else { &self.save_at };
        let mut stops: Vec<f64> = outputs.iter().chain(&breaks).copied().filter(|t| *t != start).chain([end]).collect();
        stops.sort_by(|a, b| if end > start { a.total_cmp(b) } else { b.total_cmp(a) });
        stops.dedup();
        let controller = self.controller.clone().unwrap_or_default();
        controller.check()?;
        let default = (Tolerance::Scalar(1e-3), Tolerance::Scalar(1e-6));
        let (rtol, atol) = self.tolerances.as_ref().unwrap_or(&default);
        let tolerances = Tolerances::new(rtol, atol, controller.norm.clone(), y0, accumulate)?;
        Ok(Adaptive { start, end, stops, breaks, controller, tolerances })
    }

    pub(super) fn time_grid(&self) -> Result<TimeGrid> {
        match (&self.grid, self.span) {
            (Some(times), _) => TimeGrid::new(times.clone()),
            (None, Some((t0, t1))) => TimeGrid::uniform(t0, t1, self.steps),
            (None, None) => Err(OdeError::Setting {
                setting: "span",
                value: "unset".into(),
                hint: "call .span(t0, t1).steps(n), or .grid(&times)",
            }),
        }
    }
}

/// Whether `t` lies in the span from `start` to `end`.
fn between(start: f64, end: f64, t: f64) -> bool {
    (start.min(end)..=start.max(end)).contains(&t)
}
