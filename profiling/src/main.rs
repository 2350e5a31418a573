//! `memory-report`: shows the memory reports of candle-ode.

mod show;
mod study;
mod table;

use candle_ode::memory::{MemoryReport, TrackingAllocator};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const EXAMPLES: &str = "\
Examples:
  memory-report show out/cnf/memory.json
  memory-report show out/cnf/memory.json --steps";

/// Shows where the memory of a neural ODE went.
///
/// Reads the reports that `candle_ode::memory::MemoryProfiler` writes.
#[derive(Parser)]
#[command(name = "memory-report", version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prints a report as tables: totals, owned bytes, passes and their steps, spans by name.
    #[command(after_help = EXAMPLES)]
    Show {
        /// The report, a JSON file.
        file: PathBuf,
        /// Prints every step of every pass too.
        #[arg(long)]
        steps: bool,
    },
    /// Studies what the methods of the crate do: tables, CSV files and plots.
    Study(study::Study),
}

fn main() -> ExitCode {
    let (file, steps) = match Arguments::parse().command {
        Command::Show { file, steps } => (file, steps),
        Command::Study(study) => return finish(study.run()),
    };
    let report = match MemoryReport::load(&file) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("memory-report: {error}");
            return ExitCode::FAILURE;
        }
    };
    // A reader that stops early, such as `head`, is no failure.
    match std::io::stdout().write_all(show::text(&report, steps).as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("memory-report: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

fn finish(done: candle_ode::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memory-report: {error}");
            ExitCode::FAILURE
        }
    }
}
