//! Weighted sums of states, tensor by tensor.

use super::ops::combine::{self, Finite};
use crate::State;
use crate::error::Result;
use candle_core::DType;

/// base + Σ terms, rounded once to `dtype`. Without any term or base there is nothing to sum, which no caller does.
pub(crate) fn sum(base: Option<&State>, terms: &[(f64, &State)], dtype: DType) -> Result<State> {
    let alone = match (base, terms) {
        (Some(only), []) => Some(only),
        _ => None,
    };
    if let Some(only) = alone.filter(|only| only.tensors().iter().all(|x| x.dtype() == dtype)) {
        return Ok(only.clone());
    }
    let tensors = base.or(terms.first().map(|(_, state)| *state)).map_or(0, State::len);
    let (mut sums, mut largest) = (Vec::with_capacity(tensors), Some(0.0));
    for n in 0..tensors {
        let terms: Vec<_> = terms.iter().map(|(c, state)| (*c, &state[n])).collect();
        let (sum, most) = combine::combined(base.map(|base| &base[n]), &terms, dtype)?;
        largest = largest.zip(most).map(|(a, b)| combine::larger(a, b));
        sums.push(sum);
    }
    Ok(State::with_largest(sums, largest))
}

/// Whether every element of a state is finite.
pub(crate) fn all_finite(state: &State) -> Result<Finite> {
    match state.known_largest() {
        Some(largest) => Ok(Finite::Host(!largest.is_nan())),
        None => Ok(combine::all_finite(state.tensors())?),
    }
}

/// The largest absolute value over a state, on the host; NaN if any is not finite.
pub(crate) fn largest(state: &State) -> Result<f64> {
    let of_all = || state.tensors().iter().try_fold(0.0, |most, x| Ok(combine::larger(most, combine::max_abs(x)?)));
    state.known_largest().map_or_else(of_all, Ok)
}
