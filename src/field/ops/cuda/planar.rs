//! Planar units and their pullback.

use super::arguments::{AddRows, Element, Planar};
use super::machine::Machine;
use candle_core::Result;

impl Planar {
    /// f and the divergence of all rows.
    ///
    /// # Safety
    /// As for [`Machine::launch`].
    pub(super) unsafe fn value<M: Machine>(self, machine: &M, element: Element, both: u64) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { machine.launch(&Self { both, ..self }.value_launch(element)) }
    }

    /// The cotangent of z, and that of the units, which is added to a sum in F32, from that of both results.
    ///
    /// # Safety
    /// As for [`Machine::launch`].
    pub(super) unsafe fn pull<M: Machine>(
        self,
        machine: &M,
        element: Element,
        grad: u64,
        of_z: u64,
        of_units: u64,
    ) -> Result<()> {
        let elements = self.count * (2 * self.dim + 1);
        let partial = machine.allocate((self.chunks() * elements) as usize * 4)?;
        let call = Self { grad, of_z, partial: M::address(&partial), ..self };
        let rows = AddRows::new(call.partial, of_units, (self.chunks(), elements));
        // SAFETY: the caller's; the partial sums are as many.
        unsafe {
            machine.launch(&call.pull_points(element))?;
            machine.launch(&call.pull_units(element))?;
            machine.launch(&rows.launch(Element::F32))
        }
    }
}
