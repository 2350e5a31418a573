//! What goes wrong in the tool: text for the person at the terminal.

/// Anything that says what it is about.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
