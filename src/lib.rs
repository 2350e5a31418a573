//! Neural ODEs on Candle: mixed precision, a manual reverse pass, and an account of every byte.

pub mod account;
mod error;
mod field;
mod state;
mod time;

pub use error::{OdeError, PassKind, Place, Result};
pub use field::{Tangent, draw, ops, sink};
pub use state::State;
pub use time::{Time, TimeGrid};
