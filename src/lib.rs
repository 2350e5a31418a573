//! Neural ODEs on Candle: mixed precision, a manual reverse pass, and an account of every byte.

pub mod account;
mod error;
mod file;
pub mod optim;

pub use error::{OdeError, PassKind, Place, Result};
