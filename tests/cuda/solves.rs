//! Whole solves and their gradients on a GPU, against the CPU.

use super::gpu;
use crate::common::{self, mlp_field, normal, relative, sorted};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::ops::{self, Activation, Timed};
use candle_ode::prelude::*;

type Gradients = Vec<Tensor>;

/// The end of a solve, dL/dy0 and dL/dθ.
fn gradients<M: 'static>(
    device: &Device,
    shape: &[usize],
    settings: &dyn Fn(Ode) -> Ode,
    build: impl Fn(VarBuilder<'static>) -> Result<M> + Send + Sync + 'static,
    eval: impl Fn(&M, &Time, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Gradients {
    let vars = VarMap::new();
    let field = ModelField::new(&vars, device, build, eval).unwrap();
    for (n, (_, var)) in sorted(&vars).into_iter().enumerate() {
        let fan_in: usize = var.dims().iter().skip(1).product();
        let values = (normal(n as u64, var.dims(), DType::F32) / (fan_in.max(1) as f64).sqrt()).unwrap();
        var.set(&values.to_device(device).unwrap()).unwrap();
    }
    let y0 = Var::from_tensor(&normal(9, shape, DType::F32).to_device(device).unwrap()).unwrap();
    let solution = settings(Ode::new(&field).span(0.0, 1.0)).solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let mut all = vec![solution.last().clone(), grads.get(&y0).unwrap().clone()];
    all.extend(sorted(&vars).into_values().map(|var| grads.get(&var).unwrap().clone()));
    all.iter().map(|x| x.to_device(&Device::Cpu).unwrap()).collect()
}

fn plain(device: &Device, settings: &dyn Fn(Ode) -> Ode) -> Gradients {
    gradients(device, &[64, 16], settings, |vb| common::Mlp::new(16, 64, vb), |m, t, y| m.forward(t, y))
}

/// Layers of ours, some of which see the time, with activations that keep their results and others that keep their
/// arguments.
fn ours(device: &Device, settings: &dyn Fn(Ode) -> Ode) -> Gradients {
    let build = |vb: VarBuilder<'static>| {
        Ok(ops::seq()
            .add_timed(ops::concat_linear(16, 65, vb.pp("a"))?)
            .add(Activation::Tanh)
            .add(ops::linear(65, 33, vb.pp("b"))?)
            .add(Activation::Silu)
            .add(ops::linear_no_bias(33, 16, vb.pp("c"))?)
            .add(Activation::Softplus))
    };
    gradients(device, &[77, 16], settings, build, |m, t, y| m.forward_at(t, y))
}

fn images(device: &Device, settings: &dyn Fn(Ode) -> Ode) -> Gradients {
    let build = |vb: VarBuilder<'static>| {
        let same = Conv2dConfig { padding: 1, ..Default::default() };
        Ok((ops::conv2d(4, 6, 3, same, vb.pp("a"))?, ops::conv2d(6, 4, 3, same, vb.pp("b"))?))
    };
    gradients(device, &[3, 4, 9, 7], settings, build, |m, _, y| m.1.forward(&ops::tanh(&m.0.forward(y)?)?))
}

type Problem = fn(&Device, &dyn Fn(Ode) -> Ode) -> Gradients;
const PROBLEMS: [(&str, Problem); 3] = [("plain", plain), ("ours", ours), ("images", images)];

fn compare(what: &str, got: &[Tensor], exact: &[Tensor], bound: f64) {
    for (n, (a, b)) in got.iter().zip(exact).enumerate() {
        assert!(relative(a, b) < bound, "{what}: tensor {n} is off by {}", relative(a, b));
    }
}

#[test]
fn gradients_on_the_gpu_are_those_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    for (name, problem) in PROBLEMS {
        let exact = problem(&Device::Cpu, &|ode| ode.steps(16));
        for (precision, bound) in [(Precision::F32, 2e-5), (Precision::F16, 4e-3), (Precision::BF16, 3e-2)] {
            for scaling in [AdjointScaling::per_step(), AdjointScaling::dynamic(), AdjointScaling::none()] {
                if precision == Precision::F16 && scaling.name() == "none" {
                    continue;
                }
                let what = format!("{name} in {precision:?} with {}", scaling.name());
                let got = problem(&gpu, &|ode| ode.steps(16).precision(precision).scaling(scaling.clone()));
                compare(&what, &got, &exact, bound);
            }
        }
    }
}

#[test]
fn sums_in_f64_take_what_kernels_add_in_f32() {
    let Some(gpu) = gpu() else { return };
    let precision = Precision::new().compute(DType::F32).storage(DType::F32).accumulate(DType::F64);
    let settings = |ode: Ode| ode.steps(8).precision(precision);
    compare("F64 sums", &ours(&gpu, &settings), &ours(&Device::Cpu, &settings), 2e-5);
}

#[test]
fn adaptive_and_reversible_solves() {
    let Some(gpu) = gpu() else { return };
    let settings: [(&str, &dyn Fn(Ode) -> Ode); 3] = [
        ("adaptive", &|ode| ode.solver(Dopri5).tolerances(1e-5, 1e-5)),
        ("reversible", &|ode| ode.steps(32).solver(Reversible::new(Rk4)).adjoint(Reconstruct::default())),
        ("checkpoints", &|ode| ode.steps(32).adjoint(Discrete::default().checkpoints(4))),
    ];
    for (name, settings) in settings {
        compare(name, &ours(&gpu, settings), &ours(&Device::Cpu, settings), 1e-4);
    }
}

/// The same settings give the same bits.
#[test]
fn solves_on_the_gpu_are_repeatable() {
    let Some(gpu) = gpu() else { return };
    for (_, problem) in PROBLEMS {
        let run = || problem(&gpu, &|ode| ode.steps(8).precision(Precision::F16));
        for (a, b) in run().iter().zip(&run()) {
            assert_eq!(common::bits(a), common::bits(b));
        }
    }
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
