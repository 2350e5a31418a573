//! What a pass hands out is its caller's: however many training steps were recorded, nothing is left in the parts that
//! are found inside of passes, and a later peak is made of what it is made of when its step is recorded alone. Alone in
//! its process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use candle_ode::memory::{Composition, MemoryProfiler, Part, TrackingAllocator};
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use common::{fill, variable};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// The user's own, for the whole recording.
const DATA: usize = 4 << 20;
/// Threads of tiles are not always at the same place, and the last state of a solve is in the books as found in the
/// field until the next begins.
const STATE: i64 = 512 * 64 * 4;
/// Recordings of a step alone at most: where threads meet by chance, the late peak is to be made of what one of them
/// was.
const ALONE: usize = 8;

fn step(ode: &Ode, y0: &Tensor) {
    let loss = ode.solve(y0).unwrap().last().sqr().unwrap().mean_all().unwrap();
    if loss.track_op() {
        loss.backward().unwrap();
    }
}

/// After so many steps, what is live; and what the peak is made of that a larger one makes.
fn recorded(ode: &Ode, y0: &Tensor, steps: usize) -> (Composition, Composition) {
    let recording = MemoryProfiler::new(&Device::Cpu).install().unwrap();
    let data = vec![1_u8; DATA];
    (0..steps).for_each(|_| step(ode, y0));
    let live = recording.snapshot().unwrap().bytes;
    step(&ode.clone().steps(12), y0);
    let report = recording.finish().unwrap();
    drop(data);
    (live, report.at_peak.bytes)
}

#[test]
fn the_thirtieth_step_is_told_like_the_first() {
    let vars = VarMap::new();
    let eval = |m: &Mlp, _: &Time, y: &Tensor| candle_nn::Module::forward(m, y);
    let field = ModelField::new(&vars, &Device::Cpu, |vb| Mlp::new(&[64, 64, 64], Activation::Tanh, vb), eval).unwrap();
    fill(&vars, 1, 1.0);
    // Linearised with Candle's graph, which nobody announces.
    let plain = ModelField::new(
        &vars,
        &Device::Cpu,
        |vb| Mlp::new(&[64, 64, 64], Activation::Tanh, vb),
        |m: &Mlp, _: &Time, y: &Tensor| candle_nn::Module::forward(m, y)?.affine(0.5, 0.0)?.tanh(),
    )
    .unwrap();
    let y0 = variable(2, &[512, 64], DType::F32);
    let row_wise = field.clone().row_wise();
    let cases = [
        ("plain", Ode::new(&field)),
        ("F16", Ode::new(&field).precision(Precision::F16)),
        ("kept", Ode::new(&plain).adjoint(Discrete::default().keep_linearizations())),
        ("consumed", Ode::new(&plain).adjoint(Discrete::default().keep_linearizations().consume())),
        ("tiles", Ode::new(&row_wise).tile(128).threads(1)),
        ("tiles on threads", Ode::new(&row_wise).tile(128).threads(2)),
        ("no gradient", Ode::new(&field).no_grad()),
    ];
    for (name, ode) in cases {
        let ode = ode.solver(Rk4).span(0.0, 1.0).steps(8);
        let step = |ode: &Ode| step(ode, y0.as_tensor());
        (0..3).for_each(|_| step(&ode));
        step(&ode.clone().steps(12));
        let (live, late) = recorded(&ode, y0.as_tensor(), 30);
        let parts = || late.iter().filter(|(part, _)| *part != Part::Baseline);
        let is_like = |alone: &Composition| parts().all(|(part, bytes)| (bytes - alone.of(part)).abs() <= STATE);
        let mut alone = recorded(&ode, y0.as_tensor(), 0).1;
        for _ in 1..if name == "tiles on threads" { ALONE } else { 1 } {
            if !is_like(&alone) {
                alone = recorded(&ode, y0.as_tensor(), 0).1;
            }
        }
        println!("{name}");
        for (part, bytes) in parts() {
            let (live, alone) = (live.of(part), alone.of(part));
            println!("  {:12} after 30 steps {live:9}, peak {bytes:9}, alone {alone:9}", part.name());
            assert!((bytes - alone).abs() <= STATE, "{name}: {part} {bytes} at the peak, {alone} alone");
            let expected = match part {
                Part::Field | Part::Pullback | Part::Other => 0,
                Part::Outside => DATA as i64,
                _ => continue,
            };
            assert!((live - expected).abs() <= STATE, "{name}: {part} {live} after 30 steps");
        }
    }
}
