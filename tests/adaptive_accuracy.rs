//! Adaptive steps keep the error in proportion to the tolerance, in both directions of time, for every solver with an
//! estimate; output times and discontinuities are met to the bit.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_ode::prelude::*;
use candle_ode::{Norm, Tolerance};
use common::values;

/// y′ = −2 t y² and z′ = z² cos t, solved by 1/(1 + t²) and 1/(2 − sin t).
fn rational() -> FnField {
    FnField::new(|t: &Time, y: &Tensor| y.sqr()? * Tensor::new(&[-2.0 * t.value(), t.value().cos()], y.device())?)
}

fn exact(t: f64) -> [f64; 2] {
    [1.0 / (1.0 + t * t), 1.0 / (2.0 - t.sin())]
}

fn start(t: f64) -> Tensor {
    Tensor::new(&exact(t), &Device::Cpu).unwrap()
}

fn error(y: &Tensor, t: f64) -> f64 {
    values(y).iter().zip(exact(t)).map(|(y, e)| (y - e).abs()).fold(0.0, f64::max)
}

/// The error shrinks with the tolerance, and no faster or slower than by a factor of a few for each of ten.
fn is_proportional(solver: impl Solver + Clone, loosest: i32) {
    for (t0, t1) in [(0.0, 3.0), (3.0, 0.0), (-2.0, 1.5)] {
        // An early error in y grows like ∂y(t₁)/∂y(t₀) = (y(t₁)/y(t₀))².
        let growth = (exact(t1)[0] / exact(t0)[0]).powi(2).max(3.0);
        let mut before = None;
        for exponent in loosest..loosest + 4 {
            let tolerance = 10f64.powi(-exponent);
            let ode = Ode::new(&rational()).solver(solver.clone()).span(t0, t1).tolerances(tolerance, tolerance);
            let solution = ode.solve(start(t0)).unwrap();
            let error = error(solution.last(), t1);
            let says = format!("{} from {t0} to {t1} at {tolerance:e}: error {error:e}", solver.name());
            assert!(error < 10.0 * growth * tolerance && solution.end() == t1, "{says}");
            if let Some((error_before, steps_before)) = before {
                let gain: f64 = error_before / error;
                assert!((1.5..100.0).contains(&gain), "{says}, {gain} times less than the one before");
                // h ~ tol^(1/k): ten times the accuracy costs 10^(1/k) times the steps, k being order of the estimate +
                // 1.
                let k = solver.estimate_order().unwrap() + 1;
                let growth = solution.stats().accepted_steps as f64 / steps_before as f64;
                assert!(growth < 1.35 * 10f64.powf(1.0 / k as f64), "{says}, {growth} times the steps");
            }
            before = Some((error, solution.stats().accepted_steps));
        }
    }
}

#[test]
fn error_is_proportional_to_the_tolerance_with_heun() {
    is_proportional(Heun, 2);
}

#[test]
fn error_is_proportional_to_the_tolerance_with_ralston() {
    is_proportional(Ralston, 2);
}

#[test]
fn error_is_proportional_to_the_tolerance_with_bosh3() {
    is_proportional(Bosh3, 3);
}

#[test]
fn error_is_proportional_to_the_tolerance_with_dopri5() {
    is_proportional(Dopri5, 5);
}

#[test]
fn error_is_proportional_to_the_tolerance_with_tsit5() {
    is_proportional(Tsit5, 5);
}

#[test]
fn output_times_are_met_to_the_bit() {
    let wanted = [2.0, 0.1, 0.1 + 1e-9, 0.7, 0.0, 1.0 / 3.0];
    let ode = Ode::new(&rational()).solver(Dopri5).span(0.0, 2.0).tolerances(1e-9, 1e-9).save_at(&wanted);
    let solution = ode.solve(start(0.0)).unwrap();
    assert_eq!(solution.times(), wanted);
    for (y, t) in solution.states().iter().zip(wanted) {
        assert!(error(&y[0], t) < 1e-8, "{t}");
    }
    assert_eq!((solution.end(), values(solution.last())), (2.0, values(&solution.states()[0][0])));
}

#[test]
fn a_jump_of_f_is_stepped_to_and_seen_from_its_own_side() {
    // y′ = 1 before t = 1 and 10 from there on. Without a step to 1 the controller has to find it by rejected steps.
    for up_to in [true, false] {
        let field = FnField::new(move |t: &Time, y: &Tensor| {
            let before = if up_to { t.value() < 1.0 } else { t.value() <= 1.0 };
            y.zeros_like()? + if before { 1.0 } else { 10.0 }
        });
        let y0 = Tensor::zeros(1, DType::F64, &Device::Cpu).unwrap();
        for (t0, t1, end) in [(0.0, 2.0, 11.0), (2.0, 0.0, -11.0)] {
            let ode = Ode::new(&field).solver(Dopri5).span(t0, t1).tolerances(1e-6, 1e-6);
            let blind = ode.solve(&y0).unwrap();
            let told = ode.discontinuities(&[1.0, 77.0]).solve(&y0).unwrap();
            assert!(blind.stats().rejected_steps > 3, "{:?}", blind.stats());
            assert_eq!(told.stats().rejected_steps, 0);
            assert!((values(told.last())[0] - end).abs() < 1e-13, "{}", values(told.last())[0]);
            // A grid through the jump is exact as well.
            let grid =
                Ode::new(&field).solver(Dopri5).span(t0, t1).steps(4).discontinuities(&[1.0]).solve(&y0).unwrap();
            assert!((values(grid.last())[0] - end).abs() < 1e-13);
        }
    }
}

#[test]
fn components_have_tolerances_of_their_own() {
    // z is a million times larger than y and is asked for as loosely.
    let field = FnField::new(|t: &Time, y: &Tensor| {
        (y.neg()? + Tensor::new(&[0.0, 1e6 * (5.0 * t.value()).sin()], y.device())?)? * 1.0
    });
    let y0 = Tensor::new(&[1.0, 0.0], &Device::Cpu).unwrap();
    let solve = |atol: Tolerance, norm| {
        let ode = Ode::new(&field).solver(Dopri5).span(0.0, 3.0).tolerances(0.0, atol);
        ode.controller(Controller::pi().norm(norm)).solve(&y0).unwrap()
    };
    let strict = solve(1e-6.into(), Norm::Max);
    let each = Tensor::new(&[1e-6, 1.0], &Device::Cpu).unwrap();
    let loose = solve((&each).into(), Norm::Max);
    assert!(4 * loose.stats().accepted_steps < strict.stats().accepted_steps);
    assert!((values(loose.last())[0] - (-3f64).exp()).abs() < 1e-5);
    // The same through a norm of one's own: only the first component counts.
    let first = Norm::Custom(std::sync::Arc::new(|scaled: &State| scaled[0].narrow(0, 0, 1)?.abs()?.max(0)));
    assert!(solve(1e-6.into(), first).stats().accepted_steps <= loose.stats().accepted_steps);
    // RMS over a state of two tensors is that over one of all their components.
    let pair = FnField::with_state(|t, y| {
        let (a, b) = (y[0].neg()?, (y[1].neg()? + 1e6 * (5.0 * t.value()).sin())?);
        Ok(State::from([a, b]))
    });
    let parts = State::from([y0.narrow(0, 0, 1).unwrap(), y0.narrow(0, 1, 1).unwrap()]);
    let ode = Ode::new(&pair).solver(Dopri5).span(0.0, 3.0);
    let atol = State::from([Tensor::new(&[1e-6], &Device::Cpu).unwrap(), Tensor::new(1.0, &Device::Cpu).unwrap()]);
    let (joint, split) = (solve((&each).into(), Norm::Rms), ode.tolerances(0.0, atol).solve(parts).unwrap());
    assert_eq!(joint.stats(), split.stats());
    assert_eq!(values(joint.last())[0], values(&split.last_state()[0])[0]);
}
