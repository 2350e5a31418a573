//! The micro-kernel: a tile of sums in registers, Σ over k of a(m, k) b(k, n).
//!
//! Every sum is made in the order of k, one accumulation after another, whatever the height of the tile; so the bits of
//! a row do not depend on its neighbours.

use super::lanes::Lanes;
use super::scheme::Scheme;

/// The left-hand operand: element (m, k) at `rows[m] + k · step`; each is multiplied with a whole row of the right.
pub(super) struct Left<E, const M: usize> {
    pub(super) rows: [*const E; M],
    pub(super) step: usize,
}

impl<E, const M: usize> Left<E, M> {
    /// Rows that are `apart` elements apart.
    ///
    /// # Safety
    /// They lie in the memory that `at` leads into.
    #[inline(always)]
    pub(super) unsafe fn even(at: *const E, apart: usize, step: usize) -> Self {
        // SAFETY: the caller's.
        Self { rows: std::array::from_fn(|m| unsafe { at.add(m * apart) }), step }
    }
}

/// The right-hand operand: row k at `k · step`, read in vectors.
pub(super) struct Right<E> {
    pub(super) at: *const E,
    pub(super) step: usize,
}

/// `M` rows and `V` vectors of sums over `depth` elements, which begin at `start(row, vector)`; of the last vector of
/// the right only `last` lanes are read.
///
/// # Safety
/// The CPU has the instructions of `S`, and all that is named lies in memory.
#[inline(always)]
pub(super) unsafe fn tile<S: Scheme, const M: usize, const V: usize, const WHOLE: bool>(
    depth: usize,
    a: Left<S::Element, M>,
    b: Right<S::Element>,
    last: usize,
    start: impl Fn(usize, usize) -> S::Lanes,
) -> [[S::Lanes; V]; M] {
    let width = S::Lanes::WIDTH * S::DEPTH;
    unsafe {
        let mut sums: [[_; V]; M] = std::array::from_fn(|m| std::array::from_fn(|v| start(m, v)));
        let vectors = |k: usize| -> [S::Factor; V] {
            let row = b.at.add(k * b.step);
            std::array::from_fn(|v| {
                let at = row.add(v * width);
                if WHOLE || v + 1 < V { S::vector(at) } else { S::vector_first(at, last) }
            })
        };
        for k in 0..depth / S::DEPTH {
            let row = vectors(k);
            for (m, sums) in sums.iter_mut().enumerate() {
                let factor = S::everywhere(a.rows[m].add(k * a.step));
                for (sum, &vector) in sums.iter_mut().zip(&row) {
                    *sum = S::accumulate(*sum, factor, vector);
                }
            }
        }
        if S::DEPTH > 1 && !depth.is_multiple_of(S::DEPTH) {
            let k = depth / S::DEPTH;
            let row = vectors(k);
            for (m, sums) in sums.iter_mut().enumerate() {
                let factor = S::everywhere_last(a.rows[m].add(k * a.step));
                for (sum, &vector) in sums.iter_mut().zip(&row) {
                    *sum = S::accumulate(*sum, factor, vector);
                }
            }
        }
        sums
    }
}

/// Stores the sums, rows `stride` apart; of each row's last vector only the first `last` lanes.
///
/// # Safety
/// The CPU has the instructions of `L`; there is memory for `M` rows of `V` vectors, the last one that short.
#[inline(always)]
pub(super) unsafe fn store<L: Lanes, const M: usize, const V: usize>(
    sums: [[L; V]; M],
    to: *mut f32,
    stride: usize,
    last: usize,
) {
    for (m, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let to = to.add(m * stride + v * L::WIDTH);
                if v + 1 < V || last == L::WIDTH { sum.store(to) } else { sum.store_first(to, last) }
            }
        }
    }
}

/// Adds the sums, rows `stride` apart; of each row's last vector only the first `last` lanes.
///
/// # Safety
/// The CPU has the instructions of `L`; there is memory for `M` rows of `V` vectors, the last one that short.
#[inline(always)]
pub(super) unsafe fn add<L: Lanes, const M: usize, const V: usize>(
    sums: [[L; V]; M],
    to: *mut f32,
    stride: usize,
    last: usize,
) {
    for (m, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let to = to.add(m * stride + v * L::WIDTH);
                let count = if v + 1 < V { L::WIDTH } else { last };
                L::load_first(to, count).plus(sum).store_first(to, count);
            }
        }
    }
}

/// Runs `$body` with `$height` standing for the rows of the tallest tile of `$lanes` that has no more than `$left`,
/// which is at least 1; gives that height.
macro_rules! by_height {
    ($lanes:ty, $left:expr, $height:ident => $body:block) => {{
        let left = $left;
        if <$lanes>::HEIGHT >= 8 && left >= 8 {
            const $height: usize = 8;
            $body
            $height
        } else if <$lanes>::HEIGHT == 6 && left >= 6 {
            const $height: usize = 6;
            $body
            $height
        } else if left >= 4 {
            const $height: usize = 4;
            $body
            $height
        } else if left >= 2 {
            const $height: usize = 2;
            $body
            $height
        } else {
            const $height: usize = 1;
            $body
            $height
        }
    }};
}
pub(super) use by_height;
