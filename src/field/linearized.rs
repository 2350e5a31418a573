//! Linearisations of a model: one of Candle's graphs, or layers of ours that pull back by themselves.

use super::session::{Ran, WayBack};
use super::{Gradients, Linearization, Pulled, all_finite, sink, vjp};
use crate::State;
use crate::field::ops::combine;
use crate::scaling::Scale;
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// A linearisation that is one of Candle's graphs.
pub(super) struct Graph {
    y: State,
    output: State,
    value: State,
    /// y, then the parameters and inputs, then the leaves of the time.
    wanted: Vec<Tensor>,
}

impl Graph {
    pub(super) fn new(y: State, output: State, wanted: Vec<Tensor>) -> Self {
        let value = output.detach();
        Self { y, output, value, wanted }
    }
}

impl Linearization for Graph {
    fn value(&self) -> &State {
        &self.value
    }

    fn pull(&self, cotangent: &State, scale: &Scale, gradients: &mut Gradients) -> candle_core::Result<Pulled> {
        let accumulate = cotangent.tensors().first().map_or(DType::F32, Tensor::dtype);
        let compute = |(kappa, f): (&Tensor, &Tensor)| scale.apply(kappa, f.dtype());
        let seeds: Vec<Tensor> =
            cotangent.tensors().iter().zip(self.output.tensors()).map(compute).collect::<candle_core::Result<_>>()?;
        gradients.set_scale(scale);
        let (pulled, sums) =
            sink::open(std::mem::take(gradients), || vjp::vjp(self.output.tensors(), &seeds, &self.wanted));
        *gradients = sums;
        let pulled = pulled?;
        drop(seeds);
        let (of_y, rest) = pulled.split_at(self.y.len());
        let undone = |(pulled, leaf): (&Option<Tensor>, &Tensor)| match pulled {
            Some(pulled) => scale.undone(pulled, accumulate),
            None => Ok((Tensor::zeros(leaf.shape(), accumulate, leaf.device())?, Some(0.0))),
        };
        let y = State::noted(of_y.iter().zip(self.y.tensors()).map(undone))?;
        let mut finite = all_finite(&y)?;
        let mut t: Option<Tensor> = None;
        for (gradient, leaf) in rest.iter().zip(&self.wanted[self.y.len()..]) {
            let Some(gradient) = gradient else { continue };
            if !gradients.add_leaf(leaf, gradient)? {
                let part = scale.undo(&gradient.to_dtype(accumulate)?.sum_all()?, accumulate)?;
                finite = finite.and(combine::finite(&part)?);
                t = Some(match t {
                    None => part,
                    Some(t) => (t + part)?,
                });
            }
        }
        Ok(Pulled { y, t, finite: finite.and(gradients.take_finite()) })
    }
}

/// Layers from y to dy/dt, with nothing beside them. Candle's graph has no part in it.
pub(super) struct Layered {
    value: State,
    way_back: Arc<dyn WayBack>,
}

impl Layered {
    /// The layers that `ran`, if they lead from `y` to `value`.
    pub(super) fn between(y: &State, value: &State, ran: Ran) -> Option<Self> {
        let ([y], [to]) = (y.tensors(), value.tensors()) else { return None };
        let leads = ran.from == y.id() && ran.to == to.id();
        leads.then(|| Self { value: value.clone(), way_back: ran.way_back })
    }
}

impl Linearization for Layered {
    fn value(&self) -> &State {
        &self.value
    }

    fn pull(&self, cotangent: &State, scale: &Scale, gradients: &mut Gradients) -> candle_core::Result<Pulled> {
        let (cotangent, value) = (&cotangent[0], &self.value[0]);
        let seed = scale.apply(cotangent, value.dtype())?;
        gradients.set_scale(scale);
        let (pulled, sums) = sink::open(std::mem::take(gradients), || self.way_back.pull(None, value, &seed));
        *gradients = sums;
        let y = State::noted(std::iter::once(scale.undone(&pulled?, cotangent.dtype())))?;
        let finite = all_finite(&y)?.and(gradients.take_finite());
        Ok(Pulled { y, t: None, finite })
    }
}
