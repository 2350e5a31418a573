//! A page opened in headless Chromium: no console error, and its numbers are the report's.
//!
//! Without a browser the tests say so and pass; `CHROMIUM` may name one.

use candle_core::{Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::account::Category;
use candle_ode::memory::{MemoryProfiler, MemoryReport, Part, SpanReport, TrackingAllocator};
use candle_ode::prelude::*;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Instant;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// A browser that answers, or `None` with the reason printed.
fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    let usual = ["chromium", "chromium-browser", "google-chrome", "chrome"].map(PathBuf::from);
    let mut candidates: Vec<_> = named.into_iter().chain(usual).collect();
    candidates.retain(|name| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success()));
    if candidates.is_empty() {
        println!("skipped: no chromium, chromium-browser, google-chrome or chrome answers; CHROMIUM may name one");
    }
    candidates.into_iter().next()
}

fn place(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn open(browser: &Path, page: &Path, flags: &[&str]) -> Output {
    let profile = tempfile::tempdir().unwrap();
    let mut command = Command::new(browser);
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]);
    command.args(["--disable-background-networking", "--no-first-run", "--enable-logging=stderr", "--v=0"]);
    command.arg(format!("--user-data-dir={}", profile.path().display()));
    command.args(["--virtual-time-budget=4000", "--window-size=1100,2600"]).args(flags);
    command.arg(format!("file://{}", page.canonicalize().unwrap().display()));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

/// The page's elements after its script has run. What the script complains of fails the test.
fn elements(browser: &Path, page: &Path) -> String {
    let output = open(browser, page, &["--dump-dom"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<_> = stderr.lines().filter(|line| line.contains("CONSOLE")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    let elements = String::from_utf8(output.stdout).unwrap();
    assert!(elements.contains("data-drawn=\"yes\""), "the script did not come to its end");
    elements
}

/// Half a training loop: two solves under a span of the user's own.
fn report() -> &'static MemoryReport {
    static REPORT: OnceLock<MemoryReport> = OnceLock::new();
    REPORT.get_or_init(|| {
        let vars = VarMap::new();
        let build = |vb: candle_nn::VarBuilder<'_>| candle_ode::ops::linear(16, 16, vb);
        let field = ModelField::new(&vars, &Device::Cpu, build, |layer, _: &Time, y| {
            candle_core::Module::forward(layer, y)?.tanh()
        });
        let y0 = Var::from_tensor(&Tensor::ones((32, 16), candle_core::DType::F32, &Device::Cpu).unwrap()).unwrap();
        let ode = Ode::new(&field.unwrap()).span(0.0, 1.0).steps(12);
        let profiler = MemoryProfiler::new(&Device::Cpu).set("solver", "rk4").set("note", "</script><b>bold</b>");
        let recording = profiler.install().unwrap();
        for epoch in 0..2 {
            let _epoch = tracing::info_span!("epoch", index = epoch).entered();
            let solution = ode.solve(y0.as_tensor()).unwrap();
            solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        }
        recording.finish().unwrap()
    })
}

/// The value of the element of that id, and its words.
fn output_of(elements: &str, attribute: &str) -> (i64, String) {
    let (before, rest) = elements.split_once(attribute).unwrap_or_else(|| panic!("no {attribute}"));
    let start = before.rfind('<').unwrap();
    let (tag, rest) = (format!("{}{attribute}{}", &before[start..], rest.split('>').next().unwrap()), rest);
    let value = tag.split_once("data-value=\"").unwrap().1.split('"').next().unwrap().parse().unwrap();
    (value, rest.split_once('>').unwrap().1.split('<').next().unwrap().to_owned())
}

#[test]
fn numbers_on_the_page_are_the_reports() {
    let Some(browser) = browser() else { return };
    let report = report();
    let page = place("browser.html");
    std::fs::write(&page, report.html()).unwrap();
    let elements = elements(&browser, &page);
    let value = |id: &str| output_of(&elements, &format!("id=\"{id}\"")).0;
    assert_eq!(value("peak"), (report.peak() - report.baseline()) as i64);
    assert_eq!(value("baseline"), report.baseline() as i64);
    assert_eq!(value("owned-peak"), report.totals.owned_peak as i64);
    assert_eq!(value("duration"), report.totals.duration_ns as i64);
    assert_eq!(value("span-count"), report.totals.spans as i64);
    let mut sum = report.baseline() as i64;
    for (part, bytes) in report.at_peak.bytes.iter().filter(|(part, bytes)| *bytes != 0 && *part != Part::Baseline) {
        let found = output_of(&elements, &format!("data-part=\"{part}\"")).0;
        assert_eq!(found, bytes, "{part}");
        sum += found;
    }
    assert_eq!(sum - report.baseline() as i64 + report.at_peak.bytes.of(Part::Baseline), report.peak() as i64);
    let trajectory = report.owned(Category::Trajectory).unwrap();
    assert!(elements.contains("<td>trajectory/f32</td>"), "the ledger tells the codec");
    assert!(trajectory.peak > 0 && elements.contains(&format!("<td>{}</td>", trajectory.peak)));
    assert!(elements.contains("::epoch") && elements.contains("pullback"), "the span tree has theirs and ours");
    assert!(elements.contains("&lt;/script&gt;&lt;b&gt;bold"), "settings are text");
}

#[test]
fn words_on_the_page_are_the_tools() {
    let Some(browser) = browser() else { return };
    let mut report = report().clone();
    // 3.00 MiB above the baseline, by hand.
    report.counters[0].peak = report.counters[0].baseline + (3 << 20);
    let page = place("words.html");
    std::fs::write(&page, report.html()).unwrap();
    assert_eq!(output_of(&elements(&browser, &page), "id=\"peak\""), (3 << 20, "3.00 MiB".to_owned()));
}

#[test]
fn a_report_of_nothing_is_drawn_too() {
    let Some(browser) = browser() else { return };
    let mut report = report().clone();
    report.spans.clear();
    report.passes.clear();
    report.timeline.0.clear();
    report.counters.clear();
    let page = place("nothing.html");
    std::fs::write(&page, report.html()).unwrap();
    assert!(elements(&browser, &page).contains("No pass was recorded."));
}

/// A report of many spans: passes of a hundred steps of nine evaluations each.
fn many(count: u64) -> MemoryReport {
    let mut report = report().clone();
    let like = |name: &str| report.spans.iter().find(|span| *span.name == *name).unwrap().clone();
    let kinds = ["forward", "step", "field"].map(like);
    let baseline = report.baseline();
    let (mut pass, mut step) = (0, 0);
    let spans = (0..count).map(|id| {
        // One pass, then a step and its evaluations, a hundred times.
        let place = id % 1001;
        let kind = if place == 0 {
            0
        } else if place % 10 == 1 {
            1
        } else {
            2
        };
        let (parent, lasts) = match kind {
            0 => (None, 1_000_000),
            1 => (Some(pass), 9_000),
            _ => (Some(step), 500),
        };
        match kind {
            0 => pass = id,
            1 => step = id,
            _ => {}
        }
        let index = (kind == 1).then_some(place / 10);
        let peak = baseline + 1000 + 7919 * id % 100_000;
        let (start_ns, duration_ns) = (1000 * id, lasts);
        SpanReport {
            id,
            parent,
            index,
            start_ns,
            duration_ns,
            live_before: baseline,
            live_after: baseline,
            peak,
            ..kinds[kind].clone()
        }
    });
    let spans: Vec<_> = spans.collect();
    report.totals.spans = count;
    report.totals.duration_ns = 1000 * count + 1_000_000;
    report.spans = spans;
    report
}

#[test]
fn a_hundred_thousand_spans_are_drawn_in_a_sane_time() {
    let Some(browser) = browser() else { return };
    let (few, page) = (place("few.html"), place("many.html"));
    std::fs::write(&few, many(1001).html()).unwrap();
    std::fs::write(&page, many(100_000).html()).unwrap();
    let timed = |page: &Path| {
        let start = Instant::now();
        let elements = elements(&browser, page);
        (start.elapsed().as_secs_f64(), elements)
    };
    // What a browser takes to start is not the page's.
    let (start, _) = timed(&few);
    let (whole, elements) = timed(&page);
    println!("{whole:.2} s, of which a page of few spans takes {start:.2} s");
    assert_eq!(output_of(&elements, "id=\"span-count\"").0, 100_000);
    assert!(elements.contains("solve 100 of 100"), "every pass can be chosen");
    assert!(whole - start < 5.0, "{whole:.2} s against {start:.2} s");
}

#[test]
fn a_screenshot_is_taken_wide_and_narrow() {
    let Some(browser) = browser() else { return };
    let page = place("screenshot.html");
    std::fs::write(&page, report().html()).unwrap();
    for (name, size) in [("wide.png", "1100,2600"), ("narrow.png", "400,3400")] {
        let picture = place(name);
        open(&browser, &page, &[&format!("--screenshot={}", picture.display()), &format!("--window-size={size}")]);
        let bytes = std::fs::read(&picture).unwrap();
        // A page on which nothing is drawn compresses to a few kilobytes.
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 20_000, "{name} has {} bytes", bytes.len());
    }
}

#[test]
fn a_comparison_is_drawn() {
    let Some(browser) = browser() else { return };
    let (first, second, page) = (place("first.json"), place("second.json"), place("comparison.html"));
    report().save(&first).unwrap();
    let mut half = report().clone();
    half.counters[0].peak = half.counters[0].baseline + (half.peak() - half.baseline()) / 2;
    half.save(&second).unwrap();
    let mut tool = Command::new(env!("CARGO_BIN_EXE_memory-report"));
    tool.arg("compare").args([&first, &second]).arg("--html").arg(&page);
    assert!(tool.output().unwrap().status.success());
    let elements = elements(&browser, &page);
    let peak = report().peak() - report().baseline();
    assert!(elements.contains(&format!("data-value=\"{peak}\"")) && elements.contains("<td>0.500</td>"));
    assert_eq!(elements.matches("<canvas").count(), 3, "the curves overlaid, and one chart each");
}
