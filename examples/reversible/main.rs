//! Learns three mechanical systems from noisy data, by reversible solvers that keep nothing and by others that keep
//! all: `cargo run --example reversible --release -- --help`.

// Nothing of a program is reachable from outside.
#![allow(unreachable_pub)]

mod problem;
mod train;

use candle_ode::Result;
use candle_ode::memory::TrackingAllocator;
use clap::{Parser, ValueEnum};
use std::process::ExitCode;
use train::{Outcome, Settings};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// Learns a mechanical system from noisy data, by each way of finding the gradient, and compares loss, time and memory.
#[derive(Parser)]
struct Cli {
    /// Which system.
    #[arg(long, value_enum, default_value = "white-dwarf")]
    problem: Choice,
    /// Steps of the optimiser.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    iterations: u32,
    /// Seed of data, noise and weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Choice {
    /// Chandrasekhar's equation, by the midpoint rule.
    WhiteDwarf,
    /// Two masses on three springs, by RK4.
    Oscillators,
    /// Two rods under gravity, by RK4.
    DoublePendulum,
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
    let settings = Settings { iterations: cli.iterations, seed: cli.seed };
    let problem = match cli.problem {
        Choice::WhiteDwarf => problem::white_dwarf(cli.seed)?,
        Choice::Oscillators => problem::oscillators(cli.seed)?,
        Choice::DoublePendulum => problem::double_pendulum(cli.seed)?,
    };
    println!("{}: {} steps, loss of the noise alone {:.2e}", problem.name, problem.steps, problem.noise.powi(2));
    let outcomes = match cli.problem {
        Choice::WhiteDwarf => train::compare(candle_ode::solver::Midpoint, &problem, &settings)?,
        Choice::Oscillators | Choice::DoublePendulum => train::compare(candle_ode::solver::Rk4, &problem, &settings)?,
    };
    print(&outcomes);
    compare(&outcomes);
    Ok(())
}

/// Undone steps beside the checkpoints that are fastest.
fn compare(outcomes: &[Outcome]) {
    let checkpoints = outcomes.iter().filter(|outcome| outcome.name.contains("checkpoints"));
    let (Some(undone), Some(best)) = (outcomes.first(), checkpoints.min_by(|a, b| a.seconds.total_cmp(&b.seconds)))
    else {
        return;
    };
    let (time, memory) = (undone.seconds / best.seconds, undone.peak as f64 / best.peak as f64);
    println!("\nundone steps take {time:.2} times the CPU time of the fastest checkpoints ({}),", best.name);
    println!("{memory:.2} times their peak heap, and {} bytes of trajectory to {}", undone.trajectory, best.trajectory);
}

fn print(outcomes: &[Outcome]) {
    println!("\n{:<44} {:>10} {:>10} {:>12} {:>12} {:>10}", "", "loss", "CPU s", "peak heap", "trajectory", "drift");
    for outcome in outcomes {
        let Outcome { name, loss, seconds, peak, trajectory, drift } = outcome;
        let drift = drift.map_or_else(String::new, |drift| format!("{drift:.1e}"));
        println!("{name:<44} {loss:>10.2e} {seconds:>10.1} {peak:>10} B {trajectory:>10} B {drift:>10}");
    }
}
