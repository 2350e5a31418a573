//! What a pass needs beside the trajectory is that of one tile a thread, and tile replay keeps nothing but y0: peaks
//! fall with the tile. Alone in its process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_ode::InputOnly;
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use common::memory::train_step;
use common::{bits, fill, normal, sorted};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const ROWS: usize = 2048;
const DIM: usize = 32;
const STEPS: usize = 32;

/// Peak above the baseline, the least of a few, and the bytes kept.
fn peak(ode: &Ode, y0: &Var) -> (u64, usize) {
    let measured = (0..4).map(|_| {
        let baseline = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        let kept = train_step(ode, y0);
        (TrackingAllocator::peak() - baseline, kept)
    });
    measured.min().unwrap()
}

#[test]
fn peaks_fall_with_the_tile() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder| Mlp::new(&[DIM, 128, 128, DIM], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |mlp: &Mlp, _: &Time, y| mlp.forward(y)).unwrap();
    let field = field.row_wise();
    fill(&vars, 1, 1.0);
    let y0 = Var::from_tensor(&normal(2, &[ROWS, DIM], DType::F32)).unwrap();
    let base = Ode::new(&field).span(0.0, 1.0).steps(STEPS);
    let state = (ROWS * DIM * 4) as u64;
    let trajectory = (STEPS as u64 - 1) * state;

    // Whatever is tiled: y0 twice, y(T) twice, its cotangent, the loss, dL/dy0, the sums of dL/dθ, packed weights.
    let beside = 14 * state;
    let mut last = u64::MAX;
    for (rows, threads) in [(ROWS, 1), (512, 1), (128, 1), (128, 2)] {
        let ode = base.clone().tile(rows).threads(threads);
        let (peak, kept) = peak(&ode, &y0);
        println!("{rows} rows on {threads} threads: peak {peak}, trajectory {kept}");
        assert_eq!(kept as u64, trajectory);
        // Per row and stage the state, two hidden layers, the slope, and as much again on the way back.
        let of_tiles = (threads * rows.min(ROWS) * 4 * (8 * DIM + 2 * 128) * 4) as u64;
        assert!(peak < trajectory + beside + of_tiles, "{rows} rows: {peak} of {}", trajectory + beside + of_tiles);
        if threads == 1 {
            assert!(peak < last, "{rows} rows: {peak}, and {last} with more");
            last = peak;
        }
    }

    // Tile replay: a tile is gone through once more, and keeps its states while it is reversed.
    let replay = base.clone().tile(128).threads(1).adjoint(Discrete::default().schedule(InputOnly));
    let (peak, kept) = peak(&replay, &y0);
    println!("replay of 128 rows: peak {peak}, trajectory {kept}");
    assert_eq!(kept, 0);
    let of_a_tile = trajectory * 128 / ROWS as u64 + (128 * 4 * (8 * DIM + 2 * 128) * 4) as u64;
    assert!(peak < beside + of_a_tile, "{peak}");

    let gradients = |ode: &Ode| {
        let loss = ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().mean_all().unwrap();
        let grads = loss.backward().unwrap();
        sorted(&vars).into_values().map(|var| bits(grads.get(&var).unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(gradients(&replay), gradients(&base.tile(128)));
}
