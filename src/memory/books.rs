//! Keeps the books of a recording: splits the meter's live bytes into what was announced and what was found, at the
//! moment of the peak and over time.
//!
//! Let L be live bytes and O the announced ones. Whatever L − O gains between two boundaries is put to the place (the
//! innermost span of this crate on the thread at hand) in which it appeared; what it loses is taken from that place
//! first, then from the place that gained last, and from the baseline at last. So a tensor that is born inside a field
//! and announced afterwards moves from `field` to its category, and a graph that is dropped after its pullback leaves
//! `field`. What is left of a pass when it is over has been handed out: it moves to `outside`, where it will be lost.

use super::composition::{Composition, Moment, Part};
use super::ledger::{Announced, CODECS, Ledger};
use super::meter::Reading;
use crate::account::Category;

/// Stretches of time that a timeline is made of: as many as there is room for, at least half of it.
const STRETCHES: usize = 1024;

/// Where found bytes may have appeared, the latest first when nothing is known.
const PLACES: [Part; 4] = [Part::Pullback, Part::Field, Part::Other, Part::Outside];

/// A moment, and what the trajectory was made of, by the numbers of the ledger's codecs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) moment: Moment,
    pub(super) codecs: [i64; CODECS],
}

impl Seen {
    fn total(&self) -> i64 {
        self.moment.bytes.total()
    }
}

/// The books of one recording.
pub(super) struct Books {
    now: Composition,
    codecs: [i64; CODECS],
    /// The places, the one that gained last first.
    latest: [Part; PLACES.len()],
    peak: Seen,
    stretches: Vec<Seen>,
    /// Nanoseconds that a stretch lasts.
    length: u64,
}

impl Books {
    /// Empty books with all the room they will need.
    pub(super) fn new() -> Self {
        Self {
            now: Composition::default(),
            codecs: [0; CODECS],
            latest: PLACES,
            peak: Seen::default(),
            stretches: Vec::with_capacity(STRETCHES),
            length: 1 << 16,
        }
    }

    /// Begins with what is live already: what the ledger knows is announced, the rest is the baseline.
    pub(super) fn open(&mut self, live: u64, ledger: &Ledger) {
        for category in Category::ALL {
            self.now.set(Part::Owned(category), ledger.live(category) as i64);
        }
        for (bytes, (_, live, _)) in self.codecs.iter_mut().zip(ledger.by_codec()) {
            *bytes = live as i64;
        }
        self.now.set(Part::Baseline, live as i64 - self.now.owned());
        self.peak = self.moment(0);
        self.stretches.push(self.peak);
    }

    /// A boundary at `time`, until which `place` was the innermost; `announced` bytes were born or died there.
    pub(super) fn settle(&mut self, time: u64, reading: Reading, place: Part, announced: Option<Announced>) {
        // The peak comes first: it lies before the boundary. What is announced now was made in this window.
        let mut surplus = reading.peak as i64 - self.now.total();
        if surplus >= 0 {
            let mut seen = self.moment(time);
            if let Some(Announced { category, codec, delta }) = announced {
                let born = delta.clamp(0, surplus);
                seen.moment.bytes.add(Part::Owned(category), born);
                codec.into_iter().for_each(|number| seen.codecs[number] += born);
                surplus -= born;
            }
            seen.moment.bytes.add(place, surplus);
            self.see(seen);
        }
        if let Some(Announced { category, codec, delta }) = announced {
            self.now.add(Part::Owned(category), delta);
            codec.into_iter().for_each(|number| self.codecs[number] += delta);
        }
        match reading.live as i64 - self.now.total() {
            0 => {}
            gained @ 1.. => self.gain(place, gained),
            lost => self.lose(place, -lost),
        }
        self.see(self.moment(time));
    }

    fn moment(&self, time_ns: u64) -> Seen {
        Seen { moment: Moment { time_ns, bytes: self.now }, codecs: self.codecs }
    }

    /// What is live now.
    pub(super) fn now(&self) -> Composition {
        self.now
    }

    /// What there is of these parts is the caller's from now on.
    pub(super) fn hand_out(&mut self, parts: &[Part]) {
        for &part in parts {
            let bytes = self.now.of(part).max(0);
            self.now.add(part, -bytes);
            self.now.add(Part::Outside, bytes);
        }
    }

    /// The highest moment, and the highest of each stretch of time.
    pub(super) fn close(self) -> (Seen, Vec<Seen>) {
        (self.peak, self.stretches)
    }

    fn gain(&mut self, place: Part, bytes: i64) {
        self.now.add(place, bytes);
        if let Some(at) = self.latest.iter().position(|latest| *latest == place) {
            self.latest[..=at].rotate_right(1);
        }
    }

    fn lose(&mut self, place: Part, mut bytes: i64) {
        for from in std::iter::once(place).chain(self.latest) {
            let taken = bytes.min(self.now.of(from).max(0));
            self.now.add(from, -taken);
            bytes -= taken;
        }
        // What was there before may go, but not below nothing: more was announced than there is, and `other` says so.
        let taken = bytes.min(self.now.of(Part::Baseline).max(0));
        self.now.add(Part::Baseline, -taken);
        self.now.add(Part::Other, taken - bytes);
    }

    /// Notes a moment: the highest of all, and of its stretch.
    fn see(&mut self, seen: Seen) {
        if seen.total() > self.peak.total() {
            self.peak = seen;
        }
        match self.stretches.last_mut() {
            Some(last) if last.moment.time_ns / self.length == seen.moment.time_ns / self.length => {
                if seen.total() > last.total() {
                    *last = seen;
                }
            }
            _ => {
                if self.stretches.len() == STRETCHES {
                    self.coarsen();
                }
                self.stretches.push(seen);
            }
        }
    }

    /// Joins stretches two by two until half of the room is free.
    fn coarsen(&mut self) {
        while self.stretches.len() > STRETCHES / 2 {
            self.length *= 2;
            let length = self.length;
            self.stretches.dedup_by(|later, kept| {
                let same = later.moment.time_ns / length == kept.moment.time_ns / length;
                if same && later.total() > kept.total() {
                    *kept = *later;
                }
                same
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn books(live: u64) -> Books {
        let mut books = Books::new();
        books.open(live, &Ledger::default());
        books
    }

    fn announced(category: Category, delta: i64) -> Option<Announced> {
        Some(Announced { category, codec: None, delta })
    }

    fn at(live: u64, peak: u64) -> Reading {
        Reading { live, peak }
    }

    #[test]
    fn bytes_born_in_a_field_and_announced_later_move_to_their_category() {
        let mut books = books(1000);
        books.settle(1, at(1500, 1900), Part::Field, None);
        assert_eq!((books.now().of(Part::Field), books.peak.moment.bytes.of(Part::Field)), (500, 900));
        books.settle(2, at(1500, 1500), Part::Other, announced(Category::Stages, 500));
        assert_eq!((books.now().of(Part::Field), books.now().of(Part::Owned(Category::Stages))), (0, 500));
        // The tensor dies before its announcement does, or after it: neither shows anywhere else.
        books.settle(3, at(1200, 1500), Part::Other, announced(Category::Stages, -300));
        books.settle(4, at(1200, 1200), Part::Other, announced(Category::Stages, -200));
        assert_eq!((books.now().of(Part::Other), books.now().above_baseline()), (200, 200));
        books.settle(5, at(1000, 1200), Part::Other, None);
        assert_eq!((books.now().of(Part::Other), books.now().total()), (0, 1000));
    }

    #[test]
    fn a_graph_dropped_after_its_pullback_leaves_field_and_a_cotangent_leaves_pullback() {
        let mut books = books(0);
        books.settle(1, at(800, 800), Part::Field, None);
        books.settle(2, at(860, 1000), Part::Pullback, None);
        books.settle(3, at(860, 860), Part::Other, announced(Category::Cotangents, 60));
        assert_eq!((books.now().of(Part::Field), books.now().of(Part::Pullback)), (800, 0));
        books.settle(4, at(60, 860), Part::Other, None);
        assert_eq!((books.now().of(Part::Field), books.now().owned(), books.now().total()), (0, 60, 60));
        assert_eq!(books.peak.moment.bytes.of(Part::Pullback), 200);
    }

    #[test]
    fn what_is_handed_out_is_lost_outside() {
        let mut books = books(0);
        books.settle(1, at(500, 500), Part::Outside, None);
        books.settle(2, at(560, 560), Part::Field, None);
        books.settle(3, at(600, 600), Part::Other, None);
        books.hand_out(&[Part::Other]);
        assert_eq!((books.now().of(Part::Field), books.now().of(Part::Outside)), (60, 540));
        books.settle(4, at(560, 600), Part::Outside, None);
        assert_eq!((books.now().of(Part::Field), books.now().of(Part::Outside)), (60, 500));
    }

    #[test]
    fn a_buffer_announced_in_the_window_of_its_birth_is_owned_at_the_peak() {
        let mut books = books(0);
        books.settle(1, at(100, 130), Part::Other, announced(Category::Casts, 100));
        let (peak, _) = books.close();
        assert_eq!((peak.moment.bytes.owned(), peak.moment.bytes.of(Part::Other), peak.total()), (100, 30, 130));
    }

    #[test]
    fn what_was_announced_and_is_not_there_shows_as_less_than_nothing() {
        let mut books = books(10);
        books.settle(1, at(10, 10), Part::Outside, announced(Category::Parameters, 25));
        assert_eq!((books.now().of(Part::Baseline), books.now().of(Part::Other), books.now().total()), (0, -15, 10));
    }

    #[test]
    fn the_timeline_keeps_to_its_room_and_keeps_the_peak() {
        let mut books = books(0);
        for n in 0..200_000u64 {
            let live = (n * 7919) % 100_000;
            books.settle(n * 1_000_000, at(live, live), Part::Outside, None);
        }
        let (peak, moments) = books.close();
        assert!((STRETCHES / 4..=STRETCHES).contains(&moments.len()), "{}", moments.len());
        assert!(moments.is_sorted_by_key(|seen| seen.moment.time_ns));
        assert!(moments.contains(&peak) && peak.total() == 99_999);
    }
}
