//! A bias along one dimension: y = x + b.
//!
//! Shapes: x of any rank, b as long as dimension `dim` of x. Dtypes: b has x's dtype, or F32. dL/db is summed over all
//! other dimensions in F32 (F64 for F64).

use super::cpu::{AddPattern, ColumnSums, Element, dense, dense_wide, sum, vectorised, wide_dtype, with_element};
use super::precomputed::{Precomputed, hand_over};
use super::weight::give;
use candle_core::backend::BackendStorage;
use candle_core::shape::Dim;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};
use std::borrow::Cow;

/// x + b with b along dimension `dim` of x: what `broadcast_add` computes, with the gradient of b right for any batch.
///
/// ```
/// use candle_core::{D, DType, Device, Tensor};
/// let images = Tensor::zeros((2, 3, 4, 4), DType::BF16, &Device::Cpu)?;
/// let b = Tensor::ones(3, DType::BF16, &Device::Cpu)?;
/// assert_eq!(candle_ode::ops::add_bias(&images, &b, 1)?.dims(), images.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A bias of another length or dtype; whatever the device reports.
pub fn add_bias<D: Dim>(x: &Tensor, bias: &Tensor, dim: D) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "add-bias")?;
    let channels = x.dim(dim)?;
    if bias.dims() != [channels] {
        bail!("add-bias: the bias has shape {:?}, dimension {dim} of x has {channels}", bias.shape())
    }
    if bias.dtype() != x.dtype() && bias.dtype() != wide_dtype(x.dtype()) {
        bail!("add-bias: the bias is {:?} and x {:?}; it must be the same, or F32", bias.dtype(), x.dtype())
    }
    let inner = x.dims()[dim + 1..].iter().product();
    let ready = off_cpu(x, bias, dim, inner)?;
    x.apply_op2(bias, AddBias { inner, ready })
}

/// The value where x is not on the CPU: by a kernel of ours or of Candle's ops.
fn off_cpu(x: &Tensor, bias: &Tensor, dim: usize, inner: usize) -> Result<Precomputed> {
    #[cfg(feature = "cuda")]
    if let Some(value) = super::cuda::add_bias(x, bias, inner)? {
        return Ok(Precomputed::on_device(value));
    }
    #[cfg(not(feature = "cuda"))]
    let _ = inner;
    Precomputed::off_cpu(x, || composed(&x.detach(), &bias.detach(), dim))
}

struct AddBias {
    inner: usize,
    ready: Precomputed,
}

impl AddBias {
    fn label(&self) -> &'static str {
        "add-bias"
    }
}

impl CustomOp2 for AddBias {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        with_element!(x.dtype(), self.label(), T => {
            let mut y = dense::<T>(x, lx)?.into_owned();
            add_channels(&mut y, &dense_wide::<<T as Element>::Wide>(b, lb)?, self.inner);
            Ok((<T as WithDType>::to_cpu_storage_owned(y), lx.shape().clone()))
        })
    }

    hand_over!(ready, 2);

    fn bwd(&self, x: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach();
        let for_bias = if b.track_op() {
            give(b, &sum_channels(&grad.reshape(((), b.elem_count(), self.inner))?, self.inner)?)?
        } else {
            None
        };
        Ok((x.track_op().then_some(grad), for_bias))
    }
}

/// y += b, where y is `(…, channels, inner)` and b `(channels)`.
pub(super) fn add_channels<T: Element>(y: &mut [T], bias: &[T::Wide], inner: usize) {
    if y.is_empty() {
        return;
    }
    let pattern = if inner == 1 {
        Cow::Borrowed(bias)
    } else {
        bias.iter().flat_map(|&b| std::iter::repeat_n(b, inner)).collect::<Vec<_>>().into()
    };
    vectorised(AddPattern::<T> { y, pattern: &pattern });
}

/// The sums of x, `(rows, channels)` or `(rows, channels, inner)`, over all but the channels; in F32 (F64 for F64).
pub(super) fn sum_channels(x: &Tensor, inner: usize) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.apply_op1_no_bwd(&SumChannels { channels: x.dim(1)?, inner });
    }
    #[cfg(feature = "cuda")]
    if let Some(sums) = super::cuda::sum_channels(x, inner)? {
        return Ok(sums);
    }
    let wide = x.to_dtype(wide_dtype(x.dtype()))?;
    if x.rank() == 2 { wide.sum(0) } else { wide.sum((0, 2)) }
}

struct SumChannels {
    channels: usize,
    inner: usize,
}

impl CustomOp1 for SumChannels {
    fn name(&self) -> &'static str {
        "sum-channels"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Self { channels, inner } = *self;
        with_element!(x.dtype(), CustomOp1::name(self), T => {
            type Wide = <T as Element>::Wide;
            let matrix = dense::<T>(x, layout)?;
            let sums = if matrix.is_empty() {
                vec![Wide::from_f64(0.0); channels]
            } else {
                let sums = vectorised(ColumnSums::<T> { matrix: &matrix, columns: channels * inner });
                if inner == 1 { sums } else { sums.chunks(inner).map(|c| sum(c, c, |a, _| a)).collect() }
            };
            Ok((<Wide as WithDType>::to_cpu_storage_owned(sums), Shape::from(channels)))
        })
    }
}

fn composed(x: &Tensor, bias: &Tensor, dim: usize) -> Result<Tensor> {
    let mut dims = vec![1; x.rank()];
    dims[dim] = bias.elem_count();
    let wide = wide_dtype(x.dtype());
    x.to_dtype(wide)?.broadcast_add(&bias.to_dtype(wide)?.reshape(dims)?)?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check, check_half, distance, gradients, noise, values};
    use super::*;
    use candle_core::{D, DType, Device};

    #[test]
    fn gradients_match_finite_differences_along_every_dimension() {
        for shape in [&[4][..], &[3, 4], &[2, 3, 4], &[2, 3, 4, 5]] {
            for (dim, &channels) in shape.iter().enumerate() {
                check(&|args| add_bias(&args[0], &args[1], dim), &[noise(shape, 1), noise(&[channels], 2)]);
            }
        }
        check(&|args| add_bias(&args[0].t()?, &args[1], 1), &[noise(&[4, 3], 1), noise(&[4], 2)]);
    }

    #[test]
    fn it_equals_the_broadcast_sum() {
        let (x, b) = (noise(&[3, 300, 4, 5], 1), noise(&[300], 2));
        let exact = x.broadcast_add(&b.reshape((300, 1, 1)).unwrap()).unwrap();
        assert_eq!(values(&add_bias(&x, &b, 1).unwrap()), values(&exact));
        assert_eq!(values(&composed(&x, &b, 1).unwrap()), values(&exact));
        let (x, b) = (noise(&[7, 300], 1), noise(&[300], 2));
        let exact = x.broadcast_add(&b).unwrap();
        assert_eq!(values(&add_bias(&x, &b, D::Minus1).unwrap()), values(&exact));
    }

    #[test]
    fn half_precision_is_right() {
        for (dtype, bound) in [(DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            check_half(&|a| add_bias(&a[0], &a[1], 1), &[noise(&[40, 3, 9, 9], 1), noise(&[3], 2)], dtype, bound);
        }
        let x = Tensor::zeros((50_000, 1), DType::F16, &Device::Cpu).unwrap();
        let b = Tensor::zeros(1, DType::F16, &Device::Cpu).unwrap();
        let got = gradients(&|a| add_bias(&a[0], &a[1], 1), &[x.clone(), b], &x.ones_like().unwrap());
        assert!((values(&got[1])[0] - 50_000.0).abs() <= 16.0);
    }

    #[test]
    fn sums_are_accurate_for_any_number_of_columns() {
        for (rows, channels, inner) in [(1, 1, 1), (10_007, 1, 1), (1001, 3, 1), (97, 300, 1), (33, 3, 7), (5, 2, 400)]
        {
            let x = noise(&[rows, channels, inner], 1);
            let exact = x.sum((0, 2)).unwrap();
            let narrow = x.to_dtype(DType::F32).unwrap();
            let shaped = if inner == 1 { narrow.squeeze(2).unwrap() } else { narrow };
            assert!(distance(&sum_channels(&shaped, inner).unwrap(), &exact) < 1e-5);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = noise(&[3, 4], 1);
        assert!(add_bias(&x, &noise(&[3], 2), 1).is_err());
        assert!(add_bias(&x, &noise(&[4], 2), 2).is_err());
        assert!(add_bias(&x, &noise(&[4], 2).to_dtype(DType::F32).unwrap(), 1).is_err());
    }
}
