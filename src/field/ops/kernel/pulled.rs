//! Pullbacks of first layers with one or two inputs, and of layers with up to four outputs behind tanh, the batch in
//! the lanes: what is made of a tile is made in one pass over it, where kernels one by one would fetch it from the
//! second cache each time. The bits are those of `batch_lanes.rs`.

use super::batch_lanes::{add_column_sums_lanes_on, add_outer_lanes_on, multiply_lanes_on, of_outer, of_product};
use super::epilogue::{Epilogue, Then};
use super::held::Held;
use super::lanes::Lanes;
use super::machine::{Machine, Path, Work};
use super::packed::{PANEL, Packed};
use super::shallow::{BESIDE, read, times_slope_of_tanh, write};
use super::shares::shares;
use super::view::{View, ViewMut};
use crate::field::ops::Activation;

/// The cotangent of a product x Wᵀ, and where what it gives is added or written.
pub(crate) struct Pullback<'a, T> {
    /// `(out, rows)` here, `(rows, out)` in row-major tiles.
    pub(crate) g: View<'a, T>,
    /// `(in, rows)` or `(rows, in)`.
    pub(crate) x: View<'a, T>,
    /// Of W `(out, in)`, [straight](Packed::straight).
    pub(crate) b: &'a Packed<T>,
    /// What is done with g W.
    pub(crate) then: Then<'a, T>,
    /// To which Σ g is added.
    pub(crate) db: &'a mut [f32],
    /// To which gᵀ x is added.
    pub(crate) dw: ViewMut<'a, f32>,
    /// For what is done with g W, of the shape of x.
    pub(crate) out: ViewMut<'a, T>,
}

/// db += Σ g, dW += g xᵀ and out = then(Wᵀ g).
pub(crate) fn pull_lanes(pullback: Pullback<'_, f32>) {
    pull_lanes_on(f32::path(Path::best()), pullback);
}

/// [`pull_lanes`] on a path that this CPU has.
pub(super) fn pull_lanes_on(path: Path, Pullback { g, x, b, then, db, dw, out }: Pullback<'_, f32>) {
    let (shape, epilogue) = ((x.rows(), x.columns()), Epilogue { then, ..Epilogue::default() });
    assert_eq!((shape, g.columns()), ((out.rows(), out.columns()), x.columns()));
    assert_eq!(((b.depth(), b.columns()), (dw.rows(), dw.columns())), ((g.rows(), x.rows()), (g.rows(), x.rows())));
    assert!(db.len() == g.rows() && epilogue.fits(shape.0, shape.1, shape.0));
    // The portable path has no fused products where the target has none; threads share kernels one by one.
    let alone = shares(shape.0, of_product(shape.1, b, &epilogue)).or(shares(g.rows(), of_outer(&g, &x))).is_none();
    let in_one = path != Path::Portable && alone;
    let of_x = |kept: &View<'_, f32>| std::ptr::eq(kept.slice(), x.slice()) && kept.stride() == x.stride();
    match (&then, g.rows(), x.rows()) {
        (Then::TimesSlope(Activation::Tanh, kept), outputs @ 1..=4, _) if in_one && of_x(kept) => {
            add_column_sums_lanes_on(path, g, db);
            match outputs {
                1 => path.run(FewOutputs::<1> { g, x, b, dw, out }),
                2 => path.run(FewOutputs::<2> { g, x, b, dw, out }),
                3 => path.run(FewOutputs::<3> { g, x, b, dw, out }),
                _ => path.run(FewOutputs::<4> { g, x, b, dw, out }),
            }
        }
        // With three inputs or more kernels one by one are faster: what is added to out would be fetched too often.
        (Then::Nothing, _, 1) if in_one => path.run(FewInputs::<1> { g, x, b, db, dw, out }),
        (Then::Nothing, _, 2) if in_one => path.run(FewInputs::<2> { g, x, b, db, dw, out }),
        _ => {
            add_column_sums_lanes_on(path, g, db);
            add_outer_lanes_on(path, g, x, dw);
            multiply_lanes_on(path, g, b, &epilogue, out);
        }
    }
}

/// N features of g, and x that tanh has made: in a pass over x.
struct FewOutputs<'a, const N: usize> {
    g: View<'a, f32>,
    x: View<'a, f32>,
    b: &'a Packed<f32>,
    dw: ViewMut<'a, f32>,
    out: ViewMut<'a, f32>,
}

impl<const N: usize> Work for FewOutputs<'_, N> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let (columns, width) = (self.x.columns(), M::Lanes::WIDTH);
        for feature in 0..self.x.rows() {
            let panel = self.b.panel(feature / PANEL * PANEL);
            // SAFETY: the CPU has the instructions, says the caller; so many rows of the batch are left.
            unsafe {
                let w = std::array::from_fn(|n| M::Lanes::splat(panel.values[n * panel.width + feature % PANEL]));
                let (mut sums, mut at) = ([M::Lanes::splat(0.0); N], 0);
                while at + BESIDE * width <= columns {
                    self.block::<M::Lanes, BESIDE>(feature, at, width, w, &mut sums);
                    at += BESIDE * width;
                }
                while at < columns {
                    self.block::<M::Lanes, 1>(feature, at, width.min(columns - at), w, &mut sums);
                    at += width;
                }
                for (n, sum) in sums.into_iter().enumerate() {
                    self.dw.row(n)[feature] += sum.total();
                }
            }
        }
    }
}

impl<const N: usize> FewOutputs<'_, N> {
    /// A feature of x in `V` vectors of the batch from row `at` on, the last of which has `last` rows.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`; there are such rows.
    #[inline(always)]
    unsafe fn block<L: Lanes, const V: usize>(
        &mut self,
        feature: usize,
        at: usize,
        last: usize,
        w: [L; N],
        sums: &mut [L; N],
    ) {
        // SAFETY: rows of all operands are as long, `pull_lanes_on` has seen to that, and of the last vector no more is
        // touched than there is.
        unsafe {
            let x: [L; V] = read(self.x.row(feature), at, last);
            let mut back = [L::splat(0.0); V];
            for n in 0..N {
                let g: [L; V] = read(self.g.row(n), at, last);
                back = std::array::from_fn(|v| back[v].plus_product(w[n], g[v]));
                sums[n] = (0..V).fold(sums[n], |sum, v| sum.plus_product(g[v], x[v]));
            }
            write(times_slope_of_tanh(back, x), self.out.row(feature), at, last);
        }
    }
}

/// K features of x: in a pass over g.
struct FewInputs<'a, const K: usize> {
    g: View<'a, f32>,
    x: View<'a, f32>,
    b: &'a Packed<f32>,
    db: &'a mut [f32],
    dw: ViewMut<'a, f32>,
    out: ViewMut<'a, f32>,
}

impl<const K: usize> Work for FewInputs<'_, K> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(mut self) {
        let (columns, width, panel) = (self.g.columns(), M::Lanes::WIDTH, self.b.panel(0));
        (0..K).for_each(|k| self.out.row(k).fill(0.0));
        for feature in 0..self.g.rows() {
            // SAFETY: the CPU has the instructions, says the caller; so many rows of the batch are left.
            unsafe {
                let w = std::array::from_fn(|k| M::Lanes::splat(panel.values[feature * panel.width + k]));
                let zero = M::Lanes::splat(0.0);
                let (mut of_weight, mut of_bias, mut at) = ([zero; K], [zero; BESIDE], 0);
                while at + BESIDE * width <= columns {
                    let g = self.block::<M::Lanes, BESIDE>(feature, at, width, w, &mut of_weight);
                    of_bias = std::array::from_fn(|v| of_bias[v].plus(g[v]));
                    at += BESIDE * width;
                }
                for sum in &mut of_bias {
                    if at < columns {
                        let [g] = self.block::<M::Lanes, 1>(feature, at, width.min(columns - at), w, &mut of_weight);
                        *sum = sum.plus(g);
                        at += width;
                    }
                }
                for (dw, sum) in self.dw.row(feature).iter_mut().zip(of_weight) {
                    *dw += sum.total();
                }
                let [a, b, c, d] = of_bias;
                self.db[feature] += a.plus(b).plus(c.plus(d)).total();
            }
        }
    }
}

impl<const K: usize> FewInputs<'_, K> {
    /// A feature of g in `V` vectors of the batch from row `at` on, the last of which has `last` rows; gives them.
    ///
    /// # Safety
    /// As [`FewOutputs::block`].
    #[inline(always)]
    unsafe fn block<L: Lanes, const V: usize>(
        &mut self,
        feature: usize,
        at: usize,
        last: usize,
        w: [L; K],
        of_weight: &mut [L; K],
    ) -> [L; V] {
        // SAFETY: as there.
        unsafe {
            let g: [L; V] = read(self.g.row(feature), at, last);
            for k in 0..K {
                let x: [L; V] = read(self.x.row(k), at, last);
                of_weight[k] = (0..V).fold(of_weight[k], |sum, v| sum.plus_product(g[v], x[v]));
                let back: [L; V] = read(self.out.row(k), at, last);
                let back: [L; V] = std::array::from_fn(|v| back[v].plus_product(w[k], g[v]));
                write(back, self.out.row(k), at, last);
            }
            g
        }
    }
}
