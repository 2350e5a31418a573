//! Controllers choose sensible steps: Hairer's first length, limits that hold, fewer rejections where the past counts.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_ode::prelude::*;
use common::values;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

/// Van der Pol's oscillator, y″ = μ (1 − y²) y′ − y: mildly stiff for μ = 20.
fn van_der_pol(mu: f64) -> FnField {
    FnField::new(move |_: &Time, y: &Tensor| {
        let (x, v) = (y.narrow(0, 0, 1)?, y.narrow(0, 1, 1)?);
        let bend = ((1.0 - x.sqr()?)? * &v)?;
        Tensor::cat(&[&v, &((bend * mu)? - x)?], 0)
    })
}

fn two(a: f64, b: f64) -> Tensor {
    Tensor::new(&[a, b], &Device::Cpu).unwrap()
}

fn lengths(ode: Ode, y0: &Tensor) -> (Vec<f64>, Solution) {
    let steps = Arc::new(Mutex::new(vec![]));
    let seen = steps.clone();
    let ode = ode.on_step(move |step| {
        seen.lock().unwrap().push(step.h);
        ControlFlow::Continue(())
    });
    let solution = ode.solve(y0).unwrap();
    let lengths = steps.lock().unwrap().clone();
    (lengths, solution)
}

#[test]
fn a_controller_with_a_memory_rejects_fewer_steps_of_a_stiff_problem() {
    let run = |controller: Controller| {
        let ode = Ode::new(&van_der_pol(20.0)).solver(Dopri5).span(0.0, 60.0).tolerances(1e-5, 1e-5);
        let solution = ode.controller(controller).solve(two(2.0, 0.0)).unwrap();
        (solution.stats(), values(solution.last()))
    };
    let ((i, end), (pi, end_pi), (pid, end_pid)) =
        (run(Controller::i()), run(Controller::pi()), run(Controller::pid()));
    // Where stability limits the step, the elementary controller runs into it again and again.
    assert!(i.rejected_steps > 20, "{i:?}");
    assert!(2 * pi.rejected_steps < i.rejected_steps, "{pi:?} {i:?}");
    assert!(pid.rejected_steps < i.rejected_steps, "{pid:?} {i:?}");
    for stats in [pi, pid] {
        let (tries, of_i) = (stats.accepted_steps + stats.rejected_steps, i.accepted_steps + i.rejected_steps);
        assert!(10 * tries < 13 * of_i, "{stats:?} {i:?}");
    }
    assert!((end[0] - end_pi[0]).abs() < 1e-2 && (end[0] - end_pid[0]).abs() < 1e-2, "{end:?} {end_pi:?} {end_pid:?}");
}

#[test]
fn the_first_length_is_hairers() {
    // y′ = λy, y0 = 1, rtol = 0, atol = a: d₀ = 1/a, d₁ = |λ|/a, h₀ = 0.01/|λ|; f₁ − f₀ = λ² h₀, d₂ = λ²/a, and with k
    // = 5 h = (0.01 a/max(|λ|, λ²))^(1/5), at most 100 h₀.
    for (lambda, atol) in [(-3.0f64, 1e-6), (2.0, 1e-4), (-0.1, 1e-3), (40.0, 1e-9)] {
        let field = FnField::new(move |_, y: &Tensor| y * lambda);
        for span in [(0.0, 5.0), (5.0, 0.0)] {
            let ode = Ode::new(&field).solver(Dopri5).span(span.0, span.1).tolerances(0.0, atol);
            // A limit of one try ends the solve there, and says how long that was.
            let first =
                ode.controller(Controller::pi().max_steps(1).factors(0.2, 10.0)).solve(two(1.0, 1.0)).unwrap_err();
            let OdeError::StepLimit { reached, .. } = first else { panic!("{first}") };
            let size: f64 = lambda.abs().max(lambda * lambda);
            let expected = (0.01 * atol / size).powf(0.2).min(1.0 / lambda.abs());
            assert_eq!(reached.steps, 1, "the first try is accepted: {reached}");
            let found = (reached.time - span.0).abs();
            assert!((found / expected - 1.0).abs() < 1e-3, "λ = {lambda}: {found} for {expected}");
        }
    }
    // Nothing to go by: a short step, and then longer ones.
    let still = FnField::new(|_, y: &Tensor| y.zeros_like());
    let (steps, _) = lengths(Ode::new(&still).solver(Heun).span(0.0, 1.0).tolerances(1e-3, 1e-3), &two(0.0, 0.0));
    assert!(steps[0] <= 1e-4 && steps.len() < 12, "{steps:?}");
}

#[test]
fn limits_of_length_hold() {
    let ode = Ode::new(&van_der_pol(3.0)).solver(Tsit5).span(0.0, 10.0).tolerances(1e-4, 1e-4);
    let (free, _) = lengths(ode.clone(), &two(2.0, 0.0));
    let longest = |steps: &[f64]| steps.iter().copied().fold(0.0, f64::max);
    let shortest = |steps: &[f64]| steps[..steps.len() - 1].iter().copied().fold(f64::INFINITY, f64::min);
    assert!(longest(&free) > 0.25 && shortest(&free) < 0.06, "{free:?}");
    let (limited, _) = lengths(ode.clone().controller(Controller::pi().max_step(0.2)), &two(2.0, 0.0));
    assert!(longest(&limited) < 0.2 * 1.011, "{}", longest(&limited));
    let (bounded, _) = lengths(ode.clone().controller(Controller::pi().factors(0.5, 1.5)), &two(2.0, 0.0));
    assert!(bounded.windows(2).all(|pair| pair[1] < 1.5001 * pair[0]), "{bounded:?}");
    // Output times do not count against the shortest step.
    let controller = Controller::pi().min_step(0.01);
    let (_, solution) = lengths(ode.controller(controller).save_at(&[0.5, 0.5005]), &two(2.0, 0.0));
    assert_eq!(solution.times(), [0.5, 0.5005]);
}

#[test]
fn a_step_cut_short_by_a_stop_does_not_shorten_the_next() {
    // A harmonic oscillator: all steps are about as long.
    let field = FnField::new(|_, y: &Tensor| Tensor::cat(&[&y.narrow(0, 1, 1)?, &y.narrow(0, 0, 1)?.neg()?], 0));
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 20.0).tolerances(1e-5, 1e-5);
    let (free, _) = lengths(ode.clone(), &two(1.0, 0.0));
    let stops = [5.0, 5.0 + 1e-9, 15.0, 15.0 + 1e-9];
    for ode in [ode.clone().save_at(&stops), ode.discontinuities(&stops)] {
        let (cut, _) = lengths(ode, &two(1.0, 0.0));
        // One step more for each stop, at most.
        assert!(cut.len() <= free.len() + stops.len(), "{cut:?} {free:?}");
        let tiny: Vec<usize> = (0..cut.len()).filter(|n| cut[*n] < 1e-8).collect();
        assert_eq!(tiny.len(), 2, "{cut:?}");
        assert!(tiny.iter().all(|n| cut[n + 1] > 0.9 * cut[n - 2]), "{cut:?}");
    }
}

#[test]
fn retried_overflow_is_part_of_a_step() {
    // (200 y)²·10⁻⁶ overflows in F16 as soon as y > 1.28; y reaches 1.5.
    let field = FnField::new(|_, y: &Tensor| ((y * 200.0)?.sqr()? * 1e-3)? * 1e-3);
    let y0 = Tensor::new(&[1.2f32, 0.5], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Bosh3).span(0.0, 4.0).tolerances(1e-3, 1e-3).precision(Precision::F16);
    let reached = match ode.solve(&y0).unwrap_err() {
        OdeError::StepTooSmall { reached, .. } | OdeError::StepLimit { reached, .. } => reached,
        other => panic!("{other}"),
    };
    assert!(
        (values(&reached.state[0])[0] - 1.28).abs() < 0.01 && reached.errors.iter().any(|e| e.is_nan()),
        "{reached}"
    );
    let solution = ode.on_overflow(candle_ode::OnOverflow::Retry).solve(&y0).unwrap();
    let stats = solution.stats();
    assert!(stats.redone_steps > 0 && stats.rejected_steps < 5, "{stats:?}");
    assert_eq!(solution.last().dtype(), DType::F32);
    assert!((values(solution.last())[0] - 1.0 / (1.0 / 1.2 - 0.04 * 4.0)).abs() < 5e-3, "{}", solution.last());
}
