//! Reports on disk: written whole or not at all, and read with an error that says what is wrong with the file.

use super::report::{MemoryReport, SCHEMA};
use crate::error::{OdeError, Result};
use serde::Deserialize;
use serde_json::error::Category;
use std::fs;
use std::io::Write;
use std::path::Path;

/// What every version of the format begins with.
const OPENING: &str = r#"{"schema":"candle-ode/memory-report/"#;
/// What every version's name begins with.
const FAMILY: &str = "candle-ode/memory-report/";

impl MemoryReport {
    /// The format of [`json`](Self::json) as a JSON Schema (draft 2020-12).
    pub const JSON_SCHEMA: &str = include_str!("report/schema.json");

    /// The report as JSON, which [`load`](Self::load) reads.
    pub fn json(&self) -> String {
        // Every map of a report has text for keys, and writing to memory does not fail.
        serde_json::to_string(self).unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// Writes every format into a folder, which is made if need be: `report.json` ([`json`](Self::json)), `report.csv`
    /// ([`csv`](Self::csv)), `ledger.csv` ([`ledger_csv`](Self::ledger_csv)), `trace.json`
    /// ([`chrome_trace`](Self::chrome_trace)), `report.html` ([`html`](Self::html)).
    ///
    /// # Errors
    ///
    /// [`OdeError::Io`] if the folder or a file cannot be written; each file is there whole or as it was.
    pub fn save_all(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(|source| OdeError::Io { path: folder.to_owned(), source })?;
        self.save(folder.join("report.json"))?;
        let rest = [
            ("report.csv", self.csv()),
            ("ledger.csv", self.ledger_csv()),
            ("trace.json", self.chrome_trace()),
            ("report.html", self.html()),
        ];
        rest.iter()
            .try_for_each(|(name, text)| crate::file::write_bytes_atomically(&folder.join(name), text.as_bytes()))
    }

    /// Writes the report as JSON: beside `path` first, then renamed, so that a crash leaves an earlier file whole.
    ///
    /// # Errors
    ///
    /// [`OdeError::Io`] if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        crate::file::write_atomically(path.as_ref(), |file| {
            serde_json::to_writer(&mut *file, self)?;
            file.write_all(b"\n")
        })
    }

    /// Reads a report.
    ///
    /// # Errors
    ///
    /// [`OdeError::Io`] if the file cannot be read; [`OdeError::Format`] if it is not a memory report, is truncated,
    /// is damaged (with line and column), or is of another version of the format.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|source| OdeError::Io { path: path.to_owned(), source })?;
        Self::parse(&bytes, path)
    }

    /// The report that `bytes` are; `path` is where they are from, for errors.
    ///
    /// # Errors
    ///
    /// [`OdeError::Format`] as [`load`](Self::load).
    pub fn parse(bytes: &[u8], path: impl AsRef<Path>) -> Result<Self> {
        parse(bytes).map_err(|reason| OdeError::Format { path: path.as_ref().to_owned(), reason })
    }
}

/// Only what tells the version.
#[derive(Deserialize)]
struct Head {
    schema: String,
}

fn parse(bytes: &[u8]) -> std::result::Result<MemoryReport, String> {
    let head: Head = match serde_json::from_slice(bytes) {
        Ok(head) => head,
        Err(error) => return Err(diagnose(bytes, &error)),
    };
    if head.schema == SCHEMA {
        let report = serde_json::from_slice::<MemoryReport>(bytes);
        report.map(MemoryReport::with_passes).map_err(|error| format!("is a damaged memory report: {error}"))
    } else if head.schema.starts_with(FAMILY) {
        let found = head.schema;
        Err(format!("is of another schema version: `{found}`, and this program reads `{SCHEMA}`; record it again"))
    } else {
        Err(format!("is not a memory report: its schema is `{}`", head.schema.escape_debug()))
    }
}

/// Tells what a file is that cannot be read as a report.
fn diagnose(bytes: &[u8], error: &serde_json::Error) -> String {
    let start: Vec<u8> = bytes.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).take(OPENING.len()).collect();
    if start.is_empty() {
        return "is truncated: it is empty".to_owned();
    }
    if !OPENING.as_bytes().starts_with(&start) {
        return "is not a memory report: it does not begin with this format's `schema`".to_owned();
    }
    match error.classify() {
        Category::Eof => format!("is truncated: it ends after {} bytes in the middle of the report", bytes.len()),
        _ => format!("is a damaged memory report: {error}"),
    }
}
