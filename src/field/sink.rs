//! Where fused ops leave weight gradients: straight in the accumulate-dtype sums.
//!
//! During a pullback the sums of dL/dθ are open on this thread, keyed by the leaf that stands for each parameter. An
//! op whose weight *is* such a leaf adds its F32 contribution here and returns no gradient to Candle; in any other
//! place (plain Candle training) [`add`] says `false` and the op returns the gradient as every Candle op does.

use super::gradients::Gradients;
use super::ops::combine::Finite;
use crate::error::OdeError;
use candle_core::{Result, Tensor};
use std::cell::RefCell;

thread_local! {
    static OPEN: RefCell<Option<Gradients>> = const { RefCell::new(None) };
}

/// Adds `contribution` (F32 or F64, shape of `weight`) to the sum of the parameter that `weight` is a leaf of.
/// Says whether there was one.
///
/// # Errors
/// When the addition fails on the device.
pub fn add(weight: &Tensor, contribution: &Tensor) -> Result<bool> {
    OPEN.with_borrow_mut(|open| match open {
        Some(gradients) => gradients.add_leaf(weight, contribution),
        None => Ok(false),
    })
}

/// As [`add`] for a contribution that is not scaled: `contribute` adds it in place to the F32 sum of the parameter that
/// `weight` is a leaf of.
///
/// # Errors
/// When no sums are open, or none for `weight`; when the addition fails.
pub(crate) fn add_in_place(weight: &Tensor, contribute: impl FnOnce(&mut [f32])) -> Result<()> {
    OPEN.with_borrow_mut(|open| match open {
        Some(gradients) => gradients.add_in_place(weight, contribute),
        None => Err(none_open()),
    })
}

/// Whether sums are open, and what is added is not left out: [`add_in_place`] then does run what it is given.
pub(crate) fn sums() -> bool {
    OPEN.with_borrow(|open| open.as_ref().is_some_and(Gradients::sums))
}

fn none_open() -> candle_core::Error {
    OdeError::Unsupported {
        what: "a backward pass inside a vector field, through layers of candle_ode::ops".into(),
        instead: "use layers of candle_nn for what the field differentiates itself, or the layers' Tangent",
    }
    .into()
}

/// A sum of dL/dθ in F32 on a device, to be added to in place, without the scale.
#[cfg(feature = "cuda")]
pub(crate) struct Sum {
    pub(crate) tensor: Tensor,
    apart: bool,
}

#[cfg(feature = "cuda")]
impl Sum {
    /// Everything has been added.
    pub(crate) fn finish(self, leaf: &Tensor) -> Result<()> {
        OPEN.with_borrow_mut(|open| match open {
            Some(gradients) if self.apart => gradients.add_unscaled(leaf, &self.tensor),
            _ => Ok(()),
        })
    }
}

/// The sum of the parameter that `leaf` stands for; `None` if it is not wanted.
///
/// # Errors
/// As [`add_in_place`].
#[cfg(feature = "cuda")]
pub(crate) fn sum_of(leaf: &Tensor) -> Result<Option<Sum>> {
    OPEN.with_borrow_mut(|open| match open {
        Some(gradients) => Ok(gradients.sum_of(leaf)?.map(|(tensor, apart)| Sum { tensor, apart })),
        None => Err(none_open()),
    })
}

/// Notes a 0-d F32 tensor on the device that is 0, or NaN if something that went into the open sums is not finite.
#[cfg(feature = "cuda")]
pub(crate) fn note_on_device(flag: Tensor) {
    OPEN.with_borrow_mut(|open| {
        if let Some(gradients) = open {
            gradients.note(Finite::Device(vec![flag]));
        }
    });
}

/// What the cotangents of this pullback have been multiplied by, wherever that is known.
#[cfg(feature = "cuda")]
pub(crate) fn scale_of_cotangents() -> crate::scaling::Scale {
    OPEN.with_borrow(|open| open.as_ref().map_or_else(Default::default, |gradients| gradients.scale().clone()))
}

/// Notes whether something that went into the open sums is finite.
pub(crate) fn note(finite: bool) {
    OPEN.with_borrow_mut(|open| {
        if let Some(gradients) = open {
            gradients.note(Finite::Host(finite));
        }
    });
}

/// By what the cotangents of this pullback have been multiplied.
///
/// # Errors
/// When the device fails.
pub(crate) fn scale() -> Result<f64> {
    OPEN.with_borrow(|open| open.as_ref().map_or(Ok(1.0), |gradients| gradients.scale().on_host()))
}

/// Runs `pull` with the sums open on this thread, and hands them back.
pub(crate) fn open<T>(gradients: Gradients, pull: impl FnOnce() -> T) -> (T, Gradients) {
    let outer = Outer(OPEN.replace(Some(gradients)));
    let pulled = pull();
    let gradients = OPEN.take().unwrap_or_default();
    drop(outer);
    (pulled, gradients)
}

/// What was open before, put back however `pull` ends.
struct Outer(Option<Gradients>);

impl Drop for Outer {
    fn drop(&mut self) {
        OPEN.set(self.0.take());
    }
}
