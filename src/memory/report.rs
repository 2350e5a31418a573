//! What a recording found, as data that is saved, loaded and compared.
//!
//! Bytes are the meter's own readings; subtract the baseline for what the recording added. Times are nanoseconds since
//! recording began. Owned bytes come from the ledger and are exact.

mod chrome;
mod csv;
mod html;

pub use html::Page;

use super::books::Seen;
use super::composition::{Moment, Timeline};
use super::curve::Curve;
use super::ledger::Ledger;
use super::recorder::{Finished, NameTotal, Record};
use super::{span, span_table};
use crate::account::{Category, TARGET};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Name and version of the file format. A file of another version is not read.
pub const SCHEMA: &str = "candle-ode/memory-report/3";

/// Version of Candle this crate is built on.
const CANDLE_VERSION: &str = "0.11.1";

/// Where the memory went during a recording.
///
/// `schema` comes first in the file: that is how a truncated report is told from a foreign file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// What ran, and where.
    pub environment: Environment,
    /// Whether memory or time was to be measured.
    pub run: RunKind,
    /// The counters that were read. The spans' bytes are those of the first.
    pub counters: Vec<Counter>,
    /// The recording as a whole.
    pub totals: Totals,
    /// Owned bytes by category: live at the end, and peak over the recording.
    pub owned: Vec<CategoryBytes>,
    /// Of the trajectory, the bytes of each codec: they sum to the trajectory's.
    pub trajectory: Vec<CodecBytes>,
    /// The first counter's live bytes when they were highest, and what they were made of.
    pub at_peak: Moment,
    /// The first counter's live bytes over time, and what they were made of.
    pub timeline: Timeline,
    /// All closed spans summed by target and name, dropped ones included.
    pub names: Vec<NameSummary>,
    /// The passes of the kept spans with their steps, in order of time. Left out of files: they are made of the spans.
    #[serde(skip)]
    pub passes: Vec<PassReport>,
    /// The kept spans, in order of time. In a file they are a packed table of about ten bytes a span.
    #[serde(with = "span_table")]
    pub spans: Vec<SpanReport>,
}

/// What a recording was for. Reading the memory of a device waits for it, so that one run cannot measure both well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunKind {
    /// Every span has the bytes of the device's own counter; if a [`Counter`] synchronises, the times say little.
    #[default]
    Memory,
    /// No counter was read that waits for the device: the spans' bytes are those of the host.
    Timing,
}

/// What ran, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of this crate.
    pub crate_version: String,
    /// Version of Candle.
    pub candle_version: String,
    /// The device in words.
    pub device: String,
    /// What the caller said of the run: dtypes, solver, schedule, tile …
    pub settings: BTreeMap<String, Value>,
}

/// One counter over the recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// Its name, such as `heap`.
    pub name: String,
    /// Bytes live when recording began.
    pub baseline: u64,
    /// Bytes live when it ended.
    pub live: u64,
    /// The most bytes live at once in between.
    pub peak: u64,
    /// Whether reading it waited for the device: then the times say little about speed.
    pub synchronises: bool,
    /// Live bytes over time, sampled. Empty for the first counter, whose curve is the [`Timeline`].
    pub curve: Curve,
}

/// The recording as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
    /// Owned bytes live at the end, all categories.
    pub owned_live: u64,
    /// The most owned bytes live at once, all categories together.
    pub owned_peak: u64,
    /// Spans that were measured.
    pub spans: u64,
    /// Of these, how many were dropped to keep to the limit (the oldest).
    pub spans_dropped: u64,
    /// From when on no span was dropped, in nanoseconds: passes that began earlier may lack steps.
    pub complete_from_ns: u64,
}

/// Owned bytes of one category.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CategoryBytes {
    /// [`Category::name`].
    pub category: String,
    /// Bytes live.
    pub live: u64,
    /// The most bytes live at once.
    pub peak: u64,
}

/// Bytes of the trajectory that one codec keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecBytes {
    /// [`Codec::name`](crate::Codec::name).
    pub codec: String,
    /// Bytes live.
    pub live: u64,
    /// The most bytes live at once.
    pub peak: u64,
    /// Bytes live at the moment of [`MemoryReport::at_peak`].
    pub at_peak: i64,
    /// Bytes live at each moment of [`MemoryReport::timeline`].
    pub over_time: Vec<i64>,
}

/// All spans of one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameSummary {
    /// Where the spans come from: `candle_ode`, or a module of the user's.
    pub target: String,
    /// Their name.
    pub name: String,
    /// How many.
    pub count: u64,
    /// Their time together, in nanoseconds; spans on several threads add up.
    pub time_ns: u64,
    /// The highest of their peaks.
    pub peak: u64,
}

/// One pass and its steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PassReport {
    /// `forward` or `backward`.
    pub pass: String,
    /// The pass's own span.
    pub span: u64,
    /// Whether all of its steps are here, and not some dropped to keep to the limit.
    pub complete: bool,
    /// Peak over the pass.
    pub peak: u64,
    /// Its steps, in order of time.
    pub steps: Vec<StepReport>,
}

/// One step of a pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Which one, from 0 in forward direction.
    pub index: Option<u64>,
    /// Model time at which it starts.
    pub t: Option<f64>,
    /// Its size in model time.
    pub h: Option<f64>,
    /// Peak over the step.
    pub peak: u64,
    /// Live bytes before it.
    pub live_before: u64,
    /// Live bytes after it.
    pub live_after: u64,
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
}

/// One span.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpanReport {
    /// Number in order of creation.
    pub id: u64,
    /// The span around it, if measured; that one may have been dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<u64>,
    /// Where it comes from.
    #[serde(with = "span_table::shared")]
    pub target: Arc<str>,
    /// Its name.
    #[serde(with = "span_table::shared")]
    pub name: Arc<str>,
    /// Field `index`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// Field `t`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t: Option<f64>,
    /// Field `h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub h: Option<f64>,
    /// The thread that entered it first; threads are numbered in the order in which they first enter a span.
    pub thread: u32,
    /// When it was first entered.
    pub start_ns: u64,
    /// From there to where it was last left.
    pub duration_ns: u64,
    /// Live bytes where it was first entered.
    pub live_before: u64,
    /// Live bytes where it was last left.
    pub live_after: u64,
    /// The most bytes live in the whole process while it was entered.
    pub peak: u64,
    /// Whether it was still open when the recording ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub open: bool,
}

impl MemoryReport {
    pub(super) fn new(
        run: RunKind,
        environment: Environment,
        counters: Vec<Counter>,
        ledger: &Ledger,
        found: Finished,
    ) -> Self {
        let totals = Totals {
            duration_ns: found.duration,
            owned_live: ledger.live_total(),
            owned_peak: ledger.highest_total(),
            spans: (found.closed.len() + found.open.len()) as u64 + found.dropped,
            spans_dropped: found.dropped,
            complete_from_ns: if found.dropped == 0 { 0 } else { found.dropped_until },
        };
        let closed = found.closed.iter().map(|record| SpanReport::new(record, false));
        let open = found.open.iter().map(|record| SpanReport::new(record, true));
        let mut spans: Vec<_> = closed.chain(open).collect();
        spans.sort_by_key(|span| (span.start_ns, span.id));
        let report = Self {
            schema: SCHEMA.to_owned(),
            run,
            environment,
            counters,
            totals,
            owned: CategoryBytes::all(ledger, Ledger::highest),
            trajectory: CodecBytes::all(ledger, &found.at_peak, &found.timeline),
            at_peak: found.at_peak.moment,
            timeline: Timeline(found.timeline.iter().map(|seen| seen.moment).collect()),
            names: found.names.iter().map(NameSummary::new).collect(),
            passes: Vec::new(),
            spans,
        };
        report.with_passes()
    }

    /// With the passes that its spans make.
    pub(super) fn with_passes(mut self) -> Self {
        self.passes = passes(&self.spans, self.totals.complete_from_ns);
        self
    }

    /// The counter that the spans were measured with.
    pub fn counter(&self) -> Option<&Counter> {
        self.counters.first()
    }

    /// Live bytes when recording began: what to subtract from the spans' figures.
    pub fn baseline(&self) -> u64 {
        self.counter().map_or(0, |counter| counter.baseline)
    }

    /// Peak over the recording, as the meter counts it.
    pub fn peak(&self) -> u64 {
        self.counter().map_or(0, |counter| counter.peak)
    }

    /// Owned bytes of a category.
    pub fn owned(&self, category: Category) -> Option<&CategoryBytes> {
        self.owned.iter().find(|bytes| bytes.category == category.name())
    }
}

impl Environment {
    pub(super) fn of(device: &Device, settings: BTreeMap<String, Value>) -> Self {
        Self {
            crate_version: env!("CARGO_PKG_VERSION").to_owned(),
            candle_version: CANDLE_VERSION.to_owned(),
            device: in_words(device),
            settings,
        }
    }
}

fn in_words(device: &Device) -> String {
    use std::env::consts::{ARCH, OS};
    match device {
        Device::Cpu => {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            format!("CPU ({ARCH}, {OS}, {threads} threads)")
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            let stream = cuda.cuda_stream();
            let name = stream.context().name().unwrap_or_else(|_| "unknown".to_owned());
            format!("CUDA {} ({name})", stream.context().ordinal())
        }
        other => format!("{:?}", other.location()),
    }
}

impl CategoryBytes {
    /// Every category of the ledger, with this notion of peak.
    pub(super) fn all(ledger: &Ledger, peak: fn(&Ledger, Category) -> u64) -> Vec<Self> {
        let bytes = |category: Category| Self {
            category: category.name().to_owned(),
            live: ledger.live(category),
            peak: peak(ledger, category),
        };
        Category::ALL.into_iter().map(bytes).collect()
    }
}

impl CodecBytes {
    /// Every codec that was seen.
    fn all(ledger: &Ledger, at_peak: &Seen, timeline: &[Seen]) -> Vec<Self> {
        let bytes = |(number, (codec, live, peak)): (usize, (String, u64, u64))| Self {
            codec,
            live,
            peak,
            at_peak: at_peak.codecs[number],
            over_time: timeline.iter().map(|seen| seen.codecs[number]).collect(),
        };
        ledger.by_codec().into_iter().enumerate().map(bytes).filter(|bytes| bytes.peak > 0).collect()
    }
}

impl NameSummary {
    fn new(total: &NameTotal) -> Self {
        let NameTotal { target, name, count, time, peak } = *total;
        Self { target: target.to_owned(), name: name.to_owned(), count, time_ns: time, peak }
    }
}

impl SpanReport {
    fn new(record: &Record, open: bool) -> Self {
        Self {
            id: record.id,
            parent: record.parent,
            target: record.target.into(),
            name: record.name.into(),
            index: record.fields.index,
            t: record.fields.t.filter(|t| t.is_finite()),
            h: record.fields.h.filter(|h| h.is_finite()),
            thread: record.thread,
            start_ns: record.start,
            duration_ns: record.end.saturating_sub(record.start),
            live_before: record.live_before,
            live_after: record.live_after,
            peak: record.peak,
            open,
        }
    }

    fn is(&self, name: &str) -> bool {
        &*self.target == TARGET && &*self.name == name
    }
}

impl StepReport {
    fn new(span: &SpanReport) -> Self {
        let SpanReport { index, t, h, peak, live_before, live_after, duration_ns, .. } = *span;
        Self { index, t, h, peak, live_before, live_after, duration_ns }
    }
}

/// Gathers the steps under each pass. A pass that began before the last dropped span ended may lack some.
fn passes(spans: &[SpanReport], complete_from: u64) -> Vec<PassReport> {
    let mut passes: Vec<PassReport> = Vec::new();
    // By the span's number.
    let mut place: HashMap<u64, usize> = HashMap::new();
    for span in spans.iter().filter(|span| span.is(span::FORWARD) || span.is(span::BACKWARD)) {
        place.insert(span.id, passes.len());
        passes.push(PassReport {
            pass: span.name.to_string(),
            span: span.id,
            complete: span.start_ns >= complete_from,
            peak: span.peak,
            steps: Vec::new(),
        });
    }
    // A span's parent is older than itself, so that its pass is known by then; in a damaged file it may not be.
    let mut by_age: Vec<&SpanReport> = spans.iter().collect();
    by_age.sort_by_key(|span| span.id);
    for span in by_age {
        if let Some(&at) = span.parent.and_then(|parent| place.get(&parent)) {
            place.entry(span.id).or_insert(at);
        }
    }
    for step in spans.iter().filter(|span| span.is(span::STEP)) {
        if let Some(&at) = place.get(&step.id) {
            passes[at].steps.push(StepReport::new(step));
        }
    }
    passes
}

#[cfg(test)]
mod tests {
    #[test]
    fn candle_version_is_the_pinned_one() {
        let pin = format!("candle-core = \"={}\"", super::CANDLE_VERSION);
        assert!(include_str!("../../Cargo.toml").contains(&pin));
    }
}
