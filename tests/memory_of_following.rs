//! What a step takes that keeps an increment: where codes and sums are made in one pass, two states less than where one
//! operation follows another. Alone in its process: the counter is process-wide.
#![allow(missing_docs)]

mod common;
#[path = "common/own_codec.rs"]
mod own_codec;

use candle_core::{DType, Tensor};
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;
use candle_ode::{Codec, Increments8, Increments16};
use common::variable;
use own_codec::Own;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const ELEMENTS: usize = 256 * 1024;
const STEPS: usize = 6;

/// The peak of a forward pass beside its entries, in states.
fn peak(codec: impl Codec + Clone) -> f64 {
    let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    let y0 = variable(2, &[256, 1024], DType::F32);
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(STEPS).check_determinism(false);
    let ode = ode.adjoint(Discrete::default().codec(codec.clone()));
    let pass = || {
        let before = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        let solution = ode.solve(y0.as_tensor()).unwrap();
        let peak = TrackingAllocator::peak() - before;
        // Entries before the last of the increments are there when it is made.
        let entries = (STEPS - 2) * codec.bytes(&[y0.shape().clone()]);
        assert!(solution.trajectory_bytes() >= entries);
        (peak as f64 - entries as f64) / (4 * ELEMENTS) as f64
    };
    pass().min(pass())
}

#[test]
fn one_pass_takes_two_states_less() {
    let [one_by_one, sixteen, eight] = [peak(Own(DType::F16)), peak(Increments16), peak(Increments8)];
    println!("one by one {one_by_one:.3}, Increments16 {sixteen:.3}, Increments8 {eight:.3} states");
    assert!((one_by_one - sixteen - 2.0).abs() < 0.05, "{one_by_one} {sixteen}");
    assert!((eight - sixteen).abs() < 0.05, "{eight} {sixteen}");
}
