//! Planar units with their divergence: f(z) = 1/M Σⱼ uⱼ h(wⱼ·z + bⱼ), tr ∂f/∂z = 1/M Σⱼ h′(wⱼ·z + bⱼ) uⱼ·wⱼ, j = 1 … M.
//!
//! With kernels of ours both are one node of Candle's graph, which keeps z and the weights. With pⱼ = wⱼ·z + bⱼ, aⱼ =
//! uⱼ·wⱼ and cotangents g of M f and t of M tr its pullback is
//!
//! p̄ⱼ = h′(pⱼ) uⱼ·g + h″(pⱼ) aⱼ t,  z̄ = Σⱼ wⱼ p̄ⱼ,
//! w̄ⱼ = Σ p̄ⱼ z + uⱼ Σ h′(pⱼ) t,  b̄ⱼ = Σ p̄ⱼ,  ūⱼ = Σ h(pⱼ) g + wⱼ Σ h′(pⱼ) t, the sums over the batch.

mod cpu;

use super::Activation;
use super::cpu::{Element, dense, dense_wide, with_element};
use super::linear::affine;
use super::precomputed::{Precomputed, hand_over};
use crate::Time;
use crate::error::OdeError;
use crate::field::{Tangent, sink};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Module, Result, Shape, Tensor, WithDType};
use cpu::Units;

/// The mean of planar units, f(z) = 1/M Σⱼ uⱼ h(wⱼ·z + bⱼ), whose divergence is known.
///
/// Shapes: z and f `(…, dim)`, the divergence `(…)`. All three weights get gradients, wherever they come from: of a
/// flow they are what a hypernetwork makes of the time. F16, BF16, F32 and F64.
///
/// Cost: on the CPU, and on CUDA up to eight dimensions, one pass for f and the divergence, which are always made both,
/// and one for their pullback, which evaluates h again: nothing but z and the weights is kept, and sums over units and
/// batch are made in F32, or F64 for F64, and rounded once. On other devices, and for tangents, linear layers and
/// activations, which keep what is as wide as the units.
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
/// D. Rezende, S. Mohamed, *Variational Inference with Normalizing Flows*, arXiv 1505.05770, and in continuous time T.
/// Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud, *Neural Ordinary Differential Equations*, arXiv 1806.07366.
#[derive(Clone, Debug)]
pub struct Planar {
    /// w, b and u.
    weights: [Tensor; 3],
    /// A row of all three for each unit.
    units: Tensor,
    activation: Activation,
}

impl Planar {
    /// Units of weights `w` `(M, dim)`, `b` `(M)` and `u` `(M, dim)`, all of one dtype and on one device.
    ///
    /// # Errors
    /// Other shapes, no unit or no dimension, different dtypes or devices; whatever the device reports.
    pub fn new(w: &Tensor, b: &Tensor, u: &Tensor, activation: Activation) -> Result<Self> {
        let fits = matches!(w.dims(), [count, _] if b.dims() == [*count]) && u.dims() == w.dims();
        if !fits || w.elem_count() == 0 {
            let hint = "give w (M, dim), b (M) and u (M, dim), neither M nor dim 0";
            let value = format!("w {:?}, b {:?}, u {:?}", w.dims(), b.dims(), u.dims());
            return Err(OdeError::Setting { setting: "Planar weights", value, hint }.into());
        }
        for other in [b, u] {
            same_kind("the weights w, b and u of planar units", w, other)?;
        }
        let units = Tensor::cat(&[w, &b.unsqueeze(1)?, u], 1)?;
        Ok(Self { weights: [w.clone(), b.clone(), u.clone()], units, activation })
    }

    fn dim(&self) -> usize {
        self.weights[0].dims()[1]
    }

    /// f(z) and its divergence tr ∂f/∂z.
    ///
    /// # Errors
    /// A z of another last dimension, dtype or device than the weights; whatever the device reports.
    pub fn with_divergence(&self, z: &Tensor) -> Result<(Tensor, Tensor)> {
        let dim = self.dim();
        let Some((_, batch)) = z.dims().split_last().filter(|(last, _)| **last == dim) else {
            let hint = "give z (…, dim) for weights w (M, dim)";
            let value = format!("{:?} for units of dimension {dim}", z.dims());
            return Err(OdeError::Setting { setting: "z of planar units", value, hint }.into());
        };
        same_kind("the points and the weights of planar units", &self.units, z)?;
        let Some(ready) = self.ready(z)? else { return self.composed(z) };
        let points = z.elem_count();
        let both = z.apply_op2(&self.units, PlanarOp { of: self.clone(), ready })?;
        Ok((both.narrow(0, 0, points)?.reshape(z.shape())?, both.narrow(0, points, points / dim)?.reshape(batch)?))
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
        let [w, b, u] = &self.weights;
        let p = affine(z, w, Some(b))?;
        let f = self.mean(&self.activation.forward(&p)?, &u.t()?)?;
        let along = (w * u)?.sum_keepdim(1)?;
        let divergence = self.mean(&self.activation.derivative(&p)?, &along.t()?)?;
        Ok((f, divergence.squeeze(D::Minus1)?))
    }

    /// Values of units `(…, M)` times weights `(outputs, M)`, their mean over M.
    fn mean(&self, values: &Tensor, weights: &Tensor) -> Result<Tensor> {
        affine(values, weights, None)? / self.units.dim(0)? as f64
    }

    /// Adds w̄, b̄ and ū, in F32 or F64, to the open sums of those weights that are parameters; gives the rest, zero
    /// for those.
    fn give(&self, of_units: &Tensor) -> Result<Tensor> {
        let dim = self.dim();
        let part = |first, columns| of_units.narrow(1, first, columns);
        let mut parts = [part(0, dim)?, part(dim, 1)?, part(dim + 1, dim)?];
        for (weight, part) in self.weights.iter().zip(&mut parts) {
            if weight.track_op() && sink::add(weight, &part.reshape(weight.shape())?)? {
                *part = part.zeros_like()?;
            }
        }
        Tensor::cat(&parts, 1)?.to_dtype(self.units.dtype())
    }
}

/// Whether two tensors are of one dtype and on one device.
fn same_kind(what: &str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dtype() != b.dtype() {
        let hint = "they must have the same dtype; convert with .to_dtype(..)";
        let what = format!("one of {what}, beside {:?}", a.dtype());
        return Err(OdeError::UnsupportedDType { what, dtype: b.dtype(), hint }.into());
    }
    if !a.device().same_device(b.device()) {
        let (expected, found) = (a.device().location(), b.device().location());
        return Err(OdeError::DeviceMismatch { what: what.into(), expected, found }.into());
    }
    Ok(())
}

impl Module for Planar {
    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.with_divergence(z)?.0)
    }
}

impl Tangent for Planar {
    fn tangent(&self, t: &Time, z: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let [w, b, u] = &self.weights;
        let (values, along) = self.activation.tangent(t, &affine(z, w, Some(b))?, &affine(v, w, None)?)?;
        Ok((self.mean(&values, &u.t()?)?, self.mean(&along, &u.t()?)?))
    }

    fn trace(&self, _: &Time, z: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        self.with_divergence(z).map(Some)
    }
}

/// (z, units) ↦ f of all rows and, behind it, their divergences.
struct PlanarOp {
    of: Planar,
    ready: Precomputed,
}

impl PlanarOp {
    fn label(&self) -> &'static str {
        "planar"
    }

    /// The cotangents of z and, if it is wanted, of the units in F32 or F64.
    fn pull(&self, z: &Tensor, units: &Tensor, grad: &Tensor, of_units: bool) -> Result<(Tensor, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if let Some(pulled) = super::cuda::pull_planar(z, units, self.of.activation, grad, of_units)? {
            return Ok(pulled);
        }
        // Both come in one tensor, what belongs to the units behind the rest.
        let both = z.apply_op3_no_bwd(units, grad, &PullOp { of: self, of_units })?;
        let (points, elements) = (z.elem_count(), units.elem_count());
        let of_z = both.narrow(0, 0, points)?.reshape(z.shape())?.to_dtype(z.dtype())?;
        let of_units = of_units.then(|| both.narrow(0, points, elements)?.reshape(units.shape()));
        Ok((of_z, of_units.transpose()?))
    }
}

impl CustomOp2 for PlanarOp {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, z: &CpuStorage, lz: &Layout, units: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        with_element!(z.dtype(), self.label(), T => {
            let weights = dense_wide::<<T as Element>::Wide>(units, lu)?;
            let units = Units { weights: &weights, dim: self.of.dim(), activation: self.of.activation };
            let both = units.value::<T>(&dense(z, lz)?);
            let shape = Shape::from(both.len());
            Ok((<T as WithDType>::to_cpu_storage_owned(both), shape))
        })
    }

    hand_over!(ready, 2);

    fn bwd(&self, z: &Tensor, units: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (of_z, of_units) = self.pull(&z.detach(), &units.detach(), &grad.detach(), units.track_op())?;
        let of_units = of_units.map(|of_units| self.of.give(&of_units)).transpose()?;
        Ok((z.track_op().then_some(of_z), of_units))
    }
}

/// (z, units, cotangent of both results) ↦ the cotangents of z and, behind them, of the units, in F32 or F64.
struct PullOp<'a> {
    of: &'a PlanarOp,
    of_units: bool,
}

impl CustomOp3 for PullOp<'_> {
    fn name(&self) -> &'static str {
        self.of.label()
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
        with_element!(z.dtype(), self.of.label(), T => {
            type Wide = <T as Element>::Wide;
            let weights = dense_wide::<Wide>(units, lu)?;
            let units = Units { weights: &weights, dim: self.of.of.dim(), activation: self.of.of.activation };
            let pulled = units.pull::<T>(&dense(z, lz)?, &dense(grad, lg)?, self.of_units);
            let shape = Shape::from(pulled.len());
            Ok((Wide::to_cpu_storage_owned(pulled), shape))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{ACTIVATIONS, check, check_half, check_tangent, distance, gradients, noise, values};
    use super::*;
    use crate::field::ops::cpu::CHUNK;
    use candle_core::{DType, Device, Var};

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

    /// An infinite u·w is no matter where the divergence is not asked for.
    #[test]
    fn a_divergence_that_overflows_spoils_no_gradient_of_f() {
        for dtype in [DType::F32, DType::BF16] {
            let of = |x: f64, shape: &[usize]| {
                Var::from_tensor(&Tensor::full(x, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()).unwrap()
            };
            let (z, w, b, u) = (of(1.0, &[1, 1]), of(1e25, &[1, 1]), of(0.0, &[1]), of(1e25, &[1, 1]));
            let grads = Planar::new(&w, &b, &u, Activation::Tanh).unwrap().forward(&z).unwrap().backward().unwrap();
            let found = [&z, &w, &b, &u].map(|x| values(grads.get(x).unwrap())[0]);
            assert_eq!(found, [0.0, 0.0, 0.0, 1.0], "{dtype:?}");
        }
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

    /// Gradients too, of z whole or frozen, of weights or not.
    #[test]
    fn any_strides_and_leading_dimensions() {
        let [_, w, b, u] = arguments(1, 3, 5);
        let flat = noise(&[2, 4, 3], 7);
        let strided = flat.transpose(0, 2).unwrap().contiguous().unwrap().transpose(0, 2).unwrap();
        let (shapes, rows) = ([&[2, 4, 3][..], &[8, 3]], flat.reshape((8, 3)).unwrap());
        let op = both(Activation::Tanh, false);
        let exact = op(&[rows.clone(), w.clone(), b.clone(), u.clone()]).unwrap();
        assert_eq!(values(&op(&[strided.clone(), w.clone(), b.clone(), u.clone()]).unwrap()), values(&exact));
        let weights = noise(exact.dims(), 9);
        let all = gradients(&op, &[rows, w.clone(), b.clone(), u.clone()], &weights);
        for shape in shapes {
            let z = Var::from_tensor(&strided.reshape(shape).unwrap()).unwrap();
            let grad = |z: &Tensor, w: &Tensor, b: &Tensor, u: &Tensor| {
                let y = op(&[z.clone(), w.clone(), b.clone(), u.clone()]).unwrap().flatten_all().unwrap();
                (y * weights.flatten_all().unwrap()).unwrap().sum_all().unwrap().backward().unwrap()
            };
            let of_z = grad(&z, &w, &b, &u);
            assert_eq!(values(of_z.get(&z).unwrap()), values(&all[0]));
            let u = Var::from_tensor(&u).unwrap();
            let of_u = grad(&z.as_detached_tensor(), &w, &b, &u);
            assert_eq!(values(of_u.get(&u).unwrap()), values(&all[3]));
            assert!(of_u.get(&z).is_none());
        }
        let point = op(&[flat.get(0).unwrap().get(0).unwrap(), w.clone(), b.clone(), u.clone()]).unwrap();
        assert_eq!(values(&point), values(&exact.get(0).unwrap()));
        let none = gradients(&op, &[noise(&[0, 4, 3], 1), w, b, u], &noise(&[0, 4, 4], 1));
        assert_eq!(none[0].dims(), [0, 4, 3]);
        assert!(none[1..].iter().all(|of| values(of).iter().all(|x| *x == 0.0)));
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
        refused(&b, &b, &b);
        refused(&noise(&[0, 3], 1), &noise(&[0], 1), &noise(&[0, 3], 1));
        let narrow = b.to_dtype(DType::F32).unwrap();
        let error = OdeError::from(Planar::new(&w, &narrow, &u, Activation::Tanh).unwrap_err());
        assert!(matches!(error, OdeError::UnsupportedDType { dtype: DType::F32, .. }), "{error}");
        let units = Planar::new(&w, &b, &u, Activation::Tanh).unwrap();
        for z in [z.t().unwrap(), z.sum_all().unwrap()] {
            let error = OdeError::from(units.forward(&z).unwrap_err());
            assert!(matches!(error, OdeError::Setting { setting: "z of planar units", .. }), "{error}");
        }
        let error = OdeError::from(units.forward(&z.to_dtype(DType::F32).unwrap()).unwrap_err());
        assert!(matches!(error, OdeError::UnsupportedDType { dtype: DType::F32, .. }), "{error}");
    }
}
