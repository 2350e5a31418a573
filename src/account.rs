//! Bytes we own, told to whoever listens: one `tracing` event `bytes { category, delta }` when a buffer is born and
//! one when it dies; of an entry of the trajectory it tells the `codec` too.
//!
//! The rooms below `solve` know nothing of meters and ledgers; they hold an [`Owned`] beside each buffer of ours, and
//! the memory layer adds up. What is alive is summed up here too, listened to or not, so that a ledger that begins late
//! knows where it begins.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// Target of every span and event of this crate.
pub const TARGET: &str = "candle_ode";

/// What a buffer of ours is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Category {
    /// Masters of the fields that are alive, as the optimiser sees them: once each, however many fields hold one.
    Parameters,
    /// Parameters and inputs in the compute dtype, made once per solve.
    Casts,
    /// What the forward pass keeps for the backward pass.
    Trajectory,
    /// Stage states and slopes of the step at hand.
    Stages,
    /// λ and the cotangents of the step at hand.
    Cotangents,
    /// The sums of dL/dθ.
    Gradients,
    /// Moments of an optimiser.
    Optimizer,
    /// Other buffers of ours: tables of times, residuals of rounding, copies of parameters that checks are made on.
    Scratch,
}

impl Category {
    /// Every category, in the order reports print them.
    pub const ALL: [Self; 8] = [
        Self::Parameters,
        Self::Casts,
        Self::Trajectory,
        Self::Stages,
        Self::Cotangents,
        Self::Gradients,
        Self::Optimizer,
        Self::Scratch,
    ];

    /// The name in events and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parameters => "parameters",
            Self::Casts => "casts",
            Self::Trajectory => "trajectory",
            Self::Stages => "stages",
            Self::Cotangents => "cotangents",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Scratch => "scratch",
        }
    }

    /// The category of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|category| category.name() == name)
    }
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Says that some bytes are ours for as long as it lives.
#[derive(Debug)]
#[must_use = "the bytes are given back when this is dropped"]
pub struct Owned {
    category: Category,
    codec: Option<&'static str>,
    bytes: usize,
}

impl Owned {
    /// Announces `bytes` bytes of `category`.
    pub fn new(category: Category, bytes: usize) -> Self {
        Self { category, codec: None, bytes }.born()
    }

    /// Announces an entry of the trajectory, and the codec that it is encoded by.
    pub fn entry(codec: &'static str, bytes: usize) -> Self {
        Self { category: Category::Trajectory, codec: Some(codec), bytes }.born()
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn born(self) -> Self {
        self.tell(self.bytes as i64);
        self
    }

    fn tell(&self, delta: i64) {
        if delta == 0 {
            return;
        }
        let category = self.category.name();
        ALIVE[self.category as usize].fetch_add(delta, Relaxed);
        // A thread that is ending asks no more.
        let _ = HERE.try_with(|here| {
            let (alive, highest) = here[self.category as usize].get();
            here[self.category as usize].set((alive + delta, highest.max(alive + delta)));
        });
        match self.codec {
            None => tracing::event!(name: "bytes", target: TARGET, tracing::Level::TRACE, category, delta),
            Some(codec) => {
                count_entry(codec, delta);
                tracing::event!(name: "bytes", target: TARGET, tracing::Level::TRACE, category, codec, delta);
            }
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.tell(-(self.bytes as i64));
    }
}

thread_local! {
    /// By category, bytes that this thread has announced less those that it has given back, and the most of that since
    /// [`at_most`] was asked.
    static HERE: [Cell<(i64, i64)>; Category::ALL.len()] = const { [const { Cell::new((0, 0)) }; Category::ALL.len()] };
}

/// Bytes that are announced and not given back, by category, and those of the trajectory by codec.
static ALIVE: [AtomicI64; Category::ALL.len()] = [const { AtomicI64::new(0) }; Category::ALL.len()];
static ENTRIES: Mutex<Vec<(&'static str, i64)>> = Mutex::new(Vec::new());

fn count_entry(codec: &'static str, delta: i64) {
    let mut entries = ENTRIES.lock().unwrap_or_else(PoisonError::into_inner);
    match entries.iter_mut().find(|(name, _)| *name == codec) {
        Some((_, bytes)) => *bytes += delta,
        None => entries.push((codec, delta)),
    }
}

/// Bytes of `category` that are announced in the whole process and not given back.
pub(crate) fn alive(category: Category) -> u64 {
    ALIVE[category as usize].load(Relaxed).max(0) as u64
}

/// Bytes of `category` that this thread has announced, less those that it has given back.
pub(crate) fn alive_here(category: Category) -> i64 {
    HERE.with(|here| here[category as usize].get().0)
}

/// Runs something, and says how much more of `category` was announced at most meanwhile, by this thread.
pub(crate) fn at_most<T>(category: Category, run: impl FnOnce() -> T) -> (T, usize) {
    let before = alive_here(category);
    HERE.with(|here| here[category as usize].set((before, before)));
    let done = run();
    let highest = HERE.with(|here| here[category as usize].get().1);
    (done, usize::try_from(highest - before).unwrap_or(0))
}

/// Of the trajectory, the bytes of each codec that was ever used.
pub(crate) fn alive_by_codec() -> Vec<(&'static str, i64)> {
    ENTRIES.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
