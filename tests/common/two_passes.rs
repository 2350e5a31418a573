//! A report whose every byte is known: two passes of three steps, each of which needs 100 bytes more than the one
//! before.

use super::counted::Counted;
use candle_core::Device;
use candle_ode::account::Owned;
use candle_ode::memory::{MemoryProfiler, MemoryReport};

/// Keeps at most `span_limit` spans. Tests that call it take turns ([`alone`](super::counted::alone)).
pub(crate) fn report(span_limit: usize) -> MemoryReport {
    let memory = Counted::default();
    let profiler = MemoryProfiler::new(&Device::Cpu).meter(memory.clone()).span_limit(span_limit);
    let (recording, _guard) = profiler.set("solver", "rk4").set("steps", 3).install_scoped().unwrap();
    let owned = Owned::entry("bf16", 64);
    for pass in ["forward", "backward"] {
        let _pass = match pass {
            "forward" => tracing::debug_span!(target: "candle_ode", "forward"),
            _ => tracing::debug_span!(target: "candle_ode", "backward"),
        }
        .entered();
        for index in 0..3u64 {
            let t = index as f64 / 3.0;
            let _step = tracing::debug_span!(target: "candle_ode", "step", index, t, h = 1.0 / 3.0).entered();
            let bytes = 100 * (index as i64 + 1);
            tracing::trace_span!(target: "candle_ode", "field").in_scope(|| memory.add(bytes));
            memory.add(-bytes);
        }
    }
    drop(owned);
    recording.finish().unwrap()
}
