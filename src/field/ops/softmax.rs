//! Softmax along a dimension: y_i = exp(x_i − max x) / Σ_j exp(x_j − max x).
//!
//! Any shape, any strides; F16 and BF16 are calculated in F32 and rounded once. The differentiable twin of
//! [`candle_nn::ops::softmax_last_dim`], for any dimension.

use super::cpu::{Element, Kernel, dense, sum, vectorised, wide_dtype, with_element};
use super::precomputed::{Precomputed, hand_over};
use super::real::Real;
use crate::Time;
use crate::field::Tangent;
use candle_core::backend::BackendStorage;
use candle_core::shape::Dim;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Layout, Module, Result, Shape, Tensor, WithDType};

/// Softmax of `x` along `dim`.
///
/// ```
/// use candle_core::{D, Device, Tensor};
/// let x = Tensor::new(&[[1000.0_f32, 1000.0], [0.0, -1000.0]], &Device::Cpu)?;
/// assert_eq!(candle_ode::ops::softmax(&x, D::Minus1)?.to_vec2::<f32>()?, [[0.5, 0.5], [1.0, 0.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A dimension that `x` has not, integer tensors; whatever the device reports.
pub fn softmax<I: Dim>(x: &Tensor, dim: I) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "softmax")?;
    let last = x.rank() - 1;
    let x = x.transpose(dim, last)?;
    let ready = Precomputed::off_cpu(&x, || composed(&x.detach()))?;
    x.apply_op1(SoftmaxLast { ready })?.transpose(dim, last)
}

/// Softmax along a dimension as a layer.
#[derive(Clone, Copy, Debug)]
pub struct Softmax {
    from_last: usize,
}

impl Softmax {
    /// Along the last dimension.
    pub fn last() -> Self {
        Self::from_last(0)
    }

    /// Along the dimension that has `n` others after it.
    pub fn from_last(n: usize) -> Self {
        Self { from_last: n }
    }
}

impl Module for Softmax {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        softmax(x, D::Minus(self.from_last + 1))
    }
}

impl Tangent for Softmax {
    /// J v = y (v − Σ y v)
    fn tangent(&self, _: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let value = self.forward(y)?;
        let wide = wide_dtype(y.dtype());
        let (weights, v) = (value.to_dtype(wide)?, v.to_dtype(wide)?);
        let mean = (&weights * &v)?.sum_keepdim(D::Minus(self.from_last + 1))?;
        Ok((value, (weights * v.broadcast_sub(&mean)?)?.to_dtype(y.dtype())?))
    }
}

/// Softmax along the last dimension.
struct SoftmaxLast {
    ready: Precomputed,
}

impl SoftmaxLast {
    fn label(&self) -> &'static str {
        "softmax"
    }
}

impl CustomOp1 for SoftmaxLast {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let size = layout.shape().dim(D::Minus1)?;
        with_element!(x.dtype(), self.label(), T => {
            let data = dense::<T>(x, layout)?;
            let y = vectorised(Forward::<T> { x: &data, size });
            Ok((<T as WithDType>::to_cpu_storage_owned(y), layout.shape().clone()))
        })
    }

    hand_over!(ready, 1);

    /// dx = y (g − Σ g y)
    fn bwd(&self, _: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (y, grad) = (y.detach(), grad.detach());
        if y.device().is_cpu() {
            return y.apply_op2_no_bwd(&grad, &Pull).map(Some);
        }
        let wide = wide_dtype(y.dtype());
        let (weights, grad) = (y.to_dtype(wide)?, grad.to_dtype(wide)?);
        let mean = (&weights * &grad)?.sum_keepdim(D::Minus1)?;
        (weights * grad.broadcast_sub(&mean)?)?.to_dtype(y.dtype()).map(Some)
    }
}

struct Forward<'a, T> {
    x: &'a [T],
    size: usize,
}

impl<T: Element> Kernel for Forward<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run(self) -> Vec<T> {
        let mut y = vec![T::from_f64(0.0); self.x.len()];
        let mut wide = vec![T::Wide::ZERO; self.size];
        for (x, y) in self.x.chunks_exact(self.size.max(1)).zip(y.chunks_exact_mut(self.size.max(1))) {
            T::widen(x, &mut wide);
            let largest = wide.iter().fold(T::Wide::of(f64::NEG_INFINITY), |max, &x| if x > max { x } else { max });
            wide.iter_mut().for_each(|x| *x = (*x - largest).exp_negative());
            let total = sum(&wide, &wide, |x, _| x);
            wide.iter_mut().for_each(|x| *x /= total);
            T::narrow(&wide, y);
        }
        y
    }
}

/// (y, g) ↦ y (g − Σ g y)
struct Pull;

impl CustomOp2 for Pull {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, y: &CpuStorage, ly: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let size = ly.shape().dim(D::Minus1)?;
        with_element!(y.dtype(), CustomOp2::name(self), T => {
            let (weights, grad) = (dense::<T>(y, ly)?, dense::<T>(g, lg)?);
            let x = vectorised(Backward::<T> { y: &weights, grad: &grad, size });
            Ok((<T as WithDType>::to_cpu_storage_owned(x), ly.shape().clone()))
        })
    }
}

struct Backward<'a, T> {
    y: &'a [T],
    grad: &'a [T],
    size: usize,
}

impl<T: Element> Kernel for Backward<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run(self) -> Vec<T> {
        let size = self.size.max(1);
        let mut for_x = vec![T::from_f64(0.0); self.y.len()];
        let (mut y, mut g) = (vec![T::Wide::ZERO; self.size], vec![T::Wide::ZERO; self.size]);
        let slices = self.y.chunks_exact(size).zip(self.grad.chunks_exact(size));
        for ((y_n, g_n), out) in slices.zip(for_x.chunks_exact_mut(size)) {
            T::widen(y_n, &mut y);
            T::widen(g_n, &mut g);
            let mean = sum(&y, &g, |y, g| y * g);
            g.iter_mut().zip(&y).for_each(|(g, &y)| *g = y * (*g - mean));
            T::narrow(&g, out);
        }
        for_x
    }
}

/// The same value made of Candle's ops, for devices without kernels of ours.
fn composed(x: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(wide_dtype(x.dtype()))?;
    let e = wide.broadcast_sub(&wide.max_keepdim(D::Minus1)?)?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check, check_half, check_tangent, distance, noise, values};
    use super::*;
    use candle_core::{DType, Device};

    fn spread(shape: &[usize]) -> Tensor {
        (noise(shape, 1) * 3.0).unwrap()
    }

    #[test]
    fn gradients_match_finite_differences_along_every_dimension() {
        for shape in [&[7][..], &[1, 5], &[5, 1], &[3, 4, 2], &[2, 3, 2, 3]] {
            for dim in 0..shape.len() {
                check(&|args| softmax(&args[0], dim), &[spread(shape)]);
            }
        }
        check(&|args| softmax(&args[0].narrow(1, 1, 3)?, 0), &[spread(&[4, 5])]);
    }

    #[test]
    fn tangents_match_pullbacks_and_are_differentiable() {
        let t = Time::new(0.0, &Device::Cpu);
        for layer in [Softmax::last(), Softmax::from_last(1)] {
            check_tangent(&layer, &|args| layer.forward(&args[0]), &spread(&[2, 4, 3]));
            check(&|args| Ok(layer.tangent(&t, &args[0], &args[1])?.1), &[spread(&[4, 3]), noise(&[4, 3], 2)]);
        }
    }

    #[test]
    fn values_are_right_in_every_dtype() {
        let x = spread(&[33, 70]);
        let exact = candle_nn::ops::softmax(&x, 1).unwrap();
        assert!(distance(&softmax(&x, 1).unwrap(), &exact) < 1e-14);
        assert!(distance(&composed(&x).unwrap(), &exact) < 1e-14);
        let narrow = softmax(&x.to_dtype(DType::F32).unwrap(), 1).unwrap();
        assert!(
            distance(&narrow, &softmax(&x.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap(), 1).unwrap())
                < 5e-7
        );
        check_half(&|args| softmax(&args[0], 1), std::slice::from_ref(&x), DType::F16, 2e-3);
        check_half(&|args| softmax(&args[0], 0), &[x], DType::BF16, 1.2e-2);
    }

    #[test]
    fn extremes_stay_finite() {
        let x = Tensor::new(&[[3e38_f32, -3e38, 0.0], [-3e38, -3e38, -3e38]], &Device::Cpu).unwrap();
        let third = values(&Tensor::new(&[1.0_f32 / 3.0], &Device::Cpu).unwrap())[0];
        assert_eq!(values(&softmax(&x, 1).unwrap()), [1.0, 0.0, 0.0, third, third, third]);
        let long = Tensor::zeros((1, 70_000), DType::F16, &Device::Cpu).unwrap();
        let y = values(&softmax(&long, 1).unwrap());
        assert!(y.iter().all(|v| (v - 1.0 / 70_000.0).abs() < 1e-7), "{}", y[0]);
        let nan = Tensor::new(&[[f32::NAN, 1.0]], &Device::Cpu).unwrap();
        assert!(values(&softmax(&nan, 1).unwrap())[0].is_nan());
    }
}
