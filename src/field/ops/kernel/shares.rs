//! Kernels on several threads, for a batch that is not cut into tiles.
//!
//! Each thread makes rows of the result of its own, so that its bits are those of one thread.

use super::epilogue::{Epilogue, Then};
use super::view::ViewMut;
use crate::workers::{share, to_share};
use std::ops::Range;

/// Multiplications of a thread at least, pairs of BF16 counted as one: some seventy microseconds.
pub(super) const OF_ROWS: usize = 1 << 22;

/// The same for convolutions, between which frames are made and the threads that Candle has for its own ops are busy,
/// and for products with the batch in the lanes, between which are small ones.
pub(super) const OF_OTHERS: usize = 4 * OF_ROWS;

/// Of what number of rows parts are multiples, the multiplications of a row, and those of a thread at least.
pub(super) type Worth = (usize, usize, usize);

/// The parts of `rows` that threads take; nothing where one thread is as good.
pub(super) fn shares(rows: usize, (unit, each, least): Worth) -> Option<Vec<Range<usize>>> {
    let worth = rows.saturating_mul(each) / least;
    let parts = if worth > 1 { worth.min(rows / unit).min(to_share()) } else { 1 };
    let end = |n: usize| if n == parts { rows } else { rows / unit * n / parts * unit };
    (parts > 1).then(|| (0..parts).map(|n| end(n)..end(n + 1)).collect())
}

/// The same, of which there is one at least.
pub(super) fn parts(rows: usize, worth: Worth) -> Vec<Range<usize>> {
    shares(rows, worth).unwrap_or_else(|| std::iter::once(0..rows).collect())
}

/// Has `make` make the rows of `out`, whole or in [`shares`].
pub(super) fn in_shares<T: Send>(
    out: ViewMut<'_, T>,
    worth: Worth,
    make: impl Fn(Range<usize>, ViewMut<'_, T>) + Sync,
) {
    match shares(out.rows(), worth) {
        Some(parts) => {
            let outs = out.split(parts.iter().map(Range::len));
            share(parts.into_iter().zip(outs), |(rows, out)| make(rows, out));
        }
        None => make(0..out.rows(), out),
    }
}

impl<T> Epilogue<'_, T> {
    /// What it takes for an element, in multiplications.
    pub(super) fn multiplications(&self) -> usize {
        if matches!(self.then, Then::Nothing) { 0 } else { 16 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::sharing;

    #[test]
    fn shares_follow_each_other_and_are_worth_it() {
        let of = |threads, rows, unit, each| sharing(Some(threads), || shares(rows, (unit, each, OF_ROWS)));
        for (rows, unit, each, threads) in [(1024, 8, 1 << 16, 3), (2049, 8, 1 << 14, 5), (64, 8, 1 << 20, 16)] {
            let parts = of(threads, rows, unit, each).unwrap();
            assert!(parts.len() <= threads && parts.iter().all(|part| part.len() >= unit), "{parts:?}");
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, rows));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start && pair[0].end.is_multiple_of(unit)));
        }
        // Too little for two; one thread; nothing at all.
        assert_eq!([of(2, 127, 8, 1 << 16), of(1, 1024, 8, 1 << 16), of(2, 0, 8, 1 << 16)], [None, None, None]);
        assert_eq!((of(4, 1024, 8, 0), of(4, 12, 8, 1 << 30)), (None, None));
    }
}
