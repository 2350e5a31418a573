//! `memory-report show` prints a saved report, and says what is wrong with a bad file.

use candle_core::Device;
use candle_ode::account::{Category, Owned};
use candle_ode::memory::{MemoryProfiler, SCHEMA, TrackingAllocator};
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

/// The format as it is on disk, by hand.
fn written_by_hand() -> String {
    let step = |index: u64, peak: u64| {
        format!(
            r#"{{"index":{index},"t":0.5,"h":0.5,"peak":{peak},"live_before":2048,"live_after":2048,"duration_ns":1500}}"#
        )
    };
    format!(
        r#"{{"schema":"{SCHEMA}","run":"memory","environment":{{"crate_version":"0.1.0","candle_version":"0.11.1","device":"CPU (test)",
        "settings":{{"solver":"rk4","steps":2}}}},
        "counters":[{{"name":"heap","baseline":1024,"live":2048,"peak":1049600,"synchronises":false}}],
        "totals":{{"duration_ns":2500000,"owned_live":0,"owned_peak":4096,"spans":9,"spans_dropped":3}},
        "owned":[{{"category":"trajectory","live":0,"peak":4096}}],
        "at_peak":{{"time_ns":7000,"bytes":{{"trajectory":4096,"field":1045504}}}},
        "timeline":{{"time_ns":[0,7000],"bytes":{{"trajectory":[0,4096],"field":[0,1045504]}}}},
        "names":[{{"target":"candle_ode","name":"step","count":2,"time_ns":3000,"peak":1049600}},
                 {{"target":"my_model","name":"epoch","count":1,"time_ns":4000,"peak":3072}}],
        "passes":[{{"pass":"forward","span":0,"complete":true,"peak":1049600,"steps":[{},{}]}}],
        "spans":[]}}"#,
        step(0, 3072),
        step(1, 1_049_600)
    )
}

#[test]
fn a_report_is_shown_as_tables() {
    let path = place("by_hand.json");
    std::fs::write(&path, written_by_hand()).unwrap();
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
    for (text, complaint) in [("hello", "is not a memory report"), (&written_by_hand()[..200], "is truncated")] {
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
