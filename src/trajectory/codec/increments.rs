//! Increments between neighbouring states in 16, 8 or 4 bits an element, with one F32 scale a row of the batch.
//!
//! A row is what lies behind the first dimension; a tensor of at most one dimension is one row. Its scale is
//! max |Δ| / L with L = 2¹⁵, 127 and 7: no increment in F32 can overflow, in F64 one beyond L·3.4·10³⁸ does, and rows of
//! zeros stay zeros. An increment too small for its scale, or for the smallest scale there is, 2⁻¹⁴⁹, is not lost but
//! carried to the next step.

use super::{Codec, Encodes, Entry};
use crate::State;
use crate::error::Result;
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

fn decode(code: Code, entry: &Entry, dtype: DType) -> Result<State> {
    let pairs = entry.tensors.chunks_exact(2).zip(&entry.shapes);
    let tensors = pairs.map(|(pair, shape)| code.decode(&pair[0], &pair[1], shape, dtype));
    Ok(State::from(tensors.collect::<candle_core::Result<Vec<_>>>()?))
}
