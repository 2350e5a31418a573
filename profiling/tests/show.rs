//! `memory-report show` prints a saved report, and says what is wrong with a bad file.

use candle_core::Device;
use candle_ode::account::{Category, Owned};
use candle_ode::memory::{
    CategoryBytes, CodecBytes, Counter, Curve, Environment, MemoryProfiler, MemoryReport, Moment, NameSummary, RunKind,
    SCHEMA, SpanReport, Timeline, Totals, TrackingAllocator,
};
use std::path::PathBuf;
use std::process::{Command, Output};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

fn memory_report(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_memory-report")).args(arguments).output().unwrap()
}

fn place(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn span(id: u64, name: &str, index: Option<u64>, peak: u64) -> SpanReport {
    SpanReport {
        id,
        parent: id.checked_sub(1).map(|_| 0),
        target: "candle_ode".into(),
        name: name.into(),
        index,
        t: index.map(|_| 0.5),
        h: index.map(|_| 0.5),
        thread: 0,
        start_ns: 1000 * id,
        duration_ns: 1500,
        live_before: 2048,
        live_after: 2048,
        peak,
        open: false,
    }
}

/// A report of a forward pass of two steps, by hand.
fn by_hand() -> MemoryReport {
    let name = |target: &str, name: &str, count, time_ns, peak| {
        let (target, name) = (target.to_owned(), name.to_owned());
        NameSummary { target, name, count, time_ns, peak }
    };
    MemoryReport {
        schema: SCHEMA.into(),
        run: RunKind::Memory,
        environment: Environment {
            crate_version: "0.1.0".into(),
            candle_version: "0.11.1".into(),
            device: "CPU (test)".into(),
            settings: [("solver".to_owned(), "rk4".into())].into(),
        },
        counters: vec![Counter {
            name: "heap".into(),
            baseline: 1024,
            live: 2048,
            peak: 1_049_600,
            synchronises: false,
            curve: Curve::default(),
        }],
        totals: Totals {
            duration_ns: 2_500_000,
            owned_live: 0,
            owned_peak: 4096,
            spans: 9,
            spans_dropped: 3,
            complete_from_ns: 0,
        },
        owned: vec![CategoryBytes { category: "trajectory".into(), live: 0, peak: 4096 }],
        trajectory: vec![CodecBytes {
            codec: "increments8".into(),
            live: 0,
            peak: 1024,
            at_peak: 0,
            over_time: vec![],
        }],
        at_peak: Moment::default(),
        timeline: Timeline::default(),
        names: vec![name("candle_ode", "step", 2, 3000, 1_049_600), name("my_model", "epoch", 1, 4000, 3072)],
        passes: vec![],
        spans: vec![
            span(0, "forward", None, 1_049_600),
            span(1, "step", Some(0), 3072),
            span(2, "step", Some(1), 1_049_600),
        ],
    }
}

#[test]
fn a_report_is_shown_as_tables() {
    let path = place("by_hand.json");
    by_hand().save(&path).unwrap();
    let output = memory_report(&["show", path.to_str().unwrap(), "--steps"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let row = |words: &[&str]| {
        let found = text.lines().any(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") == words.join(" "));
        assert!(found, "no line `{}` in\n{text}", words.join(" "));
    };
    row(&["solver: rk4"]);
    row(&["heap", "1.00 KiB", "2.00 KiB", "1.00 MiB", "1.00 MiB"]);
    row(&["trajectory", "0 B", "4.00 KiB", "4096"]);
    row(&["trajectory/increments8", "0 B", "1.00 KiB", "1024"]);
    row(&["step", "2", "3.00 µs", "1.50 µs", "1.00 MiB"]);
    row(&["my_model::epoch", "1", "4.00 µs", "4.00 µs", "2.00 KiB"]);
    row(&["forward", "2", "1.00 MiB", "2.00 KiB", "1.00 MiB", "1.00 MiB", "1", "▁█"]);
    row(&["1", "0.500000", "0.500000", "1.00 KiB", "1.00 KiB", "1.00 MiB", "1.50 µs"]);
    assert!(text.contains("the 3 oldest were dropped"));
}

#[test]
fn a_report_just_recorded_is_shown() {
    let path = place("recorded.json");
    let recording = MemoryProfiler::new(&Device::Cpu).install().unwrap();
    drop(Owned::new(Category::Trajectory, 12_288));
    recording.finish().unwrap().save(&path).unwrap();
    let output = memory_report(&["show", path.to_str().unwrap()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("12.00 KiB"), "{text}");
}

#[test]
fn a_bad_file_is_an_error_on_stderr() {
    let path = place("bad.json");
    by_hand().save(&path).unwrap();
    let whole = std::fs::read_to_string(&path).unwrap();
    for (text, complaint) in [("hello", "is not a memory report"), (&whole[..200], "is truncated")] {
        std::fs::write(&path, text).unwrap();
        let output = memory_report(&["show", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(complaint) && stderr.contains("bad.json"), "{stderr}");
    }
    let output = memory_report(&["show", "/no/such/file.json"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn help_has_an_example() {
    for arguments in [&["--help"][..], &["show", "--help"]] {
        let output = memory_report(arguments);
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("memory-report show out/cnf/memory.json"));
    }
}
