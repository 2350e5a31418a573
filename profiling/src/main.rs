//! `memory-report`: shows the memory reports of candle-ode.

mod show;
mod study;
mod table;

use candle_ode::memory::MemoryReport;
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

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
    /// Measures what a choice costs, and prints it as CSV.
    Study {
        /// Which choice.
        #[command(subcommand)]
        study: study::Study,
    },
}

fn main() -> ExitCode {
    let text = match Arguments::parse().command {
        Command::Show { file, steps } => MemoryReport::load(&file).map(|report| show::text(&report, steps)),
        Command::Study { study } => study.table(),
    };
    let text = match text {
        Ok(text) => text,
        Err(error) => {
            eprintln!("memory-report: {error}");
            return ExitCode::FAILURE;
        }
    };
    // A reader that stops early, such as `head`, is no failure.
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("memory-report: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}
