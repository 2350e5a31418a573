//! The spans of a report in a file: columns of variable-length integers, deflated, in Base64. About ten bytes a span,
//! where an object each would take two hundred.
//!
//! `{ "count": n, "names": [[target, name], …], "columns": "…" }`. The text is Base64 (standard alphabet, padded) of a
//! raw deflate stream of these columns, one after another, each with one value per span unless it says otherwise:
//!
//! | column | value |
//! |---|---|
//! | flags | one byte: 1 has a parent, 2 an index, 4 a time t, 8 a step size h, 16 was still open |
//! | name | place in `names` |
//! | id, start, live before | signed difference to the span before |
//! | live after, peak | signed difference to the span's own live before |
//! | duration, thread | as they are |
//! | parent | spans that have one: own id − its id, signed |
//! | index | spans that have one: as it is |
//! | t, then h | spans that have one: the IEEE bits, exclusive-or those of the one before, as eight bytes, lowest first |
//!
//! Integers are in LEB128 (seven bits a byte, lowest first), signed ones zigzagged; differences wrap around at 64 bits.

use super::report::SpanReport;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use miniz_oxide::deflate::compress_to_vec;
use miniz_oxide::inflate::decompress_to_vec_with_limit;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::HashMap;
use std::sync::Arc;

/// Effort of the deflater: 6 of 10, as everybody's.
const EFFORT: u8 = 6;
/// The columns take at least and at most so many bytes a span.
const BYTES: std::ops::RangeInclusive<usize> = 9..=128;
/// Deflate never packs more than this many bytes into one.
const MOST_PACKED: usize = 1032;

const PARENT: u8 = 1;
const INDEX: u8 = 2;
const TIME: u8 = 4;
const SIZE: u8 = 8;
const OPEN: u8 = 16;

type Read<T> = fn(&SpanReport) -> T;
type Write<T> = fn(&mut SpanReport) -> &mut T;
type ModelTime = Option<f64>;

/// Kept as differences to the span before.
const ALONG: [(Read<u64>, Write<u64>); 3] = [
    (|span| span.id, |span| &mut span.id),
    (|span| span.start_ns, |span| &mut span.start_ns),
    (|span| span.live_before, |span| &mut span.live_before),
];
/// Kept as differences to the span's own live bytes before.
const ABOVE: [(Read<u64>, Write<u64>); 2] =
    [(|span| span.live_after, |span| &mut span.live_after), (|span| span.peak, |span| &mut span.peak)];
/// Kept as bits, under a flag.
const MODEL_TIMES: [(u8, Read<ModelTime>, Write<ModelTime>); 2] =
    [(TIME, |span| span.t, |span| &mut span.t), (SIZE, |span| span.h, |span| &mut span.h)];

#[derive(Serialize, Deserialize)]
struct Table {
    count: usize,
    names: Vec<(String, String)>,
    columns: String,
}

pub(super) fn serialize<S: Serializer>(spans: &[SpanReport], serializer: S) -> Result<S::Ok, S::Error> {
    let mut names: Vec<(String, String)> = Vec::new();
    let mut known: HashMap<(&str, &str), u64> = HashMap::new();
    let of_span = spans.iter().map(|span| {
        *known.entry((&span.target, &span.name)).or_insert_with(|| {
            names.push((span.target.to_string(), span.name.to_string()));
            names.len() as u64 - 1
        })
    });
    let of_span: Vec<u64> = of_span.collect();
    let packed = compress_to_vec(&columns(spans, &of_span), EFFORT);
    Table { count: spans.len(), names, columns: STANDARD.encode(packed) }.serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<SpanReport>, D::Error> {
    let Table { count, names, columns } = Table::deserialize(deserializer)?;
    let damaged = |what: &str| D::Error::custom(format!("the table of {count} spans is damaged: {what}"));
    let packed = STANDARD.decode(columns).map_err(|error| damaged(&error.to_string()))?;
    let most = count.saturating_mul(*BYTES.end()).min(packed.len().saturating_mul(MOST_PACKED)).saturating_add(1);
    let bytes = decompress_to_vec_with_limit(&packed, most).map_err(|error| damaged(&error.to_string()))?;
    if count.checked_mul(*BYTES.start()).is_none_or(|least| bytes.len() < least) {
        return Err(damaged("it is too short"));
    }
    let names: Vec<(Arc<str>, Arc<str>)> =
        names.into_iter().map(|(target, name)| (target.into(), name.into())).collect();
    spans(count, &names, &bytes).ok_or_else(|| damaged("a column ends early, goes on, or names what is not there"))
}

/// A text that many spans have. (serde's own is behind a feature.)
pub(super) mod shared {
    use super::*;

    pub(in crate::memory) fn serialize<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(text)
    }

    pub(in crate::memory) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<str>, D::Error> {
        String::deserialize(deserializer).map(Arc::from)
    }
}

fn columns(spans: &[SpanReport], names: &[u64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 * spans.len());
    let flag = |there: bool, flag: u8| if there { flag } else { 0 };
    out.extend(spans.iter().map(|span| {
        flag(span.parent.is_some(), PARENT)
            | flag(span.index.is_some(), INDEX)
            | flag(span.t.is_some(), TIME)
            | flag(span.h.is_some(), SIZE)
            | flag(span.open, OPEN)
    }));
    names.iter().for_each(|name| unsigned(&mut out, *name));
    for (column, _) in ALONG {
        let mut before = 0;
        for value in spans.iter().map(column) {
            signed(&mut out, value.wrapping_sub(before));
            before = value;
        }
    }
    for (column, _) in ABOVE {
        spans.iter().for_each(|span| signed(&mut out, column(span).wrapping_sub(span.live_before)));
    }
    spans.iter().for_each(|span| unsigned(&mut out, span.duration_ns));
    spans.iter().for_each(|span| unsigned(&mut out, u64::from(span.thread)));
    spans.iter().for_each(|span| span.parent.iter().for_each(|parent| signed(&mut out, span.id.wrapping_sub(*parent))));
    spans.iter().for_each(|span| span.index.iter().for_each(|index| unsigned(&mut out, *index)));
    for (_, column, _) in MODEL_TIMES {
        let mut before = 0;
        for bits in spans.iter().filter_map(column).map(f64::to_bits) {
            out.extend((bits ^ before).to_le_bytes());
            before = bits;
        }
    }
    out
}

/// The spans again, with one text for all of the same name; `None` if the columns do not fit.
fn spans(count: usize, names: &[(Arc<str>, Arc<str>)], bytes: &[u8]) -> Option<Vec<SpanReport>> {
    let (flags, rest) = bytes.split_at_checked(count)?;
    let mut rest = Rest(rest);
    let mut spans = Vec::with_capacity(count);
    for flags in flags {
        let (target, name) = names.get(usize::try_from(rest.unsigned()?).ok()?)?.clone();
        spans.push(SpanReport {
            id: 0,
            parent: None,
            target,
            name,
            index: None,
            t: None,
            h: None,
            thread: 0,
            start_ns: 0,
            duration_ns: 0,
            live_before: 0,
            live_after: 0,
            peak: 0,
            open: flags & OPEN != 0,
        });
    }
    for (_, column) in ALONG {
        let mut before = 0_u64;
        for span in &mut spans {
            before = before.wrapping_add(rest.signed()?);
            *column(span) = before;
        }
    }
    for (_, column) in ABOVE {
        for span in &mut spans {
            *column(span) = span.live_before.wrapping_add(rest.signed()?);
        }
    }
    for span in &mut spans {
        span.duration_ns = rest.unsigned()?;
    }
    for span in &mut spans {
        span.thread = rest.unsigned()?.try_into().ok()?;
    }
    for (span, _) in spans.iter_mut().zip(flags).filter(|(_, flags)| *flags & PARENT != 0) {
        span.parent = Some(span.id.wrapping_sub(rest.signed()?));
    }
    for (span, _) in spans.iter_mut().zip(flags).filter(|(_, flags)| *flags & INDEX != 0) {
        span.index = Some(rest.unsigned()?);
    }
    for (flag, _, column) in MODEL_TIMES {
        let mut before = 0;
        for (span, _) in spans.iter_mut().zip(flags).filter(|(_, flags)| *flags & flag != 0) {
            before ^= rest.bits()?;
            *column(span) = Some(f64::from_bits(before));
        }
    }
    rest.0.is_empty().then_some(spans)
}

fn unsigned(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn signed(out: &mut Vec<u8>, difference: u64) {
    let value = difference as i64;
    unsigned(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// What has not been read yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn unsigned(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn signed(&mut self) -> Option<u64> {
        let value = self.unsigned()?;
        Some((value >> 1) ^ (value & 1).wrapping_neg())
    }

    fn bits(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Spans(#[serde(with = "super")] Vec<SpanReport>);

    fn any_span() -> impl Strategy<Value = SpanReport> {
        let finite = || proptest::option::of(proptest::num::f64::NORMAL | proptest::num::f64::ZERO);
        let of_tree =
            (any::<u64>(), any::<Option<u64>>(), "[a-z]{0,3}", "[a-zµ]{0,3}", any::<Option<u64>>(), finite(), finite());
        let numbers = any::<(u32, u64, u64, u64, u64, u64, bool)>();
        (of_tree, numbers).prop_map(|((id, parent, target, name, index, t, h), numbers)| {
            let (thread, start_ns, duration_ns, live_before, live_after, peak, open) = numbers;
            SpanReport {
                id,
                parent,
                target: target.into(),
                name: name.into(),
                index,
                t,
                h,
                thread,
                start_ns,
                duration_ns,
                live_before,
                live_after,
                peak,
                open,
            }
        })
    }

    proptest! {
        #[test]
        fn whatever_the_spans_they_come_back(spans in proptest::collection::vec(any_span(), 0..40)) {
            let spans = Spans(spans);
            let text = serde_json::to_string(&spans).unwrap();
            prop_assert_eq!(serde_json::from_str::<Spans>(&text).unwrap(), spans);
        }

        #[test]
        fn damage_is_an_error_and_no_panic(
            spans in proptest::collection::vec(any_span(), 1..5), count in any::<usize>(),
            bytes in proptest::collection::vec(any::<u8>(), 0..200), deflated in any::<bool>(),
        ) {
            let names: Vec<_> = spans.iter().map(|span| (span.target.to_string(), span.name.to_string())).collect();
            let columns = STANDARD.encode(if deflated { compress_to_vec(&bytes, EFFORT) } else { bytes });
            let table = serde_json::to_string(&Table { count: count % 30, names: names.clone(), columns: columns.clone() });
            let _ = serde_json::from_str::<Spans>(&table.unwrap());
            let table = serde_json::to_string(&Table { count: count.max(1 << 40), names, columns });
            prop_assert!(serde_json::from_str::<Spans>(&table.unwrap()).is_err());
        }
    }
}
