//! Sums over a batch: of a matrix over its rows, of images over all but their channels.

use super::arguments::{AddRows, Element, PullColumns, SumChannels};
use super::machine::Machine;
use crate::field::ops::Activation;
use candle_core::Result;

/// A sum of dL/dθ in F32 that something is added to: `sum += factor · by · also · x`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sum {
    /// Where it is; 0 for nowhere: the flag alone is wanted.
    pub(super) at: u64,
    pub(super) factor: f32,
    /// A factor on the device; 0 for none.
    pub(super) by: u64,
    /// Becomes NaN if what is added is not finite; 0 for no flag.
    pub(super) flag: u64,
}

impl Sum {
    /// What is added as it is.
    pub(super) fn plain(at: u64) -> Self {
        Self { at, factor: 1.0, by: 0, flag: 0 }
    }

    /// The arguments that add the rows of x.
    pub(super) fn add_rows(&self, x: u64, rows: u32, count: u32) -> AddRows {
        AddRows { by: self.by, flag: self.flag, factor: self.factor, ..AddRows::new(x, self.at, (rows, count)) }
    }
}

/// A cotangent and what an activation kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    /// `(rows, columns)`
    pub(super) grad: u64,
    pub(super) rows: u32,
    pub(super) columns: u32,
    pub(super) activation: Activation,
    /// What f′ is a function of; 0 if that is 1.
    pub(super) kept: u64,
    /// Where grad · f′ goes; 0 for nowhere.
    pub(super) pulled: u64,
}

impl Columns {
    /// Pulls back, and leaves partial sums: their memory, and how many rows of `columns` they are.
    ///
    /// # Safety
    /// As for [`Machine::launch`].
    pub(super) unsafe fn pull<M: Machine>(&self, machine: &M, element: Element) -> Result<(M::Memory, u32)> {
        let &Self { grad, rows, columns, activation, kept, pulled } = self;
        let mut arguments = PullColumns::new(grad, (rows, columns), activation);
        let partial = machine.allocate((arguments.chunks() * columns) as usize * 4)?;
        (arguments.kept, arguments.pulled, arguments.partial) = (kept, pulled, M::address(&partial));
        // SAFETY: the caller's; the partial sums fit.
        unsafe { machine.launch(&arguments.launch(element))? };
        Ok((partial, arguments.chunks()))
    }
}

/// sum += Σ x over all but the channels, x `(rows, channels, inner)`.
///
/// # Safety
/// As for [`Machine::launch`].
pub(super) unsafe fn add_channels<M: Machine>(
    machine: &M,
    element: Element,
    x: u64,
    (rows, channels, inner): (u32, u32, u32),
    sum: Sum,
) -> Result<()> {
    let (partial, chunks) = if inner == 1 {
        let columns =
            Columns { grad: x, rows, columns: channels, activation: Activation::Identity, kept: 0, pulled: 0 };
        // SAFETY: the caller's.
        unsafe { columns.pull(machine, element)? }
    } else {
        let mut arguments = SumChannels::new(x, (rows, channels, inner));
        let partial = machine.allocate((arguments.chunks() * channels) as usize * 4)?;
        arguments.partial = M::address(&partial);
        // SAFETY: the caller's; the partial sums fit.
        unsafe { machine.launch(&arguments.launch(element))? };
        (partial, arguments.chunks())
    };
    let rows = sum.add_rows(M::address(&partial), chunks, channels);
    // SAFETY: the caller's; the partial sums are as many.
    unsafe { machine.launch(&rows.launch(Element::F32)) }
}
