//! What happens to a product before it is stored: bias, activation or its slope.

use super::held::Held;
use super::view::{View, ViewMut};
use crate::field::ops::Activation;
use std::ops::Range;

/// out = f(x B + bias), or (x B + bias) ∘ f′, rounded once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Epilogue<'a, T> {
    /// Where the sums of every row of the batch begin; as long as it.
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
        Self { bias: None, then: Then::Nothing }
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
                *out = T::of(value);
            }
        }
    }
}
