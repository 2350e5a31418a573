//! The peak heap of a training step with `Reconstruct` does not grow with the number of steps. Alone in its process:
//! the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use common::memory::{BATCH, DIM, train_step};
use common::{fill, normal};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// M2's size, by the layers of this crate.
fn field(vars: &VarMap) -> ModelField {
    let build = |vb: VarBuilder| Mlp::new(&[DIM, 64, DIM], Activation::Tanh, vb);
    let field = ModelField::new(vars, &Device::Cpu, build, |mlp: &Mlp, _: &Time, y| mlp.forward(y)).unwrap();
    fill(vars, 1, 1.0);
    field
}

/// The least of a few training steps: see `peak_of_m2`.
fn peak(ode: &Ode, y0: &Var, runs: usize) -> u64 {
    let measured = (0..runs).map(|_| {
        let baseline = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        assert_eq!(train_step(ode, y0), 2 * BATCH * DIM * 4);
        TrackingAllocator::peak() - baseline
    });
    measured.min().unwrap()
}

#[test]
fn peak_at_1024_steps_is_at_most_1_02_times_that_at_16() {
    let vars = VarMap::new();
    let field = field(&vars);
    let y0 = Var::from_tensor(&normal(2, &[BATCH, DIM], DType::F32)).unwrap();
    let over = |steps| {
        let ode = Ode::new(&field).solver(Reversible::new(Midpoint)).span(0.0, 1.0).steps(steps);
        ode.adjoint(Reconstruct::default())
    };
    let (short, long) = (peak(&over(16), &y0, 8), peak(&over(1024), &y0, 2));
    println!("16 steps {short} bytes, 1024 steps {long} bytes");
    assert!(long as f64 <= 1.02 * short as f64, "{long} {short}");
}
