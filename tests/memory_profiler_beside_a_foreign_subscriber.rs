//! Where the program has its own subscriber, installing says so and leaves it alone.

#[path = "common/heap.rs"]
mod heap;

use candle_core::Device;
use candle_ode::memory::MemoryProfiler;

#[test]
fn a_foreign_subscriber_is_an_error() {
    heap::settle();
    tracing::subscriber::set_global_default(tracing_subscriber::registry()).unwrap();
    for _ in 0..2 {
        let message = MemoryProfiler::new(&Device::Cpu).install().unwrap_err().to_string();
        assert!(message.contains("MemoryProfiler::layer()"), "{message}");
    }
    let (_layer, recording) = MemoryProfiler::new(&Device::Cpu).layer::<tracing_subscriber::Registry>().unwrap();
    drop(recording);
}
