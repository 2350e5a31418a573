//! Rows of numbers from a text file: comma-separated values, with or without a header line.

use csv::{Position, ReaderBuilder, StringRecord, Trim};
use std::io::Read;

/// Numbers in rows of equal length.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    values: Vec<f64>,
    columns: usize,
}

impl Matrix {
    /// Rows one after the other, `columns` numbers each; what does not fill a row is left out.
    pub fn new(mut values: Vec<f64>, columns: usize) -> Self {
        values.truncate(values.len().checked_div(columns).map_or(0, |rows| rows * columns));
        Self { values, columns }
    }

    /// How many columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.values.len().checked_div(self.columns).unwrap_or(0)
    }

    /// The rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.columns.max(1))
    }

    /// The row of that number; empty behind the last.
    pub fn row(&self, row: usize) -> &[f64] {
        self.values.get(row * self.columns..(row + 1) * self.columns).unwrap_or_default()
    }

    /// The first columns only.
    pub fn first_columns(&self, columns: usize) -> Self {
        let columns = columns.min(self.columns);
        Self { values: self.rows().flat_map(|row| &row[..columns]).copied().collect(), columns }
    }
}

/// Reads comma-separated numbers. A first line without a single number in it is a header.
///
/// # Errors
/// What is wrong, with line and column counted from 1.
pub fn read_csv(mut reader: impl Read) -> Result<Matrix, String> {
    let mut text = Vec::new();
    reader.read_to_end(&mut text).map_err(|error| error.to_string())?;
    let mut reader =
        ReaderBuilder::new().has_headers(false).flexible(true).trim(Trim::All).from_reader(text.as_slice());
    let mut record = StringRecord::new();
    let mut values = Vec::new();
    let mut columns = None;
    loop {
        let at = |position: Option<&Position>, column: usize, reason: &str| {
            format!("line {}, column {}: {reason}", line(&text, position), column + 1)
        };
        match reader.read_record(&mut record) {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) => match error.kind() {
                csv::ErrorKind::Utf8 { pos, err } => return Err(at(pos.as_ref(), err.field(), "no UTF-8 text")),
                _ => return Err(error.to_string()),
            },
        }
        let header = columns.is_none() && record.iter().all(|cell| cell.parse::<f64>().is_err());
        let wanted = *columns.get_or_insert(record.len());
        if record.len() != wanted {
            let reason = format!("the line has {} columns, the first has {wanted}", record.len());
            return Err(at(record.position(), record.len().min(wanted), &reason));
        }
        if !header {
            for (column, cell) in record.iter().enumerate() {
                values.push(number(cell).map_err(|reason| at(record.position(), column, &reason))?);
            }
        }
    }
    match columns {
        Some(columns) if !values.is_empty() => Ok(Matrix::new(values, columns)),
        _ => Err("line 1, column 1: there are no numbers in this file".into()),
    }
}

/// The line a record is on; its position is where the one before ended, blank lines in between included.
fn line(text: &[u8], position: Option<&Position>) -> usize {
    let end = position.map_or(0, |position| position.byte() as usize).min(text.len());
    let blank = text[end..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    1 + text[..end + blank].iter().filter(|&&byte| byte == b'\n').count()
}

fn number(cell: &str) -> Result<f64, String> {
    match cell.parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(value),
        Ok(value) => Err(format!("`{cell}` is read as {value}; values must be finite")),
        Err(_) if cell.is_empty() => Err("the cell is empty; fill in or drop rows with missing values".into()),
        Err(_) => Err(format!("`{cell}` is not a number (a header, if any, is the first line and holds no numbers)")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &[u8]) -> String {
        read_csv(text).unwrap_err()
    }

    #[test]
    fn headers_are_optional() {
        let wanted = Matrix::new(vec![1.0, 2.0, 3e-1, -4.0], 2);
        for text in
            ["1,2\n3e-1,-4\n", "x,y\n1,2\n3e-1,-4", " 1 , 2 \r\n\r\n0.3,-4\r\n", "\"width, mm\",h\n1,2\n.3,\"-4\""]
        {
            assert_eq!(read_csv(text.as_bytes()), Ok(wanted.clone()), "{text}");
        }
    }

    #[test]
    fn malformed_cells_are_named_by_line_and_column() {
        assert!(error(b"1,2\n3,four\n").starts_with("line 2, column 2: `four` is not a number"));
        assert!(error(b"x,y\n1,2\n\n3,\n").starts_with("line 4, column 2: the cell is empty"));
        assert!(error(b"1,2\n3,inf\n").starts_with("line 2, column 2: `inf`"));
        assert!(error(b"1,2\n3,4\nNaN,1\n").starts_with("line 3, column 1: `NaN`"));
        assert!(error(b"1,y\n1,2\n").starts_with("line 1, column 2: `y` is not a number"));
        assert!(error(b"1,2\n3,4\n5\n").starts_with("line 3, column 2: the line has 1 columns, the first has 2"));
        assert!(error(b"1,2\n3,4,5\n").starts_with("line 2, column 3: the line has 3 columns, the first has 2"));
        assert!(error(b"1,2\n3,\xff\n").starts_with("line 2, column 2: no UTF-8"));
        assert!(error(b"").starts_with("line 1, column 1"));
        assert!(error(b"x,y\n").starts_with("line 1, column 1"));
    }
}
