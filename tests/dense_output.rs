//! The solution between the ends of steps has the order of the solver's interpolant, and gradients.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::gradcheck::Case;
use common::*;

/// y′ = 0.8 (1 + y²) cos t, solved by tan(0.8 sin t).
fn tangent() -> FnField {
    FnField::new(|t: &Time, y: &Tensor| (y.sqr()? + 1.0)? * (0.8 * t.value().cos()))
}

fn exact(t: f64) -> f64 {
    (0.8 * t.sin()).tan()
}

/// Log₂ of the ratio of the largest errors between grid points, over halvings of the step.
fn observed_order(solver: impl Solver + Clone, steps: usize, span: (f64, f64)) -> f64 {
    let worst = |steps: usize| {
        let y0 = Tensor::new(&[exact(span.0)], &Device::Cpu).unwrap();
        let ode = Ode::new(&tangent()).solver(solver.clone()).span(span.0, span.1).steps(steps).dense();
        let solution = ode.solve(&y0).unwrap();
        let between = (0..5 * steps).map(|n| span.0 + (span.1 - span.0) * (n as f64 + 0.37) / (5 * steps) as f64);
        between.map(|t| (values(&solution.at(t).unwrap()[0])[0] - exact(t)).abs()).fold(0.0, f64::max)
    };
    (worst(steps) / worst(4 * steps)).log2() / 2.0
}

#[test]
fn dense_output_has_the_order_of_its_interpolant() {
    // An interpolant of order q has an error of O(h^(q+1)) inside a step; the ends have that of the method.
    for span in [(0.0, 3.0), (3.0, 0.0)] {
        for (order, expected, name) in [
            (observed_order(Heun, 64, span), 2.0, "Heun, by Hermite"),
            (observed_order(Bosh3, 32, span), 3.0, "Bosh3, by Hermite"),
            (observed_order(Rk4, 32, span), 4.0, "Rk4, by Hermite"),
            (observed_order(Dopri5, 24, span), 5.0, "Dopri5, by its own"),
            (observed_order(Tsit5, 24, span), 5.0, "Tsit5, by its own"),
        ] {
            assert!((order - expected).abs() < 0.3, "{name} over {span:?}: order {order}");
        }
    }
}

#[test]
fn the_ends_of_steps_are_the_states_themselves() {
    let y0 = Tensor::new(&[0.3, -0.2], &Device::Cpu).unwrap();
    let ode = Ode::new(&tangent()).solver(Dopri5).span(0.0, 1.0);
    let solution = ode.clone().steps(4).save_at(&[0.25, 1.0]).dense().solve(&y0).unwrap();
    for (t, y) in [0.25, 1.0].into_iter().zip(solution.states()) {
        assert_eq!(bits(&solution.at(t).unwrap()[0]), bits(&y[0]));
    }
    assert_eq!(bits(&solution.at(0.0).unwrap()[0]), bits(&y0));
    // Continuous at the end of a step.
    let (left, right) = (solution.at(0.5f64.next_down()).unwrap(), solution.at(0.5f64.next_up()).unwrap());
    assert!(relative(&left[0], &right[0]) < 1e-14);
}

#[test]
fn interpolated_outputs_shape_no_step() {
    let y0 = Tensor::new(&[0.3], &Device::Cpu).unwrap();
    let ode = Ode::new(&tangent()).solver(Dopri5).span(0.0, 3.0).tolerances(1e-8, 1e-8);
    let times: Vec<f64> = (0..=300).map(|n| 0.01 * f64::from(n)).map(|t: f64| t.min(3.0)).collect();
    let free = ode.solve(&y0).unwrap();
    let between = ode.clone().save_at(&times).interpolate().solve(&y0).unwrap();
    let stepped = ode.save_at(&times).solve(&y0).unwrap();
    assert_eq!(between.stats().accepted_steps, free.stats().accepted_steps);
    assert!(stepped.stats().accepted_steps >= 300);
    assert_eq!((between.times(), between.states().len()), (times.as_slice(), 301));
    assert_eq!(bits(between.last()), bits(free.last()));
    for (a, b) in between.states().iter().zip(stepped.states()) {
        assert!((values(&a[0])[0] - values(&b[0])[0]).abs() < 1e-6);
    }
}

/// f is 1 before t = ½ and 3 from there on, and nothing at it.
#[test]
fn between_steps_each_side_of_a_jump_is_seen_from_its_own() {
    let field = FnField::new(|t: &Time, y: &Tensor| {
        let slope = if t.value() < 0.5 { 1.0 } else { 3.0 };
        y.affine(0.0, if t.value() == 0.5 { f64::NAN } else { slope })
    });
    let y0 = Tensor::new(&[0.25], &Device::Cpu).unwrap();
    for (from, to) in [(0.0, 1.0), (1.0, 0.0)] {
        let ode = Ode::new(&field).solver(Dopri5).span(from, to).discontinuities(&[0.5]).dense();
        for ode in [ode.clone().steps(4), ode.tolerances(1e-6, 1e-6)] {
            let solution = ode.solve(&y0).unwrap();
            for t in [0.1, 0.3, 0.45, 0.5f64.next_down(), 0.5, 0.5f64.next_up(), 0.55, 0.9] {
                // The integral of f over time.
                let until = |t: f64| t + 2.0 * (t - 0.5).max(0.0);
                let found = values(&solution.at(t).unwrap()[0])[0];
                assert!((found - 0.25 - until(t) + until(from)).abs() < 1e-13, "{from} to {to} at {t}: {found}");
            }
        }
    }
}

#[test]
fn gradients_go_through_interpolated_states() {
    with_large_stack(|| {
        for adaptive in [false, true] {
            let vars = VarMap::new();
            let field = mlp_field(&vars, DType::F64, 3, 5);
            fill(&vars, 3, 1.5);
            let y0 = variable(4, &[2, 3], DType::F64);
            let names = sorted(&vars).into_iter().chain([("y0".to_owned(), y0.clone())]);
            let ode = Ode::new(&field).span(0.0, 1.0);
            // Given steps: differences of the solution cannot see the controller.
            let ode = if adaptive { ode.solver(Tsit5).tolerances(1e-4, 1e-4) } else { ode.solver(Heun).steps(4) };
            let ode = ode.save_at(&[0.3, 0.9]).interpolate().dense();
            let case = Case::new(names, move |adjoint| {
                let solution = ode.clone().adjoint(adjoint).solve(y0.as_tensor())?;
                let mut loss = solution.last().sum_all()?;
                for state in solution.states().iter().chain([&solution.at(0.55)?, &solution.at(0.56)?]) {
                    loss = (loss + state[0].sqr()?.sum_all()?)?;
                }
                Ok(loss)
            });
            if adaptive { case.equals_unrolled() } else { case.check() }
        }
    });
}

#[test]
fn a_solution_that_cannot_be_asked_says_why() {
    let y0 = Tensor::new(&[0.3], &Device::Cpu).unwrap();
    let ode = Ode::new(&tangent()).solver(Dopri5).span(0.0, 1.0).steps(4);
    let error = ode.solve(&y0).unwrap().at(0.5).unwrap_err();
    assert!(error.to_string().contains("Ode::dense()"), "{error}");
    let dense = ode.clone().dense().solve(&y0).unwrap();
    for t in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(dense.at(t), Err(OdeError::Setting { setting: "Solution::at", .. })));
    }
    let error = ode.save_at(&[1.5]).interpolate().solve(&y0).unwrap_err();
    assert!(matches!(error, OdeError::Setting { setting: "save_at", .. }), "{error}");
}
