//! The profiler: a meter and the layer put together, and a recording begun.

use super::curve::Curves;
use super::feed::Feed;
use super::layer::{Filter, MemoryLayer, Shared};
use super::meter::{HeapMeter, Meter, ProcessMeter, TrackingAllocator, meter_for};
use super::recorder::Recorder;
use super::recording::{Claim, Recording, under_way};
use super::report::{Environment, RunKind};
use crate::error::{OdeError, Result};
use candle_core::Device;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::subscriber::DefaultGuard;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// Sets up a recording of where the memory goes.
///
/// Defaults: the meter of the device ([`meter_for`]), the latest 20 000 spans, and all spans of this crate plus those
/// of others from `DEBUG` up (so that a whole training loop can be measured).
///
/// Beside another layer:
///
/// ```
/// use candle_core::Device;
/// use candle_ode::memory::{MemoryProfiler, TrackingAllocator};
/// use tracing_subscriber::layer::SubscriberExt;
///
/// #[global_allocator]
/// static HEAP: TrackingAllocator = TrackingAllocator::system();
///
/// # fn main() -> candle_ode::Result<()> {
/// let (layer, recording) = MemoryProfiler::new(&Device::Cpu).set("batch", 64).layer()?;
/// let subscriber = tracing_subscriber::registry().with(layer); // .with(fmt::layer().with_filter(..)) …
/// tracing::subscriber::with_default(subscriber, || tracing::info_span!("epoch").in_scope(|| vec![0u8; 1000]));
/// let report = recording.finish()?;
/// assert_eq!(&*report.spans[0].name, "epoch");
/// assert_eq!(report.environment.settings["batch"], 64);
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is measured before `install`, `install_scoped` or `layer`"]
pub struct MemoryProfiler {
    device: Device,
    meter: Option<Box<dyn Meter>>,
    run: RunKind,
    span_limit: usize,
    filter: Filter,
    settings: BTreeMap<String, Value>,
}

impl MemoryProfiler {
    /// For tensors on `device`.
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            meter: None,
            run: RunKind::Memory,
            span_limit: 20_000,
            filter: MemoryLayer::default_filter,
            settings: BTreeMap::new(),
        }
    }

    /// Reads this meter instead of the device's.
    pub fn meter(mut self, meter: impl Meter + 'static) -> Self {
        self.meter = Some(Box::new(meter));
        self
    }

    /// Measures time: no counter that waits for the device is read at the boundaries of spans, whose bytes are then
    /// those of the heap, or of the process where nothing counts the heap. The report says that it was such a run.
    pub fn timing(mut self) -> Self {
        self.run = RunKind::Timing;
        self
    }

    /// Keeps the latest `limit` closed spans; older ones are dropped, counted, and stay in the sums by name.
    ///
    /// Their room, about 150 bytes a span, is taken when recording begins and is part of the baseline.
    pub fn span_limit(mut self, limit: usize) -> Self {
        self.span_limit = limit;
        self
    }

    /// Measures the spans that `filter` accepts. It must accept this crate's (target
    /// [`account::TARGET`](crate::account::TARGET)) events too, or the ledger stays empty.
    pub fn filter(mut self, filter: fn(&Metadata<'_>) -> bool) -> Self {
        self.filter = filter;
        self
    }

    /// Writes a setting (`solver`, `precision`, `schedule`, `tile` …) into the report.
    pub fn set(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.settings.insert(name.to_owned(), value.into());
        self
    }

    /// Begins recording on all threads, as the program's global `tracing` subscriber.
    ///
    /// After [`finish`](Recording::finish) another profiler may be installed; the ledger goes on counting in between.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] if memory cannot be read (see [`meter_for`]), if another recording is under way, or if the
    /// program has set another global subscriber: then add [`layer`](Self::layer) to that one.
    pub fn install(self) -> Result<Recording> {
        static INSTALLED: Mutex<Option<Arc<Shared>>> = Mutex::new(None);
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = &*installed {
            return self.begin(shared.clone());
        }
        let shared = Arc::<Shared>::default();
        let recording = self.begin(shared.clone())?;
        let subscriber = tracing_subscriber::registry().with(filtered(&shared));
        tracing::subscriber::set_global_default(subscriber).map_err(|_| OdeError::Meter {
            counter: "spans",
            reason: "the program has already set a global tracing subscriber".to_owned(),
            hint: "add the layer of MemoryProfiler::layer() to that subscriber",
        })?;
        *installed = Some(shared);
        Ok(recording)
    }

    /// Begins recording on this thread only, until the guard is dropped: for tests.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] if memory cannot be read, or if another recording is under way.
    pub fn install_scoped(self) -> Result<(Recording, DefaultGuard)> {
        let (layer, recording) = self.layer()?;
        Ok((recording, tracing::subscriber::set_default(tracing_subscriber::registry().with(layer))))
    }

    /// Begins recording, and hands out the layer to add to a subscriber of one's own.
    ///
    /// # Errors
    ///
    /// As [`install_scoped`](Self::install_scoped).
    pub fn layer<S>(self) -> Result<(impl Layer<S> + Send + Sync + 'static + use<S>, Recording)>
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync + 'static,
    {
        let shared = Arc::<Shared>::default();
        let recording = self.begin(shared.clone())?;
        Ok((filtered(&shared), recording))
    }

    fn begin(self, shared: Arc<Shared>) -> Result<Recording> {
        let claim = match self.meter {
            Some(_) => None,
            None => Some(Claim::take()?),
        };
        let meter = match (self.meter, self.run) {
            (Some(meter), _) => meter,
            (None, RunKind::Memory) => meter_for(&self.device)?,
            (None, RunKind::Timing) => host_meter()?,
        };
        if self.run == RunKind::Timing && meter.synchronises() {
            let reason = "a reading waits for the device, which a timing run must not do".to_owned();
            let hint = "leave out .timing() to measure memory, or .meter(..) to measure time";
            return Err(OdeError::Meter { counter: meter.name(), reason, hint });
        }
        let others = other_meters(&self.device, meter.name())?;
        let curves = Curves::new(others, self.run == RunKind::Timing);
        let environment = Environment::of(&self.device, self.settings);
        shared.choose(self.filter);
        let feed = Feed::open(&shared, meter.name())?;
        shared.begin(|ledger| Recorder::start(meter, curves, self.span_limit, ledger))?.ok_or_else(under_way)?;
        Ok(Recording { shared, run: self.run, environment, feed, _claim: claim })
    }
}

impl fmt::Debug for MemoryProfiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, span_limit, settings, .. } = self;
        write!(f, "MemoryProfiler({:?}, span_limit {span_limit}, {settings:?})", device.location())
    }
}

/// The layer, kept from seeing what the recording's filter rejects, at no cost to other layers.
fn filtered<S>(shared: &Arc<Shared>) -> impl Layer<S> + Send + Sync + 'static + use<S>
where
    S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync + 'static,
{
    let asked = shared.clone();
    MemoryLayer::new(shared.clone()).with_filter(filter_fn(move |metadata| asked.accepts(metadata)))
}

/// What can be read without waiting for a device.
fn host_meter() -> Result<Box<dyn Meter>> {
    if TrackingAllocator::is_installed() {
        return Ok(Box::new(HeapMeter::new()?));
    }
    Ok(Box::new(ProcessMeter::new()?))
}

/// Counters beside the one that the spans are measured with, and where they stood at the start.
fn other_meters(device: &Device, first: &str) -> Result<Vec<(Box<dyn Meter>, u64)>> {
    let mut meters: Vec<Box<dyn Meter>> = Vec::new();
    #[cfg(feature = "cuda")]
    if matches!(device, Device::Cuda(_)) {
        meters.push(Box::new(super::CudaPoolMeter::used(device)?));
        meters.push(Box::new(super::CudaPoolMeter::reserved(device)?));
        meters.push(Box::new(super::CudaDeviceMeter::new(device)?));
    }
    let _ = device;
    if TrackingAllocator::is_installed() {
        meters.push(Box::new(HeapMeter::new()?));
    }
    // Not every system tells; nobody asked for it.
    if let Ok(process) = ProcessMeter::new() {
        meters.push(Box::new(process));
    }
    meters.retain(|meter| meter.name() != first);
    meters.into_iter().map(|meter| meter.mark().map(|reading| (meter, reading.live))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Ledger, MemoryReport};
    use super::*;

    #[test]
    fn what_users_hold_crosses_threads() {
        fn crosses<T: Send + Sync>() {}
        crosses::<MemoryProfiler>();
        crosses::<Recording>();
        crosses::<MemoryLayer>();
        crosses::<MemoryReport>();
        crosses::<Ledger>();
    }
}
