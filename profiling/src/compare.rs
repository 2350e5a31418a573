//! `memory-report compare`: reports side by side, with ratios against the first.

mod condition;
mod page;
mod picture;
mod side;

use crate::failure::Result;
use crate::table::Table;
use candle_ode::file::write_bytes_atomically;
use clap::Args;
use condition::Condition;
use side::{METRICS, Side};
use std::path::{Path, PathBuf};

pub(crate) const EXAMPLES: &str = "\
Examples:
  memory-report compare out/precisions --html compare.html
  memory-report compare before/report.json after/report.json --fail-if 'peak > 1.02'";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Compare {
    /// Reports, folders that hold a report.json, or folders of such folders (as `run` makes them).
    #[arg(required = true)]
    reports: Vec<PathBuf>,
    /// Writes the table as Markdown too.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Writes the figures as comma-separated values too, in bytes and nanoseconds.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Writes a page too: the table, the curves of all overlaid, and small multiples.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Draws peaks against the number of steps too, one curve for each choice of everything else.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Fails (exit code 1) if a ratio against the first report is so: peak, trajectory, time or gradient_error, then
    /// one of > >= < <=, then a number. May be given several times.
    #[arg(long, value_name = "CONDITION")]
    fail_if: Vec<Condition>,
}

impl Compare {
    pub(crate) fn run(&self) -> Result<()> {
        let sides = side::load(&self.reports)?;
        if let (Some(condition), [only]) = (self.fail_if.first(), sides.as_slice()) {
            let what =
                format!("'{condition:?}' is about ratios against the first report, and {} is the only one", only.name);
            return Err(format!("{what}: name another").into());
        }
        let table = table(&sides);
        crate::print(table.text().as_bytes())?;
        let write = |path: &Option<PathBuf>, text: &dyn Fn() -> Result<String>| match path {
            Some(path) => save(path, &text()?),
            None => Ok(()),
        };
        write(&self.markdown, &|| Ok(table.markdown()))?;
        write(&self.csv, &|| side::csv(&sides))?;
        write(&self.html, &|| page::html(&sides))?;
        write(&self.svg, &|| picture::peaks_against_steps(&sides))?;
        let broken: Vec<_> = self.fail_if.iter().flat_map(|condition| condition.broken(&sides)).collect();
        if broken.is_empty() { Ok(()) } else { Err(broken.join("\nmemory-report: ").into()) }
    }
}

fn save(path: &Path, text: &str) -> Result<()> {
    Ok(write_bytes_atomically(path, text.as_bytes())?)
}

/// A row a report; behind each figure but the first its ratio.
fn table(sides: &[Side]) -> Table {
    let mut head = vec!["report".to_owned()];
    for metric in METRICS {
        head.extend([metric.title.to_owned(), "ratio".to_owned()]);
    }
    let mut table = Table::of(head);
    for side in sides {
        let mut row = vec![side.name.clone()];
        for metric in METRICS {
            let (value, ratio) = (side.value(metric), side.ratio(metric, &sides[0]));
            row.push(value.map_or("-".to_owned(), metric.words));
            row.push(ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.3}")));
        }
        table.add(row);
    }
    table
}
