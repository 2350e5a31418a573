//! Adds up, without allocating any of it, what a solve would allocate: live bytes by part, and the highest moments.

use crate::account::Category;
use crate::memory::composition::{Composition, Part};

/// What is live at a moment of the imagined solve, and the peaks so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    now: Composition,
    highest: Composition,
    owned: [u64; Category::ALL.len()],
    owned_total: u64,
}

impl Tally {
    /// Bytes of `part` are allocated.
    pub(super) fn take(&mut self, part: Part, bytes: usize) {
        self.now.add(part, bytes as i64);
        self.note(self.now);
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
        self.note(moment);
    }

    /// What was live when most was.
    pub(super) fn highest(&self) -> Composition {
        self.highest
    }

    /// The most that was announced of a category.
    pub(super) fn owned_peak(&self, category: Category) -> u64 {
        self.owned[category as usize]
    }

    /// The most that was announced of all categories together.
    pub(super) fn owned_total_peak(&self) -> u64 {
        self.owned_total
    }

    fn note(&mut self, moment: Composition) {
        if moment.total() > self.highest.total() {
            self.highest = moment;
        }
        for category in Category::ALL {
            let peak = &mut self.owned[category as usize];
            *peak = (*peak).max(moment.of(Part::Owned(category)).max(0) as u64);
        }
        self.owned_total = self.owned_total.max(moment.owned().max(0) as u64);
    }
}
