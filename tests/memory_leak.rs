//! Training leaks nothing: live bytes after 1000 steps are those after 10, on one thread and on four. Alone in its
//! process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use candle_ode::account::Category;
use candle_ode::memory::{MemoryProfiler, TrackingAllocator};
use candle_ode::prelude::*;
use common::*;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

struct Training {
    ode: Ode,
    y0: Var,
    optimizer: AdamW,
}

impl Training {
    fn new(seed: u64) -> Self {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F32, 4, 8);
        fill(&vars, seed, 1.0);
        let y0 = Var::from_tensor(&normal(seed, &[6, 4], DType::F32)).unwrap();
        let ode = Ode::new(&field).span(0.0, 1.0).steps(2).solver(Heun).precision(Precision::F16);
        let vars = sorted(&vars).into_values().collect();
        Self { ode, y0, optimizer: AdamW::new(vars, ParamsAdamW::default()).unwrap() }
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            let solution = self.ode.solve(self.y0.as_tensor()).unwrap();
            let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
            self.optimizer.step(&grads).unwrap();
        }
    }
}

#[test]
fn live_bytes_do_not_grow() {
    let profiler = MemoryProfiler::new(&Device::Cpu).filter(|metadata| metadata.is_event());
    let recording = profiler.install().unwrap();
    let owned = || Category::ALL.map(|category| recording.ledger().live(category));
    let mut training = Training::new(1);
    training.steps(10);
    let (live, ours) = (TrackingAllocator::live(), owned());
    training.steps(990);
    assert!(recording.ledger().peak(Category::Trajectory) > 0, "the ledger hears the solves");
    let grown = TrackingAllocator::live() as i64 - live as i64;
    assert!(grown <= 4096, "one thread: {grown} bytes more after 1000 steps than after 10");
    assert_eq!(owned(), ours);

    // Four threads, kept alive over both measurements so that their thread-locals are in the baseline.
    let barrier = std::sync::Arc::new(std::sync::Barrier::new(5));
    let threads: Vec<_> = (0..4)
        .map(|seed| {
            let barrier = barrier.clone();
            std::thread::spawn(move || {
                let mut training = Training::new(seed);
                training.steps(10);
                barrier.wait();
                barrier.wait();
                training.steps(990);
                barrier.wait();
                barrier.wait();
            })
        })
        .collect();
    barrier.wait();
    let (live, ours) = (TrackingAllocator::live(), owned());
    barrier.wait();
    barrier.wait();
    let grown = TrackingAllocator::live() as i64 - live as i64;
    assert_eq!(owned(), ours);
    barrier.wait();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(grown <= 4096, "four threads: {grown} bytes more after 1000 steps than after 10");
}
