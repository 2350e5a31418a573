//! The pullback of planar units.

use super::arguments::{AddRows, Element, PlanarUnits};
use super::machine::Machine;
use candle_core::Result;

impl PlanarUnits {
    /// The cotangent of z and, if it is wanted, that of the units, which is added to `of_units` in F32.
    ///
    /// # Safety
    /// As for [`Machine::launch`].
    pub(super) unsafe fn pull<M: Machine>(self, machine: &M, element: Element, of_units: Option<u64>) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { machine.launch(&self.pull_points(element))? };
        let Some(of_units) = of_units else { return Ok(()) };
        let elements = self.count * (2 * self.dim + 1);
        let partial = machine.allocate((self.chunks() * elements) as usize * 4)?;
        let call = Self { partial: M::address(&partial), ..self };
        let rows = AddRows::new(call.partial, of_units, (self.chunks(), elements));
        // SAFETY: the caller's; the partial sums are as many.
        unsafe {
            machine.launch(&call.pull_units(element))?;
            machine.launch(&rows.launch(Element::F32))
        }
    }
}
