//! Row-major matrices in slices: a row is `columns` elements, the next begins `stride` further on.

use std::ops::Range;

/// A matrix to be read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a, T> {
    values: &'a [T],
    rows: usize,
    columns: usize,
    stride: usize,
}

/// A matrix to be written.
#[derive(Debug)]
pub(crate) struct ViewMut<'a, T> {
    values: &'a mut [T],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a, T> View<'a, T> {
    /// # Panics
    /// If a row is longer than the stride, or the slice too short: kernels read what a view says without looking.
    pub(crate) fn new(values: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(fits(values.len(), rows, columns, stride), "{rows} rows of {columns}, {stride} apart");
        Self { values, rows, columns, stride }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Row `n`.
    #[inline(always)]
    pub(crate) fn row(&self, n: usize) -> &'a [T] {
        &self.values[n * self.stride..][..self.columns]
    }

    /// Some rows, and of them some columns.
    pub(crate) fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        let start = rows.start * self.stride + columns.start;
        Self::new(&self.values[start..], rows.len(), columns.len(), self.stride)
    }

    pub(crate) fn slice(&self) -> &'a [T] {
        self.values
    }

    pub(super) fn as_ptr(&self) -> *const T {
        self.values.as_ptr()
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// # Panics
    /// As [`View::new`].
    pub(crate) fn new(values: &'a mut [T], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(fits(values.len(), rows, columns, stride), "{rows} rows of {columns}, {stride} apart");
        Self { values, rows, columns, stride }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// Row `n`.
    #[inline(always)]
    pub(crate) fn row(&mut self, n: usize) -> &mut [T] {
        &mut self.values[n * self.stride..][..self.columns]
    }

    /// Its rows in parts of so many, which follow each other.
    ///
    /// # Panics
    /// If that are not all rows there are.
    pub(super) fn split(mut self, rows: impl IntoIterator<Item = usize>) -> Vec<Self> {
        let parts = rows.into_iter().map(|rows| {
            let values = std::mem::take(&mut self.values);
            let (part, rest) = values.split_at_mut((rows * self.stride).min(values.len()));
            self.values = rest;
            Self::new(part, rows, self.columns, self.stride)
        });
        let parts: Vec<Self> = parts.collect();
        assert_eq!(parts.iter().map(Self::rows).sum::<usize>(), self.rows);
        parts
    }

    /// Its elements: all at once, or row by row where something lies between the rows.
    pub(super) fn pieces(&mut self) -> impl Iterator<Item = &mut [T]> {
        let (pieces, count, apart) = match self.stride == self.columns {
            true => (1, self.rows * self.columns, self.rows * self.columns),
            false => (self.rows, self.columns, self.stride),
        };
        self.values.chunks_mut(apart.max(1)).take(pieces).map(move |piece| &mut piece[..count])
    }

    pub(super) fn into_slice(self) -> &'a mut [T] {
        self.values
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [T] {
        self.values
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut T {
        self.values.as_mut_ptr()
    }
}

fn fits(len: usize, rows: usize, columns: usize, stride: usize) -> bool {
    let end = rows.checked_sub(1).map_or(Some(0), |before| before.checked_mul(stride)?.checked_add(columns));
    (columns <= stride || rows < 2) && end.is_some_and(|end| end <= len)
}
