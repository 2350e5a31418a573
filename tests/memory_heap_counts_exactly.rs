//! The tracking allocator counts live bytes, peak and allocations to the byte, on one thread and on several.

#[path = "common/heap.rs"]
mod heap;

use candle_ode::memory::{HeapMeter, Meter, TrackingAllocator as Heap};
use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, realloc};
use std::hint::black_box;

fn counters() -> (u64, u64, u64, u64) {
    (Heap::live(), Heap::peak(), Heap::allocations(), Heap::large_allocations())
}

#[test]
fn live_peak_and_counts_are_exact() {
    assert!(Heap::is_installed());
    let meter = HeapMeter::new().unwrap();
    heap::settle();
    meter.reset_peak().unwrap();
    let (live, peak, count, large) = counters();
    assert_eq!(peak, live, "a reset re-bases the peak on what is live");

    let small = Layout::from_size_align(100, 8).unwrap();
    let big = Layout::from_size_align(4096, 64).unwrap();
    // SAFETY: the layouts are not empty, and each block is used and freed with the layout it has.
    unsafe {
        let a = black_box(alloc(small));
        let b = black_box(alloc_zeroed(big));
        assert_eq!(counters(), (live + 4196, live + 4196, count + 2, large + 1));

        let a = black_box(realloc(a, small, 5000));
        assert_eq!(counters(), (live + 9096, live + 9096, count + 3, large + 2), "growing adds the difference");
        let a = black_box(realloc(a, Layout::from_size_align(5000, 8).unwrap(), 40));
        assert_eq!(counters(), (live + 4136, live + 9096, count + 4, large + 2), "shrinking keeps the peak");

        Heap::reset_peak();
        assert_eq!(counters(), (live + 4136, live + 4136, count + 4, large + 2));
        dealloc(b, big);
        assert_eq!(counters(), (live + 40, live + 4136, count + 4, large + 2));
        let reading = meter.mark().unwrap();
        assert_eq!((reading.live, reading.peak), (live + 40, live + 4136), "a mark closes the window");
        assert_eq!((meter.live().unwrap(), meter.peak().unwrap()), (live + 40, live + 40), "and begins the next");
        dealloc(a, Layout::from_size_align(40, 8).unwrap());
    }
    assert_eq!(Heap::live(), live);

    // Four threads at once: what each gives back is gone, and the counts add up.
    let rounds = 10_000;
    let before = Heap::live();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..rounds).for_each(|i| drop(black_box(vec![0u8; 1 + i % 200]))));
        }
    });
    heap::settle();
    let (live, _, after, _) = counters();
    assert!(after >= count + 4 + 4 * rounds as u64);
    // Threads leave a little of the standard library's own behind, at most once.
    assert!(live.abs_diff(before) < 4096, "{before} bytes before, {live} after");
}
