//! What the forward pass keeps for the backward pass.

mod codec;
mod store;

pub use codec::{Codec, Entry, States};
pub(crate) use store::Trajectory;
