//! Elements of CPU tensors in the number that sums are made in, and how large they are.

use crate::field::ops::cpu::{Element, Kernel};
use crate::field::ops::real::Real;
use candle_core::{CpuStorage, Result, Storage, Tensor};
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Range;

/// The number a sum is made in.
pub(super) trait Wide: Real + Element {
    /// Some elements in this number: where they lie, if they are such, or in `space`, as long as they are.
    fn read<'a>(storage: &'a CpuStorage, range: Range<usize>, space: &'a mut [Self]) -> Result<&'a [Self]>;
    /// Appends the values, rounded to nearest.
    fn write(values: &[Self], to: &mut CpuStorage);
}

macro_rules! wide {
    ($wide:ident as $own:ident, beside $other:ident as $beside:ident,
     widen: [$f16_to_wide:expr, $bf16_to_wide:expr], append: [$append_f16:expr, $append_bf16:expr $(,)?]) => {
        impl Wide for $wide {
            #[inline(always)]
            fn read<'a>(storage: &'a CpuStorage, range: Range<usize>, space: &'a mut [Self]) -> Result<&'a [Self]> {
                match storage {
                    CpuStorage::$own(x) => return Ok(&x[range]),
                    CpuStorage::$beside(x) => space.iter_mut().zip(&x[range]).for_each(|(to, x)| *to = *x as $wide),
                    CpuStorage::F16(x) => $f16_to_wide(&x[range], space),
                    CpuStorage::BF16(x) => $bf16_to_wide(&x[range], space),
                    other => return Err(not_float(other)),
                }
                Ok(space)
            }

            #[inline(always)]
            fn write(values: &[Self], to: &mut CpuStorage) {
                match to {
                    CpuStorage::$own(to) => to.extend_from_slice(values),
                    CpuStorage::$beside(to) => to.extend(values.iter().map(|x| *x as $other)),
                    CpuStorage::F16(to) => $append_f16(values, to),
                    CpuStorage::BF16(to) => $append_bf16(values, to),
                    _ => {}
                }
            }
        }
    };
}
wide!(f32 as F32, beside f64 as F64, widen: [f16::widen, bf16::widen], append: [Element::append, Element::append]);
wide!(f64 as F64, beside f32 as F32, widen: [widened, widened], append: [
    |x: &[f64], to: &mut Vec<f16>| to.extend(x.iter().map(|x| f16::from_f64(*x))),
    |x: &[f64], to: &mut Vec<bf16>| to.extend(x.iter().map(|x| bf16::from_f64(*x))),
]);

#[inline(always)]
fn widened<T: Copy + Into<f64>>(x: &[T], to: &mut [f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to = (*x).into());
}

fn not_float(storage: &CpuStorage) -> candle_core::Error {
    use candle_core::backend::BackendStorage;
    candle_core::Error::Msg(format!("{:?} in a sum of floats", storage.dtype()))
}

/// The tensor, or a copy of it that has no gaps.
pub(super) fn dense(x: &Tensor) -> Result<Cow<'_, Tensor>> {
    if x.is_contiguous() { Ok(Cow::Borrowed(x)) } else { x.contiguous().map(Cow::Owned) }
}

/// Lets `see` see the storage of a contiguous tensor on the CPU, and which part of it is the tensor.
pub(super) fn with_storage<R>(x: &Tensor, see: impl FnOnce(&CpuStorage, Range<usize>) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((from, to))) => see(storage, from..to),
        _ => candle_core::bail!("expected a contiguous tensor on the CPU"),
    }
}

/// max |x| of some elements; NaN if any of them is not finite.
#[inline(always)]
pub(super) fn largest(storage: &CpuStorage, range: Range<usize>) -> Result<f64> {
    // The bits of |x| are ordered as |x| is, and of what is not finite they are the largest.
    macro_rules! largest {
        ($values:expr, $float:ty, $bits:ty) => {{
            let bits = $values.iter().fold(0, |most: $bits, x| most.max(x.to_bits() & (<$bits>::MAX >> 1)));
            f64::from(<$float>::from_bits(bits))
        }};
    }
    let most = match storage {
        CpuStorage::F16(x) => largest!(x[range], f16, u16),
        CpuStorage::BF16(x) => largest!(x[range], bf16, u16),
        CpuStorage::F32(x) => return Ok(largest_of(&x[range])),
        CpuStorage::F64(x) => largest!(x[range], f64, u64),
        other => return Err(not_float(other)),
    };
    Ok(if most.is_finite() { most } else { f64::NAN })
}

/// [`largest`] of F32.
#[inline(always)]
pub(super) fn largest_of(x: &[f32]) -> f64 {
    let bits = x.iter().fold(0, |most: u32, x| most.max(x.to_bits() & (u32::MAX >> 1)));
    let most = f32::from_bits(bits);
    if most.is_finite() { f64::from(most) } else { f64::NAN }
}

/// [`largest`] by itself.
pub(super) struct Largest<'a>(pub(super) &'a CpuStorage, pub(super) Range<usize>);

impl Kernel for Largest<'_> {
    type Output = Result<f64>;

    #[inline(always)]
    fn run(self) -> Result<f64> {
        largest(self.0, self.1)
    }
}
