//! The pullback of normalisations.

use super::arguments::{AddRows, Element, NormGroups};
use super::machine::Machine;
use candle_core::Result;

impl NormGroups {
    /// The cotangent of x and, if they are wanted, Σ grad x̂ and Σ grad for each parameter, which are added to `sums`
    /// `(2, parameters)` in F32.
    ///
    /// # Safety
    /// As for [`Machine::launch`].
    pub(super) unsafe fn pull<M: Machine>(self, machine: &M, element: Element, sums: Option<u64>) -> Result<()> {
        let Some(sums) = sums else {
            // SAFETY: the caller's.
            return unsafe { machine.launch(&self.pull_groups(element)) };
        };
        let elements = 2 * self.parameters();
        let standards = machine.allocate(self.groups() as usize * Self::STANDARD)?;
        let partial = machine.allocate((self.chunks() * elements) as usize * 4)?;
        let call = Self { standards: M::address(&standards), partial: M::address(&partial), ..self };
        let rows = AddRows::new(call.partial, sums, (self.chunks(), elements));
        // SAFETY: the caller's; the standards are written before they are read, and the partial sums are as many.
        unsafe {
            machine.launch(&call.pull_groups(element))?;
            machine.launch(&call.sum_parameters(element))?;
            machine.launch(&rows.launch(Element::F32))
        }
    }
}
