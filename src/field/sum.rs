//! Weighted sums of states, tensor by tensor.

use super::ops::combine::{self, Finite};
use crate::State;
use crate::error::Result;
use candle_core::DType;

/// base + Σ terms, rounded once to `dtype`. Without any term or base there is nothing to sum, which no caller does.
pub(crate) fn sum(base: Option<&State>, terms: &[(f64, &State)], dtype: DType) -> Result<State> {
    let tensors = base.or(terms.first().map(|(_, state)| *state)).map_or(0, State::len);
    let one = |n: usize| {
        let terms: Vec<_> = terms.iter().map(|(c, state)| (*c, &state[n])).collect();
        combine::combine(base.map(|base| &base[n]), &terms, dtype)
    };
    Ok(State::from((0..tensors).map(one).collect::<candle_core::Result<Vec<_>>>()?))
}

/// Whether every element of a state is finite.
pub(crate) fn all_finite(state: &State) -> Result<Finite> {
    Ok(combine::all_finite(state.tensors())?)
}
