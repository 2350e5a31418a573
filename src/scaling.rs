//! Adjoint scaling: keeps cotangents inside the range of a half-precision compute dtype.
//!
//! A cotangent κ is multiplied by a power of two S (exact), pulled back, and divided by S in the accumulate dtype.

use crate::State;
use crate::error::{OdeError, Result};
use crate::field::largest;
use crate::field::ops::combine;
use candle_core::{DType, Device, Tensor};
use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// How the backward pass scales cotangents before it pulls them back in a half-precision dtype.
///
/// The headroom that overflows have taught [`per_step`](Self::per_step) is shared by clones: keep one value over a
/// training run (or keep the [`Ode`](crate::Ode)), and save [`headroom`](Self::headroom) with the optimiser.
///
/// # Reference
/// Celledoni, Owren, Ruthotto, Yang, arXiv 2510.23498, §4 (the dynamic rule).
#[derive(Clone, Debug)]
pub struct AdjointScaling {
    pub(crate) rule: Rule,
    headroom: Arc<AtomicI32>,
}

/// The rules.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rule {
    PerStep,
    Dynamic,
    Static(f64),
    None,
}

impl AdjointScaling {
    /// Default for F16. For each stage the power of two with ½ < S·max|κ| ≤ 1, found from the exponent on the device,
    /// with nothing read back. A pass that overflows all the same is redone with one more notch of headroom and the
    /// overflowing steps in F32.
    pub fn per_step() -> Self {
        Self::of(Rule::PerStep)
    }

    /// The dynamic rule of the reference: S₀ = 2^round(log₂(target / max|λ|)), target = √(batch/numel)/ε; halved and
    /// the step redone on overflow (at most 50 times); doubled after eight clean steps in a row if S·max|λ| < target/4
    /// (the reference tests the unscaled λ, and so doubles until it overflows). Reads from the device every step.
    pub fn dynamic() -> Self {
        Self::of(Rule::Dynamic)
    }

    /// One S for every stage of every step.
    ///
    /// # Errors
    /// If `s` is not a power of two.
    pub fn fixed(s: f64) -> Result<Self> {
        if s.is_finite() && s > 0.0 && s.log2().fract() == 0.0 {
            Ok(Self::of(Rule::Static(s)))
        } else {
            let hint = "a scale must be a positive power of two, which is exact in every dtype";
            Err(OdeError::Setting { setting: "AdjointScaling::fixed", value: s.to_string(), hint })
        }
    }

    /// No scaling. Default for every compute dtype but F16.
    pub fn none() -> Self {
        Self::of(Rule::None)
    }

    /// What `compute` needs.
    pub fn default_for(compute: DType) -> Self {
        if compute == DType::F16 { Self::per_step() } else { Self::none() }
    }

    /// `per_step`, `dynamic`, `static` or `none`.
    pub fn name(&self) -> &'static str {
        match self.rule {
            Rule::PerStep => "per_step",
            Rule::Dynamic => "dynamic",
            Rule::Static(_) => "static",
            Rule::None => "none",
        }
    }

    /// Whether a step that overflows in `dtype` is tried again at once, with another scale.
    pub(crate) fn tries_again(&self, dtype: DType) -> bool {
        self.rule == Rule::Dynamic && dtype.size_in_bytes() < 4
    }

    /// Powers of two that earlier overflows have taken off S.
    pub fn headroom(&self) -> i32 {
        self.headroom.load(Ordering::Relaxed)
    }

    /// Restores a saved headroom.
    pub fn set_headroom(&self, notches: i32) {
        self.headroom.store(notches, Ordering::Relaxed);
    }

    /// Headroom beyond which small cotangents would be lost to F16's range instead.
    pub(crate) const MOST_HEADROOM: i32 = 10;

    /// A pass has succeeded with this headroom, and not with less.
    pub(crate) fn learn(&self, headroom: i32) {
        if self.rule == Rule::PerStep {
            self.headroom.fetch_max(headroom, Ordering::Relaxed);
        }
    }

    /// The same rule with the same headroom, which learns by itself from here on.
    pub(crate) fn apart(&self) -> Self {
        Self { rule: self.rule, headroom: Arc::new(AtomicI32::new(self.headroom())) }
    }

    fn of(rule: Rule) -> Self {
        Self { rule, headroom: Arc::default() }
    }
}

/// A power of two by which a cotangent is multiplied before a pullback.
#[derive(Clone, Debug)]
pub enum Scale {
    /// Known on the host.
    Host(f64),
    /// S and 1/S as 0-d F32 tensors on the device.
    Device {
        /// S.
        scale: Tensor,
        /// 1/S.
        inverse: Tensor,
    },
}

impl Default for Scale {
    fn default() -> Self {
        Self::Host(1.0)
    }
}

impl Scale {
    /// S·x, rounded once to `dtype`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn apply(&self, x: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
        match self {
            Self::Host(s) => combine::combine(None, &[(*s, x)], dtype),
            #[cfg(feature = "cuda")]
            Self::Device { scale, .. } if let Some(scaled) = combine::times(x, scale, dtype)? => Ok(scaled),
            Self::Device { scale, .. } => x.broadcast_mul(&scale.to_dtype(x.dtype())?)?.to_dtype(dtype),
        }
    }

    /// S, read from the device if it is there.
    pub(crate) fn on_host(&self) -> candle_core::Result<f64> {
        match self {
            Self::Host(s) => Ok(*s),
            Self::Device { scale, .. } => scale.to_dtype(DType::F64)?.to_scalar(),
        }
    }

    /// x/S in `dtype`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn undo(&self, x: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
        Ok(self.undone(x, dtype)?.0)
    }

    /// x/S in `dtype`, and its largest absolute value where that is found on the way.
    pub(crate) fn undone(&self, x: &Tensor, dtype: DType) -> candle_core::Result<(Tensor, Option<f64>)> {
        match self {
            Self::Host(s) => combine::combined(None, &[(1.0 / s, x)], dtype),
            #[cfg(feature = "cuda")]
            Self::Device { inverse, .. } if let Some(scaled) = combine::times(x, inverse, dtype)? => Ok((scaled, None)),
            Self::Device { inverse, .. } => Ok((x.to_dtype(dtype)?.broadcast_mul(&inverse.to_dtype(dtype)?)?, None)),
        }
    }
}

/// Finds the power of two with ½ < S·max|κ| ≤ 1 for each cotangent of one pass, shifted down by its headroom. 1 for a
/// cotangent that is zero or not finite.
#[derive(Debug)]
pub(crate) struct PowerOfTwo {
    headroom: i32,
    tables: OnceCell<Tables>,
}

/// The rule by table look-up, all on the device: the count of powers of two below the maximum is its exponent.
#[derive(Debug)]
struct Tables {
    thresholds: Tensor,
    scales: Tensor,
    inverses: Tensor,
}

impl PowerOfTwo {
    pub(crate) fn new(headroom: i32) -> Self {
        Self { headroom, tables: OnceCell::new() }
    }

    /// S for a cotangent, without a read from the device.
    pub(crate) fn scale(&self, cotangent: &State) -> Result<Scale> {
        let tensors = cotangent.tensors();
        if tensors.iter().all(|x| x.device().is_cpu()) {
            return Ok(Scale::Host(self.below(largest(cotangent)?)));
        }
        #[cfg(feature = "cuda")]
        if let Some((scale, inverse)) = combine::power_of_two(tensors, self.headroom, (LOWEST, HIGHEST))? {
            return Ok(Scale::Device { scale, inverse });
        }
        let maxima = tensors.iter().map(combine::max_abs_on_device).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(self.look_up(&Tensor::stack(&maxima, 0)?.max(0)?)?)
    }

    /// S for a cotangent of that size.
    pub(crate) fn below(&self, largest: f64) -> f64 {
        power_below(largest, self.headroom)
    }

    fn look_up(&self, largest: &Tensor) -> candle_core::Result<Scale> {
        let Tables { thresholds, scales, inverses } = self.tables(largest.device())?;
        let below = thresholds.broadcast_lt(largest)?.to_dtype(DType::F32)?.sum_all()?;
        let infinite = largest.gt(f32::MAX)?.to_dtype(DType::F32)?;
        let row = (below + infinite)?.to_dtype(DType::U32)?.reshape(1)?;
        let pick = |table: &Tensor| table.index_select(&row, 0)?.reshape(());
        Ok(Scale::Device { scale: pick(scales)?, inverse: pick(inverses)? })
    }

    /// The tables, uploaded once.
    fn tables(&self, device: &Device) -> candle_core::Result<&Tables> {
        if let Some(tables) = self.tables.get() {
            return Ok(tables);
        }
        let thresholds: Vec<f32> = (LOWEST..=HIGHEST).map(|e| 2f32.powi(e)).collect();
        // Entry 0 stands for zero and NaN (no threshold is below), the last for infinity (all are).
        let scale = |p: &f32| power_below(f64::from(*p) * 1.5, self.headroom) as f32;
        let scales: Vec<f32> = std::iter::once(1.0).chain(thresholds.iter().map(scale)).chain([1.0]).collect();
        let inverses: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
        let upload = |table: Vec<f32>| Tensor::new(table, device);
        let made = Tables { thresholds: upload(thresholds)?, scales: upload(scales)?, inverses: upload(inverses)? };
        Ok(self.tables.get_or_init(|| made))
    }
}

/// Exponents of the F32 numbers between which a cotangent is scaled; smaller ones are as good as zero.
pub(crate) const LOWEST: i32 = -100;
pub(crate) const HIGHEST: i32 = 127;

/// The power of two S with ½ < S·m ≤ 1, shifted down by `headroom`; 1 if m is zero or not finite.
pub(crate) fn power_below(m: f64, headroom: i32) -> f64 {
    if m == 0.0 || !m.is_finite() {
        return 1.0;
    }
    let mut exponent = m.log2().ceil() as i32;
    // log2 may be off by an ulp: settle it by exact comparisons.
    while 2f64.powi(exponent) < m {
        exponent += 1;
    }
    while 2f64.powi(exponent - 1) >= m {
        exponent -= 1;
    }
    2f64.powi(-exponent.clamp(LOWEST, HIGHEST) - headroom)
}

/// The dynamic rule's state over one backward pass.
#[derive(Debug)]
pub(crate) struct Dynamic {
    pub(crate) scale: f64,
    target: f64,
    clean: usize,
}

impl Dynamic {
    /// How often a step is tried before the rule gives up.
    pub(crate) const ATTEMPTS: usize = 50;
    /// Clean steps in a row before S may grow.
    const PATIENCE: usize = 8;

    pub(crate) fn new(compute: DType, numel: usize, batch: usize, largest: f64) -> Self {
        let epsilon = 2.0 * crate::precision::unit_roundoff(compute);
        let target = 1.0 / (epsilon * (numel as f64 / batch.max(1) as f64).sqrt());
        let scale = if largest > 0.0 && largest.is_finite() {
            2f64.powi((target / largest).log2().round() as i32)
        } else {
            1.0
        };
        let mut start = Self { scale, target, clean: 0 };
        while start.scale * largest > crate::precision::largest_finite(compute) {
            start.scale /= 2.0;
        }
        start
    }

    pub(crate) fn overflowed(&mut self) {
        self.scale /= 2.0;
        self.clean = 0;
    }

    /// Says whether S changed.
    pub(crate) fn finished_step(&mut self, largest: f64) -> bool {
        self.clean += 1;
        let grow = self.clean >= Self::PATIENCE && largest > 0.0 && self.scale * largest < self.target / 4.0;
        if grow {
            self.scale *= 2.0;
            self.clean = 0;
        }
        grow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_brings_the_maximum_into_half_to_one() {
        for m in [1e-30, 3.1e-9, 0.5, 0.500001, 0.75, 1.0, 1.0000001, 6e4, 3e20] {
            let s = power_below(m, 0);
            assert!(s * m <= 1.0 && s * m > 0.5, "{m}: {s}");
            assert_eq!(power_below(m, 3), s / 8.0);
        }
        for m in [0.0, f64::NAN, f64::INFINITY] {
            assert_eq!(power_below(m, 2), 1.0);
        }
    }

    #[test]
    fn the_scale_on_the_device_is_the_one_on_the_host() -> candle_core::Result<()> {
        for m in [1e-20_f32, 3.1e-9, 0.5, 0.500001, 0.75, 1.0, 1.0000001, 6e4, 3e20, 0.0, f32::NAN, f32::INFINITY] {
            let Scale::Device { scale, inverse } = PowerOfTwo::new(2).look_up(&Tensor::new(m, &Device::Cpu)?)? else {
                panic!()
            };
            let (s, i) = (scale.to_scalar::<f32>()?, inverse.to_scalar::<f32>()?);
            assert_eq!((f64::from(s), s * i), (power_below(f64::from(m), 2), 1.0), "{m}");
        }
        Ok(())
    }
}
