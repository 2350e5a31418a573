//! Does the tracking allocator agree with a counter that knows nothing of it? Run by `profiling/agreement.sh`, which
//! preloads `counter.c`: one training step of M2 (MLP 64-64-64, batch 512, 64 steps of RK4) in F32 and in F16, live
//! bytes and peak by both counters, and failure where they differ by more than one per cent.

use candle_core::{Device, Module, Result, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use std::process::ExitCode;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// How far the two may be apart: the C library rounds every block up, and its own buffers are not ours.
const APART: f64 = 0.01;

/// The counter outside of the program.
struct Outside(libloading::os::unix::Library);

impl Outside {
    fn ask<T>(&self, name: &str) -> std::result::Result<T, libloading::Error> {
        // SAFETY: these are the functions of `counter.c`, which take nothing and return a `size_t` or nothing.
        unsafe { self.0.get::<unsafe extern "C" fn() -> T>(name.as_bytes()).map(|function| function()) }
    }
}

fn train(ode: &Ode, y0: &Tensor) -> Result<Solution> {
    let solution = ode.solve(y0)?;
    solution.last().sqr()?.mean_all()?.backward()?;
    Ok(solution)
}

fn compare(what: &str, ours: u64, theirs: usize) -> bool {
    let apart = theirs as f64 / ours as f64 - 1.0;
    println!("{what:10} {ours:12} bytes by the tracking allocator {theirs:12} from outside {:+.3} %", 100.0 * apart);
    apart.abs() <= APART
}

fn run() -> std::result::Result<bool, Box<dyn std::error::Error>> {
    let outside = Outside(libloading::os::unix::Library::this());
    if outside.ask::<usize>("counter_live").is_err() {
        return Err("the counter is not preloaded: run profiling/agreement.sh".into());
    }
    let (vars, device) = (VarMap::new(), Device::Cpu);
    let build = |vb| Mlp::new(&[64, 64, 64], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &device, build, |m: &Mlp, _: &Time, y| m.forward(y))?;
    let y0 = Var::from_tensor(&Tensor::randn(0f32, 1.0, (512, 64), &device)?)?;
    let mut agree = true;
    for precision in [Precision::F32, Precision::F16] {
        let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(64).precision(precision);
        train(&ode, y0.as_tensor())?;
        outside.ask::<()>("counter_reset_peak")?;
        TrackingAllocator::reset_peak();
        let solution = train(&ode, y0.as_tensor())?;
        let ours = (TrackingAllocator::live(), TrackingAllocator::peak());
        let theirs = (outside.ask("counter_live")?, outside.ask("counter_peak")?);
        println!("{:?}", precision.compute_dtype());
        agree &= compare("  live", ours.0, theirs.0) & compare("  peak", ours.1, theirs.1);
        drop(solution);
    }
    Ok(agree)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("the counters are more than {} % apart", 100.0 * APART);
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("agreement: {error}");
            ExitCode::FAILURE
        }
    }
}
