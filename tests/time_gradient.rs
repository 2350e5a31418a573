//! Times that are given as tensors receive the gradient of the steps: over given steps equal to finite differences,
//! over adaptive steps to the derivative of the solution.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::gradcheck::differences;
use common::*;

fn mlp() -> (VarMap, ModelField, Var) {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F64, 3, 5);
    fill(&vars, 3, 1.5);
    (vars, field, variable(4, &[2, 3], DType::F64))
}

fn scalar(t: f64) -> Var {
    Var::new(t, &Device::Cpu).unwrap()
}

/// Σ (n + 1) ½ |y_n|² over the outputs.
fn loss(solution: &Solution) -> Tensor {
    let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu).unwrap();
    for (n, state) in solution.states().iter().enumerate() {
        loss = (loss + (state[0].sqr().unwrap().sum_all().unwrap() * (0.5 * (n as f64 + 1.0))).unwrap()).unwrap();
    }
    loss
}

/// The gradients that `run` gives to `times` are those of finite differences.
fn matches_differences(times: &[&Var], run: impl Fn() -> Solution, tolerance: f64) {
    let grads = loss(&run()).backward().unwrap();
    for (n, time) in times.iter().enumerate() {
        let expected = differences(time, 1e-5, || loss(&run()).to_scalar().unwrap());
        let error = relative(grads.get(time).unwrap(), &expected);
        assert!(error < tolerance, "times {n}: {} for {expected}, {error:e}", grads.get(time).unwrap());
    }
}

#[test]
fn the_ends_of_equal_steps_have_gradients() {
    let (_, field, y0) = mlp();
    for memory in [StageMemory::All, StageMemory::One] {
        for (from, to) in [(0.2, 1.3), (1.0, -0.5)] {
            let (t0, t1) = (scalar(from), scalar(to));
            for detached in [true, false] {
                // With respect to nothing but times, too.
                let frozen = if detached { field.clone().freeze(|_| true) } else { field.clone() };
                let start = if detached { y0.as_detached_tensor() } else { y0.as_tensor().clone() };
                let adjoint = Discrete::default().stage_memory(memory);
                let ode = Ode::new(&frozen).steps(5).adjoint(adjoint);
                let run = |ode: Ode| ode.span_tensors(&t0, &t1).solve(&start).unwrap();
                matches_differences(&[&t0, &t1], || run(ode.clone().solver(Rk4)), 1e-8);
                matches_differences(&[&t0, &t1], || run(ode.clone().solver(Dopri5)), 1e-8);
                matches_differences(&[&t0, &t1], || run(ode.clone().solver(Euler)), 1e-8);
            }
        }
    }
}

#[test]
fn every_point_of_a_grid_has_one() {
    let (_, field, y0) = mlp();
    let times = Var::new(&[0.0, 0.1, 0.35, 0.6, 1.0], &Device::Cpu).unwrap();
    let run = || {
        let outputs = values(&times)[1..].to_vec();
        Ode::new(&field).solver(Bosh3).grid_tensor(&times).save_at(&outputs).solve(y0.as_tensor()).unwrap()
    };
    matches_differences(&[&times], run, 1e-8);
    // Through whatever made the times.
    let (length, inner) = (scalar(1.0), Tensor::new(&[0.0, 0.25, 1.0], &Device::Cpu).unwrap());
    let scaled = || {
        let times = inner.broadcast_mul(&length).unwrap();
        Ode::new(&field).solver(Rk4).grid_tensor(&times).solve(y0.as_tensor()).unwrap()
    };
    matches_differences(&[&length], scaled, 1e-8);
}

#[test]
fn output_times_and_ends_of_adaptive_steps_have_the_derivative_of_the_solution() {
    let (_, field, y0) = mlp();
    let (t0, t1) = (scalar(0.1), scalar(1.2));
    let times = Var::new(&[0.4, 0.75], &Device::Cpu).unwrap();
    let ode = Ode::new(&field).solver(Dopri5).tolerances(1e-10, 1e-10).span_tensors(&t0, &t1).save_at_tensor(&times);
    matches_differences(&[&times, &t0], || ode.solve(y0.as_tensor()).unwrap(), 1e-6);
    let whole = Ode::new(&field).solver(Tsit5).tolerances(1e-10, 1e-10).span_tensors(&t0, &t1);
    matches_differences(&[&t0, &t1], || whole.solve(y0.as_tensor()).unwrap(), 1e-6);
}

#[test]
fn times_have_gradients_in_half_precision() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 3, 8);
    fill(&vars, 3, 1.0);
    let y0 = variable(4, &[16, 3], DType::F32);
    let gradient = |precision| {
        let (t0, t1) = (Var::new(0f32, &Device::Cpu).unwrap(), Var::new(1f32, &Device::Cpu).unwrap());
        let ode = Ode::new(&field).span_tensors(&t0, &t1).steps(8).precision(precision);
        let grads = ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        [&t0, &t1].map(|t| values(grads.get(t).unwrap())[0])
    };
    let exact = gradient(Precision::F64);
    for (precision, bound) in [(Precision::F32, 1e-5), (Precision::F16, 5e-3), (Precision::BF16, 4e-2)] {
        for (found, exact) in gradient(precision).iter().zip(exact) {
            assert!((found / exact - 1.0).abs() < bound, "{precision:?}: {found} for {exact}");
        }
    }
}

#[test]
fn a_gradient_that_does_not_fit_is_an_error() {
    // dL/dh is a product of 10³⁵ and 10¹⁰: too much for F32, though dL/dy0 is not.
    let steep = FnField::new(|_, y: &Tensor| y.affine(0.0, 1e10));
    // dL/dt₁ = 10⁶ e fits F32, and no F16.
    let growth = FnField::new(|_, y: &Tensor| y * 1.0);
    for (field, loss, dtype) in [(steep, 1e35, DType::F32), (growth, 1e6, DType::F16)] {
        let time = |t: f64| Var::from_tensor(&scalar(t).to_dtype(dtype).unwrap()).unwrap();
        let (t0, t1) = (time(0.0), time(1.0));
        let y0 = Var::new(&[1f32], &Device::Cpu).unwrap();
        let solution = Ode::new(&field).span_tensors(&t0, &t1).steps(10).solve(y0.as_tensor()).unwrap();
        let error = OdeError::from((solution.last().sum_all().unwrap() * loss).unwrap().backward().unwrap_err());
        assert!(matches!(error, OdeError::SumOverflow { dtype: found, .. } if found == dtype), "{error}");
    }
}

#[test]
fn what_has_no_gradient_of_times_is_refused() {
    let (_, field, y0) = mlp();
    let (t0, t1) = (scalar(0.0), scalar(1.0));
    let times = Var::new(&[0.5, 1.0], &Device::Cpu).unwrap();
    let ode = || Ode::new(&field).solver(Dopri5).span_tensors(&t0, &t1);
    let fails = |ode: Ode| ode.solve(y0.as_tensor()).unwrap_err();
    for ode in [
        ode().steps(4).adjoint(Unrolled),
        ode().steps(4).dense(),
        ode().tolerances(1e-3, 1e-3).save_at(&[0.5]).interpolate(),
        ode().steps(4).save_at_tensor(&times),
        ode().grid(&[0.0, 0.5, 1.0]),
        ode().grid_tensor(&times),
        ode().tolerances(1e-3, 1e-3).save_at_tensor(&Var::new(&[0.5, 0.5], &Device::Cpu).unwrap()),
    ] {
        assert!(matches!(fails(ode), OdeError::Unsupported { what, .. } if what.contains("gradient of times")));
    }
    assert!(ode().steps(4).adjoint(Unrolled).no_grad().solve(y0.as_tensor()).is_ok());
    assert!(matches!(
        fails(ode().span_tensors(&t0, &times).steps(4)),
        OdeError::Setting { setting: "span_tensors", .. }
    ));
    let integers = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
    assert!(matches!(fails(ode().grid_tensor(&integers)), OdeError::Setting { setting: "grid_tensor", .. }));
}
