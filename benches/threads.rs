//! A training step with the whole batch on one thread and on all of them, beside the default tiles: seconds of the
//! clock, and the peak of the heap. Alternately, in one run. `cargo bench --bench threads`
#![allow(missing_docs)]

use candle_core::{Device, Module, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Mlp, conv2d, seq};
use candle_ode::prelude::*;
use std::time::Instant;

#[path = "../examples/cnf/flow.rs"]
#[allow(dead_code, unreachable_pub)]
mod flow;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const ROUNDS: usize = 9;

/// Milliseconds and bytes of a training step.
fn step(ode: &Ode, y0: &State) -> candle_ode::Result<(f64, u64)> {
    let (before, begin) = (TrackingAllocator::live(), Instant::now());
    TrackingAllocator::reset_peak();
    let solution = ode.solve(y0)?;
    let squares = solution.last_state().tensors().iter().map(|x| x.sqr()?.sum_all());
    let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
    drop(Tensor::stack(&squares, 0)?.sum_all()?.backward()?);
    Ok((1e3 * begin.elapsed().as_secs_f64(), TrackingAllocator::peak() - before))
}

fn print(what: &str, field: &ModelField, shapes: &[&[usize]]) -> candle_ode::Result<()> {
    let draw = |shape: &&[usize]| Var::from_tensor(&Tensor::randn(0f32, 1.0, *shape, &Device::Cpu)?);
    let y0: Vec<Var> = shapes.iter().map(draw).collect::<candle_core::Result<_>>()?;
    let y0 = State::from(y0.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>());
    for precision in [Precision::F32, Precision::BF16] {
        let of = |field: &ModelField| Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(8).precision(precision);
        let whole = of(field);
        let ways = [whole.clone().threads(1), whole, of(&field.clone().row_wise())];
        let mut measured = [const { vec![] }; 3];
        for _ in 0..ROUNDS {
            for (ode, measured) in ways.iter().zip(&mut measured) {
                measured.push(step(ode, &y0)?);
            }
        }
        let [alone, all, tiles] = measured.map(|mut of| {
            of.sort_by(|a, b| a.0.total_cmp(&b.0));
            (of[ROUNDS / 2].0, of.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0) as f64 / (1 << 20) as f64)
        });
        println!(
            "  {what}, {:?}: one thread {:.1} ms, all {:.1} ms ({:.2} ×), {:.2} MiB; tiles {:.1} ms ({:.2} ×), {:.2} MiB",
            precision.compute_dtype(),
            alone.0,
            all.0,
            all.0 / alone.0,
            all.1,
            tiles.0,
            tiles.0 / alone.0,
            tiles.1
        );
    }
    Ok(())
}

fn mlp(sizes: &'static [usize], rows: usize) -> candle_ode::Result<()> {
    let build = move |vb: VarBuilder<'static>| Mlp::new(sizes, Activation::Tanh, vb);
    let field = ModelField::new(&VarMap::new(), &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y))?;
    print(&format!("MLP {sizes:?}, {rows} rows"), &field, &[&[rows, sizes[0]]])
}

fn main() -> candle_ode::Result<()> {
    println!("RK4, 8 steps, the whole batch; {} threads; medians of {ROUNDS} steps", rayon::current_num_threads());
    mlp(&[64, 256, 256, 64], 1024)?;
    mlp(&[2, 64, 64, 2], 4096)?;
    let config = Conv2dConfig { padding: 1, ..Default::default() };
    let build = move |vb: VarBuilder<'static>| {
        let first = seq().add(conv2d(64, 64, 3, config, vb.pp(0))?).add(Activation::Tanh);
        Ok(first.add(conv2d(64, 64, 3, config, vb.pp(1))?))
    };
    let field = ModelField::new(&VarMap::new(), &Device::Cpu, build, |m, _: &Time, y| m.forward(y))?;
    print("two convolutions of 64 channels, 64 × 14 × 14", &field, &[&[64, 64, 14, 14]])?;
    let build = |vb: VarBuilder<'static>| Ok(LogDensity::new(flow::Velocity::mlp(2, vb)?, Trace::Exact));
    let field = ModelField::with_state(&VarMap::new(), &Device::Cpu, build, |flow, t, y| flow.eval(t, y))?;
    print("flow in the plane (cnf --field mlp), 2048 rows", &field, &[&[2048, 2], &[2048]])
}
