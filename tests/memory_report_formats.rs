//! A report in each of its formats says the same.

#[path = "common/counted.rs"]
mod counted;
#[path = "common/two_passes.rs"]
mod two_passes;

use candle_ode::memory::{Curve, MemoryReport};
use counted::alone;
use serde_json::{Value, json};
use two_passes::report;

#[test]
fn csv_has_a_line_for_every_step() {
    let _turn = alone();
    let report = report(100);
    let text = report.csv();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let head = reader.headers().unwrap().clone();
    let rows: Vec<_> = reader.records().map(Result::unwrap).collect();
    let column = |name: &str| {
        let at = head.iter().position(|column| column == name).unwrap();
        rows.iter().map(|row| row[at].to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(column("pass"), ["forward", "forward", "forward", "backward", "backward", "backward"]);
    assert_eq!(column("index"), ["0", "1", "2", "0", "1", "2"]);
    assert_eq!(column("peak"), ["100", "200", "300", "100", "200", "300"]);
    assert_eq!(column("peak_above_baseline"), column("peak"), "the baseline is 0");
    assert_eq!(column("t")[1].parse::<f64>().unwrap(), 1.0 / 3.0);
    let times: Vec<u64> = column("duration_ns").iter().map(|time| time.parse().unwrap()).collect();
    let steps = report.passes.iter().flat_map(|pass| &pass.steps);
    assert_eq!(times, steps.map(|step| step.duration_ns).collect::<Vec<_>>());
}

#[test]
fn trace_has_every_span_and_a_track_for_every_counter() {
    let _turn = alone();
    let mut report = report(100);
    // Longer recordings sample the counters beside the first.
    let process = report.counters.iter_mut().find(|counter| counter.name == "process").unwrap();
    process.curve = Curve { time_ns: vec![1000, 2000], live: vec![77, 88] };
    let trace: Value = serde_json::from_str(&report.chrome_trace()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |phase: &'static str| events.iter().filter(move |event| event["ph"] == phase);
    assert_eq!(of("X").count(), report.spans.len());
    for (event, span) in of("X").zip(&report.spans) {
        assert_eq!((event["name"].as_str(), event["cat"].as_str()), (Some(&*span.name), Some(&*span.target)));
        assert_eq!(
            (event["ts"].as_f64(), event["dur"].as_f64()),
            (Some(span.start_ns as f64 / 1e3), Some(span.duration_ns as f64 / 1e3))
        );
        assert_eq!((event["args"]["peak"].as_u64(), event["args"]["index"].as_u64()), (Some(span.peak), span.index));
    }
    let first = &report.counters[0];
    assert!(report.counters.len() >= 2);
    let bytes =
        |name: &'static str| of("C").filter(move |event| event["name"] == name).map(|event| &event["args"]["bytes"]);
    let process: Vec<_> = bytes("process").collect();
    assert_eq!((process.len(), process[1], process[2]), (4, &json!(77), &json!(88)), "its start, its curve, its end");
    for counter in &report.counters {
        let track: Vec<_> = of("C").filter(|event| event["name"] == *counter.name).collect();
        assert!(track.len() >= 2, "{}", counter.name);
        assert!(track.is_sorted_by_key(|event| (event["ts"].as_f64().unwrap() * 1e3) as u64), "{}", counter.name);
    }
    let highest =
        of("C").filter(|event| event["name"] == *first.name).map(|event| event["args"]["bytes"].as_u64().unwrap());
    assert_eq!(highest.max(), Some(first.peak));
    // What live bytes are made of sums to what they are.
    let parts = of("C").filter(|event| event["name"] == "live bytes by kind");
    let sums: Vec<i64> =
        parts.map(|event| event["args"].as_object().unwrap().values().map(|n| n.as_i64().unwrap()).sum()).collect();
    assert_eq!(sums.into_iter().max(), Some(first.peak as i64));
    let codecs = of("C").filter(|event| event["name"] == "trajectory by codec");
    assert_eq!(codecs.filter_map(|event| event["args"]["bf16"].as_i64()).max(), Some(64));
}

#[test]
fn a_kind_that_is_gone_is_nothing_in_the_trace() {
    let _turn = alone();
    let mut report = report(100);
    let bytes = json!({ "trajectory": [0, 64, 0], "field": [0, 7, 7] });
    report.timeline = serde_json::from_value(json!({ "time_ns": [1, 2, 3], "bytes": bytes })).unwrap();
    let trace: Value = serde_json::from_str(&report.chrome_trace()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let kinds = events.iter().filter(|event| event["name"] == "live bytes by kind").map(|event| &event["args"]);
    // A viewer goes on with a value that an event leaves out; kinds that never are stay out.
    let expected =
        [(0, 0), (64, 7), (0, 7)].map(|(trajectory, field)| json!({ "trajectory": trajectory, "field": field }));
    assert_eq!(kinds.collect::<Vec<_>>(), expected.iter().collect::<Vec<_>>());
}

#[test]
fn ledger_tells_categories_and_codecs() {
    let _turn = alone();
    let report = report(100);
    let codec = &report.trajectory[0];
    assert_eq!((codec.codec.as_str(), codec.live, codec.peak, codec.at_peak), ("bf16", 0, 64, 64));
    assert_eq!(codec.over_time.len(), report.timeline.0.len());
    let text = report.ledger_csv();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let rows: Vec<_> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.iter().position(|row| row == ["trajectory", "0", "64", "64"][..]), Some(2));
    assert_eq!(rows.iter().position(|row| row == ["trajectory/bf16", "0", "64", "64"][..]), Some(3));
    assert_eq!(rows.len(), report.owned.len() + 1);
}

#[test]
fn page_fetches_nothing_and_holds_the_report() {
    let _turn = alone();
    let mut report = report(100);
    let nasty = "</script><script>alert(1)</script><!--";
    report.environment.settings.insert("note".to_owned(), nasty.into());
    let page = report.html();
    assert!(!page.contains(nasty) && page.matches("</script>").count() == 2);
    for fetching in ["http://", "https://", "src=", "@import", "url(", "fetch(", "XMLHttpRequest"] {
        assert!(!page.contains(fetching), "{fetching}");
    }
    let (_, rest) = page.split_once("id=\"data\">").unwrap();
    let (data, _) = rest.split_once("</script>").unwrap();
    assert_eq!(MemoryReport::parse(data.as_bytes(), "page").unwrap(), report);
}

#[test]
fn all_formats_are_written_into_one_folder() {
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("new/cell");
    let report = report(100);
    report.save_all(&place).unwrap();
    assert_eq!(MemoryReport::load(place.join("report.json")).unwrap(), report);
    let text = |name: &str| std::fs::read_to_string(place.join(name)).unwrap();
    assert_eq!((text("report.csv"), text("trace.json")), (report.csv(), report.chrome_trace()));
    assert_eq!((text("report.html"), text("ledger.csv")), (report.html(), report.ledger_csv()));
    assert_eq!(std::fs::read_dir(&place).unwrap().count(), 5);
}
