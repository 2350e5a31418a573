//! What layers reach of a core, in F32 and BF16: the products of a solve over `ops::Mlp`, forward alone and with its
//! gradient, beside the bare product of the `gemm` crate in the same run; and those of a convolution of 3 × 3, counted
//! as if all were made, over images of even sides, where filtering makes fewer, and of odd ones.
//! `cargo bench --bench layers`
#![allow(missing_docs)]

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::ops::{Activation, Mlp, conv2d};
use candle_ode::prelude::*;
use std::time::Instant;

const ROWS: usize = 128;
const STEPS: usize = 64;

/// Seconds of the fastest of a few runs.
fn seconds(mut run: impl FnMut()) -> f64 {
    let once = || {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    std::iter::repeat_with(once).take(12).fold(f64::INFINITY, f64::min)
}

/// The rates of a convolution of as many channels as it has outputs, over 8 images.
fn convolution(channels: usize, side: usize, precision: Precision) -> candle_ode::Result<[f64; 2]> {
    const STEPS: usize = 8;
    let (vars, config) = (VarMap::new(), Conv2dConfig { padding: 1, ..Default::default() });
    let build = move |vb: VarBuilder<'static>| conv2d(channels, channels, 3, config, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m, _: &Time, y| m.forward(y))?.row_wise();
    let start = Tensor::randn(0f32, 1.0, (8, channels, side, side), &Device::Cpu)?;
    let y0 = Var::from_tensor(&start)?;
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(STEPS).precision(precision).threads(1);
    let forward = ode.clone().no_grad();
    let evaluated = seconds(|| drop(forward.solve(y0.as_tensor()).unwrap()));
    let trained = seconds(|| drop(ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap()));
    let flops = 1e-9 * (2 * 9 * channels * channels * 8 * side * side * STEPS) as f64;
    Ok([flops / evaluated, 4.0 * flops / trained])
}

/// GFLOP/s of `products` products of a layer's size.
fn rate(width: usize, products: usize, seconds: f64) -> f64 {
    2e-9 * (ROWS * width * width * products) as f64 / seconds
}

fn gemm_alone(width: usize) -> f64 {
    let (a, b, mut c) = (vec![0.5_f32; ROWS * width], vec![0.25_f32; width * width], vec![0.0_f32; ROWS * width]);
    let (rows, n, none) = (width as isize, width, gemm::Parallelism::None);
    let product = || {
        // SAFETY: a and c have ROWS rows of `width` elements and b `width`, row-major; c is borrowed here alone.
        unsafe {
            let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
            gemm::gemm(ROWS, n, n, c, 1, rows, false, a, 1, rows, b, 1, rows, 0.0, 1.0, false, false, false, none);
        }
    };
    rate(width, 1, seconds(product))
}

fn main() -> candle_ode::Result<()> {
    for width in [64, 256] {
        println!("{ROWS} rows, {width} units, gemm alone: {:.0} GFLOP/s", gemm_alone(width));
        let vars = VarMap::new();
        let build = move |vb: VarBuilder<'static>| Mlp::new(&[width; 3], Activation::Tanh, vb);
        let field = ModelField::new(&vars, &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y))?.row_wise();
        // Two tiles of as many rows, one after another.
        let y0 = Var::from_tensor(&Tensor::randn(0f32, 1.0, (2 * ROWS, width), &Device::Cpu)?.to_dtype(DType::F32)?)?;
        for precision in [Precision::F32, Precision::BF16] {
            let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(STEPS).precision(precision);
            let ode = ode.tile(ROWS).threads(1);
            let forward = ode.clone().no_grad();
            let evaluated = seconds(|| drop(forward.solve(y0.as_tensor()).unwrap()));
            let trained =
                seconds(|| drop(ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap()));
            let layers = 2 * 2 * STEPS;
            println!(
                "  {:?}: forward {:.0} GFLOP/s, with its gradient {:.0} GFLOP/s",
                precision.compute_dtype(),
                rate(width, layers, evaluated),
                rate(width, 4 * layers, trained),
            );
        }
    }
    for channels in [16, 32, 64] {
        for precision in [Precision::F32, Precision::BF16] {
            println!("3 × 3 convolution of {channels} channels in {:?}:", precision.compute_dtype());
            for side in [16, 17] {
                let [evaluated, trained] = convolution(channels, side, precision)?;
                println!("  {side} × {side}: forward {evaluated:.0} GFLOP/s, with its gradient {trained:.0} GFLOP/s");
            }
        }
    }
    Ok(())
}
