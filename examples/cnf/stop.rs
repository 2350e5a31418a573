//! Ctrl-C: the run ends after the iteration at hand, saves and says so. A second one ends it at once.

use candle_ode::{OdeError, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared by the signal's handler and the run: the number of iterations to stop after.
#[derive(Clone, Debug)]
pub struct Stop(Arc<AtomicU64>);

/// What a shell expects of a program that Ctrl-C ended.
pub const INTERRUPTED: u8 = 130;

impl Stop {
    /// Stops after that many iterations.
    pub fn after(iterations: u64) -> Self {
        Self(Arc::new(AtomicU64::new(iterations)))
    }

    /// Stops only when Ctrl-C is pressed.
    ///
    /// # Errors
    /// [`OdeError::Io`] when the system refuses the handler.
    pub fn on_ctrl_c() -> Result<Self> {
        let stop = Self::after(u64::MAX);
        let shared = stop.clone();
        let handler = move || {
            if shared.0.swap(0, Ordering::SeqCst) == 0 {
                std::process::exit(i32::from(INTERRUPTED));
            }
        };
        ctrlc::set_handler(handler).map_err(|error| OdeError::Io {
            path: "the handler of Ctrl-C".into(),
            source: std::io::Error::other(error.to_string()),
        })?;
        Ok(stop)
    }

    /// Whether a run with that many iterations behind it stops here.
    pub fn reached(&self, iteration: u64) -> bool {
        iteration >= self.0.load(Ordering::SeqCst)
    }
}
