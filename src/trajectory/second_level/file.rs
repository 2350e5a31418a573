//! A second level of storage in a file.

use crate::error::{OdeError, Result};
use candle_core::{DType, Shape};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A tensor in a file.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) at: u64,
    pub(super) dtype: DType,
    pub(super) shape: Shape,
}

impl Page {
    pub(super) fn len(&self) -> usize {
        self.shape.elem_count() * self.dtype.size_in_bytes()
    }
}

/// A file of pages that are written, read and freed.
#[derive(Debug)]
pub(super) struct Pages {
    /// Where the file lies, for errors.
    directory: PathBuf,
    space: Mutex<Space>,
}

#[derive(Debug)]
struct Space {
    file: File,
    end: u64,
    /// Freed pages by their length: entries of a solve are as long as one another.
    free: BTreeMap<usize, Vec<u64>>,
}

impl Pages {
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let directory = directory.to_owned();
        let file =
            tempfile::tempfile_in(&directory).map_err(|source| OdeError::Io { path: directory.clone(), source })?;
        let space = Mutex::new(Space { file, end: 0, free: BTreeMap::new() });
        Ok(Self { directory, space })
    }

    pub(super) fn put(&self, bytes: &[u8]) -> Result<u64> {
        self.with(|Space { file, end, free }| {
            let freed = free.get_mut(&bytes.len()).and_then(Vec::pop);
            let at = freed.unwrap_or(*end);
            file.seek(SeekFrom::Start(at))?;
            file.write_all(bytes)?;
            *end = (*end).max(at + bytes.len() as u64);
            Ok(at)
        })
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        self.with(|Space { file, .. }| {
            let mut bytes = vec![0; len];
            file.seek(SeekFrom::Start(at))?;
            file.read_exact(&mut bytes)?;
            Ok(bytes)
        })
    }

    pub(super) fn free(&self, at: u64, len: usize) {
        let mut space = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        space.free.entry(len).or_default().push(at);
    }

    /// Where the file ends.
    #[cfg(test)]
    pub(super) fn end(&self) -> u64 {
        self.space.lock().unwrap_or_else(PoisonError::into_inner).end
    }

    fn with<T>(&self, run: impl FnOnce(&mut Space) -> io::Result<T>) -> Result<T> {
        let mut space = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        run(&mut space).map_err(|source| OdeError::Io { path: self.directory.clone(), source })
    }
}
