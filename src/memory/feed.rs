//! A recording told to another process while it runs: `memory-report watch` draws it.
//!
//! If the environment variable [`FEED`] names a file, each recording appends lines of text to it: `recording COUNTER`,
//! then about ten times a second `TIME LIVE PEAK` (nanoseconds since recording began, bytes above the baseline as of
//! the last span boundary), and `end`. The meter is not read for it, so no figure of the report changes.

use super::layer::Shared;
use crate::error::{OdeError, Result};
use std::fs::File;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

/// The environment variable that names the file of the live feed, for programs that follow a recording.
pub const FEED: &str = "CANDLE_ODE_MEMORY_FEED";

/// From line to line.
const PERIOD: Duration = Duration::from_millis(100);

/// The thread that writes, and how it is told to stop.
#[derive(Debug)]
pub(super) struct Feed {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A recording as of its last boundary: time in nanoseconds, live bytes and peak above the baseline.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) time: u64,
    pub(super) live: i64,
    pub(super) peak: i64,
}

impl Feed {
    /// Follows the recording that `shared` is about to begin, if the environment asks for it.
    pub(super) fn open(shared: &Arc<Shared>, counter: &str) -> Result<Option<Self>> {
        match std::env::var_os(FEED) {
            Some(path) if !path.is_empty() => Self::start(&PathBuf::from(path), shared.clone(), counter).map(Some),
            _ => Ok(None),
        }
    }

    fn start(path: &Path, shared: Arc<Shared>, counter: &str) -> Result<Self> {
        let failed = |source| OdeError::Io { path: path.to_owned(), source };
        let mut file = File::options().create(true).append(true).open(path).map_err(failed)?;
        writeln!(file, "recording {counter}").map_err(failed)?;
        let ended = Arc::<AtomicBool>::default();
        let told = ended.clone();
        let work = move || {
            while !told.load(Relaxed) {
                std::thread::park_timeout(PERIOD);
                write_sample(&mut file, &shared);
            }
            // Whoever followed may be gone; the recording goes on without.
            let _ = file.write_all(b"end\n");
        };
        let thread = std::thread::Builder::new().name("memory feed".to_owned()).spawn(work).map_err(failed)?;
        Ok(Self { ended, thread: Some(thread) })
    }
}

/// Takes no heap memory, which would be counted.
fn write_sample(file: &mut File, shared: &Shared) {
    let Some(Sample { time, live, peak }) = shared.sample() else { return };
    let mut line = Cursor::new([0u8; 80]);
    // Three numbers of at most 20 digits fit.
    if writeln!(line, "{time} {live} {peak}").is_ok() {
        let length = line.position() as usize;
        let _ = file.write_all(&line.get_ref()[..length]);
    }
}

impl Drop for Feed {
    /// The last line says how the recording stood.
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
