//! Where the memory went: meters, a ledger, and a `tracing` layer that gives every span its peak.
//!
//! | part | says |
//! |---|---|
//! | [`Meter`]: [`HeapMeter`], [`ProcessMeter`], `CudaPoolMeter`, `CudaDeviceMeter` | live and peak bytes of one memory |
//! | [`Ledger`] | bytes this crate owns, by [`Category`](crate::account::Category), exact |
//! | [`Composition`] | what live bytes are made of, at the peak and over time ([`Timeline`]) |
//! | [`MemoryLayer`] | for every span its time, live bytes before and after, and peak |
//! | [`MemoryPlan`] | the bytes of a solve before it runs ([`Ode::plan`](crate::Ode::plan)) |
//! | [`MemoryProfiler`] | puts them together and hands out a [`MemoryReport`] |
//!
//! The rest of the crate knows nothing of this room: it opens the spans listed in [`span`] and emits `bytes` events,
//! which cost next to nothing while nobody listens.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_ode::memory::{MemoryProfiler, TrackingAllocator};
//!
//! // Binaries opt in to heap counting; a library never should.
//! #[global_allocator]
//! static HEAP: TrackingAllocator = TrackingAllocator::system();
//!
//! # fn main() -> candle_ode::Result<()> {
//! let device = Device::Cpu;
//! let profiler = MemoryProfiler::new(&device).install()?;
//! tracing::info_span!("my_step").in_scope(|| Tensor::zeros(1 << 16, DType::F32, &device))?;
//! let report = profiler.finish()?;
//! assert!(report.spans[0].peak - report.spans[0].live_before >= 4 << 16);
//! # Ok(())
//! # }
//! ```

mod books;
mod composition;
mod curve;
mod device;
mod feed;
mod file;
mod layer;
mod ledger;
mod meter;
pub(crate) mod plan;
mod profiler;
mod recorder;
mod recording;
mod report;
pub mod span;
mod span_table;

pub use composition::{Composition, Moment, Part, Timeline};
pub use curve::Curve;
pub use device::{CudaSettings, cuda_device, cuda_device_with};
pub use feed::FEED;
pub use layer::MemoryLayer;
pub use ledger::Ledger;
#[cfg(feature = "cuda")]
pub use meter::{CudaDeviceMeter, CudaPoolMeter};
pub use meter::{HeapMeter, Meter, ProcessMeter, Reading, TrackingAllocator, meter_for, probe_cuda};
pub use plan::{Choice, Choices, MemoryPlan};
pub use profiler::MemoryProfiler;
pub use recording::{Recording, Snapshot};
pub use report::{
    CategoryBytes, CodecBytes, Counter, Environment, MemoryReport, NameSummary, Page, PassReport, RunKind, SCHEMA,
    SpanReport, StepReport, Totals,
};
