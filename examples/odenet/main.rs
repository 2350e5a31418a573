//! Tells handwritten digits apart by an ODE net, in several precisions: accuracy, time and memory beside each other.
//! `cargo run --example odenet --release -- --help`.

// Nothing of a program is reachable from outside.
#![allow(unreachable_pub)]

mod digits;
mod network;
mod train;

use candle_ode::Result;
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::Precision;
use clap::{Parser, ValueEnum};
use digits::Digits;
use std::process::ExitCode;
use train::{Outcome, Settings};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// Trains an ODE net on 8×8 handwritten digits in each precision, and compares accuracy, time and memory.
#[derive(Parser)]
struct Cli {
    /// Precisions of the vector field, one after another.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "f32,bf16,f16")]
    precision: Vec<Choice>,
    /// Passes over the training images.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Images of a step of the optimiser.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    /// Steps of RK4 through the block.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Channels of the block, a multiple of 8.
    #[arg(long, default_value_t = 32, value_parser = channels)]
    channels: usize,
    /// Seed of weights, of the images that are held out and of the order of the others.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Choice {
    F32,
    Bf16,
    F16,
}

impl Choice {
    fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::BF16,
            Self::F16 => Precision::F16,
        }
    }
}

fn channels(text: &str) -> std::result::Result<usize, String> {
    let channels = text.parse().map_err(|error| format!("{error}"))?;
    if channels == 0 || channels % network::GROUPS != 0 || channels > 1024 {
        return Err(format!("give a multiple of {} up to 1024", network::GROUPS));
    }
    Ok(channels)
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let digits = Digits::read(cli.seed)?;
    println!("{} images to learn from, {} held out", digits.training.len(), digits.held_out.len());
    let settings = Settings {
        epochs: cli.epochs,
        batch: cli.batch.into(),
        steps: cli.steps as usize,
        channels: cli.channels,
        seed: cli.seed,
    };
    let outcomes = cli.precision.iter().map(|choice| train::run(&digits, &settings, choice.precision()));
    print(&outcomes.collect::<Result<Vec<_>>>()?);
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    println!("\n{:<6} {:>10} {:>10} {:>12} {:>12} {:>12}", "", "accuracy", "loss", "CPU s", "peak heap", "trajectory");
    for Outcome { name, accuracy, loss, seconds, peak, trajectory } in outcomes {
        let (percent, peak) = (100.0 * accuracy, *peak as f64 / f64::from(1 << 20));
        println!("{name:<6} {percent:>8.1} % {loss:>10.4} {seconds:>12.2} {peak:>8.2} MiB {trajectory:>10} B");
    }
    println!(
        "\nCPU seconds are those of an epoch; the peak is that of a step of the optimiser above what was live before."
    );
}
