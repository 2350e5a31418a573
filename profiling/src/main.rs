//! `memory-report`: measures, shows and compares where the memory of neural ODEs goes.

mod bench_peer;
mod cell;
mod compare;
mod failure;
mod measure;
mod names;
mod plan;
mod problem;
mod run;
mod show;
mod study;
mod table;
mod watch;

use candle_ode::memory::TrackingAllocator;
use clap::{CommandFactory, Parser, Subcommand};
use failure::Result;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const EXAMPLES: &str = "\
Examples:
  memory-report run --field cnf --precision f32,bf16,f16 --out out/precisions
  memory-report compare out/precisions --html out/precisions.html --fail-if 'peak > 1.0'
  memory-report plan --field cnf --precision f32,bf16,f16 --steps 16,64,256
  memory-report show out/cnf/memory.json
  memory-report watch -- cargo run --release --example cnf
  memory-report completions bash > ~/.local/share/bash-completion/completions/memory-report";

const COMPLETIONS: &str = "\
Examples:
  memory-report completions bash > ~/.local/share/bash-completion/completions/memory-report
  memory-report completions fish > ~/.config/fish/completions/memory-report.fish";

/// Measures, shows and compares where the memory of neural ODEs goes.
///
/// Reads the reports that `candle_ode::memory::MemoryProfiler` writes, and makes some of its own.
#[derive(Parser)]
#[command(name = "memory-report", version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures standard fields under every combination of what is listed, each in a fresh process.
    Run(run::Run),
    /// Prints what the same cells will take, without solving any.
    Plan(plan::Plan),
    /// Puts reports side by side, with ratios against the first.
    Compare(compare::Compare),
    /// Prints a report as tables, and writes its other formats.
    Show(show::Show),
    /// Runs a program that uses the crate's profiler, and draws its live bytes while it runs.
    Watch(watch::Watch),
    /// Studies what the methods of the crate do: tables, CSV files and plots.
    Study(study::Study),
    /// Times training steps of the works on which peers are measured, with heap and error.
    BenchPeer(bench_peer::BenchPeer),
    /// Prints a completion script for a shell.
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Run(run) => run.run(),
        Command::Plan(plan) => plan.run(),
        Command::Compare(compare) => compare.run(),
        Command::Show(show) => show.run(),
        Command::Watch(watch) => return watch.run(),
        Command::Study(study) => study.run(),
        Command::BenchPeer(bench) => bench.run(),
        Command::Completions { shell } => completions(shell),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memory-report: {error}");
            ExitCode::FAILURE
        }
    }
}

fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "memory-report", &mut script);
    print(&script)
}

/// A reader that stops early, such as `head`, is no failure.
fn print(text: &[u8]) -> Result<()> {
    match std::io::stdout().write_all(text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
