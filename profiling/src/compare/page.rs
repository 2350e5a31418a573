//! The comparison as a page: the table, all curves overlaid, and each report's bytes by kind in a small chart.

use super::side::{METRICS, Side};
use crate::failure::Result;
use candle_ode::memory::Page;
use serde_json::{Value, json};

/// One self-contained page.
pub(crate) fn html(sides: &[Side]) -> Result<String> {
    let page =
        Page { title: "Memory reports compared", body: include_str!("page.html"), script: include_str!("page.js") };
    let metrics: Vec<_> = METRICS.iter().map(|metric| json!({ "name": metric.name, "title": metric.title })).collect();
    let data = json!({ "metrics": metrics, "sides": sides.iter().map(|side| of(side, &sides[0])).collect::<Vec<_>>() });
    Ok(page.html(&serde_json::to_string(&data)?))
}

fn of(side: &Side, first: &Side) -> Value {
    let figures = METRICS.iter().map(|metric| {
        let value = side.value(metric);
        json!({ "value": value, "words": value.map(metric.words), "ratio": side.ratio(metric, first) })
    });
    let report = &side.report;
    json!({
        "name": side.name,
        "figures": figures.collect::<Vec<_>>(),
        "baseline": report.baseline(),
        "duration_ns": report.totals.duration_ns,
        "timeline": report.timeline,
        "at_peak": report.at_peak,
        "settings": report.environment.settings,
    })
}
