//! Elements of CPU tensors in the number that sums are made in, and how large they are.

use crate::field::ops::cpu::{Element, Kernel, vectorised};
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
    ($wide:ty, $own:ident, $other:ident($other_type:ty), $widen:expr, $narrow:expr) => {
        impl Wide for $wide {
            #[inline(always)]
            fn read<'a>(storage: &'a CpuStorage, range: Range<usize>, space: &'a mut [Self]) -> Result<&'a [Self]> {
                let widen = $widen;
                match storage {
                    CpuStorage::$own(x) => return Ok(&x[range]),
                    CpuStorage::$other(x) => space.iter_mut().zip(&x[range]).for_each(|(to, x)| *to = *x as $wide),
                    CpuStorage::F16(x) => widen.0(&x[range], space),
                    CpuStorage::BF16(x) => widen.1(&x[range], space),
                    other => return Err(not_float(other)),
                }
                Ok(space)
            }

            #[inline(always)]
            fn write(values: &[Self], to: &mut CpuStorage) {
                let narrow = $narrow;
                match to {
                    CpuStorage::$own(to) => to.extend_from_slice(values),
                    CpuStorage::$other(to) => to.extend(values.iter().map(|x| *x as $other_type)),
                    CpuStorage::F16(to) => narrow.0(values, to),
                    CpuStorage::BF16(to) => narrow.1(values, to),
                    _ => {}
                }
            }
        }
    };
}
wide!(
    f32,
    F32,
    F64(f64),
    (<f16 as Element>::widen, <bf16 as Element>::widen),
    (<f16 as Element>::append, <bf16 as Element>::append)
);
wide!(
    f64,
    F64,
    F32(f32),
    (
        |x: &[f16], to: &mut [f64]| to.iter_mut().zip(x).for_each(|(to, x)| *to = x.to_f64()),
        |x: &[bf16], to: &mut [f64]| to.iter_mut().zip(x).for_each(|(to, x)| *to = x.to_f64())
    ),
    (
        |x: &[f64], to: &mut Vec<f16>| to.extend(x.iter().map(|x| f16::from_f64(*x))),
        |x: &[f64], to: &mut Vec<bf16>| to.extend(x.iter().map(|x| bf16::from_f64(*x)))
    )
);

fn not_float(storage: &CpuStorage) -> candle_core::Error {
    use candle_core::backend::BackendStorage;
    candle_core::Error::Msg(format!("{:?} in a sum of floats", storage.dtype()))
}

/// The tensor, or a copy of it that has no gaps.
pub(super) fn dense(x: &Tensor) -> Result<Cow<'_, Tensor>> {
    if x.is_contiguous() { Ok(Cow::Borrowed(x)) } else { x.contiguous().map(Cow::Owned) }
}

/// Lets `see` see the storage of a contiguous tensor on the CPU, and which part of it is the tensor.
pub(super) fn on_cpu<R>(x: &Tensor, see: impl FnOnce(&CpuStorage, Range<usize>) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((from, to))) => see(storage, from..to),
        _ => candle_core::bail!("expected a contiguous tensor on the CPU"),
    }
}

/// max |x| of some elements; NaN if any of them is not finite.
pub(super) fn largest(storage: &CpuStorage, range: Range<usize>) -> Result<f64> {
    match storage {
        CpuStorage::F16(x) => Ok(vectorised(Largest(&x[range]))),
        CpuStorage::BF16(x) => Ok(vectorised(Largest(&x[range]))),
        CpuStorage::F32(x) => Ok(vectorised(Largest(&x[range]))),
        CpuStorage::F64(x) => Ok(vectorised(Largest(&x[range]))),
        other => Err(not_float(other)),
    }
}

/// The larger of two such; NaN if either is.
pub(crate) fn larger(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

/// The bits of |x| are ordered as |x| is; what is not finite has the largest.
struct Largest<'a, T>(&'a [T]);

macro_rules! largest {
    ($($float:ty: $bits:ty),*) => {
        $(
            impl Kernel for Largest<'_, $float> {
                type Output = f64;

                #[inline(always)]
                fn run(self) -> f64 {
                    let most = self.0.iter().fold(0, |most: $bits, x| most.max(x.to_bits() & (<$bits>::MAX >> 1)));
                    let most = f64::from(<$float>::from_bits(most));
                    if most.is_finite() { most } else { f64::NAN }
                }
            }
        )*
    };
}
largest!(f16: u16, bf16: u16, f32: u32, f64: u64);
