//! What `Reconstruct`, `Backsolve` and `Reversible` cannot do is an error that says what to do instead.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_ode::PassKind;
use candle_ode::prelude::*;
use common::*;

fn decay() -> FnField {
    FnField::new(|_: &Time, y: &Tensor| y.neg())
}

fn solve(solver: impl Solver, adjoint: impl Into<Adjoint>) -> Result<Solution, OdeError> {
    let y0 = variable(1, &[2, 3], DType::F32);
    Ode::new(&decay()).solver(solver).span(0.0, 1.0).steps(4).adjoint(adjoint).solve(y0.as_tensor())
}

fn backward(solution: &Solution) -> OdeError {
    OdeError::from(solution.last().sum_all().unwrap().backward().unwrap_err())
}

#[test]
fn reconstruct_of_a_solver_that_is_not_reversible() {
    match solve(Rk4, Reconstruct::default()).unwrap_err() {
        OdeError::Unsupported { what, instead } => {
            assert!(what.contains("Rk4"), "{what}");
            assert!(instead.contains("Reversible::new(Rk4)") && instead.contains("Discrete"), "{instead}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn settings_out_of_range() {
    for c in [0.0, 1.0, -0.5, 1.5, f64::NAN, f64::INFINITY] {
        match Reversible::new(Rk4).coupling(c).unwrap_err() {
            OdeError::Setting { setting, value, .. } => {
                assert_eq!((setting, value), ("Reversible::coupling", c.to_string()));
            }
            other => panic!("{other}"),
        }
    }
    let zero = |error| match error {
        OdeError::Setting { setting, value, .. } if value == "0" => setting,
        other => panic!("{other}"),
    };
    let anchors = solve(Reversible::new(Rk4), Reconstruct::default().anchor_every(0));
    assert_eq!(zero(anchors.unwrap_err()), "Reconstruct::anchor_every");
    assert_eq!(zero(solve(Rk4, Backsolve::default().substeps(0)).unwrap_err()), "Backsolve::substeps");
}

#[test]
fn backsolve_over_a_method_without_a_tableau() {
    match solve(Reversible::new(Rk4), Backsolve::default()).unwrap_err() {
        OdeError::Unsupported { what, instead } => {
            assert!(
                what.contains("Reversible(Rk4)") && instead.contains("Backsolve::default().solver"),
                "{what} {instead}"
            );
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_reconstruction_that_breaks_down_names_its_step() {
    // Forwards every error dies away as e^−100t, backwards it grows so: beyond all numbers of F32 half way.
    let field = FnField::new(|t: &Time, y: &Tensor| (y - t.value().cos())? * -100.0);
    let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Euler).span(0.0, 2.0).steps(2000);
    let solution = ode.clone().adjoint(Backsolve::default().solver(Euler)).solve(y0.as_tensor()).unwrap();
    match backward(&solution) {
        OdeError::Reconstruction { step, time, hint } => {
            assert!(step < 1200 && (time - f64::from(step as u32) * 1e-3).abs() < 1e-9, "{step} {time}");
            assert!(hint.contains("Discrete"));
        }
        other => panic!("{other}"),
    }
    // Discrete has no such trouble.
    let solution = ode.solve(y0.as_tensor()).unwrap();
    solution.last().sum_all().unwrap().backward().unwrap();
}

#[test]
fn a_reversible_solver_beyond_its_stability_is_an_error_or_shows_its_drift() {
    // |αh| = 0.05 with c = 0.999: far beyond 1 − c, so that y runs away forwards.
    let field = FnField::new(|_: &Time, y: &Tensor| y * -50.0);
    let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
    let ode = |steps| {
        let end = f64::from(steps) * 1e-3;
        Ode::new(&field)
            .solver(Reversible::new(Rk4))
            .span(0.0, end)
            .steps(steps as usize)
            .adjoint(Reconstruct::default())
    };
    match ode(40_000).solve(y0.as_tensor()).unwrap_err() {
        OdeError::Overflow { pass: PassKind::Forward, place, .. } => assert!(place.step > 100, "{place}"),
        other => panic!("{other}"),
    }
}
