//! What the forward pass keeps for the backward pass: which states (a schedule), and how each is encoded (a codec).

mod codec;
mod forecast;
pub mod schedule;
mod slots;
mod store;

pub use codec::{Codec, Encodes, Entry, Increments4, Increments8, Increments16, States};
pub(crate) use forecast::kept_bytes;
pub(crate) use slots::{AtHand, Slots};
pub(crate) use store::Trajectory;

use schedule::{Schedule, kept};
use std::sync::Arc;

/// How a solve keeps its trajectory.
#[derive(Clone, Debug)]
pub(crate) struct Keeping {
    pub(crate) codec: Arc<dyn Codec>,
    pub(crate) schedule: Arc<dyn Schedule>,
    /// Whether the first backward pass frees the trajectory as it walks over it.
    pub(crate) consume: bool,
}

impl Keeping {
    /// Whether a solve of so many steps keeps the start of each of them but the first, each by itself.
    pub(crate) fn is_every_state(&self, steps: usize) -> bool {
        let scheduled = || kept(self.schedule.as_ref(), steps, Some(steps)).0;
        self.codec.encodes() == Encodes::States && scheduled().into_iter().eq(1..steps)
    }
}
