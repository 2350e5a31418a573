//! A span's peak is that of the whole process over its window, whoever allocates. Alone in its process, as is every
//! test that makes a dispatcher.

#[path = "common/counted.rs"]
mod counted;

use candle_ode::memory::MemoryProfiler;
use counted::Counted;
use std::thread::spawn;
use tracing::Dispatch;
use tracing::dispatcher::set_default;
use tracing_subscriber::layer::SubscriberExt;

#[test]
fn a_span_sees_what_other_threads_allocate_and_its_parent_is_the_one_given() {
    let memory = Counted::default();
    let (layer, recording) = MemoryProfiler::new(&candle_core::Device::Cpu).meter(memory.clone()).layer().unwrap();
    let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer));
    let _guard = set_default(&dispatch);
    let outer = tracing::info_span!("outer").entered();
    let other = (dispatch.clone(), memory.clone(), outer.id());
    spawn(move || {
        let (dispatch, memory, parent) = other;
        let _guard = set_default(&dispatch);
        tracing::info_span!(parent: parent, "inner").in_scope(|| memory.add(700));
        memory.add(-700);
    })
    .join()
    .unwrap();
    drop(outer);
    let report = recording.finish().unwrap();
    let [outer, inner] = &report.spans[..] else { panic!("{:?}", report.spans) };
    assert_eq!((outer.peak, outer.live_after, inner.peak, inner.live_after), (700, 0, 700, 700));
    assert_eq!(inner.parent, Some(outer.id));
    assert_ne!(inner.thread, outer.thread);
}
