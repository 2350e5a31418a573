//! Bytes by category: what this crate owns, counted exactly from its `bytes` events.

use crate::account::{Category, alive, alive_by_codec};
use crate::error::{OdeError, Result};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Codecs that have an account of their own; further ones share the last.
pub(super) const CODECS: usize = 8;
/// The name of the shared account.
const FURTHER: &str = "further codecs";

/// Bytes of ours that were born, or died if negative.
#[derive(Clone, Copy, Debug)]
pub(super) struct Announced {
    pub(super) category: Category,
    /// Of an entry of the trajectory, the number of its codec's account.
    pub(super) codec: Option<usize>,
    pub(super) delta: i64,
}

/// Owned bytes by [`Category`], live and at most.
///
/// Only buffers that are announced count ([`Owned`](crate::account::Owned)); what Candle allocates inside a vector
/// field does not. A recording begins with what is announced in the whole process at that moment; let no solve be
/// under way on another thread then.
///
/// ```
/// use candle_ode::account::Category;
/// use candle_ode::memory::Ledger;
///
/// let ledger = Ledger::default();
/// ledger.record(Category::Trajectory, 4096);
/// ledger.record(Category::Trajectory, -4096);
/// assert_eq!((ledger.live(Category::Trajectory), ledger.peak(Category::Trajectory)), (0, 4096));
/// ```
#[derive(Debug, Default)]
pub struct Ledger {
    accounts: [Account; Category::ALL.len()],
    total: Account,
    /// Of the trajectory, by codec, in the order in which they appear.
    codecs: Mutex<Vec<(String, Account)>>,
    unknown: AtomicU64,
}

impl Ledger {
    /// Adds `delta` bytes to a category, or takes them away if negative.
    pub fn record(&self, category: Category, delta: i64) {
        self.accounts[position(category)].add(delta);
        self.total.add(delta);
    }

    /// As [`record`](Self::record), with a codec where there is one.
    pub(super) fn record_announced(&self, Announced { category, codec, delta }: Announced) {
        self.record(category, delta);
        if let Some(number) = codec {
            self.codecs()[number].1.add(delta);
        }
    }

    /// The number of a codec's account, opened when it is first asked for.
    pub(super) fn number_of(&self, codec: &str) -> usize {
        number_of(&mut self.codecs(), codec)
    }

    /// Of the trajectory, for each codec that was seen its name, bytes that are live, and the most that were live at
    /// once since recording began.
    pub fn by_codec(&self) -> Vec<(String, u64, u64)> {
        self.codecs().iter().map(|(name, account)| (name.clone(), account.live(), account.highest())).collect()
    }

    /// Bytes of a category that are live.
    pub fn live(&self, category: Category) -> u64 {
        self.accounts[position(category)].live()
    }

    /// The most bytes of a category that were live at once, since the start or the last reset.
    pub fn peak(&self, category: Category) -> u64 {
        self.accounts[position(category)].peak()
    }

    /// Bytes of all categories that are live.
    pub fn live_total(&self) -> u64 {
        self.total.live()
    }

    /// The most bytes of all categories together that were live at once; at most the sum of the categories' peaks.
    pub fn peak_total(&self) -> u64 {
        self.total.peak()
    }

    /// As [`peak`](Self::peak), since recording began and whatever was reset since: what a report says.
    pub fn highest(&self, category: Category) -> u64 {
        self.accounts[position(category)].highest()
    }

    /// As [`peak_total`](Self::peak_total), since recording began and whatever was reset since.
    pub fn highest_total(&self) -> u64 {
        self.total.highest()
    }

    /// Starts every peak anew at what is live now.
    pub fn reset_peak(&self) {
        self.all(Account::reset_peak);
    }

    /// Begins with what is announced in the whole process, and forgets the highest peaks too: a recording begins.
    pub(super) fn restart(&self) {
        let mut total = 0;
        for category in Category::ALL {
            let live = alive(category) as i64;
            self.accounts[position(category)].restart(live);
            total += live;
        }
        self.total.restart(total);
        let mut codecs = self.codecs();
        codecs.reserve(CODECS);
        codecs.iter().for_each(|(_, account)| account.restart(0));
        for (codec, bytes) in alive_by_codec() {
            let number = number_of(&mut codecs, codec);
            let (_, account) = &codecs[number];
            account.restart(account.balance() + bytes);
        }
    }

    /// Whether the books are in order: nothing was given back that had not been announced.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] that names the category whose balance is negative (the profiler was installed after the
    /// buffer was made), or says that an event named no known category.
    pub fn check(&self) -> Result<()> {
        let hint = "install the profiler before the first tensor of a solve is made";
        for category in Category::ALL {
            let balance = self.accounts[position(category)].balance();
            if balance < 0 {
                let reason = format!("{category}: {} bytes more were given back than announced", -balance);
                return Err(OdeError::Meter { counter: "ledger", reason, hint });
            }
        }
        match self.unknown.load(Relaxed) {
            0 => Ok(()),
            n => {
                let reason = format!("{n} `bytes` events had no known category or no delta");
                let hint = "`category` must be a name from account::Category and `delta` an i64";
                Err(OdeError::Meter { counter: "ledger", reason, hint })
            }
        }
    }

    fn all(&self, change: impl Fn(&Account)) {
        self.accounts.iter().for_each(&change);
        self.codecs().iter().for_each(|(_, account)| change(account));
        change(&self.total);
    }

    fn codecs(&self) -> MutexGuard<'_, Vec<(String, Account)>> {
        self.codecs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an event that could not be read.
    pub(super) fn record_unknown(&self) {
        self.unknown.fetch_add(1, Relaxed);
    }
}

#[derive(Debug, Default)]
struct Account {
    live: AtomicI64,
    /// Since the last reset.
    peak: AtomicI64,
    /// The highest of the peaks before it.
    highest: AtomicI64,
}

impl Account {
    fn add(&self, delta: i64) {
        let live = self.live.fetch_add(delta, Relaxed) + delta;
        self.peak.fetch_max(live, Relaxed);
    }

    fn balance(&self) -> i64 {
        self.live.load(Relaxed)
    }

    fn live(&self) -> u64 {
        self.balance().max(0) as u64
    }

    fn peak(&self) -> u64 {
        self.peak.load(Relaxed).max(self.balance()).max(0) as u64
    }

    fn highest(&self) -> u64 {
        self.peak().max(self.highest.load(Relaxed).max(0) as u64)
    }

    /// Emptied before it is re-based, so that a change in between is not lost.
    fn reset_peak(&self) {
        let closed = self.peak.swap(i64::MIN, Relaxed);
        self.highest.fetch_max(closed, Relaxed);
        self.peak.fetch_max(self.balance(), Relaxed);
    }

    fn restart(&self, live: i64) {
        self.live.store(live, Relaxed);
        self.peak.store(live, Relaxed);
        self.highest.store(0, Relaxed);
    }
}

fn number_of(codecs: &mut Vec<(String, Account)>, codec: &str) -> usize {
    let name = match codecs.iter().position(|(name, _)| name == codec) {
        Some(number) => return number,
        None if codecs.len() < CODECS - 1 => codec,
        None if codecs.len() < CODECS => FURTHER,
        None => return CODECS - 1,
    };
    codecs.push((name.to_owned(), Account::default()));
    codecs.len() - 1
}

fn position(category: Category) -> usize {
    category as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_peak_is_the_peak_of_the_sum() {
        let ledger = Ledger::default();
        ledger.record(Category::Trajectory, 100);
        ledger.record(Category::Trajectory, -100);
        ledger.record(Category::Stages, 60);
        assert_eq!(ledger.peak_total(), 100);
        assert_eq!(ledger.live_total(), 60);
        ledger.reset_peak();
        assert_eq!(ledger.peak_total(), 60);
        assert_eq!(ledger.peak(Category::Trajectory), 0);
        assert_eq!(ledger.peak(Category::Stages), 60);
        assert_eq!((ledger.highest_total(), ledger.highest(Category::Trajectory)), (100, 100));
    }

    #[test]
    fn every_codec_has_its_own_account_and_those_that_are_too_many_share_one() {
        let entry = |ledger: &Ledger, codec: &str, delta: i64| {
            let codec = Some(ledger.number_of(codec));
            ledger.record_announced(Announced { category: Category::Trajectory, codec, delta });
        };
        let ledger = Ledger::default();
        for n in 0..CODECS as i64 + 3 {
            entry(&ledger, &format!("codec {n}"), n + 1);
        }
        entry(&ledger, "codec 2", -3);
        let found = ledger.by_codec();
        assert_eq!(found.len(), CODECS);
        assert_eq!(found[2], ("codec 2".to_owned(), 0, 3));
        assert_eq!(found[CODECS - 1], (FURTHER.to_owned(), 8 + 9 + 10 + 11, 38));
        assert_eq!(found.iter().map(|(_, live, _)| live).sum::<u64>(), ledger.live(Category::Trajectory));
    }

    #[test]
    fn every_category_has_its_own_account() {
        let ledger = Ledger::default();
        for (i, category) in Category::ALL.into_iter().enumerate() {
            ledger.record(category, i as i64 + 1);
        }
        for (i, category) in Category::ALL.into_iter().enumerate() {
            assert_eq!(position(category), i);
            assert_eq!(ledger.live(category), i as u64 + 1);
        }
    }

    #[test]
    fn giving_back_what_was_not_announced_is_found() {
        let ledger = Ledger::default();
        assert!(ledger.check().is_ok());
        ledger.record(Category::Casts, -8);
        let message = ledger.check().unwrap_err().to_string();
        assert!(message.contains("casts: 8 bytes"), "{message}");
        assert_eq!(ledger.live(Category::Casts), 0);
    }
}
