//! The curves of counters beside the one that spans are measured with: sampled now and then, since a reading may cost
//! as much as a span.

use super::meter::Meter;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// From sample to sample at first, in nanoseconds. A reading takes 20 µs at most: under half a per cent.
const PERIOD: u64 = 5_000_000;
/// At most so many samples: then every other one goes, and the period doubles.
const SAMPLES: usize = 1024;

/// Live bytes over time, as columns of one length.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Curve {
    /// When, in nanoseconds since recording began.
    pub time_ns: Vec<u64>,
    /// What was live then.
    pub live: Vec<u64>,
}

impl Curve {
    /// Each moment with its bytes.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.time_ns.iter().copied().zip(self.live.iter().copied())
    }
}

/// A counter, where it stood at the start, and its curve so far.
pub(super) struct Sampled {
    pub(super) meter: Box<dyn Meter>,
    pub(super) baseline: u64,
    pub(super) curve: Curve,
}

/// Counters that are sampled together. All room is taken at the start.
pub(super) struct Curves {
    pub(super) all: Vec<Sampled>,
    /// Whether those are left out whose reading waits for the device.
    free_only: bool,
    period: u64,
    next: u64,
}

impl Curves {
    /// Of meters and where they stood at the start.
    pub(super) fn new(meters: Vec<(Box<dyn Meter>, u64)>, free_only: bool) -> Self {
        let room = || Vec::with_capacity(SAMPLES);
        let sampled = |(meter, baseline)| Sampled { meter, baseline, curve: Curve { time_ns: room(), live: room() } };
        Self { all: meters.into_iter().map(sampled).collect(), free_only, period: PERIOD, next: PERIOD }
    }

    /// Reads the counters, if it is time.
    pub(super) fn pass(&mut self, time: u64) -> Result<()> {
        if time < self.next {
            return Ok(());
        }
        self.next = time + self.period;
        let mut is_full = false;
        for Sampled { meter, curve, .. } in &mut self.all {
            if self.free_only && meter.synchronises() {
                continue;
            }
            curve.time_ns.push(time);
            curve.live.push(meter.live()?);
            is_full |= curve.time_ns.len() == SAMPLES;
        }
        if is_full {
            self.period *= 2;
            self.all.iter_mut().for_each(|sampled| sampled.curve.thin());
        }
        Ok(())
    }
}

impl Curve {
    /// Keeps every other sample.
    fn thin(&mut self) {
        for column in [&mut self.time_ns, &mut self.live] {
            let mut odd = true;
            column.retain(|_| {
                odd = !odd;
                !odd
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Clocked;

    impl Meter for Clocked {
        fn name(&self) -> &'static str {
            "clocked"
        }

        fn live(&self) -> Result<u64> {
            Ok(7)
        }

        fn peak(&self) -> Result<u64> {
            Ok(7)
        }

        fn reset_peak(&self) -> Result<()> {
            Ok(())
        }

        fn synchronises(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_curve_keeps_to_its_room_and_to_the_order_of_time() -> Result<()> {
        let mut curves = Curves::new(vec![(Box::new(Clocked), 3)], false);
        (0..100_000u64).try_for_each(|n| curves.pass(n * 1_000_000))?;
        let Curve { time_ns, live } = &curves.all[0].curve;
        assert!((SAMPLES / 2..SAMPLES).contains(&time_ns.len()), "{}", time_ns.len());
        assert_eq!((time_ns.len(), time_ns.capacity()), (live.len(), SAMPLES));
        assert!(time_ns.is_sorted() && time_ns[time_ns.len() - 1] > 99_000_000_000);
        Ok(())
    }

    #[test]
    fn a_timing_run_waits_for_no_device() -> Result<()> {
        let mut curves = Curves::new(vec![(Box::new(Clocked), 3)], true);
        curves.pass(PERIOD)?;
        assert_eq!(curves.all[0].curve, Curve::default());
        Ok(())
    }
}
