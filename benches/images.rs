//! A training step of an ODE net's block over images: norm, ReLU, convolution, norm, ReLU, convolution, norm, with the
//! time as a channel of the convolutions or without; and of the convolutions alone; in F32, BF16 and F16. The layers
//! called one by one by a closure, beside the same in a `Sequential` that is called so, and as a field that is layers
//! alone (`ModelField::of_layers`); in turns in one run, on one thread: milliseconds of the fastest of a few steps, and
//! the highest peak of the heap.
//! `cargo bench --bench images`
#![allow(missing_docs)]

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{
    Activation, ConcatConv2d, Conv2d, GroupNorm, Sequential, Timed, concat_conv2d, conv2d, group_norm, seq,
};
use candle_ode::prelude::*;
use std::time::Instant;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const CHANNELS: usize = 64;
const GROUPS: usize = 32;
const IMAGES: usize = 32;
const STEPS: usize = 4;

/// What a block is made of.
#[derive(Clone, Copy)]
struct Parts {
    norms: bool,
    time: bool,
}

struct Block {
    convolutions: [Convolution; 2],
    norms: Option<[GroupNorm; 3]>,
}

enum Convolution {
    Still(Conv2d),
    InTime(ConcatConv2d),
}

impl Convolution {
    fn forward(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Still(layer) => layer.forward(x),
            Self::InTime(layer) => layer.forward_at(t, x),
        }
    }

    fn behind(self, layers: Sequential) -> Sequential {
        match self {
            Self::Still(layer) => layers.add(layer),
            Self::InTime(layer) => layers.add_timed(layer),
        }
    }
}

impl Block {
    fn new(vb: &VarBuilder, parts: Parts) -> Result<Self> {
        let config = Conv2dConfig { padding: 1, ..Default::default() };
        let convolution = |n: usize| {
            let vb = vb.pp("conv").pp(n);
            match parts.time {
                true => concat_conv2d(CHANNELS, CHANNELS, 3, config, vb).map(Convolution::InTime),
                false => conv2d(CHANNELS, CHANNELS, 3, config, vb).map(Convolution::Still),
            }
        };
        let norm = |n: usize| group_norm(GROUPS, CHANNELS, 1e-5, vb.pp("norm").pp(n));
        let norms = if parts.norms { Some([norm(0)?, norm(1)?, norm(2)?]) } else { None };
        Ok(Self { convolutions: [convolution(0)?, convolution(1)?], norms })
    }

    /// One layer after another.
    fn forward(&self, t: &Time, y: &Tensor) -> Result<Tensor> {
        let [first, second] = &self.convolutions;
        match &self.norms {
            None => second.forward(t, &Activation::Relu.forward(&first.forward(t, y)?)?),
            Some([before, between, behind]) => {
                let y = first.forward(t, &Activation::Relu.forward(&before.forward(y)?)?)?;
                let y = second.forward(t, &Activation::Relu.forward(&between.forward(&y)?)?)?;
                behind.forward(&y)
            }
        }
    }

    fn sequential(self) -> Sequential {
        let [first, second] = self.convolutions;
        match self.norms {
            None => second.behind(first.behind(seq()).add(Activation::Relu)),
            Some([before, between, behind]) => {
                let layers = first.behind(seq().add(before).add(Activation::Relu));
                second.behind(layers.add(between).add(Activation::Relu)).add(behind)
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

fn compare(parts: Parts, side: usize) -> candle_ode::Result<()> {
    let y0 = Var::from_tensor(&Tensor::randn(0f32, 1.0, (IMAGES, CHANNELS, side, side), &Device::Cpu)?)?;
    let apart = ModelField::new(
        &VarMap::new(),
        &Device::Cpu,
        move |vb: VarBuilder<'static>| Block::new(&vb, parts),
        |block: &Block, t: &Time, y| block.forward(t, y),
    )?;
    let together = ModelField::new(
        &VarMap::new(),
        &Device::Cpu,
        move |vb: VarBuilder<'static>| Ok(Block::new(&vb, parts)?.sequential()),
        |layers, t: &Time, y| layers.forward_at(t, y),
    )?;
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let alone = ModelField::of_layers(vb, move |vb| Ok(Block::new(&vb, parts)?.sequential()))?;
    let fields = [apart, together, alone].map(ModelField::row_wise);
    for precision in [Precision::F32, Precision::BF16, Precision::F16] {
        let mut seen = [(f64::INFINITY, 0); 3];
        for _ in 0..8 {
            for (field, (fastest, peak)) in fields.iter().zip(&mut seen) {
                let ode = Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(STEPS).precision(precision).threads(1);
                let (milliseconds, bytes) = step(&ode, y0.as_tensor())?;
                *fastest = fastest.min(milliseconds);
                *peak = bytes.max(*peak);
            }
        }
        let apart = seen[0].0;
        let [apart, together, alone] = seen.map(|(milliseconds, bytes)| {
            let (ratio, peak) = (milliseconds / apart, bytes as f64 / f64::from(1 << 20));
            format!("{milliseconds:.0} ms ({ratio:.2} ×), {peak:.1} MiB")
        });
        println!("  {:?}: one by one {apart}; one op {together}; of layers {alone}", precision.compute_dtype());
    }
    Ok(())
}

fn main() -> candle_ode::Result<()> {
    let without = Parts { norms: false, time: false };
    for (parts, what) in [
        (without, "convolutions"),
        (Parts { norms: true, ..without }, "convolutions and norms"),
        (Parts { norms: true, time: true }, "convolutions in time and norms"),
    ] {
        for side in [6, 14] {
            println!("{what}, {IMAGES} × {CHANNELS} × {side} × {side}, {STEPS} steps of RK4:");
            compare(parts, side)?;
        }
    }
    Ok(())
}
