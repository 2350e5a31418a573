//! What a solver carries from step to step: y, or y and others that start as y0 too, in a row, y first.
//!
//! Start: y ↦ (y, …, y), with the pullback (ȳ, z̄, …) ↦ ȳ + z̄ + …; what is handed out: (y, z, …) ↦ y, with the
//! pullback ȳ ↦ (ȳ, 0, …).

use super::{Solver, zeros_like};
use crate::State;
use crate::error::Result;
use crate::field::ops::combine;
use candle_core::DType;

/// (y0, …, y0).
pub(crate) fn carry(solver: &dyn Solver, y0: &State) -> State {
    let tensors = y0.tensors().iter().cycle().take(y0.len() * solver.carries());
    State::from(tensors.cloned().collect::<Vec<_>>())
}

/// y out of (y, z, …).
pub(crate) fn visible(solver: &dyn Solver, carried: &State) -> State {
    State::from(carried.tensors()[..carried.len() / solver.carries()].to_vec())
}

/// (ȳ, 0, …).
pub(crate) fn lift(solver: &dyn Solver, cotangent: &State, accumulate: DType) -> Result<State> {
    let mut tensors = cotangent.tensors().to_vec();
    for _ in 1..solver.carries() {
        tensors.extend(zeros_like(cotangent, accumulate)?.into_tensors());
    }
    Ok(State::from(tensors))
}

/// ȳ + z̄ + ….
pub(crate) fn fold(solver: &dyn Solver, lambda: &State, accumulate: DType) -> Result<State> {
    let tensors = lambda.len() / solver.carries();
    let (first, others) = lambda.tensors().split_at(tensors);
    let sum = |(n, x): (usize, &candle_core::Tensor)| {
        let terms: Vec<_> = others.iter().skip(n).step_by(tensors).map(|x| (1.0, x)).collect();
        combine::combine(Some(x), &terms, accumulate)
    };
    Ok(State::from(first.iter().enumerate().map(sum).collect::<candle_core::Result<Vec<_>>>()?))
}

/// The states in a row, each of as many tensors.
pub(super) fn split<const N: usize>(carried: &State) -> [State; N] {
    let tensors = carried.len() / N;
    std::array::from_fn(|n| State::from(carried.tensors()[n * tensors..(n + 1) * tensors].to_vec()))
}

/// The other way round.
pub(super) fn joined<const N: usize>(states: [State; N]) -> State {
    State::from(states.into_iter().flat_map(State::into_tensors).collect::<Vec<_>>())
}
