//! Files that are there whole or not at all: how checkpoints, reports and pictures are written.

use crate::{OdeError, Result};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Has `write` fill a file beside `path`, then puts it in place of `path`: whoever reads sees the old file or the new
/// one, also after a crash.
///
/// # Errors
/// [`OdeError::Io`] with `path`; the file that was there stays as it was.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let part = beside(path);
    let written = fill(&part, write).and_then(|()| fs::rename(&part, path));
    written.map_err(|source| {
        // Best effort: the error worth telling is the first one.
        let _ = fs::remove_file(&part);
        OdeError::Io { path: path.to_owned(), source }
    })
}

fn fill(part: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(part)?);
    write(&mut file)?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().map_or_else(OsString::new, OsString::from);
    name.push(format!(".{}.part", std::process::id()));
    path.with_file_name(name)
}

/// As [`write_atomically`], for bytes at hand.
///
/// # Errors
/// As there.
pub fn write_bytes_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |file| file.write_all(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_write_leaves_the_old_file_and_nothing_else() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write_bytes_atomically(&path, b"old")?;
        let error = write_atomically(&path, |file| {
            file.write_all(b"ne")?;
            Err(io::Error::other("disk full"))
        });
        assert!(error.unwrap_err().to_string().contains("disk full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write_bytes_atomically(&path, b"new")?;
        assert_eq!(fs::read(&path).unwrap(), b"new");
        Ok(())
    }
}
