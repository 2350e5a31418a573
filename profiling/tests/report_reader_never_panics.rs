//! Whatever a file holds, reading it gives a report or an error, and what was read can be written in every format: a
//! million files optimised, which is how the figure is meant, and few of them otherwise.
//!
//! The targets are those of a fuzzer too: `cargo bolero test edited_reports` looks for inputs by coverage.

#[path = "../../tests/common/counted.rs"]
mod counted;
#[path = "../../tests/common/two_passes.rs"]
mod two_passes;

use bolero::check;
use candle_ode::memory::MemoryReport;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

const INPUTS: usize = if cfg!(debug_assertions) { 5_000 } else { 1_000_000 };
/// Of the reports that were read, one in so many is written in the formats that take long.
const WRITTEN: usize = if cfg!(debug_assertions) { 1 } else { 8 };

/// What is done to a report that is whole. Places are parts of its length in 65536.
#[derive(Clone, Debug)]
enum Edit {
    /// Cuts it off.
    Cut(u16),
    /// Puts a byte in place of another.
    Put(u16, u8),
    /// Puts a piece of JSON there.
    Insert(u16, &'static [u8]),
    /// Puts a number in place of the next one.
    Number(u16, i64),
    /// Takes so many bytes out.
    Remove(u16, u8),
    /// Takes what lies between the next two commas a second time.
    Repeat(u16),
}

/// What a parser may trip over: tokens, numbers out of range, half a character, more depth than a stack has.
const PIECES: [&[u8]; 9] = [b"{", b"}", b"[]", b",", b"\"", b"null", b"1e999", br"\ud800", &[b'['; 300]];

/// The edit that random numbers stand for; `None` for a file that is edited less often.
fn edit((kind, at, number): &(u8, u16, i64)) -> Option<Edit> {
    let (at, byte) = (*at, *number as u8);
    Some(match kind % 16 {
        0 => Edit::Cut(at),
        1 => Edit::Put(at, byte),
        2 => Edit::Insert(at, PIECES[usize::from(byte) % PIECES.len()]),
        3..=6 => Edit::Number(at, *number),
        7 => Edit::Remove(at, byte),
        8..=9 => Edit::Repeat(at),
        _ => return None,
    })
}

fn apply(edit: &Edit, bytes: &mut Vec<u8>) {
    let place = |at: u16, bytes: &[u8]| usize::from(at) * bytes.len() / (1 << 16);
    match *edit {
        Edit::Cut(at) => bytes.truncate(place(at, bytes)),
        Edit::Put(at, byte) => {
            let at = place(at, bytes);
            if let Some(there) = bytes.get_mut(at) {
                *there = byte;
            }
        }
        Edit::Insert(at, piece) => {
            let at = place(at, bytes);
            bytes.splice(at..at, piece.iter().copied());
        }
        Edit::Number(at, number) => {
            let from = place(at, bytes);
            let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit) else { return };
            let start = from + start;
            let length = bytes[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            bytes.splice(start..start + length, number.to_string().into_bytes());
        }
        Edit::Remove(at, count) => {
            let at = place(at, bytes);
            bytes.drain(at..(at + usize::from(count)).min(bytes.len()));
        }
        Edit::Repeat(at) => {
            let from = place(at, bytes);
            let mut commas = bytes[from..].iter().enumerate().filter(|(_, byte)| **byte == b',').map(|(n, _)| from + n);
            if let (Some(start), Some(end)) = (commas.next(), commas.next()) {
                let piece = bytes[start..end].to_vec();
                bytes.splice(end..end, piece);
            }
        }
    }
}

/// Reads, and if it is a report, writes.
fn read(bytes: &[u8], formats: bool) -> bool {
    let Ok(report) = MemoryReport::parse(bytes, "fuzzed.json") else { return false };
    if formats {
        let written = report.json();
        assert!(MemoryReport::parse(written.as_bytes(), "again.json").is_ok());
        assert!(report.csv().lines().count() > report.passes.iter().map(|pass| pass.steps.len()).sum());
        assert!(report.chrome_trace().len() + report.html().len() > written.len());
        assert!(report.ledger_csv().lines().count() > report.owned.len());
    }
    true
}

static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| two_passes::report(100).json().into_bytes());

#[test]
fn edited_reports() {
    static READ: AtomicUsize = AtomicUsize::new(0);
    assert!(read(&WHOLE, true));
    check!().with_iterations(INPUTS).with_type::<[(u8, u16, i64); 4]>().for_each(|edits| {
        let mut bytes = WHOLE.clone();
        edits.iter().filter_map(edit).for_each(|edit| apply(&edit, &mut bytes));
        if read(&bytes, false) && READ.fetch_add(1, Relaxed).is_multiple_of(WRITTEN) {
            read(&bytes, true);
        }
    });
    let still = READ.load(Relaxed);
    println!("{still} of {INPUTS} edited files of {} bytes are still reports", WHOLE.len());
    assert!(still > INPUTS / 50, "hardly an edited report is still a report, so the formats were not tried");
}

#[test]
fn bytes_from_nowhere() {
    check!().with_iterations(INPUTS).for_each(|bytes: &[u8]| assert!(!read(bytes, true)));
}
