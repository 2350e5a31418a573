//! Studies: what the methods of candle-ode do, as tables, CSV files and plots.

mod codecs;
mod pareto;
mod plan;
mod plot;
mod reversal;
mod stability;

use crate::failure::Result;
use clap::{Args, Subcommand};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  memory-report study codecs
  memory-report study pareto --rounds 3 --out out/study
  memory-report study plan --quick";

/// The verb `study`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Study {
    #[command(subcommand)]
    which: Which,
}

#[derive(Subcommand)]
enum Which {
    /// Gradient errors of the codecs of the trajectory against F64, as CSV.
    Codecs(codecs::Codecs),
    /// Solves three equations backwards, which cannot be: where the continuous adjoint fails and the discrete does not.
    Reversal(Output),
    /// How long the steps of reversible solvers may be, found by solving and from the roots of the step matrix.
    Stability(Output),
    /// Time against memory of a gradient, for every adjoint: what √N slots cost, and what steps that are undone.
    Pareto(pareto::Pareto),
    /// What plans say against what is measured: fails unless owned bytes are equal and peaks within three per cent.
    Plan(plan::Plan),
}

/// Where a study leaves its files.
#[derive(Args)]
struct Output {
    /// The folder for CSV and SVG; it is made if need be.
    #[arg(long, default_value = "out/study")]
    out: PathBuf,
}

impl Study {
    pub(crate) fn run(&self) -> Result<()> {
        match &self.which {
            Which::Codecs(codecs) => codecs.run(),
            Which::Reversal(output) => reversal::run(output.folder()?),
            Which::Stability(output) => stability::run(output.folder()?),
            Which::Pareto(pareto) => pareto::run(pareto),
            Which::Plan(plan) => plan.run(),
        }
    }
}

impl Output {
    /// The folder, made if need be.
    fn folder(&self) -> Result<&Path> {
        std::fs::create_dir_all(&self.out).map_err(|error| format!("{}: {error}", self.out.display()))?;
        Ok(&self.out)
    }
}

/// Prints rows as a table and writes them as CSV; the first row is the head.
fn publish(rows: &[Vec<String>], path: &Path) -> Result<()> {
    let mut table = crate::table::Table::of(rows.first().cloned().unwrap_or_default());
    rows.iter().skip(1).for_each(|row| table.add(row.clone()));
    crate::print(table.text().as_bytes())?;
    let lines: Vec<String> = rows.iter().map(|row| row.join(",") + "\n").collect();
    candle_ode::file::write_bytes_atomically(path, lines.concat().as_bytes())?;
    crate::print(format!("\n{}\n", path.display()).as_bytes())
}
