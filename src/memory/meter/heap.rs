//! The heap: an allocator that counts, and the meter that reads its counters.
//!
//! The counters are process-wide relaxed atomics: two or three uncontended additions per allocation. They count what
//! the program asked for; what the allocator underneath adds for alignment and bookkeeping is not seen.

use super::{Meter, Reading};
use crate::error::{OdeError, Result};
use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static LIVE: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static LARGE: AtomicU64 = AtomicU64::new(0);

/// A global allocator that counts live bytes, their peak, and allocations, and leaves the work to another one.
///
/// ```
/// use candle_ode::memory::TrackingAllocator;
///
/// #[global_allocator]
/// static HEAP: TrackingAllocator = TrackingAllocator::system();
///
/// assert!(TrackingAllocator::is_installed());
/// let before = TrackingAllocator::live();
/// let buffer = vec![0u8; 1 << 20];
/// assert!(TrackingAllocator::live() >= before + (1 << 20));
/// drop(buffer);
/// assert!(TrackingAllocator::peak() >= before + (1 << 20));
/// ```
#[derive(Debug, Default)]
pub struct TrackingAllocator<A = System> {
    inner: A,
}

impl TrackingAllocator {
    /// Counts what goes through the system's allocator.
    pub const fn system() -> Self {
        Self::new(System)
    }

    /// Allocations of at least this many bytes are counted as large.
    pub const LARGE_BYTES: usize = 4096;

    /// Whether a `TrackingAllocator` is this program's global allocator.
    pub fn is_installed() -> bool {
        if ALLOCATIONS.load(Relaxed) == 0 {
            black_box(Box::new(0u8));
        }
        ALLOCATIONS.load(Relaxed) > 0
    }

    /// Bytes allocated and not yet given back, in the whole process.
    pub fn live() -> u64 {
        LIVE.load(Relaxed)
    }

    /// The most bytes live at once since the start, or since the last [`reset_peak`](Self::reset_peak).
    pub fn peak() -> u64 {
        PEAK.load(Relaxed).max(LIVE.load(Relaxed))
    }

    /// How many times memory was asked for since the start; growing or shrinking a buffer counts once.
    pub fn allocations() -> u64 {
        ALLOCATIONS.load(Relaxed)
    }

    /// As [`allocations`](Self::allocations), of at least [`LARGE_BYTES`](Self::LARGE_BYTES) bytes each.
    pub fn large_allocations() -> u64 {
        LARGE.load(Relaxed)
    }

    /// Starts the peak anew at what is live now.
    pub fn reset_peak() {
        mark();
    }
}

impl<A> TrackingAllocator<A> {
    /// Counts what goes through `inner`.
    pub const fn new(inner: A) -> Self {
        Self { inner }
    }
}

// SAFETY: every call goes to `inner` unchanged and its answer is returned unchanged; counting neither allocates,
// unwinds nor touches the memory.
unsafe impl<A: GlobalAlloc> GlobalAlloc for TrackingAllocator<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `inner`'s.
        let pointer = unsafe { self.inner.alloc(layout) };
        if !pointer.is_null() {
            count(layout.size());
            grow(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let pointer = unsafe { self.inner.alloc_zeroed(layout) };
        if !pointer.is_null() {
            count(layout.size());
            grow(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `inner` with this layout, since `alloc` returns what `inner` returned.
        unsafe { self.inner.dealloc(pointer, layout) };
        LIVE.fetch_sub(layout.size() as u64, Relaxed);
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; `new_size` is the caller's promise.
        let moved = unsafe { self.inner.realloc(pointer, layout, new_size) };
        if !moved.is_null() {
            count(new_size);
            match new_size.checked_sub(layout.size()) {
                Some(more) => grow(more),
                None => _ = LIVE.fetch_sub((layout.size() - new_size) as u64, Relaxed),
            }
        }
        moved
    }
}

fn count(size: usize) {
    ALLOCATIONS.fetch_add(1, Relaxed);
    if size >= TrackingAllocator::LARGE_BYTES {
        LARGE.fetch_add(1, Relaxed);
    }
}

fn grow(size: usize) {
    let live = LIVE.fetch_add(size as u64, Relaxed) + size as u64;
    // Most allocations are below the peak: a load is cheaper than a read-modify-write.
    if live > PEAK.load(Relaxed) {
        PEAK.fetch_max(live, Relaxed);
    }
}

/// Taking the peak out before re-basing it means that an allocation in flight falls into one window or the other,
/// never into neither.
fn mark() -> Reading {
    let peak = PEAK.swap(0, Relaxed);
    let live = LIVE.load(Relaxed);
    PEAK.fetch_max(live, Relaxed);
    Reading { live, peak: peak.max(live) }
}

/// What the heap gained while something ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// At most, above what was live before.
    pub(crate) most: usize,
    /// At the end.
    pub(crate) kept: usize,
}

/// Runs something and says what it held; zeros where nothing counts. Other threads count too. Whoever watches the peak
/// meanwhile loses nothing of it.
pub(crate) fn held<T>(run: impl FnOnce() -> Result<T>) -> Result<(T, Held)> {
    let before = mark();
    let done = run();
    let after = mark();
    PEAK.fetch_max(before.peak.max(after.peak), Relaxed);
    let above = |bytes: u64| bytes.saturating_sub(before.live) as usize;
    Ok((done?, Held { most: above(after.peak), kept: above(after.live) }))
}

/// Reads the heap of the whole process, as [`TrackingAllocator`] counts it.
#[derive(Clone, Copy, Debug)]
pub struct HeapMeter(());

impl HeapMeter {
    /// The heap's meter.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] if no [`TrackingAllocator`] is installed.
    pub fn new() -> Result<Self> {
        if TrackingAllocator::is_installed() {
            return Ok(Self(()));
        }
        Err(OdeError::Meter {
            counter: "heap",
            reason: "nothing counts this program's allocations".to_owned(),
            hint: "put `#[global_allocator] static HEAP: TrackingAllocator = TrackingAllocator::system();` in the binary",
        })
    }
}

impl Meter for HeapMeter {
    fn name(&self) -> &'static str {
        "heap"
    }

    fn live(&self) -> Result<u64> {
        Ok(TrackingAllocator::live())
    }

    fn peak(&self) -> Result<u64> {
        Ok(TrackingAllocator::peak())
    }

    fn reset_peak(&self) -> Result<()> {
        TrackingAllocator::reset_peak();
        Ok(())
    }

    fn mark(&self) -> Result<Reading> {
        Ok(mark())
    }
}
