//! The gradient of an adaptive solve is that of its accepted steps: in F64 equal to Candle's own graph through the same
//! steps, and to the gradient over a grid of the same times.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::gradcheck::Case;
use common::*;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

fn mlp() -> (VarMap, ModelField, Var) {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F64, 3, 8);
    fill(&vars, 3, 2.5);
    (vars, field, variable(4, &[4, 3], DType::F64))
}

fn of(solver: impl Solver + Clone) {
    with_large_stack(move || {
        for (t0, t1) in [(0.0, 2.0), (1.0, -1.0)] {
            let (vars, field, y0) = mlp();
            let names = sorted(&vars).into_iter().chain([("y0".to_owned(), y0.clone())]);
            let middle = 0.5 * (t0 + t1) + 0.1;
            let ode = Ode::new(&field).solver(solver.clone()).span(t0, t1).save_at(&[middle, t1]);
            // A long first step, so that some are rejected.
            let ode = ode.tolerances(1e-4, 1e-5).controller(Controller::i().first_step(2.0));
            let solved = ode.solve(y0.as_tensor()).unwrap();
            assert!(solved.stats().rejected_steps > 0 && solved.stats().accepted_steps > 3, "{:?}", solved.stats());
            Case::new(names, move |adjoint| {
                let solution = ode.clone().adjoint(adjoint).solve(y0.as_tensor())?;
                let both = solution.states().iter().map(|y| y[0].sqr()?.sum_all()).collect::<Result<Vec<_>, _>>()?;
                Ok((&both[0] + (&both[1] * 2.0)?)?)
            })
            .equals_unrolled();
        }
    });
}

#[test]
fn equals_the_unrolled_one_with_heun() {
    of(Heun);
}

#[test]
fn equals_the_unrolled_one_with_bosh3() {
    of(Bosh3);
}

#[test]
fn equals_the_unrolled_one_with_dopri5() {
    of(Dopri5);
}

#[test]
fn equals_the_unrolled_one_with_tsit5() {
    of(Tsit5);
}

#[test]
fn is_that_over_a_grid_of_the_accepted_times() {
    for precision in [Precision::F64, Precision::F32, Precision::BF16, Precision::F16] {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F32, 3, 8);
        fill(&vars, 3, 2.0);
        let y0 = variable(4, &[4, 3], DType::F32);
        let times = Arc::new(Mutex::new(vec![0.0]));
        let seen = times.clone();
        let ode = Ode::new(&field).solver(Dopri5).span(0.0, 2.0).precision(precision).tolerances(3e-3, 3e-3);
        let ode = ode.on_step(move |step| {
            assert!(step.error.is_some_and(|error| error <= 1.0));
            seen.lock().unwrap().push(step.t);
            ControlFlow::Continue(())
        });
        let gradients = |solution: Solution| {
            let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
            sorted(&vars).values().chain([&y0]).map(|x| bits(grads.get(x).unwrap())).collect::<Vec<_>>()
        };
        let adaptive = ode.solve(y0.as_tensor()).unwrap();
        assert_eq!(adaptive.trajectory_bytes(), {
            let steps = adaptive.stats().accepted_steps;
            (steps - 1) * 12 * precision.storage_dtype().size_in_bytes()
        });
        let times = times.lock().unwrap().clone();
        let given = Ode::new(&field).solver(Dopri5).grid(&times).precision(precision).solve(y0.as_tensor()).unwrap();
        assert_eq!(bits(adaptive.last()), bits(given.last()), "{precision:?}");
        assert_eq!(gradients(adaptive), gradients(given), "{precision:?}");
    }
}

/// ⟨gradient, direction⟩ against a difference of solves with tight tolerances: the steps move, and it does not matter.
#[test]
fn is_the_derivative_of_the_solution() {
    let (vars, field, y0) = mlp();
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).tolerances(1e-11, 1e-11);
    let loss = || ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().sum_all().unwrap();
    let grads = loss().backward().unwrap();
    for (name, var) in sorted(&vars).into_iter().chain([("y0".to_owned(), y0.clone())]) {
        let direction = normal(8, var.dims(), DType::F64);
        let start = var.as_tensor().copy().unwrap();
        let moved = |by: f64| {
            var.set(&(&start + (&direction * by).unwrap()).unwrap()).unwrap();
            loss().to_scalar::<f64>().unwrap()
        };
        let difference = (moved(1e-4) - moved(-1e-4)) / 2e-4;
        var.set(&start).unwrap();
        let slope: f64 = values(&(grads.get(&var).unwrap() * &direction).unwrap()).iter().sum();
        assert!((difference / slope - 1.0).abs() < 1e-6, "{name}: {slope} {difference}");
    }
}

#[test]
fn is_the_same_on_every_backward_pass() {
    let (_, field, y0) = mlp();
    let ode = Ode::new(&field).solver(Tsit5).span(0.0, 1.0).tolerances(1e-5, 1e-5);
    let loss = ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().sum_all().unwrap();
    let gradient = || -> Vec<u64> { bits(loss.backward().unwrap().get(&y0).unwrap()) };
    assert_eq!(gradient(), gradient());
    let again: Tensor = ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().sum_all().unwrap();
    assert_eq!(gradient(), bits(again.backward().unwrap().get(&y0).unwrap()));
}

#[test]
fn is_the_same_to_the_bit_where_steps_are_computed_again() {
    let (vars, field, y0) = mlp();
    let run = |adjoint: Discrete| {
        let ode = Ode::new(&field).solver(Dopri5).span(0.0, 2.0).tolerances(1e-6, 1e-6).adjoint(adjoint);
        let solution = ode.solve(y0.as_tensor()).unwrap();
        let grads = solution.last().sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let found: Vec<_> = sorted(&vars).values().chain([&y0]).map(|x| bits(grads.get(x).unwrap())).collect();
        (found, solution.stats())
    };
    let (all, kept) = run(Discrete::default());
    let (few, again) = run(Discrete::default().checkpoints(2));
    assert_eq!(all, few);
    assert_eq!((kept.recomputed_steps, kept.accepted_steps), (0, again.accepted_steps));
    assert!(again.recomputed_steps > again.accepted_steps / 2, "{again:?}");
}
