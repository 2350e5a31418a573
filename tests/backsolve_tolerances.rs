//! `Backsolve` by tolerances of its own: the way back chooses its steps, its gradient follows the tolerances, whatever
//! the steps of the solve and the scale of the loss.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::*;

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

    fn ode(&self) -> Ode {
        Ode::new(&self.field).solver(Dopri5).span(0.0, 1.0).steps(128).save_at(&[0.5, 1.0])
    }

    /// dL/dy0 and each dL/dθ in a row, for L = scale · (‖y(½)‖² + ½‖y(1)‖²).
    fn gradient(&self, ode: &Ode, scale: f64) -> (Vec<f64>, Stats) {
        let solution = ode.solve(self.y0.as_tensor()).unwrap();
        let [half, end] = [&solution.states()[0][0], &solution.states()[1][0]];
        let loss = (half.sqr().unwrap().sum_all().unwrap() + (end.sqr().unwrap().sum_all().unwrap() * 0.5)).unwrap();
        let grads = (loss * scale).unwrap().backward().unwrap();
        let all = std::iter::once(self.y0.clone()).chain(sorted(&self.vars).into_values());
        (all.flat_map(|var| values(grads.get(&var).unwrap())).collect(), solution.stats())
    }
}

fn distance(found: &[f64], exact: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied())
}

#[test]
fn the_error_follows_the_tolerances() {
    let problem = Problem::new();
    let (exact, _) = problem.gradient(&problem.ode(), 1.0);
    for solver in ["dopri5", "tsit5", "bosh3"] {
        let mut before = (f64::INFINITY, 0);
        for tolerance in [1e-4, 1e-6, 1e-8] {
            let adjoint = Backsolve::default().tolerances(tolerance, tolerance);
            let adjoint = match solver {
                "dopri5" => adjoint,
                "tsit5" => adjoint.solver(Tsit5),
                _ => adjoint.solver(Bosh3),
            };
            let (found, stats) = problem.gradient(&problem.ode().adjoint(adjoint), 1.0);
            let error = distance(&found, &exact);
            assert!(error < 30.0 * tolerance && error < before.0 / 10.0, "{solver} {tolerance:e}: {error:e}");
            assert!(stats.back_steps > before.1, "{solver}: {stats:?}");
            before = (error, stats.back_steps);
        }
    }
    // Six stages, and the seventh for the estimate.
    let adjoint = Backsolve::default().tolerances(1e-6, 1e-6);
    let (_, stats) = problem.gradient(&problem.ode().adjoint(adjoint), 1.0);
    let tried = stats.back_steps + stats.rejected_back_steps;
    assert_eq!((stats.linearizations, stats.pullbacks), (7 * tried, 7 * tried));
    assert!(stats.back_steps < stats.accepted_steps, "its steps are not those of the solve");
}

#[test]
fn steps_of_the_solve_and_scale_of_the_loss_do_not_matter() {
    let problem = Problem::new();
    let adjoint = Backsolve::default().tolerances(1e-6, 1e-9);
    let ode = problem.ode().adjoint(adjoint.clone());
    let (found, stats) = problem.gradient(&ode, 1.0);
    let small = 2f64.powi(-40);
    let (scaled, of_scaled) = problem.gradient(&ode, small);
    assert_eq!(scaled, found.iter().map(|x| x * small).collect::<Vec<_>>());
    assert_eq!((stats.back_steps, stats.rejected_back_steps), (of_scaled.back_steps, of_scaled.rejected_back_steps));
    // The same steps again, to the bit.
    assert_eq!(problem.gradient(&ode, 1.0).0, found);
    // A solve of adaptive steps, and one by a solver of another kind.
    let adaptive = ode.clone().steps(0).tolerances(1e-10, 1e-10);
    assert!(distance(&problem.gradient(&adaptive, 1.0).0, &found) < 1e-5);
    let reversible = ode.solver(Reversible::new(Rk4)).adjoint(adjoint.solver(Dopri5));
    assert!(distance(&problem.gradient(&reversible, 1.0).0, &found) < 1e-5);
}

#[test]
fn half_precision_stays_near_f64() {
    let problem = Problem::new();
    let (exact, _) = problem.gradient(&problem.ode(), 1.0);
    for (precision, tolerance, bound) in
        [(Precision::F32, 1e-5, 1e-4), (Precision::F16, 1e-2, 2e-2), (Precision::BF16, 3e-2, 1e-1)]
    {
        for scaling in [AdjointScaling::per_step(), AdjointScaling::dynamic(), AdjointScaling::none()] {
            let adjoint = Backsolve::default().tolerances(tolerance, tolerance);
            let ode = problem.ode().precision(precision).scaling(scaling).adjoint(adjoint);
            let error = distance(&problem.gradient(&ode, 1.0).0, &exact);
            assert!(error < bound, "{precision:?}: {error:e}");
        }
    }
}

/// f jumps at t = ½, where the way back has to see each side from its own.
#[test]
fn jumps_of_f_are_stepped_to() {
    let field = FnField::new(|t: &Time, y: &Tensor| if t.value() < 0.5 { y.neg() } else { y * 2.0 });
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    for (from, to, exact) in [(0.0, 1.0, 0.5f64.exp()), (1.0, 0.0, (-0.5f64).exp())] {
        let ode = Ode::new(&field).solver(Dopri5).span(from, to).steps(64).discontinuities(&[0.5]);
        let ode = ode.adjoint(Backsolve::default().tolerances(1e-9, 1e-9));
        let solution = ode.solve(y0.as_tensor()).unwrap();
        let grads = solution.last().sum_all().unwrap().backward().unwrap();
        let error = values(grads.get(&y0).unwrap())[0] / exact - 1.0;
        assert!(error.abs() < 1e-8, "{from} to {to}: {error:e}");
        assert!(solution.stats().rejected_back_steps < 3, "a step across the jump would be rejected down to nothing");
    }
}

#[test]
fn steps_are_rejected_and_limits_are_kept() {
    // y′ = cos(t)·y has quick and slow stretches once t is squared.
    let field = FnField::new(|t: &Time, y: &Tensor| y * (t.value() * t.value()).cos());
    let y0 = Var::new(&[1f64, -2.0], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 8.0).steps(16);
    let gradient = |adjoint: Backsolve| {
        let solution = ode.clone().adjoint(adjoint).solve(y0.as_tensor())?;
        solution.last().sum_all()?.backward()?;
        Ok::<_, OdeError>(solution.stats())
    };
    let stats = gradient(Backsolve::default().tolerances(1e-6, 1e-6)).unwrap();
    assert!(stats.rejected_back_steps > 0 && stats.back_steps > 16, "{stats:?}");
    let short = Controller::pi().max_step(0.01);
    assert!(gradient(Backsolve::default().tolerances(1e-2, 1e-2).controller(short)).unwrap().back_steps >= 800);
    let few = gradient(Backsolve::default().tolerances(1e-6, 1e-6).controller(Controller::pi().max_steps(10)));
    match few.unwrap_err() {
        OdeError::StepLimit { steps, reached } => assert!(steps == 10 && reached.time < 8.0 && reached.steps < 10),
        other => panic!("{other}"),
    }
    // No length is below what the time can resolve.
    let tiny = |controller| gradient(Backsolve::default().tolerances(1e-6, 1e-6).controller(controller));
    assert!(tiny(Controller::pi().first_step(1e-300)).is_ok());
    let limit = tiny(Controller::pi().max_step(1e-300).max_steps(10)).unwrap_err();
    assert!(matches!(limit, OdeError::StepLimit { steps: 10, .. }), "{limit}");
    let none = gradient(Backsolve::default().solver(Rk4).tolerances(1e-6, 1e-6)).unwrap_err();
    assert!(matches!(none, OdeError::NoErrorEstimate { .. }), "{none}");
    let wrong = gradient(Backsolve::default().tolerances(-1.0, 1e-6)).unwrap_err().to_string();
    assert!(wrong.contains("rtol") && wrong.contains("-1"), "{wrong}");
}

#[test]
fn where_y_cannot_be_solved_backwards_it_says_so() {
    // Backwards y′ = −100 y grows by e¹⁰⁰: rounding of the end is all there is.
    let field = FnField::new(|_: &Time, y: &Tensor| y * -100.0);
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).tolerances(1e-6, 1e-9);
    let solution = ode.adjoint(Backsolve::default().tolerances(1e-6, 1e-9)).solve(y0.as_tensor()).unwrap();
    solution.last().sum_all().unwrap().backward().unwrap();
    assert!(solution.stats().drift.unwrap() > 1e-2, "{:?}", solution.stats());
}
