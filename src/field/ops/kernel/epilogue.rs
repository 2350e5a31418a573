//! What happens to a product before it is stored: bias, activation or its slope, rounding.

use super::held::Held;
use super::machine::{Machine, Path, Work};
use super::view::{View, ViewMut};
use crate::field::ops::Activation;
use half::bf16;
use std::ops::Range;

/// out = round(f(x B + bias)), or round((x B + bias) ∘ f′).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Epilogue<'a, T> {
    /// Where the sums of every row of the batch begin; as long as it.
    pub(crate) bias: Option<&'a [f32]>,
    /// Done with the sum.
    pub(crate) then: Then<'a, T>,
    /// Done with the result.
    pub(crate) rounding: Rounding,
}

/// What is done with the sum of product and bias.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Then<'a, T> {
    /// Nothing: it is the result.
    Nothing,
    /// The activation of it.
    Activation(Activation),
    /// Its product with the activation's slope, which is calculated from what the forward pass has kept; as
    /// [`Activation::keeps`] says, of the shape of the result.
    TimesSlope(Activation, View<'a, T>),
}

/// To what a result is rounded before it is stored as `T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To `T`.
    None,
    /// To the nearest F16, so that F32 tiles hold F16 values.
    Half,
    /// To the nearest BF16, likewise.
    Brain,
}

impl Rounding {
    /// Rounds values that no kernel has rounded.
    pub(crate) fn apply(self, values: &mut [f32]) {
        f32::path(Path::best()).run(Round { rounding: self, values });
    }

    /// The value that is stored.
    #[inline(always)]
    fn of(self, value: f32) -> f32 {
        match self {
            Self::None => value,
            Self::Half => nearest_half(value),
            Self::Brain => bf16::of(value).wide(),
        }
    }
}

struct Round<'a> {
    rounding: Rounding,
    values: &'a mut [f32],
}

impl Work for Round<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<M: Machine>(self) {
        self.values.iter_mut().for_each(|value| *value = self.rounding.of(*value));
    }
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Self { bias: None, then: Then::Nothing, rounding: Rounding::None }
    }
}

/// Sums of `rows × stride` that are to be finished.
pub(super) struct Sums<'a> {
    /// The sums; a row of them is `stride` long, of which the columns that lie in the result count.
    pub(super) values: &'a mut [f32],
    pub(super) stride: usize,
    /// Space for as many slopes.
    pub(super) slopes: &'a mut [f32],
}

impl<T: Held> Epilogue<'_, T> {
    /// Finishes the sums, which began with the bias, and stores them in those rows and columns of `out`.
    #[inline(always)]
    pub(super) fn finish(&self, sums: Sums<'_>, rows: Range<usize>, columns: Range<usize>, out: &mut ViewMut<'_, T>) {
        let Sums { values, stride, slopes } = sums;
        match self.then {
            Then::Nothing => {}
            Then::Activation(activation) => activation.value_in_place(values),
            Then::TimesSlope(activation, kept) => {
                for (slopes, row) in slopes.chunks_exact_mut(stride).zip(rows.clone()) {
                    for (slope, kept) in slopes.iter_mut().zip(&kept.row(row)[columns.clone()]) {
                        *slope = kept.wide();
                    }
                }
                activation.slope_in_place(slopes);
                for (sum, &slope) in values.iter_mut().zip(slopes.iter()) {
                    *sum *= slope;
                }
            }
        }
        for (row, values) in rows.zip(values.chunks_exact(stride)) {
            let out = &mut out.row(row)[columns.clone()];
            for (out, &value) in out.iter_mut().zip(values) {
                *out = T::of(self.rounding.of(value));
            }
        }
    }
}

/// The F16 next to `value`, as F32: ties to even, infinite from 65520 on.
#[inline(always)]
pub(super) fn nearest_half(value: f32) -> f32 {
    let bits = value.to_bits();
    // Normal numbers keep ten bits of the mantissa. Below 2⁻¹⁴, F16 has the spacing that F32 has above ½.
    let normal = f32::from_bits(bits.wrapping_add(0xfff + (bits >> 13 & 1)) & !0x1fff);
    let size = value.abs();
    let subnormal = ((size + 0.5) - 0.5).copysign(value);
    let finite = if size < 6.103_515_6e-5 { subnormal } else { normal };
    let rounded = if finite.abs() > 65504.0 { f32::INFINITY.copysign(value) } else { finite };
    if value.is_nan() { value } else { rounded }
}
