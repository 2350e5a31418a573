//! How far states that were reconstructed backwards are off: ‖reconstructed − kept‖ / ‖kept‖ in the 2-norm.

use crate::State;
use crate::error::Result;
use crate::field::on_host;
use crate::state::larger;
use crate::stats::Counters;
use candle_core::Tensor;

/// The drifts of one pass, read from the device once.
#[derive(Default)]
pub(super) struct Drifts(Vec<Tensor>);

impl Drifts {
    /// Compares a state with the one that it should be.
    pub(super) fn compare(&mut self, reconstructed: &State, kept: &State) -> Result<()> {
        let mut sums: Option<[Tensor; 2]> = None;
        for (reconstructed, kept) in reconstructed.tensors().iter().zip(kept.tensors()) {
            let square = |x: &Tensor| x.sqr()?.sum_all();
            let here = [square(&(reconstructed - kept)?)?, square(kept)?];
            sums = Some(match sums {
                None => here,
                Some([difference, size]) => [(difference + &here[0])?, (size + &here[1])?],
            });
        }
        if let Some(sums) = sums {
            self.0.push(Tensor::stack(&sums, 0)?);
        }
        Ok(())
    }

    /// Leaves the largest with the counters.
    pub(super) fn report(self, counters: &Counters) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut largest = 0.0_f64;
        for pair in on_host(&Tensor::stack(&self.0, 0)?)?.to_vec1::<f64>()?.chunks(2) {
            let [difference, size] = [pair[0], pair[1]].map(f64::sqrt);
            // Of a state that is zero there is no relative error: its absolute one is told.
            let drift = if size == 0.0 { difference } else { difference / size };
            largest = larger(largest, drift);
        }
        counters.drifted(largest);
        Ok(())
    }
}
