//! What overflows in half precision on the way forward is an error that names the first place, or is retried in F32.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use candle_ode::{Increments4, Increments8, Increments16, PassKind, Place};
use common::*;

/// (200 y)² · 10⁻⁶ = 0.04 y² in F32; in F16 the square overflows as soon as y > 1.28.
fn squaring() -> (VarMap, ModelField) {
    let vars = VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'static>| vb.get(1, "gain");
    let eval = |gain: &Tensor, _: &Time, y: &Tensor| (y.broadcast_mul(gain)?.sqr()? * 1e-3)? * 1e-3;
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    sorted(&vars)["gain"].set(&Tensor::new(&[200f32], &Device::Cpu).unwrap()).unwrap();
    (vars, field)
}

fn start() -> Var {
    Var::new(&[1.2f32, 0.5], &Device::Cpu).unwrap()
}

fn over_two_units(field: &(impl Field + Clone), precision: Precision) -> Ode {
    Ode::new(field).solver(Heun).span(0.0, 2.0).steps(10).precision(precision)
}

/// The first stage at which the squaring field overflows, found in F32: y as it enters f, rounded to F16.
fn first_overflow() -> (usize, usize) {
    let (f, h) = (|y: f64| 0.04 * y * y, 0.2);
    let mut y = f64::from(1.2f32);
    for step in 0.. {
        let second = y + h * f(y);
        for (stage, y) in [y, second].into_iter().enumerate() {
            let inside = half::f16::from_f64(half::f16::from_f64(y).to_f64() * 200.0).to_f64();
            if half::f16::from_f64(inside * inside).is_infinite() {
                return (step, stage);
            }
        }
        y += h / 2.0 * (f(y) + f(second));
    }
    unreachable!("the loop has no end")
}

#[test]
fn an_overflow_in_f_names_the_first_step_time_and_stage() {
    let (vars, field) = squaring();
    let before = snapshot(&vars);
    let (step, stage) = first_overflow();
    assert!(step > 2 && step < 9, "the problem should overflow half way, not in step {step}");
    let time = 0.2 * (step + stage) as f64;
    for y0 in [start().as_tensor().clone(), start().as_detached_tensor()] {
        match over_two_units(&field, Precision::F16).solve(y0).unwrap_err() {
            OdeError::Overflow { pass, place, hint } => {
                assert_eq!(pass, PassKind::Forward);
                let Place { step: found, stage: at, time: when, dtype } = place;
                assert_eq!((found, at, dtype), (step, stage, DType::F16));
                assert!((when - time).abs() < 1e-12, "{when} {time}");
                assert!(hint.contains("OnOverflow::Retry"));
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(snapshot(&vars), before);
}

#[test]
fn a_stage_state_that_overflows_is_seen_though_f_saturates() {
    // f is finite at ±∞: tanh(∞) = 1.
    let field = FnField::new(|t: &Time, y: &Tensor| y.tanh()? * if t.value() < 1.0 { 0.0 } else { 6e4 });
    let y0 = Tensor::new(&[4e4f32], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Midpoint).span(0.0, 2.0).steps(2);
    match ode.precision(Precision::new().compute(DType::F16)).solve(y0).unwrap_err() {
        OdeError::Overflow { pass: PassKind::Forward, place, .. } => {
            assert_eq!((place.step, place.stage), (1, 1), "{place}");
        }
        other => panic!("{other}"),
    }
}

/// One element of one slope is not finite, and f saturates, so that nothing else need show it.
#[test]
fn the_stage_whose_slope_is_not_finite_is_named_whatever_becomes_of_the_step() {
    let y0 = Tensor::new(&[0.3f32, -0.2, 0.1], &Device::Cpu).unwrap();
    let solvers: [&dyn Solver; 7] = [&Euler, &Midpoint, &Heun, &Rk4, &Bosh3, &Dopri5, &Tsit5];
    for tableau in solvers.into_iter().filter_map(Solver::tableau) {
        let evaluated = |step: usize| {
            let stages = (0..tableau.stages()).filter(|stage| tableau.is_used(*stage));
            stages.map(move |stage| (step, stage, 0.5 * (step as f64 + tableau.nodes()[stage])))
        };
        for (_, _, bad) in evaluated(1) {
            let is_bad = move |t: f64| (t - bad).abs() < 1e-9;
            let (step, stage, _) = (0..2).flat_map(evaluated).find(|(_, _, t)| is_bad(*t)).unwrap();
            for value in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
                let spoil = Tensor::new(&[0.0, value, 0.0], &Device::Cpu).unwrap();
                let field = FnField::new(move |t: &Time, y: &Tensor| match is_bad(t.value()) {
                    true => y.tanh()? + spoil.to_dtype(y.dtype())?,
                    false => y.clamp(-1.0, 1.0)?.tanh(),
                });
                for precision in [Precision::F64, Precision::F32, Precision::BF16, Precision::F16] {
                    for tracked in [false, true] {
                        let y0 = if tracked { Var::from_tensor(&y0).unwrap().as_tensor().clone() } else { y0.clone() };
                        let ode = Ode::new(&field).solver(tableau.clone()).span(0.0, 1.0).steps(2).precision(precision);
                        match ode.solve(&y0).unwrap_err() {
                            OdeError::Overflow { pass: PassKind::Forward, place, .. } => {
                                assert_eq!(
                                    (place.step, place.stage),
                                    (step, stage),
                                    "{} {value} {precision:?}",
                                    tableau.name()
                                );
                            }
                            other => panic!("{other}"),
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_solution_without_bounds_is_an_error_in_every_dtype() {
    let field = FnField::new(|_, y: &Tensor| y.sqr());
    for precision in [Precision::F64, Precision::F32, Precision::BF16] {
        let ode = Ode::new(&field).solver(Euler).span(0.0, 30.0).steps(30).precision(precision);
        for retry in [OnOverflow::Error, OnOverflow::Retry] {
            match ode.clone().on_overflow(retry).solve(start().as_tensor()).unwrap_err() {
                OdeError::Overflow { pass: PassKind::Forward, place, hint } => {
                    assert!(place.time == place.step as f64 && place.stage == 0 && place.step > 5);
                    let retried = precision == Precision::BF16 && retry == OnOverflow::Retry;
                    let dtype = if retried { DType::F32 } else { precision.compute_dtype() };
                    assert_eq!(place.dtype, dtype);
                    assert!(!hint.is_empty());
                }
                other => panic!("{other}"),
            }
        }
    }
}

#[test]
fn a_retried_solve_is_right_forwards_and_backwards() {
    let (vars, field) = squaring();
    let run = |precision, memory| {
        let y0 = start();
        let adjoint = Discrete::default().stage_memory(memory);
        let ode = over_two_units(&field, precision).on_overflow(OnOverflow::Retry).adjoint(adjoint);
        let solution = ode.solve(y0.as_tensor()).unwrap();
        let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        let found = [grads.get(&y0).unwrap(), grads.get(&sorted(&vars)["gain"]).unwrap()].map(Tensor::clone);
        (solution, found)
    };
    let (exact, exact_gradients) = run(Precision::F64, StageMemory::All);
    let mut kept: Option<[Tensor; 2]> = None;
    for memory in [StageMemory::All, StageMemory::One] {
        let (solution, gradients) = run(Precision::F16, memory);
        let (stats, first) = (solution.stats(), first_overflow().0);
        assert_eq!((stats.redone_steps, stats.redone_passes, stats.accepted_steps), (10 - first, 0, 10));
        // What a redone step leaves behind is kept in F32, except for the last, which is not kept at all.
        assert_eq!(solution.trajectory_bytes(), first * 2 * 2 + (9 - first) * 2 * 4);
        assert_eq!((solution.last().dtype(), stats.builds), (DType::F32, 4));
        assert!(relative(solution.last(), exact.last()) < 1e-3);
        for (found, exact) in gradients.iter().zip(&exact_gradients) {
            assert!(relative(found, exact) < 2e-3, "{:e}", relative(found, exact));
        }
        if let Some(kept) = &kept {
            assert!(kept.iter().zip(&gradients).all(|(a, b)| bits(a) == bits(b)));
        }
        kept = Some(gradients);
    }
}

#[test]
fn a_state_that_does_not_fit_its_storage_is_an_error_or_kept_wider() {
    // y doubles in every unit of time; the field is in F32 and the trajectory in F16, whose largest number is 65504.
    let field = FnField::new(|_, y: &Tensor| y * std::f64::consts::LN_2);
    let precision = Precision::new().storage(DType::F16);
    let ode = Ode::new(&field).span(0.0, 6.0).steps(6).precision(precision);
    let y0 = Var::new(&[3e3f32, -5e3], &Device::Cpu).unwrap();
    match ode.solve(y0.as_tensor()).unwrap_err() {
        OdeError::StorageOverflow { step, time, dtype, largest } => {
            assert_eq!((step, time, dtype, largest), (3, 4.0, DType::F16, 65504.0));
        }
        other => panic!("{other}"),
    }
    // Nothing is stored, nothing overflows.
    assert!(ode.solve(y0.as_detached_tensor()).is_ok() && ode.clone().no_grad().solve(y0.as_tensor()).is_ok());
    // The last state is handed out and never stored.
    assert!(ode.clone().span(0.0, 4.0).steps(4).solve(y0.as_tensor()).is_ok());
    let solution = ode.clone().on_overflow(OnOverflow::Retry).solve(y0.as_tensor()).unwrap();
    assert_eq!(solution.trajectory_bytes(), 3 * 2 * 2 + 2 * 2 * 4);
    let gradient = values(solution.last().sum_all().unwrap().backward().unwrap().get(&y0).unwrap());
    let growth = values(solution.last())[0] / 3e3;
    assert!(gradient.iter().all(|g| (g / growth - 1.0).abs() < 1e-5), "{gradient:?} {growth}");
    // With f in F16 as well, the steps from there on are redone in F32.
    let all = ode.precision(Precision::F16).on_overflow(OnOverflow::Retry).solve(y0.as_tensor()).unwrap();
    assert!(all.stats().redone_steps > 0);
    let gradient = values(all.last().sum_all().unwrap().backward().unwrap().get(&y0).unwrap());
    assert!(gradient.iter().all(|g| (g / growth - 1.0).abs() < 5e-3), "{gradient:?} {growth}");
}

/// y′ = −y in increments, of states at both ends of what an F32 scale can tell.
#[test]
fn increments_follow_tiny_states_and_say_which_are_too_large() {
    let field = FnField::new(|_, y: &Tensor| y.neg());
    let ode = Ode::new(&field).span(0.0, 1.0).steps(20);
    for (codec, name, start, dtype, bound) in [
        (Discrete::default().codec(Increments16), "16 bits", 1e-44, DType::F64, 1e-4),
        (Discrete::default().codec(Increments16), "16 bits", 1e-41, DType::F32, 2e-3),
        (Discrete::default().codec(Increments8), "8 bits", 1e-41, DType::F32, 2e-2),
        (Discrete::default().codec(Increments4), "4 bits", 1e-41, DType::F32, 5e-2),
    ] {
        let y0 = Var::from_tensor(&Tensor::new(&[start], &Device::Cpu).unwrap().to_dtype(dtype).unwrap()).unwrap();
        let last = ode.clone().adjoint(codec).solve(y0.as_tensor()).unwrap();
        let error = values(last.last())[0] / (values(&y0)[0] * (-1f64).exp()) - 1.0;
        assert!(error.abs() < bound, "{name} from {start:e} in {dtype:?}: {error:e}");
    }
    let y0 = Var::new(&[1e50f64], &Device::Cpu).unwrap();
    let limits = [
        (Discrete::default().codec(Increments16), DType::F16, 2f64.powi(15)),
        (Discrete::default().codec(Increments8), DType::U8, 127.0),
        (Discrete::default().codec(Increments4), DType::U8, 7.0),
    ];
    for (codec, expected, codes) in limits {
        let ode = ode.clone().adjoint(codec);
        let error = ode.solve(y0.as_tensor()).unwrap_err();
        assert!(error.to_string().contains("increment"), "{error}");
        match error {
            OdeError::StorageOverflow { step: 1, dtype, largest, .. } => {
                assert_eq!((dtype, largest), (expected, codes * f64::from(f32::MAX)));
            }
            other => panic!("{other}"),
        }
        let retried = ode.on_overflow(OnOverflow::Retry).solve(y0.as_tensor()).unwrap();
        assert!((values(retried.last())[0] / (1e50 * (-1f64).exp()) - 1.0).abs() < 1e-6);
    }
}
