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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    fn state(tensors: &[&[f64]], dtype: DType) -> State {
        let tensor = |values: &&[f64]| Tensor::new(*values, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        State::from(tensors.iter().map(tensor).collect::<Vec<_>>())
    }

    #[test]
    fn a_sum_knows_the_largest_of_all_its_tensors_as_they_are_kept() {
        let long: Vec<f64> = (0..1030).map(|n| if n == 1027 { -8.0 } else { f64::from(n % 5) }).collect();
        for from in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            for to in [DType::F16, DType::BF16, DType::F32, DType::F64] {
                let (y, k) = (state(&[&[1.0, -3.0], &long], from), state(&[&[2.0, 2.0], &long], from));
                let sums = sum(Some(&y), &[(-2.0, &k)], to).unwrap();
                assert_eq!((sums.known_largest(), largest(&sums).unwrap()), (Some(8.0), 8.0), "{from:?} {to:?}");
                assert!(all_finite(&sums).unwrap().known_good());
                // What is handed on as it is has not been looked at.
                let same = sum(Some(&y), &[], from).unwrap();
                assert_eq!((same.known_largest(), largest(&same).unwrap()), (None, 8.0));
                assert_eq!(sum(Some(&sums), &[], to).unwrap().known_largest(), Some(8.0));
                for bad in [f64::NAN, f64::INFINITY] {
                    for at in [[bad, 0.0], [0.0, bad]] {
                        let sums = sum(None, &[(0.5, &state(&[&at, &[1.0]], from))], to).unwrap();
                        assert!(sums.known_largest().unwrap().is_nan() && all_finite(&sums).unwrap().known_bad());
                    }
                }
            }
        }
        // Finite before it is rounded, and not after.
        let sums = sum(None, &[(1e4, &state(&[&[1.0], &[7.0]], DType::F32))], DType::F16).unwrap();
        assert!(sums.known_largest().unwrap().is_nan());
    }
}
