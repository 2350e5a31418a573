//! A network of several solves that keep only their inputs costs O(blocks) + O(steps) states: each block computes its
//! own trajectory again when its turn comes, and frees it. Alone in its process: the counter is process-wide.
#![allow(missing_docs)]

#[path = "common/heap.rs"]
mod heap;

use candle_core::{Device, Tensor, Var};
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;
use candle_ode::{InputOnly, KeepAll};

/// Large enough that what a solve holds besides states, some three KiB, is little beside one.
const SHAPE: (usize, usize) = (1024, 64);
const STATE: f64 = (SHAPE.0 * SHAPE.1 * 4) as f64;
const STEPS: usize = 16;

/// Peak heap of a training step over `blocks` solves in a row, in states, above what is live before; and dL/dy0.
fn peak(blocks: usize, adjoint: Discrete) -> (f64, Vec<f32>) {
    let y0 = Var::from_tensor(&Tensor::full(0.3f32, SHAPE, &Device::Cpu).unwrap()).unwrap();
    let field = FnField::new(|_: &Time, y: &Tensor| y.sin());
    let ode = Ode::new(&field).solver(Heun).span(0.0, 0.5).steps(STEPS).adjoint(adjoint);
    let step = || {
        let mut y = y0.as_tensor().clone();
        for _ in 0..blocks {
            y = ode.solve(&y).unwrap().last().clone();
        }
        let grads = y.sum_all().unwrap().backward().unwrap();
        grads.get(&y0).unwrap().narrow(0, 0, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    step();
    heap::settle();
    let baseline = TrackingAllocator::live();
    TrackingAllocator::reset_peak();
    let gradient = step();
    ((TrackingAllocator::peak() - baseline) as f64 / STATE, gradient)
}

#[test]
fn memory_grows_with_the_blocks_by_their_inputs_alone() {
    let figures: Vec<(f64, f64)> = (1..=8)
        .map(|blocks| {
            let (input_only, gradient) = peak(blocks, Discrete::default().schedule(InputOnly));
            let (keep_all, same) = peak(blocks, Discrete::default().schedule(KeepAll));
            assert_eq!(gradient, same, "{blocks} blocks");
            println!("{blocks} blocks: {input_only:.2} states with their inputs kept, {keep_all:.2} with everything");
            (input_only, keep_all)
        })
        .collect();
    let slope = |of: fn(&(f64, f64)) -> f64| (of(&figures[7]) - of(&figures[0])) / 7.0;
    // Of each block before the one at hand: its input, which is the output of the one before.
    assert!(slope(|f| f.0) <= 1.05, "{} states a block", slope(|f| f.0));
    assert!((slope(|f| f.1) - STEPS as f64).abs() <= 0.5, "{} states a block", slope(|f| f.1));
    // While a block runs backwards: its trajectory, and what a step needs.
    assert!(figures[0].0 <= STEPS as f64 + 12.0);
    for pair in figures.windows(2) {
        assert!(pair[1].0 - pair[0].0 <= 1.05, "the growth is linear");
    }
}
