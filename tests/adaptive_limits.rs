//! An adaptive solve that cannot go on says how far it came, with the solution so far, the last errors and the
//! offending component; settings that make no sense are refused before anything runs.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_ode::controller::AtFloor;
use candle_ode::prelude::*;
use candle_ode::{Interrupted, Norm, Tolerance};
use common::*;

fn decay() -> FnField {
    FnField::new(|_, y| y.neg())
}

fn over(field: &(impl Field + Clone), tolerance: f64) -> Ode {
    Ode::new(field).solver(Dopri5).span(0.0, 1.0).tolerances(tolerance, tolerance)
}

fn ones() -> Tensor {
    Tensor::ones((2, 3), DType::F64, &Device::Cpu).unwrap()
}

#[test]
fn at_the_step_limit_the_error_holds_the_solution_so_far() {
    let ode = over(&decay(), 1e-9).save_at(&[0.0, 0.05, 0.9]);
    let whole = ode.solve(ones()).unwrap();
    let all = whole.stats().accepted_steps + whole.stats().rejected_steps;
    for limit in 1..all {
        let limited = ode.clone().controller(Controller::pi().max_steps(limit));
        let OdeError::StepLimit { steps, reached } = limited.solve(ones()).unwrap_err() else {
            panic!("another error")
        };
        let Interrupted { time, state, times, states, errors, worst, .. } = *reached;
        assert_eq!(steps, limit);
        assert!((values(&state[0])[3] - (-time).exp()).abs() < 1e-7, "at {time}");
        assert_eq!(errors.len(), limit.min(8));
        assert!(worst.tensor == 0 && worst.index < 6 && worst.error >= 0.0);
        let passed: Vec<f64> = [0.0, 0.05, 0.9].into_iter().filter(|t| *t < time).collect();
        assert!(
            times == passed || times.len() == passed.len() + 1 || times.len() + 1 == passed.len(),
            "{times:?} at {time}"
        );
        assert_eq!(times.len(), states.len());
        assert!(!state[0].track_op());
    }
    assert!(ode.controller(Controller::pi().max_steps(all)).solve(ones()).is_ok());
}

#[test]
fn a_pole_names_the_component_that_leaves() {
    // y′ = y²: the second of these has its pole at t = 0.5.
    let field = FnField::new(|_, y: &Tensor| y.sqr());
    let y0 = Tensor::new(&[0.5, 2.0, 1.0], &Device::Cpu).unwrap();
    let error = over(&field, 1e-6).solve(&y0).unwrap_err();
    assert!(error.to_string().contains("flat index 1"), "{error}");
    match error {
        OdeError::StepTooSmall { h, reached } => {
            assert!((reached.time - 0.5).abs() < 1e-6 && h < 1e-12, "{h} {reached}");
            assert_eq!((reached.worst.tensor, reached.worst.index), (0, 1));
            assert!(values(&reached.state[0])[1] > 1e6);
        }
        OdeError::StepLimit { reached, .. } => panic!("the pole was not reached: {reached}"),
        other => panic!("{other}"),
    }
    // The shortest step that the user allows is the one named.
    let coarse = over(&field, 1e-6).controller(Controller::pi().min_step(0.01)).solve(&y0).unwrap_err();
    assert!(matches!(coarse, OdeError::StepTooSmall { h, .. } if h == 0.01), "{coarse}");
}

#[test]
fn a_nan_rejects_the_step_and_a_shorter_one_goes_on() {
    // √(1 − t²)-like: f is NaN beyond |y| = 1, which only a step that is too long enters.
    let field = FnField::new(|_, y: &Tensor| (1.0 - y.sqr()?)?.sqrt());
    let y0 = Tensor::zeros(2, DType::F64, &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.5).tolerances(1e-6, 1e-6);
    let solution = ode.controller(Controller::pi().first_step(1.5)).solve(&y0).unwrap();
    assert!(solution.stats().rejected_steps > 0);
    assert!((values(solution.last())[0] - 1.5f64.sin()).abs() < 1e-5);
    // NaN whatever the step: an error that says so.
    let never = FnField::new(|t: &Time, y: &Tensor| y * if t.value() > 0.5 { f64::NAN } else { 1.0 });
    match over(&never, 1e-6).solve(ones()).unwrap_err() {
        OdeError::StepTooSmall { reached, .. } => {
            assert!((reached.time - 0.5).abs() < 1e-9 && reached.worst.error.is_nan(), "{reached}");
            assert!(reached.errors.last().unwrap().is_nan());
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_solver_without_an_estimate_is_refused_with_those_that_have_one() {
    let error = over(&decay(), 1e-3).solver(Rk4).solve(ones()).unwrap_err();
    assert!(matches!(&error, OdeError::NoErrorEstimate { solver } if solver == "Rk4"));
    for name in ["Heun", "Ralston", "Bosh3", "Dopri5", "Tsit5", ".steps(n)"] {
        assert!(error.to_string().contains(name), "{error}");
    }
    let plain = Tableau::new("mine", 2, &[&[1.0]], &[0.5, 0.5]).unwrap();
    assert!(over(&decay(), 1e-3).solver(plain.clone()).solve(ones()).is_err());
    assert!(over(&decay(), 1e-3).solver(plain.with_embedded(&[1.0, 0.0]).unwrap()).solve(ones()).is_ok());
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let setting = |ode: Ode| match ode.solve(ones()).unwrap_err() {
        OdeError::Setting { setting, hint, .. } if !hint.is_empty() => setting,
        other => panic!("{other}"),
    };
    let with = |controller| setting(over(&decay(), 1e-3).controller(controller));
    let nan = f64::NAN;
    assert_eq!(setting(over(&decay(), 1e-3).steps(4)), "steps");
    assert_eq!(setting(over(&decay(), 1e-3).grid(&[0.0, 1.0])), "grid");
    assert_eq!(setting(over(&decay(), 0.0)), "tolerances");
    assert_eq!(setting(over(&decay(), -1e-3)), "rtol");
    assert_eq!(setting(over(&decay(), 1.0).tolerances(1e-3, nan)), "atol");
    assert_eq!(setting(over(&decay(), 1e-3).save_at(&[1.5])), "save_at");
    assert_eq!(
        setting(over(&decay(), 1.0).tolerances(&Tensor::ones(4, DType::F64, &Device::Cpu).unwrap(), 1.0)),
        "rtol"
    );
    assert_eq!(setting(over(&decay(), 1.0).tolerances(State::from([ones(), ones()]), 1.0)), "rtol");
    let vector = Norm::Custom(std::sync::Arc::new(|scaled: &State| scaled[0].flatten_all()));
    assert_eq!(with(Controller::pi().norm(vector)), "Norm::Custom");
    assert_eq!(with(Controller::new([nan, 0.0, 0.0])), "Controller::new");
    for safety in [0.0, 1.1, nan] {
        assert_eq!(with(Controller::pi().safety(safety)), "Controller::safety");
    }
    for (least, most) in [(0.0, 2.0), (1.0, 2.0), (0.5, 1.0), (0.5, f64::INFINITY), (nan, 2.0)] {
        assert_eq!(with(Controller::pi().factors(least, most)), "Controller::factors");
    }
    for h in [0.0, -0.1, nan, f64::INFINITY] {
        assert_eq!(with(Controller::pi().first_step(h)), "Controller::first_step");
    }
    assert_eq!(with(Controller::pi().min_step(-1.0)), "Controller::min_step");
    assert_eq!(with(Controller::pi().max_step(0.0)), "Controller::max_step");
    assert_eq!(with(Controller::pi().min_step(0.1).max_step(0.01)), "Controller::max_step");
    assert_eq!(with(Controller::pi().max_steps(0)), "Controller::max_steps");
    let nowhere = over(&decay(), 1e-3).span(0.5, 0.5).solve(ones()).unwrap_err();
    assert!(matches!(nowhere, OdeError::EmptySpan { .. }));
    let never = over(&decay(), 1e-3).discontinuities(&[0.5, nan]).solve(ones()).unwrap_err();
    assert!(matches!(never, OdeError::NonFiniteTime { index: 1, .. }));
    assert_eq!(setting(Ode::new(&decay()).solver(Dopri5).tolerances(1e-3, 1e-3)), "span");
    let _ = Tolerance::from(1.0);
}

/// A network whose rounding in F16 is far above the tolerance.
#[test]
fn a_tolerance_below_the_rounding_of_f_is_reported_or_accepted() {
    let vars = candle_nn::VarMap::new();
    let field = mlp_field(&vars, DType::F32, 8, 32);
    fill(&vars, 3, 1.5);
    let y0 = normal(4, &[16, 8], DType::F32);
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).precision(Precision::F16);
    let tight = ode.clone().tolerances(1e-7, 1e-7);
    let error = tight.solve(&y0).unwrap_err();
    let OdeError::ErrorFloor { error: estimate, floor, dtype, ref reached, .. } = error else { panic!("{error}") };
    assert_eq!(dtype, DType::F16);
    assert!(floor > 0.25 * estimate && estimate > 1.0 && reached.errors.len() < 8, "{error}");
    let accepting = tight.controller(Controller::pi().at_floor(AtFloor::Accept)).solve(&y0).unwrap();
    let exact = ode.clone().precision(Precision::F64).tolerances(1e-9, 1e-9).solve(&y0).unwrap();
    let stats = accepting.stats();
    assert!(stats.floored_steps > 0 && stats.accepted_steps < 100, "{stats:?}");
    assert!(relative(accepting.last(), exact.last()) < 2e-3);
    // In reach of F16: no floor, and no more steps than F64 needs.
    let (half, wide) = (ode.clone().tolerances(3e-3, 3e-3), ode.precision(Precision::F64).tolerances(3e-3, 3e-3));
    let (half, wide) = (half.solve(&y0).unwrap().stats(), wide.solve(&y0).unwrap().stats());
    assert_eq!(half.floored_steps, 0);
    assert!(half.accepted_steps <= wide.accepted_steps + 1, "{half:?} {wide:?}");
}

/// Times in milliseconds since 1970 resolve no step of 1e-6.
#[test]
fn a_start_far_from_zero_is_no_obstacle() {
    let t = 1.7e12;
    let field = FnField::new(|_, y: &Tensor| y.affine(-1e-3, 1.0));
    let y0 = Tensor::zeros(3, DType::F64, &Device::Cpu).unwrap();
    let solution = Ode::new(&field).solver(Dopri5).span(t, t + 1000.0).tolerances(1e-6, 1e-6).solve(&y0).unwrap();
    let expected = 1000.0 * (1.0 - (-1f64).exp());
    assert!(values(solution.last()).iter().all(|y| (y / expected - 1.0).abs() < 1e-5), "{}", solution.last());
}

/// Of a component that stays 0 the error is 0, not 0/0.
#[test]
fn without_an_absolute_tolerance_a_component_may_stay_zero() {
    let field = FnField::new(|_, y: &Tensor| y.neg());
    let y0 = Tensor::new(&[0f32, 1.0], &Device::Cpu).unwrap();
    let solution = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).tolerances(1e-5, 0.0).solve(&y0).unwrap();
    let [zero, one] = values(solution.last())[..] else { panic!() };
    assert!(zero == 0.0 && (one - (-1f64).exp()).abs() < 1e-4, "{zero} {one}");
}
