//! `Backsolve` gives the gradient of the equation, not of the steps: it converges to the gradient of `Discrete` with
//! the step size, at the order of the solver, and is wrong where y cannot be solved backwards.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::*;
use std::collections::BTreeMap;

const TIMES: [f64; 2] = [0.5, 1.0];

struct Problem {
    vars: VarMap,
    field: ModelField,
    y0: Var,
}

impl Problem {
    fn new() -> Self {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, 3, 8);
        fill(&vars, 1, 1.5);
        Self { vars, field, y0: variable(9, &[4, 3], DType::F64) }
    }

    fn ode(&self, steps: usize) -> Ode {
        Ode::new(&self.field).span(0.0, 1.0).steps(steps).save_at(&TIMES)
    }

    /// dL/dy0 and each dL/dθ; the loss takes in an output on the way.
    fn gradients(&self, ode: &Ode) -> (BTreeMap<String, Tensor>, Stats) {
        let solution = ode.solve(self.y0.as_tensor()).unwrap();
        let [half, end] = [&solution.states()[0][0], &solution.states()[1][0]];
        let loss = (half.sqr().unwrap().sum_all().unwrap() + (end.sqr().unwrap().sum_all().unwrap() * 0.5)).unwrap();
        let grads = loss.backward().unwrap();
        let named = sorted(&self.vars).into_iter().chain([("y0".to_owned(), self.y0.clone())]);
        (named.map(|(name, var)| (name, grads.get(&var).unwrap().clone())).collect(), solution.stats())
    }

    /// ‖Backsolve − Discrete‖ / ‖Discrete‖ over all gradients.
    fn gap(&self, ode: &Ode, adjoint: Backsolve) -> f64 {
        let (exact, _) = self.gradients(ode);
        let (found, _) = self.gradients(&ode.clone().adjoint(adjoint));
        let square = |x: &Tensor| values(x).iter().map(|x| x * x).sum::<f64>();
        let difference: f64 = exact.iter().map(|(name, x)| square(&(x - &found[name]).unwrap())).sum();
        (difference / exact.values().map(square).sum::<f64>()).sqrt()
    }
}

fn converges_at_its_order(solver: impl Solver + Clone, steps: usize) {
    let problem = Problem::new();
    let order = solver.order() as f64;
    let gap = |steps| problem.gap(&problem.ode(steps).solver(solver.clone()), Backsolve::default());
    let gaps: Vec<f64> = (0..4).map(|k| gap(steps << k)).collect();
    let found = (gaps[0] / gaps[3]).log2() / 3.0;
    // A symmetric error may cancel: one order more is fine.
    assert!(found > order - 0.15 && found < order + 1.25, "{}: {found}, {gaps:?}", solver.name());
    assert!(gaps[3] > 1e-14, "{gaps:?}");
}

#[test]
fn converges_to_discrete_at_the_order_of_the_solver() {
    converges_at_its_order(Euler, 32);
    converges_at_its_order(Midpoint, 16);
    converges_at_its_order(Heun, 16);
    converges_at_its_order(Rk3, 16);
    converges_at_its_order(Rk4, 8);
    converges_at_its_order(Dopri5, 4);
}

#[test]
fn has_a_solver_and_steps_of_its_own() {
    let problem = Problem::new();
    let ode = problem.ode(64).solver(Rk4);
    let coarse = problem.gap(&ode, Backsolve::default().solver(Euler));
    let fine = problem.gap(&ode, Backsolve::default().solver(Euler).substeps(4));
    assert!((coarse / fine - 4.0).abs() < 0.2, "{coarse:e} {fine:e}");
    let (_, stats) = problem.gradients(&ode.clone().adjoint(Backsolve::default().solver(Midpoint).substeps(3)));
    assert_eq!((stats.linearizations, stats.pullbacks), (64 * 3 * 2, 64 * 3 * 2));
    // It needs no reversible solver, and goes back over one by a method of its own.
    let reversible = problem.ode(64).solver(Reversible::new(Rk4));
    let gap = problem.gap(&reversible, Backsolve::default().solver(Rk4));
    assert!(gap < 1e-6, "{gap:e}");
}

#[test]
fn keeps_the_end_alone() {
    let problem = Problem::new();
    for precision in [Precision::F64, Precision::F32, Precision::F16] {
        for steps in [4, 64] {
            let ode = problem.ode(steps).precision(precision).adjoint(Backsolve::default());
            let solution = ode.solve(problem.y0.as_tensor()).unwrap();
            assert_eq!(solution.trajectory_bytes(), 4 * 3 * precision.accumulate_dtype().size_in_bytes());
        }
    }
}

#[test]
fn half_precision_stays_near_f64() {
    let problem = Problem::new();
    let ode = problem.ode(32).adjoint(Backsolve::default());
    let (exact, _) = problem.gradients(&ode);
    for (precision, bound) in [(Precision::F32, 1e-5), (Precision::F16, 4e-3), (Precision::BF16, 3e-2)] {
        for scaling in [AdjointScaling::per_step(), AdjointScaling::dynamic(), AdjointScaling::none()] {
            let (found, _) = problem.gradients(&ode.clone().precision(precision).scaling(scaling));
            for (name, gradient) in found {
                let error = relative(&gradient, &exact[&name]);
                assert!(error < bound, "{precision:?} {name}: {error:e}");
            }
        }
    }
}

#[test]
fn drift_shows_that_a_contraction_cannot_be_solved_backwards() {
    let field = FnField::new(|_: &Time, y: &Tensor| y * -100.0);
    let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
    let run = |adjoint: Adjoint| {
        let solution = Ode::new(&field).span(0.0, 1.0).steps(200).adjoint(adjoint).solve(y0.as_tensor()).unwrap();
        solution.last().sum_all().unwrap().backward().unwrap();
        solution.stats().drift
    };
    assert!(run(Backsolve::default().into()).unwrap() > 1e-2);
    assert_eq!(run(Discrete::default().into()), None);
}

/// f jumps at t = ½, where the way back has to see each side from its own.
#[test]
fn jumps_of_f_are_seen_from_both_sides() {
    let field = FnField::new(|t: &Time, y: &Tensor| if t.value() < 0.5 { y.neg() } else { y * 2.0 });
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(64).discontinuities(&[0.5]);
    let solution = ode.adjoint(Backsolve::default()).solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sum_all().unwrap().backward().unwrap();
    let error = values(grads.get(&y0).unwrap())[0] / 0.5f64.exp() - 1.0;
    assert!(error.abs() < 1e-7, "{error:e}");
}

/// Stages whose slopes do not count add nothing to dL/dθ, and their cotangents count for dL/dy all the same: layers
/// that make both in one do what Candle's do.
#[test]
fn layers_pull_through_stages_that_do_not_count() {
    use candle_nn::Module;
    use candle_ode::ops::{Activation, Mlp};
    for (sizes, rows) in [([2, 24, 2], 40), ([2, 24, 2], 3), ([24, 40, 24], 20)] {
        let vars = VarMap::new();
        let ours = move |vb| Mlp::new(&sizes, Activation::Tanh, vb);
        let ours = ModelField::new(&vars, &Device::Cpu, ours, |mlp: &Mlp, _: &Time, y| mlp.forward(y)).unwrap();
        let layers = move |vb: candle_nn::VarBuilder<'static>| {
            let [a, b, c] = sizes;
            let first = candle_nn::linear(a, b, vb.pp(0))?;
            Ok(candle_nn::seq().add(first).add_fn(Tensor::tanh).add(candle_nn::linear(b, c, vb.pp(1))?))
        };
        let candles = ModelField::new(&vars, &Device::Cpu, layers, |layers, _: &Time, y| layers.forward(y)).unwrap();
        fill(&vars, 1, 1.5);
        let y0 = variable(9, &[rows, sizes[0]], DType::F32);
        for precision in [Precision::F32, Precision::F16, Precision::BF16] {
            let chosen = || Backsolve::default().tolerances(1e-3, 1e-3);
            for (what, solver, adjoint) in [
                ("midpoint", Midpoint.tableau().unwrap().clone(), Backsolve::default()),
                ("dopri5", Dopri5.tableau().unwrap().clone(), Backsolve::default()),
                ("chosen", Dopri5.tableau().unwrap().clone(), chosen()),
            ] {
                let found = [&ours, &candles].map(|field| {
                    let ode = Ode::new(field).solver(solver.clone()).span(0.0, 1.0).steps(6).precision(precision);
                    let loss = ode.adjoint(adjoint.clone()).solve(y0.as_tensor()).unwrap().last().sqr().unwrap();
                    let grads = loss.sum_all().unwrap().backward().unwrap();
                    let named = sorted(&vars).into_values().chain([y0.clone()]);
                    named.flat_map(|var| values(grads.get(&var).unwrap())).collect::<Vec<f64>>()
                });
                let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let gap: Vec<f64> = found[0].iter().zip(&found[1]).map(|(a, b)| a - b).collect();
                let gap = norm(&gap) / norm(&found[1]);
                let bound = match precision.compute_dtype() {
                    DType::F32 => 2e-5,
                    DType::F16 => 4e-3,
                    _ => 3e-2,
                };
                assert!(gap < bound, "{sizes:?} {rows} {what} {precision:?}: {gap:e}");
            }
        }
    }
}
