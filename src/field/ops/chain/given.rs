//! Weights that a chain is given beside x, in one tensor, such as a network makes of the time.

use super::order::Order;
use super::parameter::with_elements;
use crate::field::ops::cpu::Element;
use crate::field::session::{Buffered, Matrix, Session};
use candle_core::{Result, Tensor, bail};
use std::cell::RefCell;
use std::ops::Range;

/// What a tile goes through the layers with.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) session: &'a Session,
    pub(super) order: Order,
    pub(super) given: &'a Given,
    /// The time, where it is not that of the links.
    pub(super) time: Option<f64>,
}

/// The weights that a chain is given, and the sums of their cotangents, in F32.
#[derive(Default)]
pub(super) struct Given {
    values: Option<Matrix<f32>>,
    /// Nothing where they are not wanted.
    sums: Option<RefCell<Matrix<f32>>>,
}

impl Given {
    pub(super) fn new<T: Element<Wide = f32>>(session: &Session, given: Option<&[T]>) -> Self {
        let values = given.map(|given| {
            let mut values = f32::spare(session).matrix(1, given.len());
            T::widen(given, &mut values);
            values
        });
        Self { values, sums: None }
    }

    /// The same of the tensor that a pullback is given, with sums if its cotangent is wanted.
    pub(super) fn to_pull<T: Element<Wide = f32>>(session: &Session, given: Option<&Tensor>) -> Result<Self> {
        let Some(tensor) = given else { return Ok(Self::default()) };
        let given = with_elements(tensor, |given| Ok(Self::new::<T>(session, Some(given))))?;
        let sums = tensor.track_op().then(|| {
            let mut sums = f32::spare(session).matrix(1, tensor.elem_count());
            sums.fill(0.0);
            RefCell::new(sums)
        });
        Ok(Self { sums, ..given })
    }

    pub(super) fn is_summed(&self) -> bool {
        self.sums.is_some()
    }

    /// Some of the weights.
    pub(super) fn part(&self, part: Range<usize>) -> Result<&[f32]> {
        match &self.values {
            Some(values) => Ok(&values[part]),
            None => bail!("layers with weights of the time were given none"),
        }
    }

    /// Lets `add` add to the sums of some of them.
    pub(super) fn add(&self, part: Range<usize>, add: impl FnOnce(&mut [f32])) {
        if let Some(sums) = &self.sums {
            add(&mut sums.borrow_mut()[part]);
        }
    }

    /// The sums times `scale`.
    pub(super) fn into_cotangent<T: Element<Wide = f32>>(self, scale: f64) -> Option<Vec<T>> {
        let mut sums = self.sums?.into_inner();
        sums.iter_mut().for_each(|sum| *sum *= scale as f32);
        let mut cotangent = vec![T::from_f64(0.0); sums.len()];
        T::narrow(&sums, &mut cotangent);
        Some(cotangent)
    }
}
