//! What the forward pass keeps for the backward pass: which states (a schedule), and how each is encoded (a codec).

mod codec;
mod forecast;
mod image;
mod kept;
pub mod schedule;
mod second_level;
mod slots;
mod store;

pub use codec::{Codec, Encodes, Entry, Followed, Increment, Increments4, Increments8, Increments16, States};
pub(crate) use forecast::kept_bytes;
pub(crate) use image::Image;
pub(crate) use kept::{AtHand, Encoded, Kept};
pub use second_level::SecondLevel;
#[cfg(test)]
pub(crate) use second_level::Simulated;
pub(crate) use second_level::{Movers, TwoLevels};
pub(crate) use slots::Slots;
pub(crate) use store::Trajectory;

use schedule::Schedule;
use std::sync::Arc;

/// How a solve keeps its trajectory.
#[derive(Clone, Debug)]
pub(crate) struct Keeping {
    pub(crate) codec: Arc<dyn Codec>,
    pub(crate) schedule: Arc<dyn Schedule>,
    /// Whether the first backward pass frees the trajectory as it walks over it.
    pub(crate) consume: bool,
    /// How entries are shared out, if there is a second level.
    pub(crate) levels: Option<TwoLevels>,
}
