//! One report of a comparison: its name among the others, and its figures.

use crate::cell::{FLAGS, told_apart, word};
use crate::failure::Result;
use crate::run::cells_in;
use crate::table::{bytes, time};
use candle_ode::account::Category;
use candle_ode::memory::MemoryReport;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A report under a name that tells it from the others.
pub(crate) struct Side {
    pub(crate) name: String,
    pub(crate) report: MemoryReport,
}

/// A figure that reports are compared by.
pub(crate) struct Metric {
    /// In conditions and in files.
    pub(crate) name: &'static str,
    /// In tables.
    pub(crate) title: &'static str,
    pub(crate) of: fn(&MemoryReport) -> Option<f64>,
    pub(crate) words: fn(f64) -> String,
}

/// Times are those of timing runs (`run` makes them), else how long the recording took.
pub(crate) const METRICS: &[Metric] = &[
    Metric {
        name: "peak",
        title: "peak above baseline",
        of: |report| Some(report.peak() as f64 - report.baseline() as f64),
        words: |value| if value < 0.0 { format!("-{}", bytes(-value as u64)) } else { bytes(value as u64) },
    },
    Metric {
        name: "trajectory",
        title: "trajectory",
        of: |report| report.owned(Category::Trajectory).map(|owned| owned.peak as f64),
        words: |value| bytes(value as u64),
    },
    Metric {
        name: "time",
        title: "time",
        of: |report| Some(number(report, "time_ns").unwrap_or(report.totals.duration_ns as f64)),
        words: |value| time(value as u64),
    },
    Metric {
        name: "gradient_error",
        title: "gradient error",
        of: |report| number(report, "gradient_error"),
        words: |value| format!("{value:.2e}"),
    },
];

fn number(report: &MemoryReport, setting: &str) -> Option<f64> {
    report.environment.settings.get(setting)?.as_f64()
}

impl Side {
    pub(crate) fn value(&self, metric: &Metric) -> Option<f64> {
        (metric.of)(&self.report)
    }

    /// Over the first report's; two zeros are alike.
    pub(crate) fn ratio(&self, metric: &Metric, first: &Side) -> Option<f64> {
        let (value, base) = (self.value(metric)?, first.value(metric)?);
        if value == base { Some(1.0) } else { Some(value / base) }
    }

    pub(crate) fn setting(&self, name: &str) -> Option<String> {
        self.report.environment.settings.get(name).map(word)
    }
}

/// Reads what was named: files, cells, folders of cells.
pub(crate) fn load(paths: &[PathBuf]) -> Result<Vec<Side>> {
    let mut files = Vec::new();
    for path in paths {
        files.extend(reports_at(path)?);
    }
    let reports = files.iter().map(MemoryReport::load).collect::<candle_ode::Result<Vec<_>>>()?;
    let sides: Vec<_> =
        files.iter().zip(reports).map(|(file, report)| Side { name: file.display().to_string(), report }).collect();
    Ok(named(sides))
}

fn reports_at(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let cells = if path.join("report.json").is_file() { vec![path.to_owned()] } else { cells_in(path)? };
    if cells.is_empty() {
        return Err(format!("{} holds no report.json, nor folders with one", path.display()).into());
    }
    Ok(cells.iter().map(|cell| cell.join("report.json")).collect())
}

/// Names each report by the flags in which they differ; where that does not tell them apart, the file's name stays.
fn named(mut sides: Vec<Side>) -> Vec<Side> {
    let choices: Vec<_> = sides.iter().map(|side| FLAGS.map(|flag| side.setting(flag))).collect();
    let names = told_apart(&choices);
    let distinct = names.iter().collect::<BTreeSet<_>>().len() == names.len();
    if distinct && names.iter().all(|name| !name.is_empty()) {
        sides.iter_mut().zip(names).for_each(|(side, name)| side.name = name);
    }
    sides
}

/// Every figure and ratio, a line a report.
pub(crate) fn csv(sides: &[Side]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let titles = METRICS.iter().flat_map(|metric| [metric.name.to_owned(), format!("{}_ratio", metric.name)]);
    writer.write_record(std::iter::once("report".to_owned()).chain(titles))?;
    let said = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    for side in sides {
        let figures = METRICS.iter().flat_map(|metric| [said(side.value(metric)), said(side.ratio(metric, &sides[0]))]);
        writer.write_record(std::iter::once(side.name.clone()).chain(figures))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}
