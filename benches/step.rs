//! One training step (forward, loss, backward) of the standard problems M1 and M2, and what a step of the solver costs
//! among few and many: `cargo bench --bench step`.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// A field over `sizes`, its state, and how many steps.
struct Problem {
    name: &'static str,
    sizes: &'static [usize],
    batch: usize,
    steps: usize,
}

const PROBLEMS: [Problem; 2] = [
    Problem { name: "M1", sizes: &[16, 64, 64, 16], batch: 64, steps: 32 },
    Problem { name: "M2", sizes: &[64, 64, 64], batch: 512, steps: 64 },
];

fn train_step(ode: &Ode, y0: &Tensor) -> Result<()> {
    let loss = ode.solve(y0)?.last().sqr()?.mean_all()?;
    black_box(loss.backward()?);
    Ok(())
}

fn steps(criterion: &mut Criterion) {
    for problem in &PROBLEMS {
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'static>| Mlp::new(problem.sizes, Activation::Tanh, vb);
        let field = ModelField::of_layers(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), build)
            .unwrap_or_else(|error| panic!("{}: {error}", problem.name));
        let y0 = Tensor::randn(0f32, 1.0, (problem.batch, problem.sizes[0]), &Device::Cpu)
            .and_then(|y| Var::from_tensor(&y));
        let y0 = y0.unwrap_or_else(|error| panic!("{error}"));
        let mut group = criterion.benchmark_group(problem.name);
        group.sample_size(10);
        for precision in [Precision::F32, Precision::BF16, Precision::F16, Precision::new().storage(DType::F16)] {
            let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(problem.steps).precision(precision);
            let name = format!("rk4 compute {:?} storage {:?}", precision.compute_dtype(), precision.storage_dtype());
            group.bench_function(name, |bencher| {
                bencher.iter(|| train_step(&ode, y0.as_tensor()).unwrap_or_else(|error| panic!("{error}")));
            });
        }
        group.finish();
    }
}

/// A state of one number, so that what is left is what is done beside f. Steps per second should not fall.
fn many_steps(criterion: &mut Criterion) {
    let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    let y0 = Var::new(&[1f64], &Device::Cpu).unwrap_or_else(|error| panic!("{error}"));
    let mut group = criterion.benchmark_group("many steps");
    group.sample_size(10);
    for steps in [1000, 16_000, 64_000] {
        group.throughput(Throughput::Elements(steps as u64));
        let times: Vec<f64> = (0..=steps).map(|n| n as f64 / steps as f64).collect();
        let ode = Ode::new(&field).solver(Euler).grid(&times);
        let outputs = ode.clone().no_grad().save_at(&times);
        group.bench_function(format!("{steps}, an output after each"), |bencher| {
            bencher.iter(|| black_box(outputs.solve(y0.as_tensor()).unwrap_or_else(|error| panic!("{error}"))));
        });
        group.bench_function(format!("{steps}, with the gradient"), |bencher| {
            bencher.iter(|| train_step(&ode, y0.as_tensor()).unwrap_or_else(|error| panic!("{error}")));
        });
    }
    group.finish();
}

criterion_group!(benches, steps, many_steps);
criterion_main!(benches);
