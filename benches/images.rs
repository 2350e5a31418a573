//! A training step of an ODE net's block over images: norm, ReLU, convolution, norm, ReLU, convolution, norm; and of its
//! convolutions alone; in F32, BF16 and F16. The layers called one by one beside the same in a `Sequential`, in turns in
//! one run, on one thread: milliseconds of the fastest of a few steps, and the peak of the heap.
//! `cargo bench --bench images`
#![allow(missing_docs)]

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Conv2d, GroupNorm, Sequential, conv2d, group_norm, seq};
use candle_ode::prelude::*;
use std::time::Instant;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const CHANNELS: usize = 64;
const GROUPS: usize = 32;
const IMAGES: usize = 32;
const STEPS: usize = 4;

struct Block {
    convolutions: [Conv2d; 2],
    norms: Option<[GroupNorm; 3]>,
}

impl Block {
    fn new(vb: &VarBuilder, has_norms: bool) -> Result<Self> {
        let config = Conv2dConfig { padding: 1, ..Default::default() };
        let convolution = |n: usize| conv2d(CHANNELS, CHANNELS, 3, config, vb.pp("conv").pp(n));
        let norm = |n: usize| group_norm(GROUPS, CHANNELS, 1e-5, vb.pp("norm").pp(n));
        let norms = if has_norms { Some([norm(0)?, norm(1)?, norm(2)?]) } else { None };
        Ok(Self { convolutions: [convolution(0)?, convolution(1)?], norms })
    }

    /// One layer after another.
    fn forward(&self, y: &Tensor) -> Result<Tensor> {
        let [first, second] = &self.convolutions;
        match &self.norms {
            None => second.forward(&Activation::Relu.forward(&first.forward(y)?)?),
            Some([before, between, behind]) => {
                let y = first.forward(&Activation::Relu.forward(&before.forward(y)?)?)?;
                let y = second.forward(&Activation::Relu.forward(&between.forward(&y)?)?)?;
                behind.forward(&y)
            }
        }
    }

    fn sequential(self) -> Sequential {
        let [first, second] = self.convolutions;
        match self.norms {
            None => seq().add(first).add(Activation::Relu).add(second),
            Some([before, between, behind]) => {
                let layers = seq().add(before).add(Activation::Relu).add(first);
                layers.add(between).add(Activation::Relu).add(second).add(behind)
            }
        }
    }
}

/// Milliseconds of a training step, and bytes of its peak above what was live.
fn step(ode: &Ode, y0: &Tensor) -> candle_ode::Result<(f64, u64)> {
    let (before, begin) = (TrackingAllocator::live(), Instant::now());
    TrackingAllocator::reset_peak();
    drop(ode.solve(y0)?.last().sqr()?.sum_all()?.backward()?);
    Ok((1e3 * begin.elapsed().as_secs_f64(), TrackingAllocator::peak() - before))
}

fn compare(has_norms: bool, side: usize) -> candle_ode::Result<()> {
    let y0 = Var::from_tensor(&Tensor::randn(0f32, 1.0, (IMAGES, CHANNELS, side, side), &Device::Cpu)?)?;
    let apart = ModelField::new(
        &VarMap::new(),
        &Device::Cpu,
        move |vb: VarBuilder<'static>| Block::new(&vb, has_norms),
        |block, _: &Time, y| block.forward(y),
    )?;
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let together = ModelField::of_layers(vb, move |vb| Ok(Block::new(&vb, has_norms)?.sequential()))?;
    let fields = [apart.row_wise(), together.row_wise()];
    for precision in [Precision::F32, Precision::BF16, Precision::F16] {
        let mut fastest = [(f64::INFINITY, 0); 2];
        for _ in 0..8 {
            for (field, (fastest, peak)) in fields.iter().zip(&mut fastest) {
                let ode = Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(STEPS).precision(precision).threads(1);
                let (milliseconds, bytes) = step(&ode, y0.as_tensor())?;
                *fastest = fastest.min(milliseconds);
                *peak = bytes;
            }
        }
        let [(apart, _), (together, _)] = fastest;
        let [of_apart, of_together] = fastest.map(|(_, bytes)| bytes as f64 / f64::from(1 << 20));
        println!(
            "  {:?}: one by one {apart:.0} ms, {of_apart:.1} MiB; together {together:.0} ms ({:.2} ×), {of_together:.1} MiB",
            precision.compute_dtype(),
            together / apart
        );
    }
    Ok(())
}

fn main() -> candle_ode::Result<()> {
    for (has_norms, what) in [(false, "convolutions"), (true, "convolutions and norms")] {
        for side in [6, 14] {
            println!("{what}, {IMAGES} × {CHANNELS} × {side} × {side}, {STEPS} steps of RK4:");
            compare(has_norms, side)?;
        }
    }
    Ok(())
}
