//! On the real heap, nested spans get their own peaks to the byte, and the recording itself leaves no trace in them.

#[path = "common/heap.rs"]
mod heap;

use candle_core::{DType, Device, Tensor};
use candle_ode::memory::{MemoryProfiler, TrackingAllocator};
use std::hint::black_box;

const MIB: u64 = 1 << 20;

fn work() {
    let _step = tracing::debug_span!(target: "candle_ode", "step", index = 0u64, t = 0.0, h = 0.5).entered();
    let kept = black_box(vec![0u8; MIB as usize]);
    {
        let _stage = tracing::trace_span!(target: "candle_ode", "stage", index = 0u64).entered();
        drop(black_box(vec![0u8; 3 * MIB as usize]));
    }
    drop(kept);
    let _stage = tracing::trace_span!(target: "candle_ode", "stage", index = 1u64).entered();
    drop(black_box(vec![0u8; 2 * MIB as usize]));
}

#[test]
fn spans_on_the_heap_are_exact() {
    heap::settle();
    let (recording, guard) = MemoryProfiler::new(&Device::Cpu).install_scoped().unwrap();
    // The subscriber's own first spans take their room for good.
    work();
    let (before, count) = (TrackingAllocator::live(), TrackingAllocator::allocations());
    work();
    assert_eq!(TrackingAllocator::live(), before, "spans leave nothing behind");
    assert_eq!(TrackingAllocator::allocations(), count + 3, "and nothing but the work allocates");

    recording.reset_peak().unwrap();
    let tensor = Tensor::zeros(1 << 18, DType::F32, &Device::Cpu).unwrap();
    drop(tensor);
    let snapshot = recording.snapshot().unwrap();
    assert!((MIB..MIB + 1024).contains(&(snapshot.peak - snapshot.live)), "{snapshot:?}");
    drop(guard);

    let report = recording.finish().unwrap();
    let [_, _, _, step, first, second] = &report.spans[..] else { panic!("{:?}", report.spans) };
    assert_eq!((&*step.name, step.index, step.t, step.h), ("step", Some(0), Some(0.0), Some(0.5)));
    assert_eq!(step.peak - step.live_before, 4 * MIB);
    assert_eq!(first.peak - first.live_before, 3 * MIB);
    assert_eq!(second.peak - second.live_before, 2 * MIB);
    assert_eq!((step.live_after, first.live_after), (step.live_before, first.live_before));
    assert_eq!((first.parent, second.parent), (Some(step.id), Some(step.id)));
    assert!(step.duration_ns >= first.duration_ns + second.duration_ns);
    assert_eq!(report.counter().unwrap().name, "heap");
    assert!(report.peak() - report.baseline() >= 4 * MIB);
}
