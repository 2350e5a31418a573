//! Sums that grow in place.

use super::finite::{Finite, finite};
use super::is_float;
use super::wide::{Wide, dense, largest, with_storage};
use crate::field::ops::cpu::{CHUNK, Kernel, vectorised};
use crate::state::larger;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use std::cell::Cell;

/// `sum += c·x`, in place on the CPU and by kernels of ours. Says whether every x is finite.
///
/// # Errors
/// Operands of different shapes or devices.
pub fn accumulate(sum: &mut Tensor, c: f64, x: &Tensor) -> Result<Finite> {
    if sum.dims() != x.dims() {
        candle_core::bail!("adding a gradient of shape {:?} to a sum of shape {:?}", x.dims(), sum.dims())
    }
    if sum.device().is_cpu() && is_float(x.dtype()) {
        let x = dense(x)?;
        let add = AddScaled { c, x: &x, finite: Cell::new(true) };
        sum.inplace_op1(&add)?;
        return Ok(Finite::Host(add.finite.get()));
    }
    #[cfg(feature = "cuda")]
    if let Some(flag) = crate::field::ops::cuda::accumulate(sum, c, None, x)? {
        return Ok(Finite::Device(vec![flag]));
    }
    let term = (x.to_dtype(sum.dtype())? * c)?;
    *sum = (&*sum + &term)?;
    finite(&term)
}

/// `sum += number·x` for a 0-d F32 tensor `number` on the device. Says whether every number·x is finite.
pub(crate) fn accumulate_by(sum: &mut Tensor, number: &Tensor, x: &Tensor) -> Result<Finite> {
    #[cfg(feature = "cuda")]
    if let Some(flag) = crate::field::ops::cuda::accumulate(sum, 1.0, Some(number), x)? {
        return Ok(Finite::Device(vec![flag]));
    }
    let scaled = x.to_dtype(sum.dtype())?.broadcast_mul(&number.to_dtype(sum.dtype())?)?;
    accumulate(sum, 1.0, &scaled)
}

struct AddScaled<'a> {
    c: f64,
    x: &'a Tensor,
    finite: Cell<bool>,
}

impl AddScaled<'_> {
    fn add<A: Wide>(&self, sums: &mut [A]) -> Result<()> {
        let most = with_storage(self.x, |x, range| vectorised(Add { c: A::of(self.c), x, first: range.start, sums }))?;
        self.finite.set(!most.is_nan());
        Ok(())
    }
}

/// sums += c·x; gives max |x|.
struct Add<'a, A> {
    c: A,
    x: &'a CpuStorage,
    first: usize,
    sums: &'a mut [A],
}

impl<A: Wide> Kernel for Add<'_, A> {
    type Output = Result<f64>;

    #[inline(always)]
    fn run(self) -> Result<f64> {
        let Self { c, x, first, sums } = self;
        let (mut space, mut most) = ([A::ZERO; CHUNK], 0.0);
        for (n, sums) in sums.chunks_mut(CHUNK).enumerate() {
            let range = first + n * CHUNK..first + n * CHUNK + sums.len();
            most = larger(most, largest(x, range.clone())?);
            let x = A::read(x, range, &mut space[..sums.len()])?;
            sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += c * *x);
        }
        Ok(most)
    }
}

impl InplaceOp1 for AddScaled<'_> {
    fn name(&self) -> &'static str {
        "add-scaled"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((from, to)) = layout.contiguous_offsets() else { candle_core::bail!("a sum must be contiguous") };
        match storage {
            CpuStorage::F32(sums) => self.add(&mut sums[from..to]),
            CpuStorage::F64(sums) => self.add(&mut sums[from..to]),
            other => candle_core::bail!("sums are F32 or F64, not {:?}", other.dtype()),
        }
    }
}

/// Lets `write` at the elements of a contiguous F32 tensor on the CPU, which nothing else is reading.
///
/// # Errors
/// For any other tensor.
pub(crate) fn in_place(x: &Tensor, write: impl FnOnce(&mut [f32])) -> Result<()> {
    x.inplace_op1(&Write(Cell::new(Some(write))))
}

struct Write<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets(), self.0.take()) {
            (CpuStorage::F32(values), Some((from, to)), Some(write)) => {
                write(&mut values[from..to]);
                Ok(())
            }
            (other, ..) => candle_core::bail!("{:?} is not written in place", other.dtype()),
        }
    }
}
