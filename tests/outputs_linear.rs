//! A loss over many outputs costs a backward pass no more than the outputs themselves: no buffer grows with their
//! number. Alone in its process: the counter is process-wide.
#![allow(missing_docs)]

#[path = "common/heap.rs"]
mod heap;

use candle_core::{DType, Device, Tensor, Var};
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;

/// Elements of the state, far from [`TrackingAllocator::LARGE_BYTES`]; all outputs together are far beyond it.
const DIM: usize = 64;

/// Large buffers asked for by a backward pass over `outputs` outputs, each in the loss with a weight of its own.
fn large_buffers(outputs: usize) -> u64 {
    let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    let times: Vec<f64> = (0..outputs).map(|n| n as f64 / outputs as f64).collect();
    let y0 = Var::from_tensor(&Tensor::ones(DIM, DType::F32, &Device::Cpu).unwrap()).unwrap();
    let solution = odeint(&field, y0.as_tensor(), &times, Euler).unwrap();
    let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    for (n, state) in solution.states().iter().enumerate() {
        loss = (loss + (state[0].sum_all().unwrap() * (n + 1) as f64).unwrap()).unwrap();
    }
    heap::settle();
    let before = TrackingAllocator::large_allocations();
    let grads = loss.backward().unwrap();
    let made = TrackingAllocator::large_allocations() - before;
    // y_n = (1 − h)ⁿ y0 for Euler's method, so that dL/dy0 = Σ (n + 1) (1 − h)ⁿ.
    let shrink = 1.0 - 1.0 / outputs as f64;
    let exact: f64 = (0..outputs).map(|n| (n + 1) as f64 * shrink.powi(n as i32)).sum();
    let found = grads.get(&y0).unwrap().to_vec1::<f32>().unwrap();
    assert!(found.iter().all(|g| (f64::from(*g) / exact - 1.0).abs() < 1e-5), "{} {exact}", found[0]);
    made
}

#[test]
fn no_buffer_grows_with_the_number_of_outputs() {
    let (few, many) = (large_buffers(32), large_buffers(512));
    println!("{few} large buffers for 32 outputs, {many} for 512");
    // Lists and tables of the graph's nodes grow by doubling.
    assert!(many <= few + 64, "{few} large buffers for 32 outputs, {many} for 512");
}
