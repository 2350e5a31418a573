//! A report as a Chrome trace: opens in Perfetto (ui.perfetto.dev) and in chrome://tracing.
//!
//! Spans are complete events (`X`) on the thread that entered them, counters are counter events (`C`), a track each:
//! one per meter, one of owned and found bytes by kind, and one of the trajectory by codec. Times are microseconds.

use super::{CodecBytes, Counter, MemoryReport, SpanReport};
use crate::memory::{Moment, Part};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// The counter track of what live bytes are made of.
const KINDS: &str = "live bytes by kind";

/// The counter track of what the trajectory is made of.
const CODECS: &str = "trajectory by codec";

/// The one process of a trace.
const PROCESS: u32 = 1;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace<'a> {
    trace_events: Vec<Event<'a>>,
    display_time_unit: &'static str,
    other_data: About<'a>,
}

#[derive(Serialize)]
struct About<'a> {
    report: &'a str,
    device: &'a str,
    settings: &'a BTreeMap<String, Value>,
}

#[derive(Serialize)]
struct Event<'a> {
    name: &'a str,
    ph: char,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<&'a str>,
    args: Arguments<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Arguments<'a> {
    Name { name: String },
    Bytes { bytes: i64 },
    Parts(BTreeMap<&'a str, i64>),
    Span(SpanArguments),
}

#[derive(Serialize)]
struct SpanArguments {
    live_before: u64,
    live_after: u64,
    peak: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    t: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    h: Option<f64>,
}

impl MemoryReport {
    /// The spans and counters as a Chrome trace (JSON object format).
    ///
    /// # Reference
    /// Google, *Trace Event Format*.
    pub fn chrome_trace(&self) -> String {
        let mut events = vec![metadata("process_name", 0, "candle-ode".to_owned())];
        let mut threads: Vec<u32> = self.spans.iter().map(|span| span.thread).collect();
        threads.sort_unstable();
        threads.dedup();
        events.extend(threads.iter().map(|&thread| metadata("thread_name", thread, format!("thread {thread}"))));
        events.extend(self.spans.iter().map(span));
        events.extend(self.counters.iter().enumerate().flat_map(|(n, counter)| self.counter_track(n, counter)));
        let moments = &self.timeline.0;
        let ever = |part: &Part| moments.iter().any(|moment| moment.bytes.of(*part) != 0);
        let kinds: Vec<Part> = Part::ALL.into_iter().filter(ever).collect();
        events.extend(moments.iter().map(|moment| kinds_at(&kinds, moment)));
        events.extend(self.timeline.0.iter().enumerate().map(|(n, moment)| self.codecs_at(n, moment.time_ns)));
        let environment = &self.environment;
        let trace = Trace {
            trace_events: events,
            display_time_unit: "ms",
            other_data: About { report: &self.schema, device: &environment.device, settings: &environment.settings },
        };
        // As in `json`: text for keys, and memory to write to.
        serde_json::to_string(&trace).unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// The curve of the first counter is the timeline.
    fn counter_track<'a>(&'a self, number: usize, counter: &'a Counter) -> impl Iterator<Item = Event<'a>> {
        let timeline = self.timeline.0.iter().filter(move |_| number == 0);
        let timeline = timeline.map(|moment| (moment.time_ns, moment.bytes.total()));
        let curve = timeline.chain(counter.curve.iter().map(|(at, bytes)| (at, bytes as i64)));
        let (start, end) = ((0, counter.baseline as i64), (self.totals.duration_ns, counter.live as i64));
        let points = std::iter::once(start).chain(curve).chain([end]);
        points.map(|(at, bytes)| track(&counter.name, at, Arguments::Bytes { bytes }))
    }

    /// The trajectory at moment `n` of the timeline.
    fn codecs_at(&self, n: usize, time: u64) -> Event<'_> {
        let bytes = |codec: &'_ CodecBytes| codec.over_time.get(n).copied().unwrap_or(0);
        let codecs = self.trajectory.iter().map(|codec| (codec.codec.as_str(), bytes(codec)));
        track(CODECS, time, Arguments::Parts(codecs.collect()))
    }
}

fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

fn metadata(name: &'static str, thread: u32, says: String) -> Event<'static> {
    let args = Arguments::Name { name: says };
    Event { name, ph: 'M', ts: 0.0, dur: None, pid: PROCESS, tid: thread, cat: None, args }
}

fn track<'a>(name: &'a str, at: u64, args: Arguments<'a>) -> Event<'a> {
    Event { name, ph: 'C', ts: microseconds(at), dur: None, pid: PROCESS, tid: 0, cat: None, args }
}

/// Zeros too: what is left out of an event keeps its value in Perfetto.
fn kinds_at(kinds: &[Part], moment: &Moment) -> Event<'static> {
    let bytes = kinds.iter().map(|kind| (kind.name(), moment.bytes.of(*kind)));
    track(KINDS, moment.time_ns, Arguments::Parts(bytes.collect()))
}

fn span(span: &SpanReport) -> Event<'_> {
    let SpanReport { live_before, live_after, peak, index, t, h, .. } = *span;
    Event {
        name: &span.name,
        ph: 'X',
        ts: microseconds(span.start_ns),
        dur: Some(microseconds(span.duration_ns)),
        pid: PROCESS,
        tid: span.thread,
        cat: Some(&span.target),
        args: Arguments::Span(SpanArguments { live_before, live_after, peak, index, t, h }),
    }
}
