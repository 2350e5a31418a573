//! Sums of tensors in mixed dtypes: the arithmetic of stages, cotangents and gradient sums.
//!
//! On the CPU and on CUDA each is one pass over the operands; elsewhere, and where Candle tracks an operand, it is a composition of
//! Candle's own ops with the same meaning.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, MetalStorage, Result, Shape, Storage, Tensor};
use half::{bf16, f16};

/// Whether values are finite: known on the host, or a 0-d F32 tensor on the device that is 0 (finite) or NaN.
#[derive(Clone, Debug)]
pub enum Finite {
    /// Known.
    Host(bool),
    /// To be read with the others, once per pass.
    Device(Vec<Tensor>),
}

impl Default for Finite {
    fn default() -> Self {
        Self::Host(true)
    }
}

impl Finite {
    /// Finite only if both are.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Host(true), rest) | (rest, Self::Host(true)) => rest,
            (Self::Host(false), _) | (_, Self::Host(false)) => Self::Host(false),
            (Self::Device(mut a), Self::Device(b)) => {
                a.extend(b);
                Self::Device(a)
            }
        }
    }

    /// Whether a non-finite value is already known of.
    pub fn known_bad(&self) -> bool {
        matches!(self, Self::Host(false))
    }

    /// Whether all values are already known to be finite: nothing is left to look at.
    pub fn known_good(&self) -> bool {
        matches!(self, Self::Host(true))
    }

    /// Adds what is on the device into one 0-d tensor, so that many flags cost one read.
    fn folded(&self) -> Result<Option<Tensor>> {
        let Self::Device(flags) = self else { return Ok(None) };
        let mut flags = flags.clone();
        while flags.len() > 1 {
            let sum =
                |some: &[Tensor]| combine(None, &some.iter().map(|flag| (1.0, flag)).collect::<Vec<_>>(), DType::F32);
            flags = flags.chunks(16).map(sum).collect::<Result<_>>()?;
        }
        Ok(flags.pop())
    }

    /// Reads many at once: one transfer from the device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(all: &[Self]) -> Result<Vec<bool>> {
        let folded = all.iter().map(Self::folded).collect::<Result<Vec<_>>>()?;
        let on_device: Vec<&Tensor> = folded.iter().flatten().collect();
        let mut read =
            if on_device.is_empty() { vec![] } else { Tensor::stack(&on_device, 0)?.to_vec1::<f32>()? }.into_iter();
        Ok(all
            .iter()
            .zip(&folded)
            .map(|(flag, folded)| match (flag, folded) {
                (Self::Host(finite), _) => *finite,
                (_, Some(_)) => read.next().is_some_and(|value| value == 0.0),
                (_, None) => true,
            })
            .collect())
    }
}

/// `base + Σ cᵢ·xᵢ` in `dtype`. The terms are summed first, in F64 if `base` or any term is F64 and else in F32, and
/// `base` is added last. A sum of one operand that is in `dtype` already is that operand, not a copy.
///
/// # Errors
/// Operands of different shapes or devices.
pub fn combine(base: Option<&Tensor>, terms: &[(f64, &Tensor)], dtype: DType) -> Result<Tensor> {
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
        return Ok(only.clone());
    }
    let wide = operands().any(|x| x.dtype() == DType::F64) || dtype == DType::F64;
    let tracked = operands().any(Tensor::track_op);
    #[cfg(feature = "cuda")]
    if !tracked && let Some((sum, _)) = super::cuda::combine(base, terms, None, dtype, false)? {
        return Ok(sum);
    }
    if tracked || !operands().all(|x| x.device().is_cpu() && is_float(x.dtype())) {
        return compose(base, terms, if wide { DType::F64 } else { DType::F32 }, dtype);
    }
    let storage = if wide { on_cpu::<f64>(base, terms, dtype) } else { on_cpu::<f32>(base, terms, dtype) }?;
    Ok(Tensor::from_storage(Storage::Cpu(storage), first.shape(), BackpropOp::none(), false))
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
    let copy = combine(Some(&x), &[], dtype)?;
    let finite = finite(&copy)?;
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

/// The number a sum is made in.
trait Wide:
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
const CHUNK: usize = 1024;

fn on_cpu<A: Wide>(base: Option<&Tensor>, terms: &[(f64, &Tensor)], dtype: DType) -> Result<CpuStorage> {
    let terms: Vec<(f64, Tensor)> = terms.iter().map(|(c, x)| Ok((*c, x.contiguous()?))).collect::<Result<_>>()?;
    let base = base.map(Tensor::contiguous).transpose()?;
    let count = base.as_ref().or(terms.first().map(|(_, x)| x)).map_or(0, Tensor::elem_count);
    let mut result = match dtype {
        DType::F16 => CpuStorage::F16(Vec::with_capacity(count)),
        DType::BF16 => CpuStorage::BF16(Vec::with_capacity(count)),
        DType::F32 => CpuStorage::F32(Vec::with_capacity(count)),
        DType::F64 => CpuStorage::F64(Vec::with_capacity(count)),
        other => candle_core::bail!("a sum cannot be kept in {other:?}"),
    };
    let (mut sums, mut loaded) = ([A::default(); CHUNK], [A::default(); CHUNK]);
    for from in (0..count).step_by(CHUNK) {
        let length = CHUNK.min(count - from);
        let (sums, loaded) = (&mut sums[..length], &mut loaded[..length]);
        sums.fill(A::default());
        for (c, x) in &terms {
            load(x, from, loaded)?;
            let c = A::from_f64(*c);
            sums.iter_mut().zip(&*loaded).for_each(|(sum, x)| *sum += c * *x);
        }
        if let Some(base) = &base {
            load(base, from, loaded)?;
            sums.iter_mut().zip(&*loaded).for_each(|(sum, x)| *sum = *x + *sum);
        }
        A::store(sums, &mut result);
    }
    Ok(result)
}

/// Elements `from..from + into.len()` of a contiguous CPU tensor.
fn load<A: Wide>(x: &Tensor, from: usize, into: &mut [A]) -> Result<()> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => A::load(cpu, layout.start_offset() + from, into),
        _ => candle_core::bail!("expected a tensor on the CPU"),
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

/// `sum += c·x`, in place on the CPU and by kernels of ours. Says whether every c·x is finite.
///
/// # Errors
/// Operands of different shapes or devices.
pub fn accumulate(sum: &mut Tensor, c: f64, x: &Tensor) -> Result<Finite> {
    if sum.dims() != x.dims() {
        candle_core::bail!("adding a gradient of shape {:?} to a sum of shape {:?}", x.dims(), sum.dims())
    }
    if sum.device().is_cpu() && is_float(x.dtype()) {
        let add = AddScaled { c, x: x.contiguous()?, finite: std::cell::Cell::new(true) };
        sum.inplace_op1(&add)?;
        return Ok(Finite::Host(add.finite.get()));
    }
    #[cfg(feature = "cuda")]
    if let Some(flag) = super::cuda::accumulate(sum, c, None, x)? {
        return Ok(Finite::Device(vec![flag]));
    }
    let term = (x.to_dtype(sum.dtype())? * c)?;
    *sum = (&*sum + &term)?;
    finite(&term)
}

/// `sum += number·x` for a 0-d F32 tensor `number` on the device. Says whether every number·x is finite.
pub(crate) fn accumulate_by(sum: &mut Tensor, number: &Tensor, x: &Tensor) -> Result<Finite> {
    #[cfg(feature = "cuda")]
    if let Some(flag) = super::cuda::accumulate(sum, 1.0, Some(number), x)? {
        return Ok(Finite::Device(vec![flag]));
    }
    let scaled = x.to_dtype(sum.dtype())?.broadcast_mul(&number.to_dtype(sum.dtype())?)?;
    accumulate(sum, 1.0, &scaled)
}

struct AddScaled {
    c: f64,
    x: Tensor,
    finite: std::cell::Cell<bool>,
}

impl AddScaled {
    fn add<A: Wide>(&self, sums: &mut [A]) -> Result<()> {
        let c = A::from_f64(self.c);
        let mut loaded = [A::default(); CHUNK];
        let mut zero = A::default();
        for (n, sums) in sums.chunks_mut(CHUNK).enumerate() {
            let loaded = &mut loaded[..sums.len()];
            load(&self.x, n * CHUNK, loaded)?;
            sums.iter_mut().zip(&*loaded).for_each(|(sum, x)| *sum += c * *x);
            zero += poison(loaded);
        }
        self.finite.set(zero.to_f64() == 0.0);
        Ok(())
    }
}

impl InplaceOp1 for AddScaled {
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
    x.inplace_op1(&Write(std::cell::Cell::new(Some(write))))
}

struct Write<F>(std::cell::Cell<Option<F>>);

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

/// Whether every element is finite.
///
/// # Errors
/// When the device fails.
pub fn finite(x: &Tensor) -> Result<Finite> {
    #[cfg(feature = "cuda")]
    if let Some(flag) = super::cuda::finite(x)? {
        return Ok(Finite::Device(vec![flag]));
    }
    if !x.device().is_cpu() {
        return Ok(Finite::Device(vec![(x.detach() * 0.0)?.to_dtype(DType::F32)?.sum_all()?]));
    }
    let mut zero = 0.0;
    match x.dtype() {
        DType::F64 => each_chunk(x, |chunk: &[f64]| zero += poison(chunk))?,
        _ => each_chunk(x, |chunk: &[f32]| zero += f64::from(poison(chunk)))?,
    }
    Ok(Finite::Host(zero == 0.0))
}

/// Whether every element of all tensors is finite.
///
/// # Errors
/// When the device fails.
pub fn all_finite(tensors: &[Tensor]) -> Result<Finite> {
    tensors.iter().try_fold(Finite::default(), |all, x| Ok(all.and(finite(x)?)))
}

/// max |x| on the host. NaN if any element is not finite.
///
/// # Errors
/// When the device fails.
pub fn max_abs(x: &Tensor) -> Result<f64> {
    if !x.device().is_cpu() {
        return max_abs_on_device(x)?.to_dtype(DType::F64)?.to_scalar();
    }
    let (mut most, mut zero) = (0.0_f64, 0.0);
    let mut see = |largest: f64, poison: f64| {
        most = most.max(largest);
        zero += poison;
    };
    match x.dtype() {
        DType::F64 => each_chunk(x, |chunk: &[f64]| see(largest(chunk), poison(chunk)))?,
        _ => each_chunk(x, |chunk: &[f32]| see(f64::from(largest(chunk)), f64::from(poison(chunk))))?,
    }
    Ok(if zero == 0.0 { most } else { f64::NAN })
}

/// max |x| as a 0-d F32 tensor, without a read from the device.
///
/// # Errors
/// When the device fails.
pub fn max_abs_on_device(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(largest) = super::cuda::max_abs(&[x])? {
        return Ok(largest);
    }
    x.detach().to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)
}

/// The power of two S with ½ < S·max|x| ≤ 1 over all tensors, shifted down by the headroom, and 1/S, by kernels of ours.
#[cfg(feature = "cuda")]
pub(crate) fn power_of_two(
    tensors: &[Tensor],
    headroom: i32,
    exponents: (i32, i32),
) -> Result<Option<(Tensor, Tensor)>> {
    match super::cuda::max_abs(&tensors.iter().collect::<Vec<_>>())? {
        Some(largest) => super::cuda::power_of_two(&largest, headroom, exponents),
        None => Ok(None),
    }
}

/// Shows a CPU tensor to `see`, chunk by chunk, widened.
fn each_chunk<A: Wide>(x: &Tensor, mut see: impl FnMut(&[A])) -> Result<()> {
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
fn poison<A: Wide>(values: &[A]) -> A {
    let mut lanes = [A::default(); LANES];
    for values in values.chunks(LANES) {
        lanes.iter_mut().zip(values).for_each(|(lane, x)| *lane += *x * A::default());
    }
    lanes.into_iter().fold(A::default(), |sum, lane| sum + lane)
}

/// max |x| of finite values.
fn largest<A: Wide>(values: &[A]) -> A {
    let mut lanes = [A::default(); LANES];
    for values in values.chunks(LANES) {
        for (lane, x) in lanes.iter_mut().zip(values) {
            let size = x.magnitude();
            *lane = if size > *lane { size } else { *lane };
        }
    }
    lanes.into_iter().fold(A::default(), |most, lane| if lane > most { lane } else { most })
}

/// A 0-d zero in F32, on whatever device `storage` is: what token and seed ops return.
pub(crate) fn zero_beside<S: BackendStorage>(storage: &S) -> Result<(S, Shape)>
where
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(());
    Ok((storage.device().zeros_impl(&shape, DType::F32)?, shape))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn one_bad_value_is_found_wherever_it_is() -> Result<()> {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for at in [0, 15, 16, 1023, 1024, 1029] {
                    let mut values: Vec<f64> = (0..1030).map(|n| f64::from(n) - 700.0).collect();
                    let good = Tensor::new(values.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
                    assert!(!finite(&good)?.known_bad());
                    assert_eq!(max_abs(&good)?, 700.0);
                    values[at] = bad;
                    let spoilt = Tensor::new(values.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
                    assert!(finite(&spoilt)?.known_bad() && max_abs(&spoilt)?.is_nan(), "{dtype:?} {bad} at {at}");
                    let mut sum = Tensor::zeros(1030, DType::F64, &Device::Cpu)?;
                    assert!(!accumulate(&mut sum, 2.0, &good)?.known_bad());
                    assert!(accumulate(&mut sum, 2.0, &spoilt)?.known_bad());
                }
            }
        }
        Ok(())
    }
}
