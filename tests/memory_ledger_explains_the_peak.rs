//! What a training step's live bytes are made of sums to the meter's figure at every moment, and less than two per cent
//! of them go by the name of `other`. Alone in its process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use candle_ode::memory::{Composition, MemoryProfiler, MemoryReport, Part, TrackingAllocator};
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use common::{fill, variable};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// Sizes, batch, steps.
const M1: (&[usize], usize, usize) = (&[16, 64, 64, 16], 64, 32);
const M2: (&[usize], usize, usize) = (&[64, 64, 64], 512, 64);

fn step(ode: &Ode, y0: &Tensor) {
    let loss = ode.solve(y0).unwrap().last().sqr().unwrap().mean_all().unwrap();
    loss.backward().unwrap();
}

/// One training step of a warm problem, recorded.
fn report(
    (sizes, batch, steps): (&'static [usize], usize, usize),
    precision: Precision,
    reconstructs: bool,
) -> MemoryReport {
    let vars = VarMap::new();
    let build = move |vb| Mlp::new(sizes, Activation::Tanh, vb);
    let eval = |m: &Mlp, _: &Time, y: &Tensor| candle_nn::Module::forward(m, y);
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[batch, sizes[0]], DType::F32);
    let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(steps).precision(precision);
    let ode = if reconstructs { ode.solver(Reversible::new(Rk4)).adjoint(Reconstruct::default()) } else { ode };
    (0..3).for_each(|_| step(&ode, y0.as_tensor()));
    let recording = MemoryProfiler::new(&Device::Cpu).install().unwrap();
    step(&ode, y0.as_tensor());
    recording.ledger().check().unwrap();
    recording.finish().unwrap()
}

#[test]
fn the_parts_sum_to_the_meter_and_other_is_small() {
    // Unoptimised, M2 takes minutes; the optimised run is the one that counts.
    let problems = if cfg!(debug_assertions) { vec![("M1", M1)] } else { vec![("M1", M1), ("M2", M2)] };
    for (name, problem) in problems {
        let precisions = [Precision::F32, Precision::BF16, Precision::F16];
        for (precision, reconstructs) in precisions.into_iter().flat_map(|it| [(it, false), (it, true)]) {
            let report = report(problem, precision, reconstructs);
            let peak = report.at_peak.bytes;
            let above = peak.above_baseline();
            let adjoint = if reconstructs { "Reconstruct" } else { "Discrete" };
            println!("{name} {:?} {adjoint}: peak {above} bytes", precision.compute_dtype());
            for (part, bytes) in peak.iter().filter(|(part, bytes)| *part != Part::Baseline && *bytes != 0) {
                println!("  {:12} {bytes:9} {:6.2} %", part.name(), 100.0 * bytes as f64 / above as f64);
            }
            assert_eq!(peak.total() as u64, report.peak(), "{name}");
            assert_eq!(report.timeline.0.iter().map(|moment| moment.bytes.total()).max(), Some(peak.total()));
            let other = |bytes: &Composition| bytes.of(Part::Other).unsigned_abs() as f64 / above as f64;
            assert!(other(&peak) < 0.02, "{name}: other {:.2} %", 100.0 * other(&peak));
        }
    }
}
