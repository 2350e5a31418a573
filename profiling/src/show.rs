//! `memory-report show`: one report as tables. Bytes of spans and passes are above the baseline.

use crate::failure::Result;
use crate::table::{Table, above, bytes, time};
use candle_ode::memory::{MemoryReport, PassReport, StepReport};
use clap::Args;
use std::path::PathBuf;

pub(crate) const EXAMPLES: &str = "\
Examples:
  memory-report show out/cnf/memory.json
  memory-report show out/cnf/memory.json --steps
  memory-report show out/cnf/memory.json --out out/cnf/memory";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Show {
    /// The report, a JSON file.
    file: PathBuf,
    /// Prints every step of every pass too.
    #[arg(long)]
    steps: bool,
    /// Writes report.json, report.csv, ledger.csv, trace.json (for Perfetto) and report.html into this folder too.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

impl Show {
    pub(crate) fn run(&self) -> Result<()> {
        let report = MemoryReport::load(&self.file)?;
        if let Some(folder) = &self.out {
            report.save_all(folder)?;
        }
        crate::print(text(&report, self.steps).as_bytes())
    }
}

/// How many passes and spans of a report are printed; a training run has thousands.
const MOST_ROWS: usize = 20;

fn text(report: &MemoryReport, steps: bool) -> String {
    let mut sections = vec![environment(report), counters(report), owned(report), names(report)];
    if !report.passes.is_empty() {
        sections.push(passes(report));
    }
    if steps {
        sections.extend(report.passes.iter().map(|pass| every_step(report, pass)));
    }
    sections.join("\n")
}

fn environment(report: &MemoryReport) -> String {
    let environment = &report.environment;
    let mut text = format!(
        "candle-ode {} on Candle {}, {}\n",
        environment.crate_version, environment.candle_version, environment.device
    );
    for (name, value) in &environment.settings {
        match value.as_str() {
            Some(word) => text.push_str(&format!("  {name}: {word}\n")),
            None => text.push_str(&format!("  {name}: {value}\n")),
        }
    }
    let totals = &report.totals;
    text.push_str(&format!("Recorded {}, {} spans", time(totals.duration_ns), totals.spans));
    if totals.spans_dropped > 0 {
        text.push_str(&format!(" (the {} oldest were dropped)", totals.spans_dropped));
    }
    text.push('\n');
    if report.counters.iter().any(|counter| counter.synchronises) {
        text.push_str("Readings waited for the device: the times say little about speed.\n");
    }
    text
}

fn counters(report: &MemoryReport) -> String {
    let mut table = Table::new(["counter", "baseline", "live at the end", "peak", "peak above baseline"]);
    for counter in &report.counters {
        table.row([
            counter.name.clone(),
            bytes(counter.baseline),
            bytes(counter.live),
            bytes(counter.peak),
            above(counter.peak, counter.baseline),
        ]);
    }
    format!("Totals\n{}", table.text())
}

fn owned(report: &MemoryReport) -> String {
    let mut table = Table::new(["category", "live at the end", "peak", "peak in bytes"]);
    for category in &report.owned {
        table.row([category.category.clone(), bytes(category.live), bytes(category.peak), category.peak.to_string()]);
        for codec in report.trajectory.iter().filter(|_| category.category == "trajectory") {
            let name = format!("trajectory/{}", codec.codec);
            table.row([name, bytes(codec.live), bytes(codec.peak), codec.peak.to_string()]);
        }
    }
    let totals = &report.totals;
    table.row([
        "all together".to_owned(),
        bytes(totals.owned_live),
        bytes(totals.owned_peak),
        totals.owned_peak.to_string(),
    ]);
    format!("Owned bytes\n{}", table.text())
}

fn names(report: &MemoryReport) -> String {
    let mut names: Vec<_> = report.names.iter().collect();
    names.sort_by_key(|name| std::cmp::Reverse((name.peak, name.time_ns)));
    let mut table = Table::new(["span", "count", "time", "time each", "highest peak above baseline"]);
    for name in names.iter().take(MOST_ROWS) {
        let label =
            if name.target == "candle_ode" { name.name.clone() } else { format!("{}::{}", name.target, name.name) };
        table.row([
            label,
            name.count.to_string(),
            time(name.time_ns),
            time(name.time_ns / name.count.max(1)),
            above(name.peak, report.baseline()),
        ]);
    }
    format!("Spans by name\n{}{}", table.text(), more(names.len()))
}

/// The latest passes, each with a summary of its steps' peaks.
fn passes(report: &MemoryReport) -> String {
    let mut table = Table::new([
        "pass",
        "steps",
        "peak",
        "lowest step",
        "median step",
        "highest step",
        "at index",
        "shape over the steps",
    ]);
    let skipped = report.passes.len().saturating_sub(MOST_ROWS);
    for pass in &report.passes[skipped..] {
        let mut peaks: Vec<_> = pass.steps.iter().map(|step| step.peak).collect();
        let shape = sparkline(&peaks);
        peaks.sort_unstable();
        let of = |peak: Option<&u64>| peak.map_or("-".to_owned(), |&peak| above(peak, report.baseline()));
        let highest = pass.steps.iter().max_by_key(|step| step.peak).and_then(|step| step.index);
        let label = if pass.complete { pass.pass.clone() } else { format!("{} (in part)", pass.pass) };
        table.row([
            label,
            pass.steps.len().to_string(),
            above(pass.peak, report.baseline()),
            of(peaks.first()),
            of(peaks.get(peaks.len() / 2)),
            of(peaks.last()),
            highest.map_or("-".to_owned(), |index| index.to_string()),
            shape,
        ]);
    }
    let omitted =
        if skipped > 0 { format!("  (the {skipped} passes before are in the file)\n") } else { String::new() };
    format!("Peaks of the steps, above baseline, pass by pass\n{}{omitted}", table.text())
}

fn every_step(report: &MemoryReport, pass: &PassReport) -> String {
    let mut table = Table::new(["step", "t", "h", "live before", "live after", "peak", "time"]);
    for StepReport { index, t, h, peak, live_before, live_after, duration_ns } in &pass.steps {
        let number = |value: &Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.6}"));
        table.row([
            index.map_or("-".to_owned(), |index| index.to_string()),
            number(t),
            number(h),
            above(*live_before, report.baseline()),
            above(*live_after, report.baseline()),
            above(*peak, report.baseline()),
            time(*duration_ns),
        ]);
    }
    format!("Steps of the {} pass, span {}, above baseline\n{}", pass.pass, pass.span, table.text())
}

/// At most 32 bars from the lowest to the highest; each is the highest of the steps it stands for.
fn sparkline(peaks: &[u64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let (Some(&lowest), Some(&highest)) = (peaks.iter().min(), peaks.iter().max()) else { return String::new() };
    let bar = |group: &[u64]| {
        let peak = group.iter().max().copied().unwrap_or(lowest);
        let height = (peak - lowest) as f64 / ((highest - lowest) as f64).max(1.0);
        BARS[(height * (BARS.len() - 1) as f64).round() as usize]
    };
    peaks.chunks(peaks.len().div_ceil(32)).map(bar).collect()
}

fn more(rows: usize) -> String {
    match rows.saturating_sub(MOST_ROWS) {
        0 => String::new(),
        hidden => format!("  ({hidden} more are in the file)\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::sparkline;

    #[test]
    fn sparklines_fit() {
        assert_eq!(sparkline(&[]), "");
        assert_eq!(sparkline(&[5, 5]), "▁▁");
        assert_eq!(sparkline(&[0, 4, 7]), "▁▅█");
        assert!(sparkline(&(0..1000).collect::<Vec<_>>()).chars().count() <= 32);
    }
}
