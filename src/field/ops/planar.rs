//! Planar units with their divergence: f(z) = 1/M Σⱼ uⱼ h(wⱼ·z + bⱼ), tr ∂f/∂z = 1/M Σⱼ h′(wⱼ·z + bⱼ) uⱼ·wⱼ, j = 1 … M.
//!
//! On the CPU, and on CUDA in few dimensions, both are one node of Candle's graph, which keeps z and the weights, and of a batch never more than a unit of
//! some rows: with pⱼ = wⱼ·z + bⱼ, aⱼ = uⱼ·wⱼ and cotangents g of M f and t of M tr the pullback is
//!
//! p̄ⱼ = h′(pⱼ) uⱼ·g + h″(pⱼ) aⱼ t,  z̄ = Σⱼ wⱼ p̄ⱼ,
//! w̄ⱼ = Σ p̄ⱼ z + uⱼ Σ h′(pⱼ) t,  b̄ⱼ = Σ p̄ⱼ,  ūⱼ = Σ h(pⱼ) g + wⱼ Σ h′(pⱼ) t, the sums over the batch.

use super::Activation;
use super::activation::in_place::Keeps;
use super::cpu::{CHUNK, Element, Kernel, dense, dense_wide, sum, vectorised, with_element};
use super::linear::affine;
use super::precomputed::{Precomputed, hand_over};
use super::real::Real;
use super::weight::give;
use crate::Time;
use crate::error::OdeError;
use crate::field::Tangent;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Module, Result, Shape, Tensor, WithDType, bail};

/// The mean of planar units, f(z) = 1/M Σⱼ uⱼ h(wⱼ·z + bⱼ), whose divergence is known.
///
/// Shapes: z and f `(…, dim)`, the divergence `(…)`. All three weights get gradients, wherever they come from: of a flow
/// they are what a hypernetwork makes of the time. F16, BF16, F32 and F64; the sums over units and batch are made in F32, and
/// rounded once.
///
/// Cost: on the CPU, and on CUDA up to eight dimensions, one pass for f and the divergence, and one for their pullback, which
/// evaluates h again, so that nothing but z and the weights is kept. Elsewhere linear layers and activations.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_ode::{Tangent, Time, ops::{Activation, Planar}};
///
/// let device = Device::Cpu;
/// let (w, b) = (Tensor::new(&[[1.0, 0.0]], &device)?, Tensor::new(&[0.0], &device)?);
/// let u = Tensor::new(&[[2.0, 3.0]], &device)?;
/// let units = Planar::new(&w, &b, &u, Activation::Sin)?;
/// let z = Tensor::new(&[[0.0, 5.0]], &device)?;
/// let (f, divergence) = units.with_divergence(&z)?;                // sin 0 (2, 3) and cos 0 · 2
/// assert_eq!((f.to_vec2::<f64>()?, divergence.to_vec1::<f64>()?), (vec![vec![0.0, 0.0]], vec![2.0]));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Reference
/// D. Rezende, S. Mohamed, *Variational Inference with Normalizing Flows*, arXiv 1505.05770, and in continuous time T. Chen,
/// Y. Rubanova, J. Bettencourt, D. Duvenaud, *Neural Ordinary Differential Equations*, arXiv 1806.07366.
#[derive(Clone, Debug)]
pub struct Planar {
    /// A row for each unit: w, b, u.
    units: Tensor,
    dim: usize,
    activation: Activation,
}

impl Planar {
    /// Units of weights `w` `(M, dim)`, `b` `(M)` and `u` `(M, dim)`, all of one dtype.
    ///
    /// # Errors
    /// Other shapes, no unit or no dimension; whatever the device reports.
    pub fn new(w: &Tensor, b: &Tensor, u: &Tensor, activation: Activation) -> Result<Self> {
        let (count, dim) = w.dims2()?;
        if b.dims() != [count] || u.dims() != w.dims() || w.elem_count() == 0 {
            let hint = "give w (M, dim), b (M) and u (M, dim), neither M nor dim 0";
            let value = format!("w {:?}, b {:?}, u {:?}", w.dims(), b.dims(), u.dims());
            return Err(OdeError::Setting { setting: "Planar weights", value, hint }.into());
        }
        Ok(Self { units: Tensor::cat(&[w, &b.unsqueeze(1)?, u], 1)?, dim, activation })
    }

    /// f(z) and its divergence tr ∂f/∂z.
    ///
    /// # Errors
    /// A z of another last dimension, dtype or device than the weights; whatever the device reports.
    pub fn with_divergence(&self, z: &Tensor) -> Result<(Tensor, Tensor)> {
        let Self { units, dim, activation } = self;
        let Some((last, batch)) = z.dims().split_last().filter(|(last, _)| *last == dim) else {
            bail!("planar units of dimension {dim}: z has shape {:?}", z.shape())
        };
        if z.dtype() != units.dtype() {
            let hint = "planar units take points in the dtype of their weights";
            let what = format!("the argument of planar units in {:?}", units.dtype());
            return Err(OdeError::UnsupportedDType { what, dtype: z.dtype(), hint }.into());
        }
        let Some(ready) = self.ready(z)? else { return self.composed(z) };
        let rows = z.elem_count() / last;
        let both = z.apply_op2(units, PlanarOp { dim: *dim, activation: *activation, ready })?;
        Ok((both.narrow(0, 0, rows * dim)?.reshape(z.shape())?, both.narrow(0, rows * dim, rows)?.reshape(batch)?))
    }

    /// What the op needs before it runs, if there are kernels for it.
    fn ready(&self, z: &Tensor) -> Result<Option<Precomputed>> {
        #[cfg(feature = "cuda")]
        if let Some(value) = super::cuda::planar(z, &self.units, self.activation)? {
            return Ok(Some(Precomputed::on_device(value)));
        }
        Ok(z.device().is_cpu().then(Precomputed::default))
    }

    /// The same made of other ops.
    fn composed(&self, z: &Tensor) -> Result<(Tensor, Tensor)> {
        let (w, b, u) = self.weights()?;
        let p = affine(z, &w, Some(&b))?;
        let f = self.mean(&self.activation.forward(&p)?, &u.t()?)?;
        let along = (w * u)?.sum_keepdim(1)?;
        let divergence = self.mean(&self.activation.derivative(&p)?, &along.t()?)?;
        Ok((f, divergence.squeeze(D::Minus1)?))
    }

    fn weights(&self) -> Result<(Tensor, Tensor, Tensor)> {
        let part = |first, columns| self.units.narrow(1, first, columns);
        Ok((part(0, self.dim)?, part(self.dim, 1)?.squeeze(1)?, part(self.dim + 1, self.dim)?))
    }

    /// Values of units `(…, M)` times weights `(outputs, M)`, their mean over M.
    fn mean(&self, values: &Tensor, weights: &Tensor) -> Result<Tensor> {
        affine(values, weights, None)? / self.units.dim(0)? as f64
    }
}

impl Module for Planar {
    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.with_divergence(z)?.0)
    }
}

impl Tangent for Planar {
    fn tangent(&self, t: &Time, z: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (w, b, u) = self.weights()?;
        let (values, along) = self.activation.tangent(t, &affine(z, &w, Some(&b))?, &affine(v, &w, None)?)?;
        Ok((self.mean(&values, &u.t()?)?, self.mean(&along, &u.t()?)?))
    }

    fn trace(&self, _: &Time, z: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        self.with_divergence(z).map(Some)
    }
}

/// (z, units) ↦ f of all rows and, behind it, their divergences.
struct PlanarOp {
    dim: usize,
    activation: Activation,
    ready: Precomputed,
}

impl PlanarOp {
    fn label(&self) -> &'static str {
        "planar"
    }

    /// The cotangents of z, and of the units in F32 or F64.
    fn pulled(&self, z: &Tensor, units: &Tensor, grad: &Tensor) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        if let Some(pulled) = super::cuda::pull_planar(z, units, self.activation, grad)? {
            return Ok(pulled);
        }
        // Both come in one tensor, what belongs to the units behind the rest.
        let both = z.apply_op3_no_bwd(units, grad, &Pulled(self))?;
        let (points, elements) = (z.elem_count(), units.elem_count());
        let of_z = both.narrow(0, 0, points)?.reshape(z.shape())?.to_dtype(z.dtype())?;
        Ok((of_z, both.narrow(0, points, elements)?.reshape(units.shape())?))
    }
}

impl CustomOp2 for PlanarOp {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, z: &CpuStorage, lz: &Layout, units: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        with_element!(units.dtype(), self.label(), T => {
            let units = dense_wide::<<T as Element>::Wide>(units, lu)?;
            let both = self.value::<T>(&dense::<T>(z, lz)?, &units);
            let shape = Shape::from(both.len());
            Ok((<T as WithDType>::to_cpu_storage_owned(both), shape))
        })
    }

    hand_over!(ready, 2);

    fn bwd(&self, z: &Tensor, units: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (of_z, of_units) = self.pulled(&z.detach(), &units.detach(), &grad.detach())?;
        let of_units = if units.track_op() { give(units, &of_units)? } else { None };
        Ok((z.track_op().then_some(of_z), of_units))
    }
}

/// (z, units, cotangent of both) ↦ the cotangents of z and, behind them, of the units, in F32 or F64.
struct Pulled<'a>(&'a PlanarOp);

impl CustomOp3 for Pulled<'_> {
    fn name(&self) -> &'static str {
        self.0.label()
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        lz: &Layout,
        units: &CpuStorage,
        lu: &Layout,
        grad: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        with_element!(units.dtype(), self.0.label(), T => {
            type Wide = <T as Element>::Wide;
            let (units, grad) = (dense_wide::<Wide>(units, lu)?, dense::<T>(grad, lg)?);
            let pulled = self.0.pull::<T>(&dense::<T>(z, lz)?, &units, &grad);
            let shape = Shape::from(pulled.len());
            Ok((Wide::to_cpu_storage_owned(pulled), shape))
        })
    }
}

impl PlanarOp {
    /// f of all rows and, behind it, their divergences.
    fn value<T: Element>(&self, z: &[T], units: &[T::Wide]) -> Vec<T> {
        let rows = z.len() / self.dim;
        let mut both = vec![T::from_f64(0.0); rows * (self.dim + 1)];
        let (f, divergence) = both.split_at_mut(rows * self.dim);
        let (f, divergence) = (f.chunks_mut(CHUNK * self.dim), divergence.chunks_mut(CHUNK));
        for (z, (f, divergence)) in z.chunks(CHUNK * self.dim).zip(f.zip(divergence)) {
            let z = Lanes::of(z, self.dim);
            let (mut sums, mut traces) = (Lanes::zeros(&z, self.dim), Lanes::zeros(&z, 1));
            let mut at = Activated::new(z.rows);
            for unit in self.units(units) {
                at.find(self.activation, unit, &z, false);
                let Activated { value, slope, .. } = &at;
                vectorised(Push { unit, value, slope, sums: &mut sums.values, traces: &mut traces.values });
            }
            T::narrow(&sums.row_major(self.mean(units)), f);
            T::narrow(&traces.row_major(self.mean(units)), divergence);
        }
        both
    }

    /// The cotangents of z and, behind them, of the units, from that of both results.
    fn pull<T: Element>(&self, z: &[T], units: &[T::Wide], grad: &[T]) -> Vec<T::Wide> {
        let mut pulled = vec![T::Wide::ZERO; z.len() + units.len()];
        let (of_z, of_units) = pulled.split_at_mut(z.len());
        let (g, t) = grad.split_at(z.len());
        let (g, t) = (g.chunks(CHUNK * self.dim), t.chunks(CHUNK));
        let chunks = z.chunks(CHUNK * self.dim).zip(of_z.chunks_mut(CHUNK * self.dim));
        for ((z, of_z), (g, t)) in chunks.zip(g.zip(t)) {
            let (z, g, t) = (Lanes::of(z, self.dim), Lanes::of(g, self.dim), Lanes::of(t, 1));
            let (g, t) = (g.times(self.mean(units)), t.times(self.mean(units)));
            let mut sums = Lanes::zeros(&z, self.dim);
            let mut at = Activated::new(z.rows);
            for (unit, of_unit) in self.units(units).zip(of_units.chunks_exact_mut(2 * self.dim + 1)) {
                at.find(self.activation, unit, &z, true);
                let (z, g, t) = (&z.values, &g.values, &t.values);
                vectorised(Pull { unit, at: &mut at, z, g, t, of_z: &mut sums.values, of_unit });
            }
            of_z.copy_from_slice(&sums.row_major(T::Wide::ONE));
        }
        pulled
    }

    fn units<'a, W: Real>(&self, units: &'a [W]) -> impl Iterator<Item = Unit<'a, W>> + use<'a, W> {
        let dim = self.dim;
        units.chunks_exact(2 * dim + 1).map(move |row| {
            let (w, u) = (&row[..dim], &row[dim + 1..]);
            Unit { w, b: row[dim], u, along: w.iter().zip(u).fold(W::ZERO, |sum, (w, u)| sum + *w * *u) }
        })
    }

    /// 1/M
    fn mean<W: Real>(&self, units: &[W]) -> W {
        W::of((2 * self.dim + 1) as f64 / units.len() as f64)
    }
}

/// Weights of a unit, and u·w.
#[derive(Clone, Copy)]
struct Unit<'a, W> {
    w: &'a [W],
    b: W,
    u: &'a [W],
    along: W,
}

/// Some rows of a matrix, column by column, so that the rows lie in the lanes of vectors.
struct Lanes<W> {
    values: Vec<W>,
    rows: usize,
}

impl<W: Real> Lanes<W> {
    fn of<T: Element<Wide = W>>(matrix: &[T], columns: usize) -> Self {
        let mut wide = vec![W::ZERO; matrix.len()];
        T::widen(matrix, &mut wide);
        let rows = matrix.len() / columns;
        let values = (0..columns).flat_map(|column| wide[column..].iter().step_by(columns).copied()).collect();
        Self { values, rows }
    }

    fn zeros(like: &Self, columns: usize) -> Self {
        Self { values: vec![W::ZERO; like.rows * columns], rows: like.rows }
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
    fn find(&mut self, activation: Activation, Unit { w, b, .. }: Unit<'_, W>, z: &Lanes<W>, curved: bool) {
        let Self { value, slope, curvature } = self;
        vectorised(Affine { w, b, z: &z.values, p: value });
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
struct Affine<'a, W> {
    w: &'a [W],
    b: W,
    z: &'a [W],
    p: &'a mut [W],
}

impl<W: Real> Kernel for Affine<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.p.fill(self.b);
        add_scaled(self.w, self.z, self.p);
    }
}

/// sums += u h and traces += (u·w) h′
struct Push<'a, W> {
    unit: Unit<'a, W>,
    value: &'a [W],
    slope: &'a [W],
    sums: &'a mut [W],
    traces: &'a mut [W],
}

impl<W: Real> Kernel for Push<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { unit, value, slope, sums, traces } = self;
        spread(unit.u, value, sums);
        spread(&[unit.along], slope, traces);
    }
}

/// The pullback of a unit; of what it finds for p it leaves p̄ in place of h″.
struct Pull<'a, W> {
    unit: Unit<'a, W>,
    at: &'a mut Activated<W>,
    z: &'a [W],
    g: &'a [W],
    t: &'a [W],
    of_z: &'a mut [W],
    of_unit: &'a mut [W],
}

impl<W: Real> Kernel for Pull<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { unit: Unit { w, u, along, .. }, at, z, g, t, of_z, of_unit } = self;
        let Activated { value, slope, curvature: p } = at;
        let rows = t.len();
        let of_traces = sum(slope, t, |slope, t| slope * t);
        p.iter_mut().zip(t).for_each(|(p, t)| *p *= along * *t);
        for (u, g) in u.iter().zip(g.chunks_exact(rows)) {
            p.iter_mut().zip(&*slope).zip(g).for_each(|((p, slope), g)| *p += *u * *g * *slope);
        }
        spread(w, p, of_z);
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

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check, check_half, check_tangent, distance, gradients, noise, values};
    use super::*;
    use candle_core::{DType, Device, Var};

    const ACTIVATIONS: [Activation; 11] = [
        Activation::Tanh,
        Activation::Sigmoid,
        Activation::Softplus,
        Activation::Silu,
        Activation::Gelu,
        Activation::Relu,
        Activation::Elu(0.7),
        Activation::Sin,
        Activation::Cos,
        Activation::LogCosh,
        Activation::Identity,
    ];

    /// z `(rows, dim)` and the weights of some units.
    fn arguments(rows: usize, dim: usize, count: usize) -> [Tensor; 4] {
        [noise(&[rows, dim], 1), noise(&[count, dim], 2), noise(&[count], 3), noise(&[count, dim], 4)]
    }

    /// f and the divergence side by side, from z, w, b and u.
    fn both(activation: Activation, composed: bool) -> impl Fn(&[Tensor]) -> Result<Tensor> {
        move |args| {
            let units = Planar::new(&args[1], &args[2], &args[3], activation)?;
            let (f, trace) = if composed { units.composed(&args[0]) } else { units.with_divergence(&args[0]) }?;
            Tensor::cat(&[f, trace.unsqueeze(D::Minus1)?], D::Minus1)
        }
    }

    #[test]
    fn it_is_what_other_ops_make_of_it() {
        // Rows that fill a chunk, and some that do not.
        for (activation, rows) in ACTIVATIONS.into_iter().zip([1, 5, CHUNK, CHUNK + 3].into_iter().cycle()) {
            let args = arguments(rows, 3, 7);
            let (op, composed) = (both(activation, false), both(activation, true));
            let exact = composed(&args).unwrap();
            assert!(distance(&op(&args).unwrap(), &exact) < 1e-14, "{activation:?}");
            let weights = noise(exact.dims(), 9);
            let (got, exact) = (gradients(&op, &args, &weights), gradients(&composed, &args, &weights));
            for (n, (got, exact)) in got.iter().zip(&exact).enumerate() {
                assert!(distance(got, exact) < 1e-13, "{activation:?}, argument {n}: {}", distance(got, exact));
            }
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        for (activation, dim) in [(Activation::Tanh, 2), (Activation::Silu, 1), (Activation::Softplus, 5)] {
            check(&both(activation, false), &arguments(6, dim, 4));
        }
    }

    #[test]
    fn the_divergence_is_the_trace_of_the_tangents() {
        let [z, w, b, u] = arguments(4, 3, 5);
        let units = Planar::new(&w, &b, &u, Activation::Gelu).unwrap();
        check_tangent(&units, &|args| units.forward(&args[0]), &z);
        let t = Time::new(0.0, &Device::Cpu);
        let along = |n: usize| {
            let v = Tensor::zeros_like(&z)
                .unwrap()
                .slice_assign(&[0..4, n..n + 1], &Tensor::ones((4, 1), DType::F64, &Device::Cpu).unwrap())
                .unwrap();
            units.tangent(&t, &z, &v).unwrap().1.narrow(1, n, 1).unwrap().squeeze(1).unwrap()
        };
        let trace = ((along(0) + along(1)).unwrap() + along(2)).unwrap();
        assert!(distance(&units.with_divergence(&z).unwrap().1, &trace) < 1e-14);
    }

    #[test]
    fn narrower_dtypes_round_once() {
        for (dtype, bound) in [(DType::F32, 2e-6), (DType::F16, 2e-3), (DType::BF16, 1.6e-2)] {
            check_half(&both(Activation::Tanh, false), &arguments(300, 2, 16), dtype, bound);
        }
    }

    #[test]
    fn in_half_precision_the_batch_is_summed_in_f32() {
        for dtype in [DType::F16, DType::BF16] {
            let ones = |shape: &[usize]| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
            let b = Var::from_tensor(&ones(&[1])).unwrap();
            let units = Planar::new(&ones(&[1, 1]), &b, &ones(&[1, 1]), Activation::Identity).unwrap();
            let grads = units.forward(&ones(&[4096, 1])).unwrap().backward().unwrap();
            assert_eq!(values(grads.get(&b).unwrap()), [4096.0]);
        }
    }

    #[test]
    fn any_strides_and_leading_dimensions() {
        let [_, w, b, u] = arguments(1, 3, 5);
        let units = Planar::new(&w, &b, &u, Activation::Tanh).unwrap();
        let z = noise(&[3, 4, 2], 7).transpose(0, 2).unwrap();
        assert_eq!(z.dims(), [2, 4, 3]);
        let (f, trace) = units.with_divergence(&z).unwrap();
        let (flat_f, flat_trace) = units.with_divergence(&z.contiguous().unwrap().reshape((8, 3)).unwrap()).unwrap();
        assert_eq!((f.dims(), trace.dims()), (&[2, 4, 3][..], &[2, 4][..]));
        assert_eq!((values(&f), values(&trace)), (values(&flat_f), values(&flat_trace)));
        let (f, trace) = units.with_divergence(&z.narrow(0, 0, 0).unwrap()).unwrap();
        assert_eq!((f.dims(), trace.dims()), (&[0, 4, 3][..], &[0, 4][..]));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let [z, w, b, u] = arguments(4, 3, 5);
        let refused = |w: &Tensor, b: &Tensor, u: &Tensor| {
            let error = OdeError::from(Planar::new(w, b, u, Activation::Tanh).unwrap_err());
            assert!(matches!(error, OdeError::Setting { setting: "Planar weights", .. }), "{error}");
        };
        refused(&w, &noise(&[4], 1), &u);
        refused(&w, &b, &u.t().unwrap());
        refused(&noise(&[0, 3], 1), &noise(&[0], 1), &noise(&[0, 3], 1));
        let units = Planar::new(&w, &b, &u, Activation::Tanh).unwrap();
        let error = units.forward(&z.t().unwrap()).unwrap_err().to_string();
        assert!(error.contains("dimension 3") && error.contains("[3, 4]"), "{error}");
        let error = OdeError::from(units.forward(&z.to_dtype(DType::F32).unwrap()).unwrap_err());
        assert!(matches!(error, OdeError::UnsupportedDType { dtype: DType::F32, .. }), "{error}");
    }
}
