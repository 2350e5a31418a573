//! Rows in few bits, and increments that are kept so.

use super::arguments::CodedRows;
use super::machine::Machine;
use candle_core::Result;

impl CodedRows {
    /// Codes and scales of what is to be encoded, and where it leads.
    ///
    /// # Safety
    /// As for [`Machine::launch`].
    pub(super) unsafe fn encode_sum<M: Machine>(self, machine: &M) -> Result<()> {
        // SAFETY: the caller's; the second kernel reads what the first has written.
        unsafe {
            machine.launch(&self.sum())?;
            machine.launch(&self.encode())
        }
    }
}
