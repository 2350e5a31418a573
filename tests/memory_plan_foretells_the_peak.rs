//! A plan says what will be measured: owned bytes exactly, the peak of the heap within three per cent, and how often the
//! field is called. Alone in its process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::account::Category;
use candle_ode::memory::{MemoryPlan, MemoryProfiler, TrackingAllocator};
use candle_ode::ops::{Activation, Mlp, conv2d};
use candle_ode::prelude::*;
use common::{fill, variable};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

fn mlp() -> (ModelField, Var) {
    let vars = VarMap::new();
    let build = |vb| Mlp::new(&[64, 64, 64], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y)).unwrap();
    fill(&vars, 1, 1.0);
    (field, variable(2, &[128, 64], DType::F32))
}

fn convolution() -> (ModelField, Var) {
    let vars = VarMap::new();
    let config = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
    let build = move |vb: VarBuilder<'static>| conv2d(4, 4, 3, config, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m, _: &Time, y| m.forward(y)?.tanh()).unwrap();
    fill(&vars, 1, 1.0);
    (field, variable(2, &[8, 4, 16, 16], DType::F32))
}

fn train(ode: &Ode, y0: &Tensor) -> Solution {
    let solution = ode.solve(y0).unwrap();
    solution.last().sum_all().unwrap().backward().unwrap();
    solution
}

/// The least peak of a few warm training steps above what was live before.
fn measured(ode: &Ode, y0: &Tensor) -> u64 {
    let peak = |_| {
        let before = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        train(ode, y0);
        TrackingAllocator::peak() - before
    };
    (0..2).map(peak).min().unwrap()
}

fn check(name: &str, ode: &Ode, y0: &Tensor) -> (MemoryPlan, u64) {
    let plan = ode.plan(y0).unwrap();
    let peak = measured(ode, y0);
    let recording = MemoryProfiler::new(&Device::Cpu).filter(|metadata| metadata.is_event()).install().unwrap();
    let solution = train(ode, y0);
    let owned = Category::ALL.map(|category| recording.ledger().highest(category));
    let total = recording.ledger().highest_total();
    drop(recording);
    let ratio = plan.peak.unwrap() as f64 / peak as f64;
    println!("{name}: planned {} measured {peak} ratio {ratio:.4}", plan.peak.unwrap());
    assert_eq!(owned, Category::ALL.map(|category| plan.owned(category)), "{name}");
    assert_eq!(total, plan.owned_peak, "{name}");
    let stats = solution.stats();
    assert_eq!(
        (stats.evaluations, stats.linearizations, stats.pullbacks, stats.recomputed_steps),
        (plan.evaluations, plan.linearizations, plan.pullbacks, plan.recomputed_steps),
        "{name}"
    );
    assert_eq!(solution.trajectory_bytes() as u64, plan.trajectory, "{name}");
    (plan, peak)
}

#[test]
fn planned_is_measured() {
    // Threads that join a product or not, as the scheduler likes, have buffers of their own.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let mut worst = (1.0_f64, String::new());
    for (problem, (field, y0)) in [("mlp", mlp()), ("convolution", convolution())] {
        for precision in [Precision::F32, Precision::F16, Precision::BF16] {
            // Candle has no convolution in BF16 on the CPU.
            if problem == "convolution" && precision == Precision::BF16 {
                continue;
            }
            let ode = Ode::new(&field).span(0.0, 1.0).precision(precision);
            for (solver, ode) in [
                ("Euler", ode.clone().solver(Euler)),
                ("Heun", ode.clone().solver(Heun)),
                ("RK4", ode.clone().solver(Rk4)),
                ("Dopri5", ode.clone().solver(Dopri5)),
            ] {
                for steps in if solver == "RK4" { &[16, 64][..] } else { &[16] } {
                    for memory in [StageMemory::All, StageMemory::One] {
                        let ode = ode.clone().steps(*steps).adjoint(Discrete::default().stage_memory(memory));
                        let name = format!("{problem} {:?} {solver} {steps} {memory:?}", precision.compute_dtype());
                        let (plan, peak) = check(&name, &ode, y0.as_tensor());
                        let ratio = plan.peak.unwrap() as f64 / peak as f64;
                        if (ratio - 1.0).abs() > (worst.0 - 1.0).abs() {
                            worst = (ratio, name);
                        }
                    }
                }
            }
        }
    }
    println!("worst {worst:?}");
    assert!((worst.0 - 1.0).abs() < 0.03, "{worst:?}");
}
