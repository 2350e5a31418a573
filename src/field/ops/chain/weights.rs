//! Where the weights of a chain's layers come from: parameters of the open field, or a tensor that the chain is given
//! beside x, such as a network makes of the time.

use super::order::Order;
use super::parameter::{Parameter, with_elements};
use crate::field::ops::cpu::Element;
use crate::field::session::{Matrix, Session, Tile};
use candle_core::{Result, Tensor};
use std::cell::RefCell;

/// Weight and bias of a layer.
#[derive(Clone, Debug)]
pub(in crate::field::ops) enum Weights {
    /// Parameters of the open field.
    Parameters {
        weight: Parameter,
        bias: Option<Parameter>,
        /// The time, which multiplies the one column of W beyond the inputs.
        beyond: Option<f64>,
    },
    /// Parameters, of which a gate multiplies each row of W and element of b; a shift is added to the latter. Gate and,
    /// behind it, shift are elements of what the chain is given, from this one on.
    Gated { weight: Parameter, bias: Parameter, first: usize },
    /// W and, behind it, b: elements of what the chain is given, from this one on.
    Given { first: usize },
}

impl Weights {
    /// Those that are parameters.
    pub(super) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let (weight, bias) = match self {
            Self::Parameters { weight, bias, .. } => (Some(weight), bias.as_ref()),
            Self::Gated { weight, bias, .. } => (Some(weight), Some(bias)),
            Self::Given { .. } => (None, None),
        };
        weight.into_iter().chain(bias)
    }
}

/// What a tile goes through the layers with.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) session: &'a Session,
    pub(super) order: Order,
    pub(super) given: &'a Given,
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

    /// So many of the weights, from `first` on.
    pub(super) fn part(&self, first: usize, count: usize) -> &[f32] {
        self.values.as_ref().map_or(&[], |values| &values[first..first + count])
    }

    /// Lets `add` add to the sums of so many of them.
    pub(super) fn add(&self, first: usize, count: usize, add: impl FnOnce(&mut [f32])) {
        if let Some(sums) = &self.sums {
            add(&mut sums.borrow_mut()[first..first + count]);
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
