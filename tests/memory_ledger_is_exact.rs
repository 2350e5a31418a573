//! Owned bytes are counted exactly from `bytes` events, on several threads too.

#[path = "common/counted.rs"]
mod counted;

use candle_core::Device;
use candle_ode::account::{Category, Owned};
use candle_ode::memory::{MemoryProfiler, Recording};
use counted::{Counted, alone};
use tracing::Dispatch;
use tracing::dispatcher::with_default;
use tracing_subscriber::layer::SubscriberExt;

fn recording() -> (Dispatch, Recording) {
    let memory = Counted::default();
    memory.add(5);
    let (layer, recording) = MemoryProfiler::new(&Device::Cpu).meter(memory).layer().unwrap();
    (Dispatch::new(tracing_subscriber::registry().with(layer)), recording)
}

#[test]
fn bytes_are_live_while_their_owner_lives() {
    let _turn = alone();
    let (dispatch, recording) = recording();
    let ledger = recording.ledger();
    with_default(&dispatch, || {
        let first = Owned::new(Category::Trajectory, 1000);
        let second = Owned::new(Category::Trajectory, 24);
        let other = Owned::new(Category::Gradients, 8);
        assert_eq!((ledger.live(Category::Trajectory), ledger.live(Category::Gradients)), (1024, 8));
        drop(first);
        assert_eq!((ledger.live(Category::Trajectory), ledger.peak(Category::Trajectory)), (24, 1024));
        assert_eq!((ledger.live_total(), ledger.peak_total()), (32, 1032));
        recording.reset_peak().unwrap();
        assert_eq!(ledger.peak_total(), 32);
        assert_eq!(recording.snapshot().unwrap().live, 5, "the meter is another counter");
        drop((second, other));
    });
    ledger.check().unwrap();
    let report = recording.finish().unwrap();
    let trajectory = report.owned(Category::Trajectory).unwrap();
    assert_eq!((trajectory.live, trajectory.peak), (0, 1024), "the report's peak is that of the whole recording");
    assert_eq!((report.totals.owned_live, report.totals.owned_peak), (0, 1032));
}

#[test]
fn four_threads_add_up() {
    let _turn = alone();
    let (dispatch, recording) = recording();
    let _casts: Vec<Owned> = std::thread::scope(|scope| {
        let work = |thread: usize| {
            let kept: Vec<_> = (0..500).map(|i| Owned::new(Category::Stages, i + thread)).collect();
            drop(kept);
            Owned::new(Category::Casts, 1 + thread)
        };
        let threads: Vec<_> = (0..4)
            .map(|thread| (thread, dispatch.clone()))
            .map(|(thread, dispatch)| scope.spawn(move || with_default(&dispatch, || work(thread))))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let ledger = recording.ledger();
    assert_eq!((ledger.live(Category::Stages), ledger.live(Category::Casts)), (0, 10));
    let one: u64 = (0..500).sum();
    assert!((one..=4 * one + 6 * 500).contains(&ledger.peak(Category::Stages)));
    assert_eq!(ledger.peak(Category::Casts), 10);
    ledger.check().unwrap();
}

#[test]
fn what_was_announced_before_the_recording_is_known() {
    let _turn = alone();
    let (kept, entry) = (Owned::new(Category::Optimizer, 70), Owned::entry("f16", 30));
    let (dispatch, recording) = recording();
    let ledger = recording.ledger();
    assert_eq!((ledger.live(Category::Optimizer), ledger.live(Category::Trajectory)), (70, 30));
    assert_eq!((ledger.live_total(), ledger.peak_total()), (100, 100));
    with_default(&dispatch, || drop((kept, entry)));
    assert_eq!((ledger.live_total(), ledger.peak_total()), (0, 100));
    ledger.check().unwrap();
    let report = recording.finish().unwrap();
    assert_eq!(
        report.trajectory.iter().map(|codec| (codec.codec.as_str(), codec.peak)).collect::<Vec<_>>(),
        [("f16", 30)]
    );
}

#[test]
fn an_event_that_names_no_category_is_found() {
    let _turn = alone();
    let (dispatch, recording) = recording();
    with_default(&dispatch, || {
        tracing::event!(name: "bytes", target: "candle_ode", tracing::Level::TRACE, category = "hats", delta = 4i64);
    });
    let message = recording.ledger().check().unwrap_err().to_string();
    assert!(message.contains("no known category"), "{message}");
}
