//! A report survives the disk, keeps to its limit, and a bad file says what is wrong with it.

#[path = "common/counted.rs"]
mod counted;
#[path = "common/two_passes.rs"]
mod two_passes;

use candle_ode::OdeError;
use candle_ode::account::Category;
use candle_ode::memory::{MemoryReport, SCHEMA};
use counted::alone;
use std::path::Path;
use two_passes::report;

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
    assert_eq!(two_passes::report(0).spans.len(), 0);
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
