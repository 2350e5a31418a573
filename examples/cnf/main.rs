//! Trains a continuous normalizing flow in mixed precision: `cargo run --example cnf --release -- --help`.

// Nothing of a program is reachable from outside.
#![allow(unreachable_pub)]

mod checkpoint;
mod cli;
mod compare;
mod data;
mod draws;
mod flow;
mod metrics;
mod model;
mod pictures;
mod plot;
mod progress;
mod session;
mod stop;
mod train;
mod weights;

use candle_ode::memory::TrackingAllocator;
use clap::Parser;
use std::process::ExitCode;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(asked) => {
            // Help goes to stdout, a mistake to stderr; if that is closed there is nobody to tell.
            let _ = asked.print();
            return if asked.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match stop::Stop::on_ctrl_c().and_then(|stop| session::run(&cli, &stop)) {
        Ok(session::End::Finished) => ExitCode::SUCCESS,
        Ok(session::End::Interrupted) => ExitCode::from(stop::INTERRUPTED),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
