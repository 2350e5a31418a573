//! `memory-report watch`: runs a program and draws the live bytes that its profiler tells of.

use crate::failure::Result;
use crate::table::{bytes, time};
use candle_ode::memory::FEED;
use clap::Args;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

pub(crate) const EXAMPLES: &str = "\
Examples:
  memory-report watch -- cargo run --release --example cnf
  memory-report watch -- ./my-training --epochs 3";

/// How often the program's feed is looked at.
const PERIOD: Duration = Duration::from_millis(100);

/// Columns and rows of the curve.
const COLUMNS: usize = 64;
const ROWS: usize = 8;

const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Watch {
    /// The program with its arguments; it must install a `candle_ode::memory::MemoryProfiler`.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What the feed has told so far.
#[derive(Default)]
struct Followed {
    counter: String,
    /// (nanoseconds, live bytes above the baseline) of the latest recording.
    points: Vec<(u64, i64)>,
    peak: i64,
    /// A line that is not finished yet.
    rest: String,
}

impl Watch {
    /// The program's own exit code, or 1 if it cannot be run or records nothing.
    pub(crate) fn run(&self) -> ExitCode {
        match self.follow() {
            Ok(status) => match status.code() {
                Some(code) => u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from),
                None => ExitCode::FAILURE,
            },
            Err(error) => {
                eprintln!("memory-report: {error}");
                ExitCode::FAILURE
            }
        }
    }

    fn follow(&self) -> Result<ExitStatus> {
        // The terminal interrupts the program, too: it may save what it has, and is drawn to its end. Who ends this
        // process alone has it passed on. Twice is enough.
        let interrupted = Arc::new(AtomicUsize::new(0));
        let count = interrupted.clone();
        ctrlc::set_handler(move || _ = count.fetch_add(1, Relaxed))?;
        #[cfg(unix)]
        let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
        #[cfg(unix)]
        signal_hook::flag::register(signal_hook::consts::SIGTERM, ended.clone())?;
        let feed = Place::new()?;
        let mut file = File::open(&feed.0)?;
        let (program, arguments) = self.command.split_first().ok_or("watch needs a command")?;
        let spawned = Command::new(program).args(arguments).env(FEED, &feed.0).spawn();
        let mut child = spawned.map_err(|error| format!("`{program}`: {error}"))?;
        let mut followed = Followed::default();
        let live = std::io::stderr().is_terminal();
        let status = loop {
            let status = child.try_wait()?;
            followed.read(&mut file)?;
            if live {
                eprint!("\r\x1b[K{}", followed.line());
            }
            #[cfg(unix)]
            if status.is_none() && ended.swap(false, Relaxed) {
                use nix::{sys::signal, unistd::Pid};
                signal::kill(Pid::from_raw(child.id().cast_signed()), signal::Signal::SIGTERM)?;
            }
            match status {
                Some(status) => break status,
                None if interrupted.load(Relaxed) > 1 => child.kill()?,
                None => std::thread::sleep(PERIOD),
            }
        };
        if live {
            eprint!("\r\x1b[K");
        }
        if followed.points.is_empty() {
            if !status.success() {
                return Ok(status);
            }
            return Err("the program recorded nothing: have it install a candle_ode::memory::MemoryProfiler".into());
        }
        crate::print(followed.curve().as_bytes())?;
        Ok(status)
    }
}

/// The feed's file, removed at the end.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("memory-report-{}.feed", std::process::id()));
        File::create(&path)?.flush()?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Best effort: it lies in the folder for such files.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Followed {
    fn read(&mut self, feed: &mut impl Read) -> Result<()> {
        let mut text = std::mem::take(&mut self.rest);
        feed.read_to_string(&mut text)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.rest = text.split_off(whole);
        text.lines().for_each(|line| self.take(line));
        Ok(())
    }

    /// One line; what is no sample and no start changes nothing.
    fn take(&mut self, line: &str) {
        if let Some(counter) = line.strip_prefix("recording ") {
            *self = Self { counter: counter.to_owned(), rest: std::mem::take(&mut self.rest), ..Self::default() };
            return;
        }
        let mut numbers = line.split(' ').map(str::parse::<i64>);
        if let (Some(Ok(time)), Some(Ok(live)), Some(Ok(peak))) = (numbers.next(), numbers.next(), numbers.next()) {
            self.points.push((time.max(0) as u64, live));
            self.peak = peak;
        }
    }

    /// The state in one line, while the program runs.
    fn line(&self) -> String {
        let Some(&(now, live)) = self.points.last() else { return String::new() };
        let latest = &self.points[self.points.len().saturating_sub(COLUMNS / 2)..];
        let curve: String = latest.iter().map(|&(_, live)| BARS[self.height(live, BARS.len() - 1)]).collect();
        format!("{} {} live {} peak {} {curve}", self.counter, time(now), words(live), words(self.peak))
    }

    /// The whole recording, when it is over.
    fn curve(&self) -> String {
        let end = self.points.last().map_or(0, |point| point.0);
        let mut text = format!(
            "{}: peak {} above baseline, live {} at the end, {} recorded\n",
            self.counter,
            words(self.peak),
            words(self.points.last().map_or(0, |point| point.1)),
            time(end)
        );
        let heights = self.columns(end).map(|live| self.height(live, ROWS * (BARS.len() - 1)));
        for row in (0..ROWS).rev() {
            let full = BARS.len() - 1;
            let cells: String =
                heights.iter().map(|height| BARS[height.saturating_sub(row * full).min(full)]).collect();
            let label = if row + 1 == ROWS {
                words(self.peak)
            } else if row == 0 {
                "0 B".to_owned()
            } else {
                String::new()
            };
            text.push_str(format!("{label:>12} │{cells}").trim_end());
            text.push('\n');
        }
        text
    }

    /// The highest live bytes of each column of time; a column without a sample has those of the one before.
    fn columns(&self, end: u64) -> [i64; COLUMNS] {
        let mut columns = [None; COLUMNS];
        for &(at, live) in &self.points {
            // Whoever writes the feed may be late with a line.
            let column = (u128::from(at.min(end)) * COLUMNS as u128 / (u128::from(end) + 1)) as usize;
            columns[column] = columns[column].max(Some(live));
        }
        let mut before = 0;
        columns.map(|column| {
            before = column.unwrap_or(before);
            before
        })
    }

    fn height(&self, live: i64, full: usize) -> usize {
        let part = live.max(0) as f64 / self.peak.max(1) as f64;
        ((part * full as f64).round() as usize).min(full)
    }
}

fn words(count: i64) -> String {
    let size = bytes(count.unsigned_abs());
    if count < 0 { format!("-{size}") } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_in_two_parts_is_one_line() {
        let mut followed = Followed::default();
        followed.read(&mut "recording heap\n100 40".as_bytes()).unwrap();
        assert!(followed.points.is_empty());
        followed.read(&mut "96 8192\n200 0 8192\nend\n".as_bytes()).unwrap();
        assert_eq!((followed.points.as_slice(), followed.peak), (&[(100, 4096), (200, 0)][..], 8192));
        assert_eq!(followed.counter, "heap");
    }

    #[test]
    fn the_curve_reaches_from_nothing_to_the_peak() {
        let mut followed = Followed::default();
        followed.read(&mut "recording heap\n0 0 0\n500 1024 1024\n1000 512 1024\n".as_bytes()).unwrap();
        let text = followed.curve();
        let rows: Vec<_> = text.lines().collect();
        assert_eq!(rows.len(), ROWS + 1);
        assert!(rows[0].starts_with("heap: peak 1.00 KiB above baseline, live 512 B at the end"), "{text}");
        assert!(rows[1].starts_with("    1.00 KiB │ ") && rows[1].contains('█'), "{text}");
        assert_eq!(rows[1].matches('█').count() + 1, rows[ROWS].matches('█').count(), "{text}");
    }

    #[test]
    fn a_late_line_is_drawn_at_the_end() {
        let mut followed = Followed::default();
        followed.read(&mut "recording heap\n900 7 7\n500 3 7\n".as_bytes()).unwrap();
        assert_eq!(followed.columns(500)[COLUMNS - 1], 7);
    }
}
