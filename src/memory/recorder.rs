//! The set of open spans, and what is kept of the closed ones.
//!
//! The memory keeps one peak, and spans overlap: they nest, and run on several threads. So at every boundary (a span
//! is entered or left) the peak since the last boundary is read and folded into *all* open spans, and the window starts
//! anew. A span's peak is then the process-wide maximum over the time it was open, whatever else went on.
//!
//! The same boundaries, and every `bytes` event, settle the [books](super::books): what the live bytes are made of.
//!
//! All room is taken when recording begins, before the baseline is read: what is recorded does not show in the heap,
//! unless more spans are open at once, or have different names, than there was room for.

use super::books::{Books, Seen};
use super::composition::{Composition, Part};
use super::curve::{Curves, Sampled};
use super::feed::Sample;
use super::ledger::{Announced, Ledger};
use super::meter::{Meter, Reading};
use super::span;
use crate::account::{Category, TARGET};
use crate::error::{OdeError, Result};
use std::collections::VecDeque;
use std::time::Instant;

/// Spans open at once, threads, and names, for which there is room from the start.
const ROOM: usize = 64;

/// What is known of one span. Bytes are the meter's readings; times are nanoseconds since recording began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) id: u64,
    pub(super) parent: Option<u64>,
    pub(super) target: &'static str,
    pub(super) name: &'static str,
    pub(super) fields: Fields,
    pub(super) thread: u32,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) live_before: u64,
    pub(super) live_after: u64,
    pub(super) peak: u64,
}

/// The fields of the schema that a span may have.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fields {
    pub(super) index: Option<u64>,
    pub(super) t: Option<f64>,
    pub(super) h: Option<f64>,
}

/// All closed spans of one name, kept or not.
#[derive(Clone, Copy, Debug)]
pub(super) struct NameTotal {
    pub(super) target: &'static str,
    pub(super) name: &'static str,
    pub(super) count: u64,
    pub(super) time: u64,
    pub(super) peak: u64,
}

struct Open {
    /// The subscriber's name for it.
    key: u64,
    record: Record,
    /// How many times it is entered now: a span may be entered by several threads at once.
    depth: u32,
    entered: bool,
    /// What its thread was at when it was entered.
    outside: Part,
}

/// The state of one recording.
pub(super) struct Recorder {
    meter: Box<dyn Meter>,
    others: Curves,
    origin: Instant,
    baseline: u64,
    open: Vec<Open>,
    kept: VecDeque<Record>,
    books: Books,
    /// What each thread is at.
    places: Vec<Part>,
    /// How many threads are inside spans of this crate.
    inside: usize,
    /// Whether the solve under way has linearised, and whether one before it keeps what it has linearised.
    linearised: bool,
    keeps: bool,
    limit: usize,
    next_id: u64,
    dropped: u64,
    dropped_until: u64,
    names: Vec<NameTotal>,
    peak: u64,
    peak_since_mark: u64,
    failure: Option<OdeError>,
}

/// What a finished recording hands over.
pub(super) struct Finished {
    pub(super) baseline: u64,
    pub(super) live: u64,
    pub(super) peak: u64,
    pub(super) duration: u64,
    pub(super) closed: VecDeque<Record>,
    pub(super) open: Vec<Record>,
    pub(super) dropped: u64,
    /// When the last dropped span ended.
    pub(super) dropped_until: u64,
    pub(super) names: Vec<NameTotal>,
    pub(super) at_peak: Seen,
    pub(super) timeline: Vec<Seen>,
    pub(super) meter: Box<dyn Meter>,
    pub(super) others: Vec<Sampled>,
}

impl Recorder {
    /// Takes its room, then reads the baseline; what `ledger` knows is announced already. Of the `others` the curves
    /// are sampled.
    pub(super) fn start(meter: Box<dyn Meter>, others: Curves, limit: usize, ledger: &Ledger) -> Result<Self> {
        let mut recorder = Self {
            meter,
            others,
            origin: Instant::now(),
            baseline: 0,
            open: Vec::with_capacity(ROOM),
            kept: VecDeque::with_capacity(limit),
            books: Books::new(),
            places: Vec::with_capacity(ROOM),
            inside: 0,
            linearised: false,
            keeps: false,
            limit,
            next_id: 0,
            dropped: 0,
            dropped_until: 0,
            names: Vec::with_capacity(ROOM),
            peak: 0,
            peak_since_mark: 0,
            failure: None,
        };
        recorder.baseline = recorder.meter.mark()?.live;
        recorder.books.open(recorder.baseline, ledger);
        recorder.peak = recorder.baseline;
        recorder.peak_since_mark = recorder.baseline;
        Ok(recorder)
    }

    /// A span was made. Its window begins when it is first entered.
    pub(super) fn create(
        &mut self,
        key: u64,
        parent: Option<u64>,
        target: &'static str,
        name: &'static str,
        fields: Fields,
    ) {
        let parent = parent.and_then(|key| self.find(key)).map(|at| self.open[at].record.id);
        let id = self.next_id;
        self.next_id += 1;
        let record = Record {
            id,
            parent,
            target,
            name,
            fields,
            thread: 0,
            start: 0,
            end: 0,
            live_before: 0,
            live_after: 0,
            peak: 0,
        };
        self.open.push(Open { key, record, depth: 0, entered: false, outside: Part::Outside });
    }

    /// A span's fields were filled in later.
    pub(super) fn fill(&mut self, key: u64, merge: impl FnOnce(&mut Fields)) {
        if let Some(at) = self.find(key) {
            merge(&mut self.open[at].record.fields);
        }
    }

    /// A span was entered by `thread`.
    pub(super) fn enter(&mut self, key: u64, thread: u32) {
        let Some(at) = self.find(key) else { return };
        let reading = self.boundary(thread, None);
        let now = self.now();
        let outside = self.place(thread);
        let open = &mut self.open[at];
        open.depth += 1;
        open.outside = outside;
        let inside = place_of(&open.record).unwrap_or(outside);
        open.record.peak = open.record.peak.max(reading.live);
        if !open.entered {
            open.entered = true;
            open.record.thread = thread;
            open.record.start = now;
            open.record.live_before = reading.live;
        }
        self.linearised |= open.record.target == TARGET && open.record.name == span::LINEARISE;
        if self.inside == 0 && inside != Part::Outside {
            self.hand_out(true);
        }
        self.move_to(thread, inside);
    }

    /// A span was left by `thread`.
    pub(super) fn exit(&mut self, key: u64, thread: u32) {
        let now = self.now();
        let Some(at) = self.find(key) else { return };
        let reading = self.boundary(thread, None);
        let open = &mut self.open[at];
        open.depth = open.depth.saturating_sub(1);
        open.record.end = now;
        open.record.live_after = reading.live;
        let outside = open.outside;
        let solved = open.record.name == span::SOLVE;
        let were_inside = self.inside > 0;
        self.move_to(thread, outside);
        if were_inside && self.inside == 0 {
            self.keeps |= solved && self.linearised;
            self.linearised = false;
            self.hand_out(!solved);
        }
    }

    /// Nobody is inside: what was found there is the caller's. Of `graphs` only if no backward pass is to come for
    /// them: kept linearisations live as long as a trajectory does, and Candle's own, of an unrolled solve, no longer
    /// than to the next pass.
    fn hand_out(&mut self, graphs: bool) {
        self.keeps &= self.books.now().of(Part::Owned(Category::Trajectory)) > 0;
        let parts = [Part::Other, Part::Pullback, Part::Field];
        self.books.hand_out(if graphs && !self.keeps { &parts } else { &parts[..2] });
    }

    /// Bytes of ours were born, or died if negative, on `thread`.
    pub(super) fn announce(&mut self, thread: u32, announced: Announced) {
        self.boundary(thread, Some(announced));
        // What is kept may die here, with the graph of the loss.
        if self.inside == 0 && self.keeps {
            self.hand_out(true);
        }
    }

    /// A span is gone and will not be entered again.
    pub(super) fn close(&mut self, key: u64) {
        let Some(at) = self.find(key) else { return };
        let Open { record, entered, .. } = self.open.swap_remove(at);
        if !entered {
            return;
        }
        self.add_to_names(&record);
        if self.kept.len() == self.limit {
            self.dropped += 1;
            let oldest = self.kept.pop_front().unwrap_or(record);
            self.dropped_until = self.dropped_until.max(oldest.end);
        }
        if self.limit > 0 {
            self.kept.push_back(record);
        }
    }

    /// Live bytes now and the peak since the last [`reset_peak`](Self::reset_peak), or since the start.
    pub(super) fn read(&mut self, thread: u32) -> Result<Reading> {
        let live = self.boundary(thread, None).live;
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(Reading { live, peak: self.peak_since_mark }),
        }
    }

    /// Starts the peak of [`read`](Self::read) anew; the spans' peaks are not touched.
    pub(super) fn reset_peak(&mut self, thread: u32) -> Result<()> {
        let live = self.read(thread)?.live;
        self.peak_since_mark = live;
        Ok(())
    }

    /// What was live when recording began.
    pub(super) fn baseline(&self) -> u64 {
        self.baseline
    }

    /// What is live, as of the last boundary.
    pub(super) fn composition(&self) -> Composition {
        self.books.now()
    }

    /// As of the last boundary; the meter is not read.
    pub(super) fn sample(&self) -> Sample {
        let above = |bytes: i64| bytes - self.baseline as i64;
        Sample { time: self.now(), live: above(self.books.now().total()), peak: above(self.peak as i64) }
    }

    /// Ends the recording; spans still open end now.
    pub(super) fn finish(mut self, thread: u32) -> Result<Finished> {
        let duration = self.now();
        let live = self.read(thread)?.live;
        let open = self.open.iter().filter(|open| open.entered).map(|open| match open.depth {
            0 => open.record,
            _ => Record { end: duration, live_after: live, ..open.record },
        });
        let open = open.collect();
        let (at_peak, timeline) = self.books.close();
        Ok(Finished {
            baseline: self.baseline,
            live,
            peak: self.peak,
            duration,
            open,
            closed: self.kept,
            dropped: self.dropped,
            dropped_until: self.dropped_until,
            names: self.names,
            at_peak,
            timeline,
            meter: self.meter,
            others: self.others.all,
        })
    }

    /// Reads the meter, settles the books, folds the peak into everything open, and starts a new window.
    fn boundary(&mut self, thread: u32, announced: Option<Announced>) -> Reading {
        let reading = self.meter.mark().unwrap_or_else(|failure| {
            self.failure.get_or_insert(failure);
            Reading::default()
        });
        let now = self.now();
        if let Err(failure) = self.others.pass(now) {
            self.failure.get_or_insert(failure);
        }
        self.books.settle(now, reading, self.place(thread), announced);
        for open in self.open.iter_mut().filter(|open| open.depth > 0) {
            open.record.peak = open.record.peak.max(reading.peak);
        }
        self.peak = self.peak.max(reading.peak);
        self.peak_since_mark = self.peak_since_mark.max(reading.peak);
        reading
    }

    fn add_to_names(&mut self, record: &Record) {
        let time = record.end - record.start;
        let same = |total: &&mut NameTotal| total.name == record.name && total.target == record.target;
        match self.names.iter_mut().find(same) {
            Some(total) => {
                total.count += 1;
                total.time += time;
                total.peak = total.peak.max(record.peak);
            }
            None => {
                let Record { target, name, peak, .. } = *record;
                self.names.push(NameTotal { target, name, count: 1, time, peak });
            }
        }
    }

    /// What a thread is at.
    fn place(&self, thread: u32) -> Part {
        self.places.get(thread as usize).copied().unwrap_or(Part::Outside)
    }

    fn move_to(&mut self, thread: u32, place: Part) {
        let thread = thread as usize;
        if self.places.len() <= thread {
            self.places.resize(thread + 1, Part::Outside);
        }
        self.inside -= usize::from(self.places[thread] != Part::Outside);
        self.inside += usize::from(place != Part::Outside);
        self.places[thread] = place;
    }

    /// The latest are looked at first: spans mostly close in the reverse order of opening.
    fn find(&self, key: u64) -> Option<usize> {
        self.open.iter().rposition(|open| open.key == key)
    }

    fn now(&self) -> u64 {
        // 64 bits of nanoseconds last for 584 years.
        self.origin.elapsed().as_nanos() as u64
    }
}

/// Where bytes that appear inside a span are put; `None` for spans of others, which change nothing.
fn place_of(record: &Record) -> Option<Part> {
    match record.name {
        _ if record.target != TARGET => None,
        span::FIELD | span::LINEARISE => Some(Part::Field),
        span::PULLBACK => Some(Part::Pullback),
        _ => Some(Part::Other),
    }
}
