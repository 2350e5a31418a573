//! Trains a continuous normalizing flow in mixed precision: `cargo run --example cnf --release -- --help`.

// Nothing of a program is reachable from outside.
#![allow(unreachable_pub)]
// Some of it waits for the training loop.
#![allow(dead_code)]

mod checkpoint;
mod cli;
mod data;
mod draws;
mod file;
mod metrics;
mod plot;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(&cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Checks the settings and looks at the data.
fn run(cli: &cli::Cli) -> candle_ode::Result<()> {
    let config = cli.config();
    let source = data::Source::open(&config.data)?;
    let batch = source.batch(config.seed, 1, config.batch as usize);
    println!("{}: {} columns, batches of {}", source.name(), source.dim(), batch.len());
    Ok(())
}
