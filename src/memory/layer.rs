//! The `tracing` layer: turns span boundaries into readings and `bytes` events into ledger entries.
//!
//! It takes one lock per boundary and per `bytes` event, holds it while the meter is read, and calls nothing under it
//! that could come back here. It decides nothing for other layers: give those their own filters
//! ([`Layer::with_filter`](tracing_subscriber::Layer::with_filter)).

use super::feed::Sample;
use super::ledger::{Announced, Ledger};
use super::recorder::{Fields, Recorder};
use super::span;
use crate::account::{Category, TARGET};
use crate::error::{OdeError, Result};
use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

/// Gives every span it sees its time, its live bytes before and after, and its peak, and keeps a [`Ledger`].
///
/// [`MemoryProfiler::layer`](super::MemoryProfiler::layer) makes one. A span's window is the time from where it is
/// first entered to where it is last left; its peak is the process-wide maximum while it was entered. Spans on other
/// threads count into it, too. An allocation under way on another thread at a boundary may fall on either side.
#[derive(Clone)]
pub struct MemoryLayer {
    shared: Arc<Shared>,
}

/// Which spans and events are measured.
pub(super) type Filter = fn(&Metadata<'_>) -> bool;

/// What the layer and the recording both hold.
#[derive(Default)]
pub(super) struct Shared {
    recorder: Mutex<Option<Recorder>>,
    pub(super) ledger: Ledger,
    filter: RwLock<Option<Filter>>,
}

impl Shared {
    /// Changes the filter. `tracing` asks it once per place in the code, so those answers are asked for again.
    pub(super) fn choose(&self, filter: Filter) {
        *self.filter.write().unwrap_or_else(PoisonError::into_inner) = Some(filter);
        tracing::callsite::rebuild_interest_cache();
    }

    /// Whether the filter accepts it.
    pub(super) fn accepts(&self, metadata: &Metadata<'_>) -> bool {
        let filter = *self.filter.read().unwrap_or_else(PoisonError::into_inner);
        filter.is_some_and(|accepts| accepts(metadata))
    }

    /// Begins a recording, unless one is under way: then `None`.
    pub(super) fn begin(&self, start: impl FnOnce(&Ledger) -> Result<Recorder>) -> Result<Option<()>> {
        let mut recorder = self.recorder();
        if recorder.is_some() {
            return Ok(None);
        }
        self.ledger.restart();
        *recorder = Some(start(&self.ledger)?);
        Ok(Some(()))
    }

    /// Asks the recording under way.
    pub(super) fn read<R>(&self, ask: impl FnOnce(&mut Recorder, u32) -> Result<R>) -> Result<R> {
        let thread = thread_number();
        self.recorder().as_mut().map_or_else(|| Err(ended()), |recorder| ask(recorder, thread))
    }

    /// The recording under way as of its last boundary.
    pub(super) fn sample(&self) -> Option<Sample> {
        self.recorder().as_ref().map(Recorder::sample)
    }

    /// Takes the recorder out; from here on spans are ignored, and the ledger goes on counting.
    pub(super) fn end(&self) -> Result<Recorder> {
        self.recorder().take().ok_or_else(ended)
    }

    /// A panic elsewhere leaves the recorder usable: every change is complete in itself.
    fn recorder(&self) -> MutexGuard<'_, Option<Recorder>> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In the ledger, which goes on counting between recordings, and in the recording under way.
    fn announce(&self, announced: Announced) {
        let thread = thread_number();
        let mut recorder = self.recorder();
        self.ledger.record_announced(announced);
        if let Some(recorder) = recorder.as_mut() {
            recorder.announce(thread, announced);
        }
    }

    fn with(&self, act: impl FnOnce(&mut Recorder)) {
        if let Some(recorder) = self.recorder().as_mut() {
            act(recorder);
        }
    }
}

fn ended() -> OdeError {
    let reason = "the recording has ended".to_owned();
    OdeError::Meter { counter: "spans", reason, hint: "begin another with MemoryProfiler" }
}

impl MemoryLayer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// What is measured unless the user says otherwise: all of this crate, and spans of others from `DEBUG` up.
    pub(super) fn default_filter(metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target() == TARGET || metadata.target().starts_with("candle_ode::");
        ours || (metadata.is_span() && *metadata.level() <= Level::DEBUG)
    }
}

impl<S> Layer<S> for MemoryLayer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        // Looked up before the lock is taken: letting go of a span may close another, which calls `on_close`.
        let parent = context.span(id).and_then(|span| span.parent()).map(|parent| parent.id().into_u64());
        let metadata = attributes.metadata();
        self.shared.with(|recorder| {
            recorder.create(id.into_u64(), parent, metadata.target(), metadata.name(), fields);
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        self.shared.with(|recorder| recorder.fill(id.into_u64(), |fields| values.record(fields)));
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() != TARGET || event.metadata().name() != span::BYTES {
            return;
        }
        let mut bytes = Bytes { ledger: &self.shared.ledger, category: None, codec: None, delta: None };
        event.record(&mut bytes);
        match bytes {
            Bytes { category: Some(category), codec, delta: Some(delta), .. } => {
                self.shared.announce(Announced { category, codec, delta });
            }
            _ => self.shared.ledger.record_unknown(),
        }
    }

    fn on_enter(&self, id: &Id, _: Context<'_, S>) {
        let thread = thread_number();
        self.shared.with(|recorder| recorder.enter(id.into_u64(), thread));
    }

    fn on_exit(&self, id: &Id, _: Context<'_, S>) {
        let thread = thread_number();
        self.shared.with(|recorder| recorder.exit(id.into_u64(), thread));
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        self.shared.with(|recorder| recorder.close(id.into_u64()));
    }
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == span::INDEX {
            self.index = Some(value);
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        if let Ok(value) = u64::try_from(value) {
            self.record_u64(field, value);
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        match field.name() {
            span::T => self.t = Some(value),
            span::H => self.h = Some(value),
            _ => {}
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// The fields of a `bytes` event.
struct Bytes<'a> {
    ledger: &'a Ledger,
    category: Option<Category>,
    /// The number of its account.
    codec: Option<usize>,
    delta: Option<i64>,
}

impl Visit for Bytes<'_> {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == span::DELTA {
            self.delta = Some(value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            span::CATEGORY => self.category = Category::from_name(value),
            span::CODEC => self.codec = Some(self.ledger.number_of(value)),
            _ => {}
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// Numbers threads in the order in which they first enter a span; takes no memory.
pub(super) fn thread_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local! {
        static NUMBER: Cell<u32> = const { Cell::new(u32::MAX) };
    }
    NUMBER.with(|number| {
        if number.get() == u32::MAX {
            number.set(NEXT.fetch_add(1, Relaxed));
        }
        number.get()
    })
}
