//! Whatever a file holds, reading it gives a report or an error, and what was read can be written in every format.
//!
//! A short run here; a million inputs with
//! `PROPTEST_CASES=1000000 cargo test --release --test memory_report_reader_never_panics`.

#[path = "common/counted.rs"]
mod counted;
#[path = "common/two_passes.rs"]
mod two_passes;

use candle_ode::memory::MemoryReport;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::cell::Cell;

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

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        1 => any::<u16>().prop_map(Edit::Cut),
        1 => any::<(u16, u8)>().prop_map(|(at, byte)| Edit::Put(at, byte)),
        1 => (any::<u16>(), proptest::sample::select(&PIECES[..])).prop_map(|(at, piece)| Edit::Insert(at, piece)),
        4 => any::<(u16, i64)>().prop_map(|(at, number)| Edit::Number(at, number)),
        1 => any::<(u16, u8)>().prop_map(|(at, count)| Edit::Remove(at, count)),
        2 => any::<u16>().prop_map(Edit::Repeat),
    ]
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
fn read(bytes: &[u8]) -> bool {
    let Ok(report) = MemoryReport::parse(bytes, "fuzzed.json") else { return false };
    let written = report.json();
    assert!(MemoryReport::parse(written.as_bytes(), "again.json").is_ok());
    assert!(report.csv().lines().count() > report.passes.iter().map(|pass| pass.steps.len()).sum());
    assert!(report.chrome_trace().len() + report.html().len() > written.len());
    true
}

fn runner() -> TestRunner {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(5_000);
    TestRunner::new(ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() })
}

#[test]
fn edited_reports() {
    let whole = two_passes::report(100).json().into_bytes();
    assert!(read(&whole));
    let still_reports = Cell::new(0);
    let edited = |edits: Vec<Edit>| {
        let mut bytes = whole.clone();
        edits.iter().for_each(|edit| apply(edit, &mut bytes));
        still_reports.set(still_reports.get() + u32::from(read(&bytes)));
        Ok(())
    };
    runner().run(&prop::collection::vec(edit(), 1..4), edited).unwrap();
    assert!(still_reports.get() > 100, "hardly an edited report is still a report, so the formats were not tried");
}

#[test]
fn bytes_from_nowhere() {
    let bytes = prop::collection::vec(any::<u8>(), 0..400);
    let never = |bytes: Vec<u8>| {
        prop_assert!(!read(&bytes));
        Ok(())
    };
    runner().run(&bytes, never).unwrap();
}
