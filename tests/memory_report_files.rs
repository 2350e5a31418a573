//! A report survives the disk, keeps to its limit, and a bad file says what is wrong with it.

#[path = "common/counted.rs"]
mod counted;

use candle_core::Device;
use candle_ode::OdeError;
use candle_ode::account::{Category, Owned};
use candle_ode::memory::{MemoryProfiler, MemoryReport, SCHEMA};
use counted::{Counted, alone};
use std::path::Path;

/// Two passes of three steps, each of which needs 100 bytes more than the one before.
fn report(span_limit: usize) -> MemoryReport {
    let memory = Counted::default();
    let profiler = MemoryProfiler::new(&Device::Cpu).meter(memory.clone()).span_limit(span_limit);
    let (recording, _guard) = profiler.set("solver", "rk4").set("steps", 3).install_scoped().unwrap();
    let owned = Owned::new(Category::Trajectory, 64);
    for pass in ["forward", "backward"] {
        let _pass = match pass {
            "forward" => tracing::debug_span!(target: "candle_ode", "forward"),
            _ => tracing::debug_span!(target: "candle_ode", "backward"),
        }
        .entered();
        for index in 0..3u64 {
            let t = index as f64 / 3.0;
            let _step = tracing::debug_span!(target: "candle_ode", "step", index, t, h = 1.0 / 3.0).entered();
            let bytes = 100 * (index as i64 + 1);
            tracing::trace_span!(target: "candle_ode", "field").in_scope(|| memory.add(bytes));
            memory.add(-bytes);
        }
    }
    drop(owned);
    recording.finish().unwrap()
}

fn complaint(path: &Path) -> String {
    match MemoryReport::load(path) {
        Err(OdeError::Format { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn saved_and_loaded_is_the_same() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory.json");
    let report = report(100);
    std::fs::write(&path, "an earlier file").unwrap();
    report.save(&path).unwrap();
    assert_eq!(MemoryReport::load(&path).unwrap(), report);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    assert_eq!(report.environment.settings["steps"], 3);
    assert_eq!(report.environment.candle_version, "0.11.1");
}

#[test]
fn steps_of_each_pass_have_their_peaks() {
    let _turn = alone();
    let report = report(100);
    let passes: Vec<_> = report.passes.iter().map(|pass| (pass.pass.as_str(), pass.complete, pass.peak)).collect();
    assert_eq!(passes, [("forward", true, 300), ("backward", true, 300)]);
    for pass in &report.passes {
        assert_eq!(pass.steps.iter().map(|step| step.index).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
        assert_eq!(pass.steps.iter().map(|step| step.peak).collect::<Vec<_>>(), [100, 200, 300]);
    }
    let names: Vec<_> = report.names.iter().map(|total| (total.name.as_str(), total.count, total.peak)).collect();
    assert_eq!(names, [("field", 6, 300), ("step", 6, 300), ("forward", 1, 300), ("backward", 1, 300)]);
    assert_eq!(report.owned(Category::Trajectory).unwrap().peak, 64);
}

#[test]
fn only_the_latest_spans_are_kept() {
    let _turn = alone();
    let report = report(8);
    assert_eq!((report.totals.spans, report.totals.spans_dropped, report.spans.len()), (14, 6, 8));
    let passes: Vec<_> = report.passes.iter().map(|pass| (pass.pass.as_str(), pass.complete)).collect();
    assert_eq!(passes, [("forward", false), ("backward", true)]);
    assert_eq!(report.names.iter().map(|total| total.count).sum::<u64>(), 14, "sums by name count all");
    assert_eq!(self::report(0).spans.len(), 0);
}

#[test]
fn a_bad_file_says_what_is_wrong_with_it() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory.json");
    report(100).save(&path).unwrap();
    let whole = std::fs::read_to_string(&path).unwrap();
    let complaint_of = |text: &str| {
        std::fs::write(&path, text).unwrap();
        complaint(&path)
    };

    for cut in [0, 5, 30, 60, whole.len() / 2, whole.len() - 3] {
        let reason = complaint_of(&whole[..cut]);
        assert!(reason.starts_with("is truncated"), "cut at {cut}: {reason}");
    }
    for foreign in ["hello", "[1, 2, 3]", "{\"epoch\": 3}", "{\"schema\":\"other/1\"}", "{\"epo", "\u{0}\u{1}"] {
        let reason = complaint_of(foreign);
        assert!(reason.starts_with("is not a memory report"), "{foreign:?}: {reason}");
    }
    let reason = complaint_of(&whole.replace(SCHEMA, "candle-ode/memory-report/99"));
    assert!(reason.starts_with("is of another schema version") && reason.contains("/99"), "{reason}");
    let reason = complaint_of(&whole.replace("\"counters\"", "\"hats\""));
    assert!(reason.starts_with("is a damaged") && reason.contains("counters"), "{reason}");
    let reason = complaint_of(&whole.replace("\"columns\":\"", "\"columns\":\"AAAA"));
    assert!(reason.starts_with("is a damaged") && reason.contains("the table of 14 spans is damaged"), "{reason}");
    let reason = complaint_of(&whole.replace("\"spans\":{", "\"spans\":?"));
    assert!(reason.starts_with("is a damaged") && reason.contains("line 1 column"), "{reason}");

    let missing = MemoryReport::load(folder.path().join("none.json")).unwrap_err();
    assert!(matches!(missing, OdeError::Io { .. }), "{missing}");
    let unwritable = report(1).save(folder.path().join("no/such/folder.json")).unwrap_err();
    assert!(matches!(unwritable, OdeError::Io { .. }), "{unwritable}");
}
