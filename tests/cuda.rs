//! What must hold on a GPU. Without the feature `cuda`, or without a device, each test says so and passes.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::memory::{cuda_device, meter_for};
use candle_ode::prelude::*;
use common::*;

/// The first GPU, or `None` with the reason printed.
fn gpu() -> Option<Device> {
    match cuda_device(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// dL/dy0 and dL/dθ of a small MLP on `device`, and the solution's end.
fn gradients(device: &Device, precision: Precision, scaling: AdjointScaling) -> Vec<Tensor> {
    let vars = VarMap::new();
    let field = ModelField::new(&vars, device, |vb| Mlp::new(16, 64, vb), |m, t, y| m.forward(t, y)).unwrap();
    for (n, (_, var)) in sorted(&vars).into_iter().enumerate() {
        let fan_in = var.dims().last().copied().unwrap_or(1) as f64;
        let values = (normal(n as u64, var.dims(), DType::F32) / fan_in.sqrt()).unwrap();
        var.set(&values.to_device(device).unwrap()).unwrap();
    }
    let y0 = Var::from_tensor(&normal(9, &[64, 16], DType::F32).to_device(device).unwrap()).unwrap();
    let ode = Ode::new(&field).span(0.0, 1.0).steps(32).precision(precision).scaling(scaling);
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let mut all = vec![solution.last().clone(), grads.get(&y0).unwrap().clone()];
    all.extend(sorted(&vars).into_values().map(|var| grads.get(&var).unwrap().clone()));
    all.iter().map(|x| x.to_device(&Device::Cpu).unwrap()).collect()
}

#[test]
fn gradients_on_the_gpu_are_those_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let exact = gradients(&Device::Cpu, Precision::F32, AdjointScaling::none());
    for (precision, bound) in [(Precision::F32, 1e-5), (Precision::F16, 2e-3), (Precision::BF16, 2e-2)] {
        for scaling in [AdjointScaling::per_step(), AdjointScaling::dynamic(), AdjointScaling::none()] {
            if precision == Precision::F16 && scaling.name() == "none" {
                continue;
            }
            for (n, (a, b)) in gradients(&gpu, precision, scaling.clone()).iter().zip(&exact).enumerate() {
                assert!(relative(a, b) < bound, "{precision:?} {scaling:?} {n}: {}", relative(a, b));
            }
        }
    }
}

#[test]
fn the_pool_meter_sees_the_trajectory() {
    let Some(gpu) = gpu() else { return };
    let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    let y0 = Var::from_tensor(&Tensor::ones((1 << 20,), DType::F32, &gpu).unwrap()).unwrap();
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(33);
    let meter = meter_for(&gpu).unwrap();
    drop(ode.solve(y0.as_tensor()).unwrap());
    let before = meter.live().unwrap();
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let kept = meter.live().unwrap() - before;
    assert!(kept >= solution.trajectory_bytes() as u64, "{kept} bytes live");
    drop(solution);
    assert!(meter.live().unwrap() <= before, "a dropped solution gives its bytes back");
}

#[test]
fn tensors_on_two_devices_are_refused() {
    let Some(gpu) = gpu() else { return };
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 3, 4);
    let ode = Ode::new(&field).span(0.0, 1.0).steps(2);
    let there = Tensor::zeros((2, 3), DType::F32, &gpu).unwrap();
    let here = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(ode.solve(&there).unwrap_err(), OdeError::DeviceMismatch { .. }), "parameters elsewhere");
    let state = State::from([here, there]);
    assert!(matches!(ode.solve(state).unwrap_err(), OdeError::DeviceMismatch { .. }), "half a state elsewhere");
}
