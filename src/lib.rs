//! Neural ODEs on Candle: mixed precision, a manual reverse pass, and an account of every byte.

pub mod account;
mod error;
pub mod memory;

pub use error::{OdeError, PassKind, Place, Result};
