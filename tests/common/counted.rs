//! A memory that exists only as a number, so that tests know every byte of it.

use candle_ode::Result;
use candle_ode::memory::{Meter, Reading};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Live bytes and peak, moved by hand.
#[derive(Clone, Default)]
pub(crate) struct Counted(Arc<Mutex<Reading>>);

impl Counted {
    #[allow(dead_code, reason = "not every file moves it")]
    pub(crate) fn add(&self, delta: i64) {
        let mut reading = self.0.lock().unwrap();
        reading.live = reading.live.checked_add_signed(delta).unwrap();
        reading.peak = reading.peak.max(reading.live);
    }
}

impl Meter for Counted {
    fn name(&self) -> &'static str {
        "counted"
    }

    fn live(&self) -> Result<u64> {
        Ok(self.0.lock().unwrap().live)
    }

    fn peak(&self) -> Result<u64> {
        Ok(self.0.lock().unwrap().peak)
    }

    fn reset_peak(&self) -> Result<()> {
        let mut reading = self.0.lock().unwrap();
        reading.peak = reading.live;
        Ok(())
    }
}

/// Held by each test that makes a dispatcher: while another thread makes one, `tracing` may pass over a span or event.
#[allow(dead_code, reason = "not every file that counts by hand has several tests")]
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
