//! Whether values are finite, and how large they are.

use super::combine;
use super::wide::{Largest, dense, with_storage};
use crate::field::ops::cpu::vectorised;
use candle_core::{DType, Result, Tensor};

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

/// Whether every element is finite.
///
/// # Errors
/// When the device fails.
pub fn finite(x: &Tensor) -> Result<Finite> {
    #[cfg(feature = "cuda")]
    if let Some(flag) = crate::field::ops::cuda::finite(x)? {
        return Ok(Finite::Device(vec![flag]));
    }
    if !x.device().is_cpu() {
        return Ok(Finite::Device(vec![(x.detach() * 0.0)?.to_dtype(DType::F32)?.sum_all()?]));
    }
    Ok(Finite::Host(!max_abs(x)?.is_nan()))
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
    with_storage(dense(x)?.as_ref(), |x, range| vectorised(Largest(x, range)))
}

/// max |x| as a 0-d F32 tensor, without a read from the device.
///
/// # Errors
/// When the device fails.
pub fn max_abs_on_device(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(largest) = crate::field::ops::cuda::max_abs(&[x])? {
        return Ok(largest);
    }
    x.detach().to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)
}

/// The power of two S with ½ < S·max|x| ≤ 1 over all tensors, shifted down by the headroom, and 1/S, by kernels of
/// ours.
#[cfg(feature = "cuda")]
pub(crate) fn power_of_two(
    tensors: &[Tensor],
    headroom: i32,
    exponents: (i32, i32),
) -> Result<Option<(Tensor, Tensor)>> {
    match crate::field::ops::cuda::max_abs(&tensors.iter().collect::<Vec<_>>())? {
        Some(largest) => crate::field::ops::cuda::power_of_two(&largest, headroom, exponents),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::accumulate;
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
