//! Kernels on several threads: a batch that is not cut into tiles.
//!
//! Each thread makes rows of the result of its own, so that its bits are those of one thread.

use crate::workers::to_share;
use std::ops::Range;

/// Multiplications of a thread at least, pairs of BF16 counted as one: some seventy microseconds.
const LEAST: usize = 1 << 22;

/// What an activation of an element takes, in multiplications.
const ACTIVATION: usize = 16;

/// How much less a convolution is worth: between two of them frames are made, and the threads that Candle has for its own
/// ops are busy.
const OF_CONVOLUTION: usize = 4;

/// The parts of `rows` of a result, each of so many elements of so many multiplications, that threads take; nothing where
/// one thread is as good. All but the last are of `unit` rows, many times.
pub(super) fn shares(rows: usize, unit: usize, each: [usize; 2]) -> Option<Vec<Range<usize>>> {
    parts(rows, unit, each, LEAST)
}

/// The same for a convolution.
pub(super) fn shares_of_convolution(rows: usize, unit: usize, each: [usize; 2]) -> Option<Vec<Range<usize>>> {
    parts(rows, unit, each, OF_CONVOLUTION * LEAST)
}

fn parts(rows: usize, unit: usize, [elements, depth]: [usize; 2], least: usize) -> Option<Vec<Range<usize>>> {
    let worth = rows.saturating_mul(elements).saturating_mul(depth + ACTIVATION) / least;
    let parts = if worth > 1 { worth.min(rows / unit).min(to_share()) } else { 1 };
    let ends = |n: usize| if n == parts { rows } else { rows / unit * n / parts * unit };
    (parts > 1).then(|| (0..parts).map(|n| ends(n)..ends(n + 1)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::sharing;

    #[test]
    fn shares_follow_each_other_and_are_worth_it() {
        for (rows, unit, each, threads) in [(1024, 8, [256, 256], 3), (2049, 8, [64, 256], 5), (64, 8, [65_536, 2], 16)]
        {
            let parts = sharing(Some(threads), || shares(rows, unit, each)).unwrap();
            assert!(parts.len() <= threads && parts.iter().all(|part| part.len() >= unit), "{parts:?}");
            assert_eq!((parts[0].start, parts[parts.len() - 1].end), (0, rows));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start && pair[0].end.is_multiple_of(unit)));
        }
        assert_eq!(sharing(Some(2), || shares(128, 8, [256, 256])), None);
        assert_eq!(sharing(Some(1), || shares(1024, 8, [256, 256])), None);
        assert_eq!(sharing(Some(2), || shares(0, 8, [256, 256])), None);
    }
}
