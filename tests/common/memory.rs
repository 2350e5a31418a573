//! M2 of the standard problems, and what its solve costs in heap.

use super::{fill, normal};
use candle_core::{DType, Device, Var};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;

pub const BATCH: usize = 512;
pub const DIM: usize = 64;
pub const STEPS: usize = 64;

pub fn m2() -> (VarMap, ModelField, Var) {
    let vars = VarMap::new();
    let build = |vb: VarBuilder| Ok((linear(DIM, 64, vb.pp("in"))?, linear(64, DIM, vb.pp("out"))?));
    let field = ModelField::new(&vars, &Device::Cpu, build, |(first, last): &(Linear, Linear), _: &Time, y| {
        last.forward(&first.forward(y)?.tanh()?)
    })
    .unwrap();
    fill(&vars, 1, 1.0);
    let y0 = Var::from_tensor(&normal(2, &[BATCH, DIM], DType::F32)).unwrap();
    (vars, field, y0)
}

pub fn train_step(ode: &Ode, y0: &Var) -> usize {
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let bytes = solution.trajectory_bytes();
    solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
    bytes
}

/// Peak heap of one training step above its baseline, and the trajectory's bytes.
///
/// Warm-up is in the baseline: each thread of the GEMM packs into a buffer of its own that it keeps, and allocates it
/// whenever the scheduler first lets it join, so the least of a few steps is that of a step in which none did.
pub fn peak_of_m2(precision: Precision) -> (f64, usize) {
    let (_vars, field, y0) = m2();
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(STEPS).precision(precision);
    let measured = (0..8).map(|_| {
        let baseline = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        let bytes = train_step(&ode, &y0);
        (TrackingAllocator::peak() - baseline, bytes)
    });
    let (peak, bytes) = measured.min().unwrap();
    (peak as f64 / (1 << 20) as f64, bytes)
}
