//! What happens to a product before it is stored: gate, bias, activation or its slope.

use super::held::Held;
use super::view::{View, ViewMut};
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

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Self { gate: None, bias: None, then: Then::Nothing }
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

    /// Finishes the sums, which began with [`start`](Self::start), and stores them in those rows and columns of `out`.
    #[inline(always)]
    pub(super) fn finish(&self, sums: Sums<'_>, rows: Range<usize>, columns: Range<usize>, out: &mut ViewMut<'_, T>) {
        let Sums { values, stride, slopes } = sums;
        if let Some(gate) = self.gate {
            for values in values.chunks_exact_mut(stride) {
                values.iter_mut().zip(&gate[columns.clone()]).for_each(|(value, gate)| *value *= gate);
                let bias = self.bias.map_or(&[][..], |bias| &bias[columns.clone()]);
                values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
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
                *out = T::of(value);
            }
        }
    }
}
