//! Bytes we own, told to whoever listens: one `tracing` event `bytes { category, delta }` when a buffer is born and
//! one when it dies.
//!
//! The rooms below `solve` know nothing of meters and ledgers; they hold an [`Owned`] beside each buffer of ours, and
//! the memory layer adds up.

use std::fmt;

/// Target of every span and event of this crate.
pub const TARGET: &str = "candle_ode";

/// What a buffer of ours is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Category {
    /// Masters, as the optimiser sees them.
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
    /// Other buffers of ours.
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
    bytes: usize,
}

impl Owned {
    /// Announces `bytes` bytes of `category`.
    pub fn new(category: Category, bytes: usize) -> Self {
        emit(category, bytes as i64);
        Self { category, bytes }
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        emit(self.category, -(self.bytes as i64));
    }
}

fn emit(category: Category, delta: i64) {
    if delta != 0 {
        tracing::event!(name: "bytes", target: TARGET, tracing::Level::TRACE, category = category.name(), delta);
    }
}
