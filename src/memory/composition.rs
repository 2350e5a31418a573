//! What live bytes are made of: Σ owned (announced) + Σ found (the rest, by where it was allocated) = the meter's live.

use crate::account::Category;
use serde::de::Error as _;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;

/// One kind of live bytes.
///
/// Owned bytes are exact: buffers that were announced ([`Owned`](crate::account::Owned)). The others are *found*: bytes
/// that the meter counts and nobody has announced, by the innermost span of this crate that was open on the thread when
/// they appeared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Announced by this crate.
    Owned(Category),
    /// Found in `field` and `linearise` spans: activations, Candle's graph of a linearisation.
    Field,
    /// Found in `pullback` spans: Candle's own cotangents.
    Pullback,
    /// Found in any other span of this crate: tensor handles, lists.
    Other,
    /// Found outside of this crate's spans: the loss, the data, other layers; and what a pass has handed out, y(T) and
    /// gradients.
    Outside,
    /// Live before recording began, and not given back since.
    Baseline,
}

impl Part {
    /// All, in the order reports print them.
    pub const ALL: [Self; Category::ALL.len() + 5] = {
        let mut all = [Self::Baseline; Category::ALL.len() + 5];
        let mut n = 0;
        while n < Category::ALL.len() {
            all[n] = Self::Owned(Category::ALL[n]);
            n += 1;
        }
        all[n] = Self::Field;
        all[n + 1] = Self::Pullback;
        all[n + 2] = Self::Other;
        all[n + 3] = Self::Outside;
        all
    };

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Owned(category) => category.name(),
            Self::Field => "field",
            Self::Pullback => "pullback",
            Self::Other => "other",
            Self::Outside => "outside",
            Self::Baseline => "baseline",
        }
    }

    /// The part of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|part| part.name() == name)
    }

    const fn position(self) -> usize {
        match self {
            Self::Owned(category) => category as usize,
            Self::Field => Category::ALL.len(),
            Self::Pullback => Category::ALL.len() + 1,
            Self::Other => Category::ALL.len() + 2,
            Self::Outside => Category::ALL.len() + 3,
            Self::Baseline => Category::ALL.len() + 4,
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Live bytes at one moment, by [`Part`].
///
/// They sum to what the meter said. A part is negative only where more was announced than exists, which is a bug of
/// whoever announced it.
///
/// In a file: an object of part names and bytes, zeros left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Composition([i64; Part::ALL.len()]);

impl Composition {
    /// Bytes of one part.
    pub fn of(&self, part: Part) -> i64 {
        self.0[part.position()]
    }

    /// All parts together: the meter's live bytes.
    pub fn total(&self) -> i64 {
        sum(&self.0)
    }

    /// All announced bytes together.
    pub fn owned(&self) -> i64 {
        sum(&self.0[..Category::ALL.len()])
    }

    /// Everything but what was there before: the bytes above the baseline.
    pub fn above_baseline(&self) -> i64 {
        self.total().saturating_sub(self.of(Part::Baseline))
    }

    /// Every part with its bytes, in the order reports print them.
    pub fn iter(&self) -> impl Iterator<Item = (Part, i64)> {
        Part::ALL.into_iter().map(|part| (part, self.of(part)))
    }

    pub(super) fn set(&mut self, part: Part, bytes: i64) {
        self.0[part.position()] = bytes;
    }

    pub(super) fn add(&mut self, part: Part, delta: i64) {
        self.0[part.position()] += delta;
    }

    /// Itself and so many times the other.
    pub(super) fn and(&self, times: i64, other: &Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] + times * other.0[n]))
    }
}

impl Serialize for Composition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (part, bytes) in self.iter().filter(|(_, bytes)| *bytes != 0) {
            map.serialize_entry(part.name(), &bytes)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Composition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut composition = Self::default();
        for (name, bytes) in BTreeMap::<String, i64>::deserialize(deserializer)? {
            composition.set(known::<D::Error>(&name)?, bytes);
        }
        Ok(composition)
    }
}

fn known<E: serde::de::Error>(name: &str) -> Result<Part, E> {
    Part::from_name(name).ok_or_else(|| E::custom(format!("`{}` is no kind of bytes", name.escape_debug())))
}

/// Live bytes over the recording: for each of at most about a thousand stretches of time its highest moment, so that
/// the peak is always among them.
///
/// In a file: columns (`time_ns`, and one of bytes for each part that is ever other than zero).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Columns", into = "Columns")]
pub struct Timeline(pub Vec<Moment>);

/// Live bytes at one moment of a recording.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// When, in nanoseconds since recording began.
    pub time_ns: u64,
    /// What was live.
    pub bytes: Composition,
}

#[derive(Serialize, Deserialize)]
struct Columns {
    time_ns: Vec<u64>,
    bytes: BTreeMap<String, Vec<i64>>,
}

impl From<Timeline> for Columns {
    fn from(Timeline(moments): Timeline) -> Self {
        let column = |part: Part| moments.iter().map(|moment| moment.bytes.of(part)).collect::<Vec<_>>();
        let columns = Part::ALL.into_iter().map(|part| (part.name().to_owned(), column(part)));
        let bytes = columns.filter(|(_, column)| column.iter().any(|bytes| *bytes != 0)).collect();
        Self { time_ns: moments.iter().map(|moment| moment.time_ns).collect(), bytes }
    }
}

impl TryFrom<Columns> for Timeline {
    type Error = serde_json::Error;

    fn try_from(columns: Columns) -> Result<Self, Self::Error> {
        let mut moments: Vec<_> =
            columns.time_ns.iter().map(|&time_ns| Moment { time_ns, ..Moment::default() }).collect();
        for (name, column) in &columns.bytes {
            let part = known::<serde_json::Error>(name)?;
            if column.len() != moments.len() {
                let (found, expected) = (column.len(), moments.len());
                let reason = format!("the timeline has {expected} moments and {found} values of `{part}`");
                return Err(serde_json::Error::custom(reason));
            }
            moments.iter_mut().zip(column).for_each(|(moment, bytes)| moment.bytes.set(part, *bytes));
        }
        Ok(Self(moments))
    }
}

/// Of bytes that a damaged report may have made up.
fn sum(bytes: &[i64]) -> i64 {
    bytes.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_has_a_place_of_its_own() {
        for (n, part) in Part::ALL.into_iter().enumerate() {
            assert_eq!((part.position(), Part::from_name(part.name())), (n, Some(part)));
        }
    }

    #[test]
    fn a_timeline_survives_its_columns() -> serde_json::Result<()> {
        let mut bytes = Composition::default();
        bytes.set(Part::Field, 7);
        bytes.set(Part::Other, -3);
        let timeline =
            Timeline(vec![Moment { time_ns: 1, bytes }, Moment { time_ns: 5, bytes: Composition::default() }]);
        let text = serde_json::to_string(&timeline)?;
        assert_eq!(text, r#"{"time_ns":[1,5],"bytes":{"field":[7,0],"other":[-3,0]}}"#);
        assert_eq!(serde_json::from_str::<Timeline>(&text)?, timeline);
        for bad in [r#"{"time_ns":[1],"bytes":{"field":[7,0]}}"#, r#"{"time_ns":[1],"bytes":{"hats":[7]}}"#] {
            assert!(serde_json::from_str::<Timeline>(bad).is_err(), "{bad}");
        }
        Ok(())
    }
}
