//! Increments between neighbouring states in 16, 8 or 4 bits an element, with one F32 scale a row of the batch.
//!
//! A row is what lies behind the first dimension; a tensor of at most one dimension is one row. Its scale is
//! max |Δ| / L with L = 2¹⁵, 127 and 7: no increment in F32 can overflow, in F64 one beyond L·3.4·10³⁸ does, and rows
//! of zeros stay zeros. An increment too small for its scale, or for the smallest scale there is, 2⁻¹⁴⁹, is not lost
//! but carried to the next step.

use super::{Codec, Encodes, Entry, Followed, Increment, followed};
use crate::State;
use crate::error::{OdeError, Result};
use crate::field::Finite;
use crate::field::ops::rows::Code;
use candle_core::{DType, Shape};

macro_rules! increments {
    ($($(#[$doc:meta])* $name:ident, $word:literal: $code:expr),* $(,)?) => {
        $(
            $(#[$doc])*
            ///
            /// Entries are decoded last first, so a schedule that jumps keeps a whole state at each jump. With coarse
            /// steps (h·‖f‖ of the size of ‖y‖) states in F16 are more accurate than increments in 8 bits.
            ///
            /// # Reference
            /// Error feedback as in sigma-delta modulation; the bound is in the documentation of [`Codec`].
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
            pub struct $name;

            impl Codec for $name {
                fn name(&self) -> &'static str {
                    $word
                }

                fn encodes(&self) -> Encodes {
                    Encodes::Increments
                }

                fn encode(&self, increment: &State) -> Result<(Entry, Finite)> {
                    encode($code, increment)
                }

                fn decode(&self, entry: &Entry, dtype: DType) -> Result<State> {
                    decode($code, entry, dtype)
                }

                fn follow(&self, step: &Increment<'_>) -> Result<Followed> {
                    follow($code, step)?.map_or_else(|| followed(self, step), Ok)
                }

                fn bytes(&self, shapes: &[Shape]) -> usize {
                    shapes.iter().map(|shape| $code.bytes(shape)).sum()
                }

                fn dtype(&self) -> DType {
                    $code.dtype()
                }

                fn largest(&self) -> f64 {
                    $code.largest() * f64::from(f32::MAX)
                }
            }
        )*
    };
}

increments! {
    /// Increments in F16: two bytes an element and four a row, for gradients of F32 quality.
    Increments16, "increments16": Code::Half,
    /// Increments as integers from −127 to 127: a byte an element and four a row, at the accuracy of an F16 field.
    Increments8, "increments8": Code::Byte,
    /// Increments as integers from −7 to 7: half a byte an element and four bytes a row, for small steps.
    Increments4, "increments4": Code::Nibble,
}

fn encode(code: Code, increment: &State) -> Result<(Entry, Finite)> {
    let mut finite = Finite::default();
    let mut tensors = Vec::with_capacity(2 * increment.len());
    for x in increment.tensors() {
        let (codes, scales, of_tensor) = code.encode(x)?;
        finite = finite.and(of_tensor);
        tensors.extend([codes, scales]);
    }
    Ok((Entry::new(tensors, increment), finite))
}

/// One pass over each tensor; `None` where one of them has to be composed.
fn follow(code: Code, step: &Increment<'_>) -> Result<Option<Followed>> {
    step.check()?;
    let (before, after) = (step.before.tensors(), step.after.tensors());
    let (mut finite, mut tensors, mut residuals) = (Finite::default(), vec![], vec![]);
    let mut parts = Vec::with_capacity(before.len());
    for (n, (before, after)) in before.iter().zip(after).enumerate() {
        let fits = before.dtype() == step.dtype;
        let Some(led) = (if fits { code.follow(before, after, step.residual.map(|left| &left[n]))? } else { None })
        else {
            return Ok(None);
        };
        finite = finite.and(led.finite);
        tensors.extend([led.codes, led.scales]);
        residuals.push(led.residual);
        parts.push(Ok::<_, OdeError>((led.next, led.largest)));
    }
    let (entry, next) = (Entry::new(tensors, step.before), State::noted(parts.into_iter())?);
    Ok(Some(Followed { entry, finite, next, residual: State::from(residuals) }))
}

fn decode(code: Code, entry: &Entry, dtype: DType) -> Result<State> {
    let pairs = entry.tensors.chunks_exact(2).zip(&entry.shapes);
    let tensors = pairs.map(|(pair, shape)| code.decode(&pair[0], &pair[1], shape, dtype));
    Ok(State::from(tensors.collect::<candle_core::Result<Vec<_>>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};

    const CODES: [Code; 3] = [Code::Half, Code::Byte, Code::Nibble];

    fn codec(code: Code) -> Box<dyn Codec> {
        match code {
            Code::Half => Box::new(Increments16),
            Code::Byte => Box::new(Increments8),
            Code::Nibble => Box::new(Increments4),
        }
    }

    /// Dtype, shape and bits, those of all NaNs the same.
    fn bits(x: &Tensor) -> (DType, Vec<usize>, Vec<u64>) {
        let values = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let of = |x: f64| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() };
        (x.dtype(), x.dims().to_vec(), values.into_iter().map(of).collect())
    }

    fn everything(of: &Followed) -> impl PartialEq + std::fmt::Debug {
        let states = of.next.tensors().iter().chain(of.residual.tensors());
        let tensors: Vec<_> = of.entry.tensors.iter().chain(states).map(bits).collect();
        // NaN is what is not finite.
        let largest = of.next.known_largest().map(|x| x.is_finite().then_some(x));
        (tensors, of.entry.shapes.clone(), of.finite.known_bad(), largest)
    }

    fn numbers(shape: &[usize], dtype: DType, size: f64) -> Tensor {
        (Tensor::randn(0f64, size, shape, &Device::Cpu).unwrap()).to_dtype(dtype).unwrap()
    }

    #[test]
    fn one_pass_has_the_bits_of_one_operation_after_another() {
        let shapes = [&[][..], &[1], &[33], &[5, 1], &[4, 7], &[3, 2, 5], &[2, 300], &[1, 0]];
        for (code, dtype) in CODES.into_iter().flat_map(|code| [DType::F32, DType::F64].map(|dtype| (code, dtype))) {
            for shape in shapes {
                for (size, of_left) in
                    [(1e-2, None), (1e-2, Some(1e-4)), (1e-44, Some(1e-46)), (0.0, Some(0.0)), (1e38, None)]
                {
                    let before = State::from([numbers(shape, dtype, 1.0), numbers(&[3, 2], dtype, 1.0)]);
                    let step = [numbers(shape, dtype, size), numbers(&[3, 2], dtype, size)];
                    let after = State::from([(&before[0] + &step[0]).unwrap(), (&before[1] + &step[1]).unwrap()]);
                    let left =
                        of_left.map(|size| State::from([numbers(shape, dtype, size), numbers(&[3, 2], dtype, size)]));
                    let step = Increment { before: &before, after: &after, residual: left.as_ref(), dtype };
                    let apart = followed(codec(code).as_ref(), &step).unwrap();
                    let at_once = codec(code).follow(&step).unwrap();
                    assert_eq!(at_once.finite.known_bad(), apart.finite.known_bad());
                    // Nobody goes on from what is not finite.
                    if !apart.finite.known_bad() {
                        assert_eq!(everything(&at_once), everything(&apart), "{code:?} {dtype:?} {shape:?} {size:e}");
                    }
                    assert_eq!(follow(code, &step).unwrap().is_some(), !shape.contains(&0));
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_told_and_what_has_gaps_is_summed_all_the_same() {
        for (code, dtype) in CODES.into_iter().flat_map(|code| [DType::F32, DType::F64].map(|dtype| (code, dtype))) {
            let before = State::from(numbers(&[3, 4], dtype, 1.0));
            for (at, bad) in [(0, f64::NAN), (5, f64::INFINITY), (11, f64::NEG_INFINITY)] {
                let mut values = vec![0.5; 12];
                values[at] = bad;
                let after = Tensor::from_vec(values, (3, 4), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let step = Increment { before: &before, after: &State::from(after), residual: None, dtype };
                let (at_once, apart) =
                    (codec(code).follow(&step).unwrap(), followed(codec(code).as_ref(), &step).unwrap());
                assert!(at_once.finite.known_bad() && apart.finite.known_bad(), "{code:?} {bad}");
                let codes = |of: &Followed| of.entry.tensors.iter().map(bits).collect::<Vec<_>>();
                assert_eq!(codes(&at_once), codes(&apart), "{code:?} {bad}");
            }
            // A view that begins further on is one pass, too.
            let long = numbers(&[9, 4], dtype, 1.0);
            let [before, after] = [1, 5].map(|first| State::from(long.narrow(0, first, 3).unwrap()));
            let step = Increment { before: &before, after: &after, residual: None, dtype };
            let (at_once, apart) =
                (follow(code, &step).unwrap().unwrap(), followed(codec(code).as_ref(), &step).unwrap());
            assert_eq!(everything(&at_once), everything(&apart));
            // What Candle tracks is composed, as are sums in another dtype than that of the states.
            let tracked = State::from(candle_core::Var::from_tensor(&before[0]).unwrap().as_tensor().clone());
            assert!(follow(code, &Increment { before: &tracked, ..step }).unwrap().is_none());
            let other = if dtype == DType::F32 { DType::F64 } else { DType::F32 };
            let wider = Increment { dtype: other, ..step };
            assert!(follow(code, &wider).unwrap().is_none());
            let led = codec(code).follow(&wider).unwrap();
            assert!([&led.next, &led.residual].iter().all(|state| state[0].dtype() == other));
            let before = State::from(numbers(&[3, 4], dtype, 1.0));
            let after = State::from(numbers(&[4, 3], dtype, 1.0).t().unwrap());
            let step = Increment { before: &before, after: &after, residual: None, dtype };
            assert!(follow(code, &step).unwrap().is_none());
            let (at_once, dense) = (codec(code).follow(&step).unwrap(), State::from(after[0].contiguous().unwrap()));
            let dense = codec(code).follow(&Increment { after: &dense, ..step }).unwrap();
            assert_eq!(everything(&at_once), everything(&dense));
        }
    }
}
