//! Files that are there whole or not at all.

use candle_ode::{OdeError, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Replaces the file at `path` in one go: whoever reads sees the old content or the new one.
///
/// # Errors
/// [`OdeError::Io`]; the old file is then as it was.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().map_or_else(OsString::new, OsString::from);
    name.push(".part");
    let part = path.with_file_name(name);
    write(&part, bytes)
        .and_then(|()| fs::rename(&part, path))
        .map_err(|source| OdeError::Io { path: path.to_owned(), source })
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
