//! What a solve has done so far, forward and backward.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counts of one solve. They go on counting through its backward passes. Where a solve runs in tiles, each is
        /// that of the tile with most: an evaluation of all tiles counts once.
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        #[non_exhaustive]
        pub struct Stats {
            $($(#[$doc])* pub $name: usize,)*
            /// How far the states that the last backward pass reconstructed were off, at the start or where it met a
            /// kept state: the largest ‖reconstructed y − y‖ / ‖y‖. `None` unless it reconstructed states.
            pub drift: Option<f64>,
        }

        impl Stats {
            /// The larger of each count.
            pub(crate) fn largest(self, other: Self) -> Self {
                let drift = self.drift.into_iter().chain(other.drift).reduce(f64::max);
                Self { $($name: self.$name.max(other.$name),)* drift }
            }
        }

        /// The same counts while the solve is alive, shared by its passes.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicUsize,)*
            drift: Mutex<Option<f64>>,
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.load(Ordering::Relaxed),)* drift: *self.lock_drift() }
            }

            pub(crate) fn drifted(&self, drift: f64) {
                *self.lock_drift() = Some(drift);
            }

            fn lock_drift(&self) -> MutexGuard<'_, Option<f64>> {
                self.drift.lock().unwrap_or_else(PoisonError::into_inner)
            }
        }
    };
}

counters! {
    /// Evaluations of the vector field, those inside linearisations not included.
    evaluations,
    /// Linearisations of the vector field.
    linearizations,
    /// Pullbacks through a linearisation.
    pullbacks,
    /// Steps of the forward pass that were kept.
    accepted_steps,
    /// Steps of the forward pass that were thrown away by a controller.
    rejected_steps,
    /// Accepted steps whose error estimate lies above the tolerance, because it is made of the rounding of f.
    floored_steps,
    /// Steps computed again in the backward pass because their start was not kept.
    recomputed_steps,
    /// Steps back that [`Backsolve`](crate::Backsolve) has chosen by tolerances of its own.
    back_steps,
    /// Of the steps back that it has tried, those that were thrown away.
    rejected_back_steps,
    /// Steps done again because something overflowed, in either pass.
    redone_steps,
    /// Whole backward passes done again because something overflowed.
    redone_passes,
    /// Changes of the scale by dynamic adjoint scaling.
    scale_changes,
    /// Parameters and inputs cast to a compute dtype.
    casts,
    /// Times the model was built.
    builds,
    /// Builds of the model over copies of its parameters, to see whether it writes to them: once in a field's life.
    probes,
    /// Evaluations made twice to see whether the field is a pure function.
    determinism_checks,
}

pub(crate) fn count(counter: &AtomicUsize) {
    add(counter, 1);
}

pub(crate) fn add(counter: &AtomicUsize, n: usize) {
    counter.fetch_add(n, Ordering::Relaxed);
}
