//! What happens to a product before it is stored: gate, bias, activation or its slope.

use super::held::Held;
use super::view::View;
use crate::field::ops::Activation;
use std::ops::Range;

/// out = f(x B ∘ gate + bias), or (x B ∘ gate + bias) ∘ f′, rounded once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Epilogue<'a, T> {
    /// What each row of the product is multiplied with; as long as it.
    pub(crate) gate: Option<&'a [f32]>,
    /// What is added to every row; as long as it. Without a gate the sums begin with it.
    pub(crate) bias: Option<&'a [f32]>,
    /// Done with the sum.
    pub(crate) then: Then<'a, T>,
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

impl<T> Then<'_, T> {
    pub(crate) fn activation(activation: Activation) -> Self {
        if activation == Activation::Identity { Self::Nothing } else { Self::Activation(activation) }
    }
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Self { gate: None, bias: None, then: Then::Nothing }
    }
}

/// Rows of sums that are to be finished.
pub(super) struct Sums<'a> {
    /// They begin `stride` apart, and so many of each count; where that is all, they are one slice.
    pub(super) values: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) length: usize,
    /// Space for their slopes, where what is kept is not F32.
    pub(super) slopes: &'a mut [f32],
}

impl<T: Held> Epilogue<'_, T> {
    /// Whether gate and bias are as long as a row of the result, and what is kept has its shape.
    pub(super) fn fits(&self, rows: usize, columns: usize, length: usize) -> bool {
        let kept = match &self.then {
            Then::TimesSlope(_, kept) => (kept.rows(), kept.columns()) == (rows, columns),
            Then::Nothing | Then::Activation(_) => true,
        };
        kept && [self.gate, self.bias].into_iter().flatten().all(|of| of.len() == length)
    }

    /// That of some rows of the result.
    pub(super) fn part(&self, rows: Range<usize>) -> Self {
        let then = match self.then {
            Then::TimesSlope(activation, kept) => Then::TimesSlope(activation, kept.part(rows, 0..kept.columns())),
            then => then,
        };
        Self { then, ..*self }
    }

    /// The bias where sums begin with it.
    pub(super) fn start(&self) -> Option<&[f32]> {
        self.bias.filter(|_| self.gate.is_none())
    }

    /// Finishes the sums of those rows and columns of the result, which began with [`start`](Self::start), in place.
    #[inline(always)]
    pub(super) fn finish(&self, sums: Sums<'_>, rows: Range<usize>, columns: Range<usize>) {
        let Sums { values, stride, length, slopes } = sums;
        if let Some(gate) = self.gate {
            let bias = self.bias.map_or(&[][..], |bias| &bias[columns.clone()]);
            for values in values.chunks_mut(stride) {
                values.iter_mut().zip(&gate[columns.clone()]).for_each(|(value, gate)| *value *= gate);
                values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        match self.then {
            Then::Nothing => {}
            Then::Activation(activation) if length == stride => activation.value_in_place(values),
            Then::Activation(activation) => {
                values.chunks_mut(stride).for_each(|values| activation.value_in_place(&mut values[..length]));
            }
            Then::TimesSlope(activation, kept) => match T::floats(kept.slice()) {
                Some(floats) if length == stride && length == columns.len() && length == kept.stride() => {
                    let first = rows.start * length;
                    activation.times_slope(&floats[first..first + values.len()], values);
                }
                Some(floats) => {
                    for (values, row) in values.chunks_mut(stride).zip(rows) {
                        let first = row * kept.stride() + columns.start;
                        let kept = &floats[first..first + columns.len()];
                        activation.times_slope(kept, &mut values[..kept.len()]);
                    }
                }
                None => {
                    let slopes = &mut slopes[..values.len()];
                    for (slopes, row) in slopes.chunks_mut(stride).zip(rows) {
                        for (slope, kept) in slopes.iter_mut().zip(&kept.row(row)[columns.clone()]) {
                            *slope = kept.wide();
                        }
                    }
                    activation.slope_in_place(slopes);
                    for (sum, &slope) in values.iter_mut().zip(slopes.iter()) {
                        *sum *= slope;
                    }
                }
            },
        }
    }
}
