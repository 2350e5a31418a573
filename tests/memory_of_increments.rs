//! Increments lie on the host without tensors around them: what they take beside their elements is little. Alone in its
//! process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::DType;
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;
use candle_ode::{Increments4, Increments8, Increments16};
use common::variable;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// Live bytes beside the trajectory itself, once a solve is done, and the gradient that comes of it.
fn beside(ode: &Ode, steps: usize) -> (u64, Vec<f32>) {
    let y0 = variable(2, &[16, 4], DType::F32);
    let before = TrackingAllocator::live();
    let solution = ode.clone().steps(steps).solve(y0.as_tensor()).unwrap();
    let beside = TrackingAllocator::live() - before - solution.trajectory_bytes() as u64;
    let grads = solution.last().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    (beside, grads.get(&y0).unwrap().flatten_all().unwrap().to_vec1().unwrap())
}

#[test]
fn a_step_takes_little_beside_its_increment() {
    let field = FnField::new(|_: &Time, y: &candle_core::Tensor| y.sin());
    let base = Ode::new(&field).solver(Euler).span(0.0, 1.0);
    for precision in [Precision::F32, Precision::F64] {
        let ode = base.clone().precision(precision);
        beside(&ode, 4);
        let of = |ode: &Ode| {
            // As many entries as lists have room for.
            let (few, _) = beside(ode, 127);
            let (many, gradient) = beside(ode, 255);
            ((many - few) / 128, gradient)
        };
        let (whole, exact) = of(&ode.clone().adjoint(Discrete::default()));
        let coded = [
            of(&ode.clone().adjoint(Discrete::default().codec(Increments16))),
            of(&ode.clone().adjoint(Discrete::default().codec(Increments8))),
            of(&ode.clone().adjoint(Discrete::default().codec(Increments4))),
        ];
        for (bytes, gradient) in coded {
            assert!((100..=176).contains(&bytes) && bytes < whole, "{bytes} B a step, {whole} of whole states");
            let error = gradient.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-2, "{error}");
        }
    }
}
