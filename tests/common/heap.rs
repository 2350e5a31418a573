//! A counted heap for tests that assert process-wide figures. Such a test is alone in its file: the counters see all
//! threads of the process.

use candle_ode::memory::TrackingAllocator;
use std::time::Duration;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// Waits until nothing else in the process allocates: the test harness's main thread still does when a test begins.
pub(crate) fn settle() {
    let mut seen = u64::MAX;
    while seen != TrackingAllocator::allocations() {
        seen = TrackingAllocator::allocations();
        std::thread::sleep(Duration::from_millis(30));
    }
}
