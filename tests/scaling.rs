//! F16 gradients survive cotangents far outside F16's range, with scaling and only with it; overflows are mended.
//!
//! The problem of NUMERICS: y′ = −(a t² + b t + c) y with a = 8, b = −10, c = 2⁻¹⁶, L = ½ y(T)².
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarMap};
use candle_ode::prelude::*;
use candle_ode::{OdeError, PassKind};
use common::*;

const START: f64 = 65504.0 / 180.0;
const END: f64 = 2.65;
const STEPS: usize = 399;
const PARAMETERS: [(&str, f64); 3] = [("a", 8.0), ("b", -10.0), ("c", 1.0 / 65536.0)];

/// −(a t² + b t + c) y.
fn slope(a: &Tensor, b: &Tensor, c: &Tensor, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let t = t.like(y)?;
    let rate = ((a * t.sqr()?)? + ((b * t)? + c)?)?;
    (y * rate)?.neg()
}

fn parameters() -> (VarMap, ModelField) {
    let vars = VarMap::new();
    for (name, value) in PARAMETERS {
        vars.get(1, name, Init::Const(value), DType::F32, &Device::Cpu).unwrap();
    }
    let build = |vb: candle_nn::VarBuilder<'static>| Ok([vb.get(1, "a")?, vb.get(1, "b")?, vb.get(1, "c")?]);
    let eval = |[a, b, c]: &[Tensor; 3], t: &Time, y: &Tensor| slope(a, b, c, t, y);
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    (vars, field)
}

/// dL/dy0 = y(T)²/y0 and dL/da, dL/db, dL/dc = −y(T)² (T³/3, T²/2, T).
fn exact() -> [f64; 4] {
    let [a, b, c] = PARAMETERS.map(|(_, value)| value);
    let integral = a * END.powi(3) / 3.0 + b * END.powi(2) / 2.0 + c * END;
    let end = START * (-integral).exp();
    [end * end / START, -end * end * END.powi(3) / 3.0, -end * end * END.powi(2) / 2.0, -end * end * END]
}

/// Relative errors of dL/dy0, dL/da, dL/db, dL/dc.
fn errors(of_y0: &Tensor, of_parameters: [&Tensor; 3]) -> [f64; 4] {
    let found = [of_y0, of_parameters[0], of_parameters[1], of_parameters[2]].map(|g| values(g)[0]);
    std::array::from_fn(|n| (found[n] / exact()[n] - 1.0).abs())
}

fn half_square(solution: &Solution) -> Tensor {
    (solution.last().sqr().unwrap().sum_all().unwrap() * 0.5).unwrap()
}

fn ode<F: Field + Clone>(field: &F, precision: Precision) -> Ode {
    Ode::new(field).solver(Rk4).span(0.0, END).steps(STEPS).precision(precision)
}

fn with_parameters(precision: Precision, scaling: AdjointScaling, memory: StageMemory) -> ([f64; 4], Stats) {
    let (vars, field) = parameters();
    let y0 = Var::new(&[START as f32], &Device::Cpu).unwrap();
    let ode = ode(&field, precision).scaling(scaling).adjoint(Discrete::default().stage_memory(memory));
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let grads = half_square(&solution).backward().unwrap();
    let vars = sorted(&vars);
    let of = PARAMETERS.map(|(name, _)| grads.get(&vars[name]).unwrap());
    (errors(grads.get(&y0).unwrap(), of), solution.stats())
}

fn with_inputs(precision: Precision, scaling: AdjointScaling) -> [f64; 4] {
    let field = FnField::with_inputs(|t, y, inputs| {
        let [a, b, c] = inputs else { candle_core::bail!("{} inputs", inputs.len()) };
        Ok(State::from(slope(a, b, c, t, y.single()?)?))
    });
    let vars = PARAMETERS.map(|(_, value)| Var::new(&[value as f32], &Device::Cpu).unwrap());
    let y0 = Var::new(&[START as f32], &Device::Cpu).unwrap();
    let inputs = vars.clone().map(|var| var.as_tensor().clone());
    let solution = ode(&field, precision).scaling(scaling).inputs(&inputs).solve(y0.as_tensor()).unwrap();
    let grads = half_square(&solution).backward().unwrap();
    errors(grads.get(&y0).unwrap(), [&vars[0], &vars[1], &vars[2]].map(|var| grads.get(var).unwrap()))
}

#[test]
fn the_reference_values_are_those_of_f64() {
    // What is left is the discretisation error of 399 steps.
    let (errors, _) = with_parameters(Precision::F64, AdjointScaling::none(), StageMemory::All);
    assert!(errors.iter().all(|error| *error < 2e-4), "{errors:?}");
}

#[test]
fn per_step_scaling_holds_all_four_derivatives() {
    for memory in [StageMemory::All, StageMemory::One] {
        let (errors, stats) = with_parameters(Precision::F16, AdjointScaling::per_step(), memory);
        assert!(errors.iter().all(|error| *error < 1e-2), "{errors:?}");
        assert_eq!((stats.redone_passes, stats.redone_steps), (0, 0));
    }
    let errors = with_inputs(Precision::F16, AdjointScaling::per_step());
    assert!(errors.iter().all(|error| *error < 1e-2), "{errors:?}");
}

#[test]
fn dynamic_scaling_holds_all_four_derivatives() {
    let (errors, stats) = with_parameters(Precision::F16, AdjointScaling::dynamic(), StageMemory::All);
    assert!(errors.iter().all(|error| *error < 1e-2), "{errors:?}");
    assert!(stats.scale_changes > 0, "{stats:?}");
    let errors = with_inputs(Precision::F16, AdjointScaling::dynamic());
    assert!(errors.iter().all(|error| *error < 1e-2), "{errors:?}");
}

#[test]
fn scaling_is_on_by_default_in_f16() {
    let (_, field) = parameters();
    let y0 = Var::new(&[START as f32], &Device::Cpu).unwrap();
    let solution = ode(&field, Precision::F16).solve(y0.as_tensor()).unwrap();
    let grads = half_square(&solution).backward().unwrap();
    let found = values(grads.get(&y0).unwrap())[0];
    assert!((found / exact()[0] - 1.0).abs() < 1e-2);
}

#[test]
fn without_scaling_the_gradients_are_lost() {
    for errors in [
        with_parameters(Precision::F16, AdjointScaling::none(), StageMemory::All).0,
        with_inputs(Precision::F16, AdjointScaling::none()),
    ] {
        assert!(errors.iter().any(|error| *error > 0.1), "F16 needs no scaling after all: {errors:?}");
    }
}

#[test]
fn dynamic_scaling_waits_for_the_first_cotangent() {
    // Only an inner output is used: the steps behind it see zeros, from which no scale can be found.
    let field = FnField::new(|_, y: &Tensor| y.neg());
    let y0 = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).span(0.0, 2.0).steps(40).save_at(&[1.0]).precision(Precision::F16);
    for scaling in [AdjointScaling::per_step(), AdjointScaling::dynamic()] {
        let solution = ode.clone().scaling(scaling).solve(y0.as_tensor()).unwrap();
        let grads = (solution.states()[0][0].sum_all().unwrap() * 1e-9).unwrap().backward().unwrap();
        for gradient in values(grads.get(&y0).unwrap()) {
            assert!((gradient / (1e-9 * (-1f64).exp()) - 1.0).abs() < 1e-2, "{gradient:e}");
        }
    }
}

#[test]
fn a_backward_pass_that_overflows_is_redone() {
    // dL/dW = Σ yᵀκ sums 4096 rows of 900 each, 3.7e6 where the largest cotangent is 1: κ has to be smaller.
    let vars = VarMap::new();
    let eval = |w: &Tensor, _: &Time, y: &Tensor| y.matmul(w);
    let field = ModelField::new(&vars, &Device::Cpu, |vb| vb.get((2, 2), "w"), eval).unwrap();
    sorted(&vars)["w"].set(&Tensor::new(&[[0.25f32, -0.5], [0.5, 0.125]], &Device::Cpu).unwrap()).unwrap();
    let y0 = Var::from_tensor(&Tensor::full(900f32, (4096, 2), &Device::Cpu).unwrap()).unwrap();
    let scaling = AdjointScaling::per_step();
    let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(4).scaling(scaling.clone());
    let run = |precision: Precision| {
        let solution = ode.clone().precision(precision).solve(y0.as_tensor()).unwrap();
        let grads = solution.last().mean_all().unwrap().backward().unwrap();
        let gradients = [grads.get(&y0).unwrap().clone(), grads.get(&sorted(&vars)["w"]).unwrap().clone()];
        (gradients, solution.stats())
    };
    let (exact, _) = run(Precision::F64);
    let (first, stats) = run(Precision::F16);
    assert!(stats.redone_passes > 0 && stats.redone_steps > 0, "{stats:?}");
    assert_eq!(scaling.headroom(), stats.redone_passes as i32);
    // The F32 master serves the steps that are redone as it is.
    assert_eq!((stats.casts, stats.builds), (1, 3));
    // Another backward of the same solve does the same at once, to the same bits.
    let solution =
        ode.clone().precision(Precision::F16).scaling(AdjointScaling::per_step()).solve(y0.as_tensor()).unwrap();
    let loss = solution.last().mean_all().unwrap();
    let of_w = || bits(loss.backward().unwrap().get(&sorted(&vars)["w"]).unwrap());
    let (once, redone) = (of_w(), solution.stats().redone_passes);
    assert_eq!((of_w(), solution.stats().redone_passes), (once, redone));
    // What was learnt stays: in the end no pass is redone any more.
    let (mut last, mut stats) = run(Precision::F16);
    for _ in 0..10 {
        (last, stats) = run(Precision::F16);
    }
    assert_eq!(stats.redone_passes, 0, "headroom {}", scaling.headroom());
    for found in [first, last] {
        for (found, exact) in found.iter().zip(&exact) {
            assert!(relative(found, exact) < 1e-2, "{:e}", relative(found, exact));
        }
    }
}

#[test]
fn a_cotangent_that_is_not_finite_is_an_error_with_its_place() {
    let field = FnField::new(|_, y: &Tensor| y.neg());
    let precisions = [Precision::F32, Precision::F16, Precision::BF16, Precision::F64];
    let scalings = [AdjointScaling::per_step, AdjointScaling::dynamic, AdjointScaling::none];
    for (precision, scaling) in precisions.iter().flat_map(|p| scalings.iter().map(move |s| (*p, s()))) {
        let y0 = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(4).precision(precision).scaling(scaling);
        let solution = ode.solve(y0.as_tensor()).unwrap();
        let loss = (solution.last().sum_all().unwrap() * f64::NAN).unwrap();
        match OdeError::from(loss.backward().unwrap_err()) {
            OdeError::Overflow { pass, place, .. } => {
                assert_eq!((pass, place.step, place.stage), (PassKind::Backward, 3, 1));
                // Reached in F32 at the latest: nothing wider would help.
                let dtype = if precision == Precision::F64 { DType::F64 } else { DType::F32 };
                assert_eq!(place.dtype, dtype);
            }
            other => panic!("{other}"),
        }
    }
}

/// One Euler step of y′ = 20000 y over h = 0.01, whose pullback is 201: S·h·20000 is at first beyond F16.
#[test]
fn dynamic_scaling_halves_until_a_step_fits() {
    let field = FnField::new(|_, y: &Tensor| y * 20000.0);
    let y0 = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Euler).span(0.0, 0.01).steps(1).precision(Precision::F16);
    let solution = ode.scaling(AdjointScaling::dynamic()).solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sum_all().unwrap().backward().unwrap();
    for gradient in values(grads.get(&y0).unwrap()) {
        assert!((gradient / 201.0 - 1.0).abs() < 1e-3, "{gradient}");
    }
    let stats = solution.stats();
    assert!(stats.redone_steps >= 1 && stats.scale_changes >= stats.redone_steps, "{stats:?}");
    assert_eq!(stats.redone_passes, 0);
}

/// √y has an infinite derivative at 0: no scale brings it into range.
#[test]
fn dynamic_scaling_gives_up_with_its_place() {
    let field = FnField::new(|_, y: &Tensor| y.sqrt());
    let y0 = Var::new(&[0f32, 1.0], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(2).precision(Precision::F16);
    let solution = ode.scaling(AdjointScaling::dynamic()).solve(y0.as_tensor()).unwrap();
    match OdeError::from(solution.last().sum_all().unwrap().backward().unwrap_err()) {
        OdeError::ScalingExhausted { step, time, scale, redone } => {
            assert_eq!((step, time, redone), (1, 0.5, 50));
            assert!(scale > 0.0 && scale < 1.0, "{scale:e}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_scale_is_a_power_of_two() {
    assert!(AdjointScaling::fixed(1024.0).is_ok() && AdjointScaling::fixed(0.125).is_ok());
    for s in [0.0, -2.0, 3.0, f64::NAN, f64::INFINITY] {
        match AdjointScaling::fixed(s) {
            Err(OdeError::Setting { setting, value, .. }) => {
                assert_eq!((setting, value), ("AdjointScaling::fixed", s.to_string()));
            }
            other => panic!("{other:?}"),
        }
    }
    // 2²⁴ brings the cotangents of the reference problem into range nearly everywhere.
    let fixed = AdjointScaling::fixed(2f64.powi(24)).unwrap();
    let (errors, _) = with_parameters(Precision::F16, fixed, StageMemory::All);
    assert!(errors.iter().all(|error| *error < 5e-2), "{errors:?}");
}
