//! Adds up, without allocating any of it, what a solve would allocate: live bytes by part, and the highest moments.

use crate::account::Category;
use crate::memory::composition::{Composition, Part};

/// What is live at a moment of the imagined solve, and the peaks so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    now: Composition,
    peaks: Peaks,
    /// What was live where the stretch at hand began.
    from: Composition,
}

/// The highest moments.
#[derive(Clone, Copy, Debug, Default)]
struct Peaks {
    highest: Composition,
    owned: [i64; Category::ALL.len()],
    owned_total: i64,
}

impl Peaks {
    fn at(moment: &Composition) -> Self {
        let owned = Category::ALL.map(|category| moment.of(Part::Owned(category)));
        Self { highest: *moment, owned, owned_total: moment.owned() }
    }

    /// So many times the other, and itself.
    fn and(&self, times: i64, other: &Self) -> Self {
        Self {
            highest: self.highest.and(times, &other.highest),
            owned: std::array::from_fn(|n| self.owned[n] + times * other.owned[n]),
            owned_total: self.owned_total + times * other.owned_total,
        }
    }

    fn or(&self, other: &Self) -> Self {
        Self {
            highest: if other.highest.total() > self.highest.total() { other.highest } else { self.highest },
            owned: std::array::from_fn(|n| self.owned[n].max(other.owned[n])),
            owned_total: self.owned_total.max(other.owned_total),
        }
    }
}

/// What a part of a solve does to what is live, whatever that is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stretch {
    peaks: Peaks,
    end: Composition,
}

impl Tally {
    /// Bytes of `part` are allocated.
    pub(super) fn take(&mut self, part: Part, bytes: usize) {
        self.now.add(part, bytes as i64);
        self.note(&Peaks::at(&self.now));
    }

    /// Bytes of `part` are given back.
    pub(super) fn give(&mut self, part: Part, bytes: usize) {
        self.now.add(part, -(bytes as i64));
    }

    /// Bytes that were `from` are announced, or announced bytes are not any more.
    pub(super) fn rename(&mut self, from: Part, to: Part, bytes: usize) {
        self.give(from, bytes);
        self.take(to, bytes);
    }

    /// Something needs `bytes` of `part` for a moment.
    pub(super) fn pass(&mut self, part: Part, bytes: usize) {
        let mut moment = self.now;
        moment.add(part, bytes as i64);
        self.note(&Peaks::at(&moment));
    }

    /// What has happened since the last stretch ended.
    pub(super) fn stretch(&mut self) -> Stretch {
        let stretch = Stretch { peaks: self.peaks.and(-1, &Peaks::at(&self.from)), end: self.now.and(-1, &self.from) };
        (self.from, self.peaks) = (self.now, Peaks::at(&self.now));
        stretch
    }

    /// A stretch happens.
    pub(super) fn go(&mut self, stretch: &Stretch) {
        self.note(&Peaks::at(&self.now).and(1, &stretch.peaks));
        self.now = self.now.and(1, &stretch.end);
    }

    /// The stretches happen, one after another on one thread. On several no moment is above what is noted, however they
    /// fall together.
    pub(super) fn go_on(&mut self, stretches: &[Stretch], threads: usize) {
        if threads <= 1 {
            return stretches.iter().for_each(|stretch| self.go(stretch));
        }
        let largest = stretches.iter().map(|stretch| stretch.peaks).reduce(|a, b| a.or(&b)).unwrap_or_default();
        let ended = stretches.len().saturating_sub(threads);
        let (first, last) = stretches.split_at(ended);
        let after = |now: &Composition, done: &[Stretch]| done.iter().fold(*now, |now, done| now.and(1, &done.end));
        // All threads at their highest, at the beginning and with everything else done.
        let later = after(&self.now, first);
        for now in [self.now, later] {
            self.note(&Peaks::at(&now).and(threads as i64, &largest));
        }
        self.now = after(&later, last);
    }

    /// What was live when most was.
    pub(super) fn highest(&self) -> Composition {
        self.peaks.highest
    }

    /// The most that was announced of a category.
    pub(super) fn owned_peak(&self, category: Category) -> u64 {
        self.peaks.owned[category as usize].max(0) as u64
    }

    /// The most that was announced of all categories together.
    pub(super) fn owned_total_peak(&self) -> u64 {
        self.peaks.owned_total.max(0) as u64
    }

    fn note(&mut self, peaks: &Peaks) {
        self.peaks = self.peaks.or(peaks);
    }
}
