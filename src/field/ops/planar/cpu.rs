//! Planar units on the CPU, chunk by chunk of the rows and unit by unit: nothing is made that is as large as both.

use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::cpu::{CHUNK, Element, Kernel, sum, vectorised};
use crate::field::ops::real::Real;

/// The units of a pass.
#[derive(Clone, Copy)]
pub(super) struct Units<'a, W> {
    /// `(M, 2 dim + 1)`, a row w, b, u for each.
    pub(super) weights: &'a [W],
    pub(super) dim: usize,
    pub(super) activation: Activation,
}

/// Weights of a unit, and u·w.
#[derive(Clone, Copy)]
struct Unit<'a, W> {
    w: &'a [W],
    b: W,
    u: &'a [W],
    along: W,
}

impl<'a, W: Real> Units<'a, W> {
    /// f of all rows and, behind it, their divergences.
    pub(super) fn value<T: Element<Wide = W>>(&self, z: &[T]) -> Vec<T> {
        let dim = self.dim;
        let rows = z.len() / dim;
        let mut both = vec![T::from_f64(0.0); rows * (dim + 1)];
        let (f, divergence) = both.split_at_mut(rows * dim);
        let (f, divergence) = (f.chunks_mut(CHUNK * dim), divergence.chunks_mut(CHUNK));
        for (z, (f, divergence)) in z.chunks(CHUNK * dim).zip(f.zip(divergence)) {
            let z = Columns::of(z, dim);
            let (mut sums, mut traces) = (Columns::zeros(z.rows, dim), Columns::zeros(z.rows, 1));
            let mut at = Activated::new(z.rows);
            for unit in self.each() {
                at.find(self.activation, unit, &z, false);
                let Activated { value, slope, .. } = &at;
                vectorised(AddUnit { unit, value, slope, sums: &mut sums.values, traces: &mut traces.values });
            }
            T::narrow(&sums.row_major(self.mean()), f);
            T::narrow(&traces.row_major(self.mean()), divergence);
        }
        both
    }

    /// The cotangents of z and, behind them, of the units, if those are wanted, from that of both results.
    pub(super) fn pull<T: Element<Wide = W>>(&self, z: &[T], grad: &[T], of_units: bool) -> Vec<W> {
        let dim = self.dim;
        let mut pulled = vec![W::ZERO; z.len() + if of_units { self.weights.len() } else { 0 }];
        let (of_z, of_units) = pulled.split_at_mut(z.len());
        let (g, t) = grad.split_at(z.len());
        let cotangents = g.chunks(CHUNK * dim).zip(t.chunks(CHUNK));
        for ((z, of_z), (g, t)) in z.chunks(CHUNK * dim).zip(of_z.chunks_mut(CHUNK * dim)).zip(cotangents) {
            let z = Columns::of(z, dim);
            let (g, t) = (Columns::of(g, dim).times(self.mean()), Columns::of(t, 1).times(self.mean()));
            let mut sums = Columns::zeros(z.rows, dim);
            let mut at = Activated::new(z.rows);
            let mut of_units = of_units.chunks_exact_mut(2 * dim + 1);
            for unit in self.each() {
                at.find(self.activation, unit, &z, true);
                let (z, g, t) = (&z.values, &g.values, &t.values);
                vectorised(PullUnit { unit, at: &mut at, z, g, t, of_z: &mut sums.values, of_unit: of_units.next() });
            }
            of_z.copy_from_slice(&sums.row_major(W::ONE));
        }
        pulled
    }

    fn each(&self) -> impl Iterator<Item = Unit<'a, W>> + use<'a, W> {
        let dim = self.dim;
        self.weights.chunks_exact(2 * dim + 1).map(move |row| {
            let (w, u) = (&row[..dim], &row[dim + 1..]);
            Unit { w, b: row[dim], u, along: w.iter().zip(u).fold(W::ZERO, |sum, (w, u)| sum + *w * *u) }
        })
    }

    /// 1/M
    fn mean(&self) -> W {
        W::of((2 * self.dim + 1) as f64 / self.weights.len() as f64)
    }
}

/// Some rows of a matrix, column by column, so that vectors hold rows.
struct Columns<W> {
    values: Vec<W>,
    rows: usize,
}

impl<W: Real> Columns<W> {
    fn of<T: Element<Wide = W>>(matrix: &[T], columns: usize) -> Self {
        let mut wide = vec![W::ZERO; matrix.len()];
        T::widen(matrix, &mut wide);
        let rows = matrix.len() / columns;
        let values = (0..columns).flat_map(|column| wide[column..].iter().step_by(columns).copied()).collect();
        Self { values, rows }
    }

    fn zeros(rows: usize, columns: usize) -> Self {
        Self { values: vec![W::ZERO; rows * columns], rows }
    }

    fn times(mut self, factor: W) -> Self {
        self.values.iter_mut().for_each(|x| *x *= factor);
        self
    }

    /// The rows one after another, times a factor.
    fn row_major(&self, factor: W) -> Vec<W> {
        let columns = self.values.len() / self.rows;
        let mut rows = vec![W::ZERO; self.values.len()];
        for (column, values) in self.values.chunks_exact(self.rows).enumerate() {
            rows[column..].iter_mut().step_by(columns).zip(values).for_each(|(to, x)| *to = factor * *x);
        }
        rows
    }
}

/// h, h′ and h″ of a unit at some rows.
struct Activated<W> {
    value: Vec<W>,
    slope: Vec<W>,
    curvature: Vec<W>,
}

impl<W: Real> Activated<W> {
    fn new(rows: usize) -> Self {
        let zeros = || vec![W::ZERO; rows];
        Self { value: zeros(), slope: zeros(), curvature: zeros() }
    }

    /// h″ only if it is wanted.
    fn find(&mut self, activation: Activation, Unit { w, b, .. }: Unit<'_, W>, z: &Columns<W>, curved: bool) {
        let Self { value, slope, curvature } = self;
        vectorised(Preactivate { w, b, z: &z.values, p: value });
        if activation.keeps() == Keeps::Value {
            activation.value_in_place(value);
            slope.copy_from_slice(value);
        } else {
            slope.copy_from_slice(value);
            activation.value_in_place(value);
        }
        if curved {
            curvature.copy_from_slice(slope);
            activation.curvature_in_place(curvature);
        }
        activation.slope_in_place(slope);
    }
}

/// p ← w·z + b
struct Preactivate<'a, W> {
    w: &'a [W],
    b: W,
    z: &'a [W],
    p: &'a mut [W],
}

impl<W: Real> Kernel for Preactivate<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.p.fill(self.b);
        add_scaled(self.w, self.z, self.p);
    }
}

/// sums += u h and traces += (u·w) h′
struct AddUnit<'a, W> {
    unit: Unit<'a, W>,
    value: &'a [W],
    slope: &'a [W],
    sums: &'a mut [W],
    traces: &'a mut [W],
}

impl<W: Real> Kernel for AddUnit<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { unit, value, slope, sums, traces } = self;
        spread(unit.u, value, sums);
        spread(&[unit.along], slope, traces);
    }
}

/// The pullback of a unit; of what it finds for p it leaves p̄ in place of h″.
struct PullUnit<'a, W> {
    unit: Unit<'a, W>,
    at: &'a mut Activated<W>,
    z: &'a [W],
    g: &'a [W],
    t: &'a [W],
    of_z: &'a mut [W],
    of_unit: Option<&'a mut [W]>,
}

impl<W: Real> Kernel for PullUnit<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { unit: Unit { w, u, along, .. }, at, z, g, t, of_z, of_unit } = self;
        let Activated { value, slope, curvature: p } = at;
        let rows = t.len();
        // Where the divergence has no cotangent, u·w may be infinite.
        p.iter_mut().zip(t).for_each(|(p, t)| *p *= if *t == W::ZERO { W::ZERO } else { along * *t });
        for (u, g) in u.iter().zip(g.chunks_exact(rows)) {
            p.iter_mut().zip(&*slope).zip(g).for_each(|((p, slope), g)| *p += *u * *g * *slope);
        }
        spread(w, p, of_z);
        let Some(of_unit) = of_unit else { return };
        let of_traces = sum(slope, t, |slope, t| slope * t);
        let (of_w, of_rest) = of_unit.split_at_mut(w.len());
        for ((of_w, u), z) in of_w.iter_mut().zip(u).zip(z.chunks_exact(rows)) {
            *of_w += sum(p, z, |p, z| p * z) + *u * of_traces;
        }
        of_rest[0] += sum(p, p, |p, _| p);
        for ((of_u, w), g) in of_rest[1..].iter_mut().zip(w).zip(g.chunks_exact(rows)) {
            *of_u += sum(value, g, |value, g| value * g) + *w * of_traces;
        }
    }
}

/// to += Σ cₙ xₙ, the columns of x as long as `to`.
#[inline(always)]
fn add_scaled<W: Real>(c: &[W], x: &[W], to: &mut [W]) {
    for (c, x) in c.iter().zip(x.chunks_exact(to.len())) {
        to.iter_mut().zip(x).for_each(|(to, x)| *to += *c * *x);
    }
}

/// toₙ += cₙ x, the columns of `to` as long as x.
#[inline(always)]
fn spread<W: Real>(c: &[W], x: &[W], to: &mut [W]) {
    for (c, to) in c.iter().zip(to.chunks_exact_mut(x.len())) {
        to.iter_mut().zip(x).for_each(|(to, x)| *to += *c * *x);
    }
}
