//! Weighted sums of states, tensor by tensor.

use super::ops::combine::{self, Finite};
use crate::State;
use crate::error::Result;
use crate::state::larger;
use candle_core::DType;

/// base + Σ terms, rounded once to `dtype`. Without any term or base there is nothing to sum, which no caller does.
pub(crate) fn sum(base: Option<&State>, terms: &[(f64, &State)], dtype: DType) -> Result<State> {
    if let (Some(only), []) = (base, terms)
        && only.tensors().iter().all(|x| x.dtype() == dtype)
    {
        return Ok(only.clone());
    }
    let tensors = base.or(terms.first().map(|(_, state)| *state)).map_or(0, State::len);
    let one = |n: usize| {
        let terms: Vec<_> = terms.iter().map(|(c, state)| (*c, &state[n])).collect();
        combine::combined(base.map(|base| &base[n]), &terms, dtype)
    };
    Ok(State::noted((0..tensors).map(one))?)
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
    let of_all = || state.tensors().iter().try_fold(0.0, |most, x| Ok(larger(most, combine::max_abs(x)?)));
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
        // Whatever lies between the elements, or before them.
        let wide = Tensor::new(&[[9f32, 1.0, 2.0], [9.0, 3.0, -4.0]], &Device::Cpu).unwrap();
        let part = wide.narrow(1, 1, 2).unwrap();
        for x in [part.t().unwrap(), part.clone(), wide.narrow(0, 1, 1).unwrap().narrow(1, 1, 2).unwrap()] {
            let spread = Tensor::new(0.5f32, &Device::Cpu).unwrap().broadcast_as(x.shape()).unwrap();
            let sums = sum(Some(&State::from(&x)), &[(2.0, &State::from(spread))], DType::F32).unwrap();
            let exact = ((&x + 1.0).unwrap(), 4.0);
            assert_eq!(sums[0].to_vec2::<f32>().unwrap(), exact.0.to_vec2::<f32>().unwrap());
            assert_eq!((sums.known_largest(), largest(&State::from(&x)).unwrap()), (Some(exact.1), 4.0));
        }
        // Who has other tensors knows nothing of them.
        let sums = sum(None, &[(2.0, &state(&[&[1.0]], DType::F32))], DType::F32).unwrap();
        assert_eq!(sums.detach().known_largest(), Some(2.0));
        assert_eq!(sums.try_map(Tensor::neg).unwrap().known_largest(), None);
        assert_eq!(State::from(sums.into_tensors()).known_largest(), None);
        // Finite before it is rounded, and not after.
        let sums = sum(None, &[(1e4, &state(&[&[1.0], &[7.0]], DType::F32))], DType::F16).unwrap();
        assert!(sums.known_largest().unwrap().is_nan());
    }
}
