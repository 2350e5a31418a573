//! What an M2 training step with Euler costs when its trajectory is kept in F16. Alone in its process: the counter is
//! process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::DType;
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;
use common::memory::{BATCH, DIM, STEPS, peak_of_m2};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

#[test]
fn peak_heap_of_m2_stays_below_its_bound() {
    let (peak, trajectory) = peak_of_m2(Precision::new().storage(DType::F16));
    println!("peak {peak:.2} MiB, trajectory {trajectory} bytes");
    assert_eq!(trajectory, (STEPS - 1) * BATCH * DIM * 2);
    assert!(peak <= 7.1, "{peak} MiB");
}
