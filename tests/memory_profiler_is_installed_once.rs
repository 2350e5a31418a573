//! One recording at a time; another after it; and a foreign subscriber is an error that says what to do.

#[path = "common/heap.rs"]
mod heap;

use candle_core::Device;
use candle_ode::account::{Category, Owned};
use candle_ode::memory::MemoryProfiler;

#[test]
fn recordings_follow_each_other() {
    heap::settle();
    let first = MemoryProfiler::new(&Device::Cpu).install().unwrap();
    let under_way = MemoryProfiler::new(&Device::Cpu).install().unwrap_err().to_string();
    assert!(under_way.contains("another recording is under way"), "{under_way}");

    let owned = Owned::new(Category::Parameters, 100);
    std::thread::spawn(|| tracing::info_span!("elsewhere").in_scope(|| ())).join().unwrap();
    let report = first.finish().unwrap();
    assert_eq!(report.spans.len(), 1, "spans of all threads are seen");

    tracing::info_span!("between").in_scope(|| ());
    let second = MemoryProfiler::new(&Device::Cpu).filter(|_| false).install().unwrap();
    assert_eq!(second.ledger().live(Category::Parameters), 100, "the ledger went on counting");
    tracing::info_span!("filtered").in_scope(|| ());
    assert_eq!(second.finish().unwrap().spans.len(), 0, "the second filter holds");

    let third = MemoryProfiler::new(&Device::Cpu).install().unwrap();
    drop(owned);
    assert_eq!(third.ledger().live(Category::Parameters), 0);
    tracing::info_span!("measured").in_scope(|| ());
    assert_eq!(third.finish().unwrap().spans.len(), 1);
}
