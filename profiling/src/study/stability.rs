//! How long the steps of reversible solvers may be: on y' = αy they are stable up to the |αh| at which a root of the
//! step matrix leaves the unit disc, near 1 − c for every base method.

use super::publish;
use crate::failure::Result;
use candle_core::{DType, Device, Tensor};
use candle_ode::ExplicitRungeKutta;
use candle_ode::prelude::*;
use std::path::Path;

/// R(x) = y⁺/y of one step on y' = αy, x = αh.
fn growth(tableau: &Tableau, x: f64) -> f64 {
    let mut slopes: Vec<f64> = vec![];
    for i in 0..tableau.stages() {
        let inner: f64 = slopes.iter().enumerate().map(|(j, k)| tableau.a(i, j) * k).sum();
        slopes.push(1.0 + x * inner);
    }
    1.0 + x * tableau.weights().iter().zip(&slopes).map(|(b, k)| b * k).sum::<f64>()
}

/// With p = R(αh) − 1 and q = R(−αh) − 1 the step matrix has the determinant c and the trace 1 + c − q (1 − c + p).
fn limit_by_roots(tableau: &Tableau, c: f64) -> f64 {
    let is_stable = |r: f64| {
        let (p, q) = (growth(tableau, -r) - 1.0, growth(tableau, r) - 1.0);
        (1.0 + c - q * (1.0 - c + p)).abs() < 1.0 + c
    };
    let (mut stable, mut unstable) = (0.5 * (1.0 - c), 2.0 * (1.0 - c));
    for _ in 0..60 {
        let middle = (stable + unstable) / 2.0;
        if is_stable(middle) { stable = middle } else { unstable = middle }
    }
    stable
}

/// The |αh| from which on solutions grow, of many around `near` that are solved at once.
fn limit_by_solving(solver: impl Solver, near: f64, c: f64) -> Result<f64> {
    const SIZES: usize = 120;
    let sizes: Vec<f64> = (0..SIZES).map(|n| near * (0.97025 + 0.0005 * n as f64)).collect();
    let alpha = Tensor::new(sizes.iter().map(|r| -r).collect::<Vec<_>>(), &Device::Cpu)?;
    // A push at the start alone, since (1, 1) is almost the vector of the root c.
    let push = |t: f64| if t < 0.25 { 1.0 } else { 0.0 };
    let field = FnField::new(move |t: &Time, y: &Tensor| (y * &alpha)? + push(t.value()));
    let steps = (40.0 / (1.0 - c)).ceil() as usize;
    let times = [steps as f64, 2.0 * steps as f64];
    let ode = Ode::new(&field).solver(solver).span(0.0, times[1]).steps(2 * steps).save_at(&times);
    let solution = ode.solve(&Tensor::ones(SIZES, DType::F64, &Device::Cpu)?)?;
    let states = solution.states().iter().map(|y| y[0].to_vec1::<f64>()).collect::<candle_core::Result<Vec<_>>>()?;
    let first = states[0].iter().zip(&states[1]).position(|(half, end)| end.abs() > half.abs()).unwrap_or(SIZES);
    let edge = |n: usize| sizes.get(n).copied().unwrap_or(f64::NAN);
    Ok((edge(first) + edge(first.wrapping_sub(1))) / 2.0)
}

fn row(base: impl ExplicitRungeKutta + Clone, c: f64) -> Result<Vec<String>> {
    let tableau = base.tableau().clone();
    let roots = limit_by_roots(&tableau, c);
    let solved = limit_by_solving(Reversible::new(base).coupling(c)?, roots, c)?;
    let off = format!("{:+.3} %", 100.0 * (solved / roots - 1.0));
    let figures = [format!("{roots:.6}"), format!("{solved:.6}"), off, format!("{:.4}", roots / (1.0 - c))];
    Ok([tableau.name().to_owned(), c.to_string()].into_iter().chain(figures).collect())
}

/// Prints, and `stability.csv`.
pub(super) fn run(out: &Path) -> Result<()> {
    let head = ["base", "c", "limit by roots", "limit by solving", "off", "over 1 - c"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for c in [0.8, 0.9, 0.95, 0.99, 0.999] {
        rows.extend([row(Euler, c)?, row(Midpoint, c)?, row(Rk3, c)?, row(Rk4, c)?]);
    }
    publish(&rows, &out.join("stability.csv"))
}
