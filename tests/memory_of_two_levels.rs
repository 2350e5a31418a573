//! With a second level of storage memory is flat in the number of steps, and nothing stays behind. Alone in its
//! process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::DType;
use candle_nn::VarMap;
use candle_ode::SecondLevel;
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;
use common::*;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

#[test]
fn memory_is_flat_in_the_number_of_steps() {
    const STATE: usize = 64 * 32 * 4;
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 32, 32);
    fill(&vars, 1, 1.0);
    let y0 = variable(9, &[64, 32], DType::F32);
    let peak = |steps: usize, adjoint: Discrete| {
        let run = || {
            let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(steps).adjoint(adjoint.clone());
            let solution = ode.solve(y0.as_tensor()).unwrap();
            assert_eq!(solution.trajectory_bytes() + solution.second_level_bytes(), (steps - 1) * STATE);
            drop(solution.last().sum_all().unwrap().backward().unwrap());
        };
        run();
        let before = TrackingAllocator::live();
        let peaks = (0..3).map(|_| {
            TrackingAllocator::reset_peak();
            run();
            assert!(TrackingAllocator::live() <= before + 1024, "something stays behind");
            TrackingAllocator::peak() - before
        });
        peaks.min().unwrap() as f64
    };
    let two = || Discrete::default().two_levels(4, SecondLevel::temporary_file());
    let (few, many) = (peak(16, two()), peak(256, two()));
    // What is told of a step (its times, its place in the file) is a fraction of the 8 KiB of its state.
    assert!(many - few < 240.0 * 640.0, "{few} and {many}");
    let all = peak(256, Discrete::default());
    assert!((all - many - 251.0 * STATE as f64).abs() < 0.1 * all, "{all} and {many}");
}
