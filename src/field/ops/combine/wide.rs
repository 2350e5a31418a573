//! CPU tensors chunk by chunk, widened to the number that sums are made in.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result, Storage, Tensor};
use half::{bf16, f16};

/// The number a sum is made in.
pub(super) trait Wide:
    Copy + Default + PartialOrd + std::ops::AddAssign + std::ops::Mul<Output = Self> + std::ops::Add<Output = Self>
{
    fn from_f64(x: f64) -> Self;
    fn to_f64(self) -> f64;
    fn magnitude(self) -> Self;
    fn load(storage: &CpuStorage, from: usize, into: &mut [Self]) -> Result<()>;
    fn store(sums: &[Self], into: &mut CpuStorage);
}

macro_rules! wide {
    ($wide:ty, $to_half:ident, $from_half:ident) => {
        impl Wide for $wide {
            fn from_f64(x: f64) -> Self {
                x as $wide
            }

            fn to_f64(self) -> f64 {
                f64::from(self)
            }

            fn magnitude(self) -> Self {
                self.abs()
            }

            fn load(storage: &CpuStorage, from: usize, into: &mut [Self]) -> Result<()> {
                let range = from..from + into.len();
                match storage {
                    CpuStorage::F32(x) => into.iter_mut().zip(&x[range]).for_each(|(to, x)| *to = *x as $wide),
                    CpuStorage::F64(x) => into.iter_mut().zip(&x[range]).for_each(|(to, x)| *to = *x as $wide),
                    CpuStorage::F16(x) => into.iter_mut().zip(&x[range]).for_each(|(to, x)| *to = x.$to_half()),
                    CpuStorage::BF16(x) => into.iter_mut().zip(&x[range]).for_each(|(to, x)| *to = x.$to_half()),
                    other => candle_core::bail!("{:?} in a sum of floats", other.dtype()),
                }
                Ok(())
            }

            fn store(sums: &[Self], into: &mut CpuStorage) {
                match into {
                    CpuStorage::F32(to) => to.extend(sums.iter().map(|x| *x as f32)),
                    CpuStorage::F64(to) => to.extend(sums.iter().map(|x| f64::from(*x))),
                    CpuStorage::F16(to) => to.extend(sums.iter().map(|x| f16::$from_half(*x))),
                    CpuStorage::BF16(to) => to.extend(sums.iter().map(|x| bf16::$from_half(*x))),
                    _ => {}
                }
            }
        }
    };
}
wide!(f32, to_f32, from_f32);
wide!(f64, to_f64, from_f64);

/// Elements a sum is made of at a time, in cache.
pub(super) const CHUNK: usize = 1024;

/// Elements `from..from + into.len()` of a contiguous CPU tensor.
pub(super) fn load<A: Wide>(x: &Tensor, from: usize, into: &mut [A]) -> Result<()> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => A::load(cpu, layout.start_offset() + from, into),
        _ => candle_core::bail!("expected a tensor on the CPU"),
    }
}

/// Shows a CPU tensor to `see`, chunk by chunk, widened.
pub(super) fn each_chunk<A: Wide>(x: &Tensor, mut see: impl FnMut(&[A])) -> Result<()> {
    let x = x.contiguous()?;
    let mut loaded = [A::default(); CHUNK];
    for from in (0..x.elem_count()).step_by(CHUNK) {
        let loaded = &mut loaded[..CHUNK.min(x.elem_count() - from)];
        load(&x, from, loaded)?;
        see(loaded);
    }
    Ok(())
}

/// Independent sums or maxima that a loop keeps, so that it can be vectorised.
const LANES: usize = 16;

/// 0 if all values are finite, else NaN.
pub(super) fn poison<A: Wide>(values: &[A]) -> A {
    let mut lanes = [A::default(); LANES];
    for values in values.chunks(LANES) {
        lanes.iter_mut().zip(values).for_each(|(lane, x)| *lane += *x * A::default());
    }
    lanes.into_iter().fold(A::default(), |sum, lane| sum + lane)
}

/// max |x| of finite values.
pub(super) fn largest<A: Wide>(values: &[A]) -> A {
    let mut lanes = [A::default(); LANES];
    for values in values.chunks(LANES) {
        for (lane, x) in lanes.iter_mut().zip(values) {
            let size = x.magnitude();
            *lane = if size > *lane { size } else { *lane };
        }
    }
    lanes.into_iter().fold(A::default(), |most, lane| if lane > most { lane } else { most })
}
