//! The table at the end: what each precision cost, and what it came to.

use crate::cli::{Config, PrecisionName};
use crate::train::Outcome;
use candle_ode::file::write_bytes_atomically;
use candle_ode::{OdeError, Result};
use serde::Serialize;
use std::fmt::{self, Write};
use std::path::Path;

/// One precision on one data set, over all its seeds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// The data set.
    pub data: String,
    /// The precision.
    pub precision: PrecisionName,
    /// How many runs.
    pub seeds: usize,
    /// Mean seconds of training.
    pub seconds: f64,
    /// Most bytes alive at once in any run.
    pub peak_bytes: u64,
    /// Bytes one forward pass kept.
    pub trajectory_bytes: u64,
    /// Mean NLL of the validation points, in nats.
    pub val_nll: f64,
    /// Largest less smallest NLL.
    pub val_nll_spread: f64,
    /// Mean NLL less that of the first precision on the same data.
    pub val_nll_difference: f64,
}

/// The lines, in the order of the runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Table(Vec<Line>);

impl Table {
    /// Sums up finished runs.
    pub fn of(runs: &[(Config, Outcome)]) -> Self {
        let mut lines: Vec<Line> = Vec::new();
        for (Config { data, precision, .. }, _) in runs {
            if lines.iter().any(|line| line.data == *data && line.precision == *precision) {
                continue;
            }
            let same = |config: &Config| config.data == *data && config.precision == *precision;
            let group: Vec<&Outcome> =
                runs.iter().filter(|(config, _)| same(config)).map(|(_, outcome)| outcome).collect();
            let mean = |of: fn(&Outcome) -> f64| group.iter().map(|run| of(run)).sum::<f64>() / group.len() as f64;
            let nlls = || group.iter().map(|run| run.val_nll);
            let val_nll = mean(|run| run.val_nll);
            let first = lines.iter().find(|line| line.data == *data);
            let val_nll_difference = val_nll - first.map_or(val_nll, |first| first.val_nll);
            lines.push(Line {
                data: data.clone(),
                precision: *precision,
                seeds: group.len(),
                seconds: mean(|run| run.seconds),
                peak_bytes: group.iter().map(|run| run.peak_bytes).max().unwrap_or(0),
                trajectory_bytes: group.iter().map(|run| run.trajectory_bytes).max().unwrap_or(0),
                val_nll,
                val_nll_spread: nlls().fold(f64::MIN, f64::max) - nlls().fold(f64::MAX, f64::min),
                val_nll_difference,
            });
        }
        Self(lines)
    }

    /// Writes the table as CSV.
    ///
    /// # Errors
    /// [`OdeError::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let wrong = |reason: String| OdeError::Format { path: path.to_owned(), reason };
        let mut writer = csv::Writer::from_writer(Vec::new());
        for line in &self.0 {
            writer.serialize(line).map_err(|error| wrong(error.to_string()))?;
        }
        let bytes = writer.into_inner().map_err(|error| wrong(error.to_string()))?;
        write_bytes_atomically(path, &bytes)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let several = self.0.iter().any(|line| line.seeds > 1);
        let width = self.0.iter().map(|line| line.data.chars().count()).max().unwrap_or(0).max(4) + 2;
        let mut head = format!(
            "{:<width$}{:<10}{:>9}{:>12}{:>16}{:>22}",
            "data", "precision", "time", "peak", "trajectory", "validation NLL"
        );
        if several {
            head.push_str("    spread");
        }
        if self.0.len() > 1 {
            write!(head, "{:>12}", format!("over {}", self.0[0].precision))?;
        }
        writeln!(f, "{head}\n{}", "-".repeat(head.len()))?;
        for line in &self.0 {
            let Line { data, precision, seconds, val_nll, .. } = line;
            let (peak, kept) = (mib(line.peak_bytes), kib(line.trajectory_bytes));
            write!(
                f,
                "{data:<width$}{precision:<10}{seconds:>7.1} s{peak:>8.2} MiB{kept:>12.2} KiB{val_nll:>17.4} nats"
            )?;
            if several {
                write!(f, "{:>10.4}", line.val_nll_spread)?;
            }
            if self.0.len() > 1 {
                write!(f, "{:>+12.4}", line.val_nll_difference)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

fn mib(bytes: u64) -> f64 {
    kib(bytes) / 1024.0
}

fn kib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_summed_up_by_precision() -> Result<()> {
        let run = |data: &str, precision, seed, val_nll, peak_bytes| {
            let config = Config { data: data.into(), precision, seed, ..Config::default() };
            (config, Outcome { val_nll, peak_bytes, seconds: 2.0, trajectory_bytes: 1536, ..Outcome::default() })
        };
        let (f32, f16) = (PrecisionName::F32, PrecisionName::F16);
        let runs = [
            run("a", f32, 0, 3.5, 2 << 20),
            run("a", f32, 1, 3.75, 1 << 20),
            run("a", f16, 0, 3.75, 7),
            run("a", f16, 1, 3.75, 8),
            run("b", f32, 0, 1.0, 7),
            run("b", f16, 0, 0.75, 7),
        ];
        let table = Table::of(&runs);
        assert_eq!((table.0[0].val_nll, table.0[0].val_nll_spread, table.0[0].peak_bytes), (3.625, 0.25, 2 << 20));
        assert_eq!((table.0[1].seeds, table.0[1].val_nll_difference), (2, 0.125));
        assert_eq!((table.0[2].val_nll_difference, table.0[3].val_nll_difference), (0.0, -0.25));
        let text = table.to_string();
        assert!(text.contains("over f32") && text.contains("+0.1250") && text.contains("1.50 KiB"), "{text}");
        let dir = tempfile::tempdir().unwrap();
        table.save(&dir.path().join("compare.csv"))?;
        let saved = std::fs::read_to_string(dir.path().join("compare.csv")).unwrap();
        assert!(
            saved.starts_with("data,precision,seeds,seconds,peak_bytes") && saved.contains("\na,f16,2,2.0,8,1536,3.75")
        );
        Ok(())
    }
}
