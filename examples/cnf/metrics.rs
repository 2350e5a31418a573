//! `metrics.csv`: one row per iteration.

use candle_ode::{OdeError, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// One row; the fields are the columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Iteration, from 1.
    pub iter: u64,
    /// Mean negative log-likelihood of the batch, in nats and the data's coordinates.
    pub train_nll: f64,
    /// The same for the validation points, where they were looked at.
    pub val_nll: Option<f64>,
    /// Seconds from the batch to the loss.
    pub forward_s: f64,
    /// Seconds from the loss to the gradients.
    pub backward_s: f64,
    /// Most bytes alive at once during the iteration.
    pub peak_bytes: u64,
    /// Bytes the forward pass kept for the backward pass.
    pub trajectory_bytes: u64,
    /// The largest scaled cotangent that adjoint scaling allows itself after this iteration: a power of two, 1 until an
    /// overflow has taught it to leave headroom, and without scaling.
    pub scale: f64,
}

/// The file, open at its end.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    writer: csv::Writer<File>,
}

impl Metrics {
    /// Starts the file, with the rows up to `iteration` of what was there: none for a fresh run (0). A resumed run
    /// thus repeats no row, also when rows were written after its last checkpoint.
    ///
    /// # Errors
    /// [`OdeError::Io`] and, for rows that cannot be read, [`OdeError::Format`].
    pub fn open(path: &Path, iteration: u64) -> Result<Self> {
        let kept = if iteration == 0 { Vec::new() } else { read(path)? };
        let mut writer = csv::Writer::from_writer(Vec::new());
        for row in kept.into_iter().filter(|row| row.iter <= iteration) {
            writer.serialize(row).map_err(|error| failed(path, error))?;
        }
        let mut bytes = writer.into_inner().map_err(|error| failed(path, error.into_error().into()))?;
        if bytes.is_empty() {
            bytes = b"iter,train_nll,val_nll,forward_s,backward_s,peak_bytes,trajectory_bytes,scale\n".to_vec();
        }
        candle_ode::file::write_bytes_atomically(path, &bytes)?;
        let file = File::options().append(true).open(path);
        let file = file.map_err(|source| OdeError::Io { path: path.to_owned(), source })?;
        let writer = csv::WriterBuilder::new().has_headers(false).from_writer(file);
        Ok(Self { path: path.to_owned(), writer })
    }

    /// Adds a row; on disk at once.
    ///
    /// # Errors
    /// [`OdeError::Io`].
    pub fn push(&mut self, row: &Row) -> Result<()> {
        let written = self.writer.serialize(row).and_then(|()| self.writer.flush().map_err(csv::Error::from));
        written.map_err(|error| failed(&self.path, error))
    }
}

/// The rows of a metrics file.
///
/// # Errors
/// [`OdeError::Io`] and, with line and column, [`OdeError::Format`].
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let bytes = fs::read(path).map_err(|source| OdeError::Io { path: path.to_owned(), source })?;
    // A row cut short by a crash has no end of line.
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let mut reader = csv::Reader::from_reader(&bytes[..whole]);
    reader.deserialize().map(|row| row.map_err(|error| failed(path, error))).collect()
}

fn failed(path: &Path, error: csv::Error) -> OdeError {
    let path = path.to_owned();
    if !error.is_io_error() {
        return OdeError::Format { path, reason: error.to_string() };
    }
    match error.into_kind() {
        csv::ErrorKind::Io(source) => OdeError::Io { path, source },
        other => OdeError::Format { path, reason: format!("{other:?}") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn row(iter: u64) -> Row {
        let val_nll = iter.is_multiple_of(2).then_some(4.0 / 3.0);
        Row {
            iter,
            train_nll: 0.1 * iter as f64,
            val_nll,
            forward_s: 0.25,
            backward_s: 1e-9,
            peak_bytes: 1 << 40,
            trajectory_bytes: 7,
            scale: 65536.0,
        }
    }

    #[test]
    fn resumed_file_has_every_row_once() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.csv");
        let mut metrics = Metrics::open(&path, 0)?;
        for iter in 1..=5 {
            metrics.push(&row(iter))?;
        }
        // A crash in the middle of a row.
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"6,0.6").unwrap();
        let mut metrics = Metrics::open(&path, 3)?;
        for iter in 4..=6 {
            metrics.push(&row(iter))?;
        }
        assert_eq!(read(&path)?, (1..=6).map(row).collect::<Vec<_>>());
        let text = fs::read_to_string(&path).unwrap();
        let header = "iter,train_nll,val_nll,forward_s,backward_s,peak_bytes,trajectory_bytes,scale";
        assert_eq!(text.lines().next(), Some(header));
        assert_eq!(text.lines().nth(1), Some("1,0.1,,0.25,1e-9,1099511627776,7,65536.0"));
        assert_eq!(text.lines().count(), 7);
        Metrics::open(&path, 0)?;
        assert_eq!(fs::read_to_string(&path).unwrap().trim_end(), header);
        Ok(())
    }

    #[test]
    fn unreadable_rows_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.csv");
        fs::write(
            &path,
            "iter,train_nll,val_nll,forward_s,backward_s,peak_bytes,trajectory_bytes,scale\n1,x,,1,1,1,1,1\n",
        )
        .unwrap();
        let error = Metrics::open(&path, 1).unwrap_err().to_string();
        assert!(error.contains("line: 2") && error.contains("train_nll") || error.contains("field 1"), "{error}");
        assert!(matches!(read(&dir.path().join("missing.csv")), Err(OdeError::Io { .. })));
    }
}
