//! Sums of tensors in mixed dtypes: the arithmetic of stages, cotangents and gradient sums.
//!
//! On the CPU and on CUDA each is one pass over the operands; elsewhere, and where Candle tracks an operand, it is a
//! composition of Candle's own ops with the same meaning.

mod accumulate;
mod finite;
mod wide;

pub use accumulate::accumulate;
pub(crate) use accumulate::{accumulate_by, in_place};
#[cfg(feature = "cuda")]
pub(crate) use finite::power_of_two;
pub use finite::{Finite, all_finite, finite, max_abs, max_abs_on_device};

use super::cpu::{CHUNK, Element, Kernel, vectorised};
use crate::state::larger;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Layout, MetalStorage, Result, Shape, Storage, StorageRef, Tensor};
use std::ops::Range;
use wide::{Wide, largest, largest_of};

/// `base + Σ cᵢ·xᵢ` in `dtype`. The terms are summed first, in F64 if `base` or any term is F64 and else in F32, and
/// `base` is added last. A sum of one operand that is in `dtype` already is that operand, not a copy.
///
/// # Errors
/// Operands of different shapes or devices.
pub fn combine(base: Option<&Tensor>, terms: &[(f64, &Tensor)], dtype: DType) -> Result<Tensor> {
    Ok(combined(base, terms, dtype)?.0)
}

/// [`combine`], and the largest |x| of the sum (NaN if any is not finite) where it is found on the way: on the CPU.
pub(crate) fn combined(base: Option<&Tensor>, terms: &[(f64, &Tensor)], dtype: DType) -> Result<(Tensor, Option<f64>)> {
    let operands = || base.into_iter().chain(terms.iter().map(|(_, x)| *x));
    let Some(first) = operands().next() else { candle_core::bail!("a sum needs at least one operand") };
    if let Some(other) = operands().find(|x| x.dims() != first.dims()) {
        candle_core::bail!("a sum of shapes {:?} and {:?}", first.dims(), other.dims())
    }
    let alone = match (base, terms) {
        (Some(only), []) => Some(only),
        (None, [(1.0, only)]) => Some(*only),
        _ => None,
    };
    if let Some(only) = alone.filter(|only| only.dtype() == dtype) {
        return Ok((only.clone(), None));
    }
    let wide = operands().any(|x| x.dtype() == DType::F64) || dtype == DType::F64;
    let tracked = operands().any(Tensor::track_op);
    #[cfg(feature = "cuda")]
    if !tracked && let Some((sum, _)) = super::cuda::combine(base, terms, None, dtype, false)? {
        return Ok((sum, None));
    }
    if tracked || !operands().all(|x| x.device().is_cpu() && is_float(x.dtype())) {
        return Ok((compose(base, terms, if wide { DType::F64 } else { DType::F32 }, dtype)?, None));
    }
    let (storage, most) = if wide { on_cpu::<f64>(base, terms, dtype) } else { on_cpu::<f32>(base, terms, dtype) }?;
    Ok((Tensor::from_storage(Storage::Cpu(storage), first.shape(), BackpropOp::none(), false), Some(most)))
}

/// A copy of `x` in `dtype`, outside any graph, and whether all of it is finite.
///
/// # Errors
/// When the device fails.
pub fn rounded(x: &Tensor, dtype: DType) -> Result<(Tensor, Finite)> {
    let x = x.detach();
    #[cfg(feature = "cuda")]
    if let Some((copy, Some(flag))) = super::cuda::combine(Some(&x), &[], None, dtype, true)? {
        return Ok((copy, Finite::Device(vec![flag])));
    }
    let (copy, most) = combined(Some(&x), &[], dtype)?;
    let finite = most.map_or_else(|| finite(&copy), |most| Ok(Finite::Host(!most.is_nan())))?;
    Ok((copy, finite))
}

/// `number`·x in `dtype`, outside any graph, by a kernel of ours; `number` is a 0-d F32 tensor on the device.
#[cfg(feature = "cuda")]
pub(crate) fn times(x: &Tensor, number: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    let product = super::cuda::combine(None, &[(1.0, x)], Some(number), dtype, false)?;
    Ok(product.map(|(product, _)| product))
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

fn compose(base: Option<&Tensor>, terms: &[(f64, &Tensor)], sum_dtype: DType, dtype: DType) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (c, x) in terms {
        let term = x.to_dtype(sum_dtype)?;
        let term = if *c == 1.0 { term } else { (term * *c)? };
        sum = Some(match sum {
            None => term,
            Some(sum) => (sum + term)?,
        });
    }
    let total = match (base, sum) {
        (Some(base), Some(sum)) => (base.to_dtype(sum_dtype)? + sum)?,
        (Some(only), None) => only.clone(),
        (None, Some(sum)) => sum,
        (None, None) => candle_core::bail!("a sum needs at least one operand"),
    };
    total.to_dtype(dtype)
}

fn on_cpu<A: Wide>(base: Option<&Tensor>, terms: &[(f64, &Tensor)], dtype: DType) -> Result<(CpuStorage, f64)> {
    if !base.into_iter().chain(terms.iter().map(|(_, x)| *x)).all(Tensor::is_contiguous) {
        let base = base.map(Tensor::contiguous).transpose()?;
        let terms = terms.iter().map(|(c, x)| Ok((*c, x.contiguous()?))).collect::<Result<Vec<_>>>()?;
        let terms: Vec<_> = terms.iter().map(|(c, x)| (*c, x)).collect();
        return on_cpu::<A>(base.as_ref(), &terms, dtype);
    }
    let count = base.or(terms.first().map(|(_, x)| *x)).map_or(0, Tensor::elem_count);
    let mut result = match dtype {
        DType::F16 => CpuStorage::F16(Vec::with_capacity(count)),
        DType::BF16 => CpuStorage::BF16(Vec::with_capacity(count)),
        DType::F32 => CpuStorage::F32(Vec::with_capacity(count)),
        DType::F64 => CpuStorage::F64(Vec::with_capacity(count)),
        other => candle_core::bail!("a sum cannot be kept in {other:?}"),
    };
    let base = base.map(Tensor::storage_and_layout);
    let terms: Vec<_> = terms.iter().map(|(c, x)| (A::of(*c), x.storage_and_layout())).collect();
    let terms = terms.iter().map(|(c, x)| (*c, x));
    let most = vectorised(Sum { base, terms, count, to: &mut result })?;
    Ok((result, most))
}

/// What a sum in A reads an operand from.
pub(super) trait Source<A> {
    /// Some elements: where they lie, if they are in A, or in `space`, as long as they are.
    fn read<'a>(&'a self, range: Range<usize>, space: &'a mut [A]) -> Result<&'a [A]>;
}

/// A contiguous tensor.
impl<A: Wide> Source<A> for (StorageRef<'_>, &Layout) {
    #[inline(always)]
    fn read<'a>(&'a self, range: Range<usize>, space: &'a mut [A]) -> Result<&'a [A]> {
        let first = self.1.start_offset();
        match &*self.0 {
            Storage::Cpu(storage) => A::read(storage, first + range.start..first + range.end, space),
            _ => candle_core::bail!("expected a tensor on the CPU"),
        }
    }
}

impl<T: Element> Source<T::Wide> for [T] {
    #[inline(always)]
    fn read<'a>(&'a self, range: Range<usize>, space: &'a mut [T::Wide]) -> Result<&'a [T::Wide]> {
        Ok(T::widened(&self[range], space))
    }
}

impl<A, S: Source<A> + ?Sized> Source<A> for &S {
    #[inline(always)]
    fn read<'a>(&'a self, range: Range<usize>, space: &'a mut [A]) -> Result<&'a [A]> {
        S::read(self, range, space)
    }
}

/// What a sum in A is written to.
pub(super) trait Target<A> {
    /// Writes some elements, which follow those before, rounded to nearest; gives max |x| of what it has written, NaN
    /// if any of them is not finite.
    fn write(&mut self, range: Range<usize>, values: &[A]) -> Result<f64>;
}

impl<A: Wide> Target<A> for CpuStorage {
    #[inline(always)]
    fn write(&mut self, range: Range<usize>, values: &[A]) -> Result<f64> {
        A::write(values, self);
        largest(self, range)
    }
}

impl Target<f32> for Vec<f32> {
    #[inline(always)]
    fn write(&mut self, _: Range<usize>, values: &[f32]) -> Result<f64> {
        self.extend_from_slice(values);
        Ok(largest_of(values))
    }
}

impl<T: Element<Wide = f32>> Target<f32> for [T] {
    #[inline(always)]
    fn write(&mut self, range: Range<usize>, values: &[f32]) -> Result<f64> {
        let (written, mut space) = (&mut self[range], [0.0; CHUNK]);
        T::narrow(values, written);
        Ok(largest_of(T::widened(written, &mut space[..values.len()])))
    }
}

/// base + Σ terms, chunk by chunk; gives max |x| of it.
pub(super) struct Sum<'a, B, I, T: ?Sized> {
    pub(super) base: Option<B>,
    /// Coefficients and operands.
    pub(super) terms: I,
    pub(super) count: usize,
    pub(super) to: &'a mut T,
}

impl<A, B, X, I, T> Kernel for Sum<'_, B, I, T>
where
    A: Wide,
    B: Source<A>,
    X: Source<A>,
    I: Iterator<Item = (A, X)> + Clone,
    T: Target<A> + ?Sized,
{
    type Output = Result<f64>;

    #[inline(always)]
    fn run(self) -> Result<f64> {
        let (mut sums, mut space, mut most) = ([A::ZERO; CHUNK], [A::ZERO; CHUNK], 0.0);
        for from in (0..self.count).step_by(CHUNK) {
            let range = from..self.count.min(from + CHUNK);
            let (sums, space) = (&mut sums[..range.len()], &mut space[..range.len()]);
            sums.fill(A::ZERO);
            for (c, x) in self.terms.clone() {
                let x = x.read(range.clone(), space)?;
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += c * *x);
            }
            if let Some(x) = &self.base {
                let x = x.read(range.clone(), space)?;
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum = *x + *sum);
            }
            most = larger(most, self.to.write(range, sums)?);
        }
        Ok(most)
    }
}

/// A copy of `x` in `dtype` that Candle can differentiate with respect to, made without a second copy.
///
/// # Errors
/// When the device fails.
pub fn leaf(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let own = match &*storage {
        Storage::Cpu(s) => Storage::Cpu(s.to_dtype(layout, dtype)?),
        Storage::Cuda(s) => Storage::Cuda(s.to_dtype(layout, dtype)?),
        Storage::Metal(s) => Storage::Metal(copy_on_metal(s, layout, dtype)?),
    };
    Ok(Tensor::from_storage(own, x.shape(), BackpropOp::none(), true))
}

/// Metal does not cast a dtype to itself.
pub(crate) fn copy_on_metal(storage: &MetalStorage, layout: &Layout, dtype: DType) -> Result<MetalStorage> {
    if storage.dtype() == dtype { storage.affine(layout, 1.0, 0.0) } else { storage.to_dtype(layout, dtype) }
}

/// A 0-d zero in F32, on whatever device `storage` is: what token and seed ops return.
pub(crate) fn zero_beside<S: BackendStorage>(storage: &S) -> Result<(S, Shape)>
where
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(());
    Ok((storage.device().zeros_impl(&shape, DType::F32)?, shape))
}
