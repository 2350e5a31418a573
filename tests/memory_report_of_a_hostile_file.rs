//! What a small file says is read whole, in little memory. Alone in its process: the counter is process-wide.

#[path = "common/counted.rs"]
mod counted;
#[path = "common/two_passes.rs"]
mod two_passes;

use candle_ode::memory::{MemoryReport, SpanReport, TrackingAllocator};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// A file of `count` spans like one of a step; each is inside the one before.
fn file(count: u64) -> String {
    let mut report = two_passes::report(100);
    let step = report.spans.iter().find(|span| *span.name == *"step").unwrap().clone();
    let nested = |id: u64| SpanReport { id, parent: id.checked_sub(1), start_ns: id, ..step.clone() };
    report.spans = (0..count).map(nested).collect();
    report.json()
}

#[test]
fn nested_spans_are_read_and_long_names_cost_no_memory() {
    // Where each of them looks for its pass among those around it, this takes a minute.
    let text = file(60_000);
    let report = MemoryReport::parse(text.as_bytes(), "nested.json").unwrap();
    println!("{} bytes: {} passes", text.len(), report.passes.len());
    assert_eq!(report.spans.len(), 60_000);
    drop(report);

    let long = "a".repeat(20_000);
    let text = file(60_000).replace("[\"candle_ode\",\"step\"]", &format!("[\"candle_ode\",\"{long}\"]"));
    let before = TrackingAllocator::live();
    TrackingAllocator::reset_peak();
    let report = MemoryReport::parse(text.as_bytes(), "long.json").unwrap();
    let peak = TrackingAllocator::peak() - before;
    println!("{} bytes: {peak} to read", text.len());
    assert!(*report.spans[59_999].name == *long && peak < 64 << 20, "{peak}");
}
