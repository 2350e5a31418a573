//! A recording under way: what it says while it runs, and the report at its end.

use super::composition::Composition;
use super::curve::{Curve, Sampled};
use super::feed::Feed;
use super::layer::{Shared, thread_number};
use super::ledger::Ledger;
use super::recorder::Recorder;
use super::report::{CategoryBytes, Counter, Environment, MemoryReport, RunKind};
use crate::error::{OdeError, Result};
use serde_json::Value;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};

/// Peaks are kept once per process, so only one recording may reset them.
pub(super) struct Claim(());

static CLAIMED: AtomicBool = AtomicBool::new(false);

impl Claim {
    pub(super) fn take() -> Result<Self> {
        if CLAIMED.swap(true, Acquire) {
            return Err(under_way());
        }
        Ok(Self(()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.store(false, Release);
    }
}

/// Bytes at one moment of a recording, as its meter counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Live when recording began.
    pub baseline: u64,
    /// Live now.
    pub live: u64,
    /// Peak since the last [`Recording::reset_peak`].
    pub peak: u64,
    /// Owned bytes by category, live and peak (since the same reset).
    pub owned: Vec<CategoryBytes>,
    /// What the live bytes are made of.
    pub bytes: Composition,
}

/// A recording under way; dropping it ends it without a report.
#[must_use = "dropping it ends the recording"]
pub struct Recording {
    pub(super) shared: Arc<Shared>,
    pub(super) run: RunKind,
    pub(super) environment: Environment,
    pub(super) feed: Option<Feed>,
    pub(super) _claim: Option<Claim>,
}

impl Recording {
    /// Bytes this crate owns, by category.
    pub fn ledger(&self) -> &Ledger {
        &self.shared.ledger
    }

    /// Bytes now and at most. The peaks of spans are not disturbed.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] if the meter cannot be read, or could not be at some span since the last snapshot.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let (baseline, reading, bytes) = self
            .shared
            .read(|recorder, thread| Ok((recorder.baseline(), recorder.read(thread)?, recorder.composition())))?;
        let owned = CategoryBytes::all(&self.shared.ledger, Ledger::peak);
        Ok(Snapshot { baseline, live: reading.live, peak: reading.peak, owned, bytes })
    }

    /// Starts the peaks of [`snapshot`](Self::snapshot) and of the [`ledger`](Self::ledger) anew, as at the start of an
    /// iteration. The peaks of spans and of the report are not disturbed.
    ///
    /// # Errors
    ///
    /// As [`snapshot`](Self::snapshot).
    pub fn reset_peak(&self) -> Result<()> {
        self.shared.read(Recorder::reset_peak)?;
        self.shared.ledger.reset_peak();
        Ok(())
    }

    /// Writes a setting into the report, as [`MemoryProfiler::set`](super::MemoryProfiler::set) does.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.environment.settings.insert(name.to_owned(), value.into());
    }

    /// Ends the recording. Spans still open are reported up to now.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] if the meter could not be read, now or at some span.
    pub fn finish(mut self) -> Result<MemoryReport> {
        // It tells how the recording ends, so it goes before.
        self.feed = None;
        let mut finished = self.shared.end()?.finish(thread_number())?;
        let mut counters = vec![Counter {
            name: finished.meter.name().to_owned(),
            baseline: finished.baseline,
            live: finished.live,
            peak: finished.peak,
            synchronises: finished.meter.synchronises(),
            curve: Curve::default(),
        }];
        for Sampled { meter, baseline, curve } in finished.others.drain(..) {
            let (live, peak) = (meter.live()?, meter.peak()?);
            let (name, synchronises) = (meter.name().to_owned(), meter.synchronises());
            counters.push(Counter { name, baseline, live, peak, synchronises, curve });
        }
        Ok(MemoryReport::new(self.run, self.environment.clone(), counters, &self.shared.ledger, finished))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.feed = None;
        // Already gone if the recording was finished.
        let _ = self.shared.end();
    }
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recording({:?})", self.environment)
    }
}

pub(super) fn under_way() -> OdeError {
    OdeError::Meter {
        counter: "peak",
        reason: "another recording is under way in this process".to_owned(),
        hint: "call finish() on it (or drop it) first",
    }
}
