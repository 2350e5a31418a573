//! The rows of a tensor in few bits, with one scale a row.
//!
//! Row r of x (everything behind the first dimension; a tensor of at most one dimension is one row) is kept as codes
//! qᵢ = Q(xᵢ / s_r) and the F32 scale s_r = max |x_r| / L, and read back as qᵢ·s_r. No scale of a row that is not zero is
//! below 2⁻¹⁴⁹, the smallest F32: what Q tells apart, 2⁻¹⁷⁴ or 2⁻¹⁴⁹ in integers, is then the least that is kept. On the
//! CPU that is one pass over a row; elsewhere it is a composition of Candle's ops with the same meaning.

use super::combine::{self, Finite};
use super::cpu::{Kernel, vectorised};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Result, Shape, Storage, Tensor};
use half::f16;

/// What an element of a row becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// F16, L = 2¹⁵: out of reach of overflow, and of underflow unless an element is 2⁻³⁹ of the largest in its row.
    Half,
    /// An integer from −127 to 127 in a byte, 127 above its value.
    Byte,
    /// An integer from −7 to 7, 7 above its value, two to a byte: even columns in the low half.
    Nibble,
}

/// 2⁻¹⁴⁹.
const SMALLEST: f32 = f32::from_bits(1);

impl Code {
    /// L: what the largest element of a row becomes.
    pub(crate) fn largest(self) -> f64 {
        match self {
            Self::Half => 32768.0,
            Self::Byte => 127.0,
            Self::Nibble => 7.0,
        }
    }

    /// The dtype of the tensor of codes.
    pub(crate) fn dtype(self) -> DType {
        if self == Self::Half { DType::F16 } else { DType::U8 }
    }

    /// Bytes of the codes and scales of a tensor.
    pub(crate) fn bytes(self, shape: &Shape) -> usize {
        let (rows, width) = rows(shape);
        rows * (self.columns(width) * self.dtype().size_in_bytes() + DType::F32.size_in_bytes())
    }

    fn columns(self, width: usize) -> usize {
        if self == Self::Nibble { width.div_ceil(2) } else { width }
    }

    /// The codes, shape `(rows, columns)`, the scales, shape `(rows, 1)`, and whether all of it is finite.
    ///
    /// # Errors
    /// A tensor that is neither F32 nor F64; a device that fails.
    pub(crate) fn encode(self, x: &Tensor) -> Result<(Tensor, Tensor, Finite)> {
        let (rows, width) = rows(x.shape());
        if x.elem_count() == 0 {
            let zeros = |columns, dtype| Tensor::zeros((rows, columns), dtype, x.device());
            return Ok((zeros(self.columns(width), self.dtype())?, zeros(1, DType::F32)?, Finite::default()));
        }
        let x = x.detach().contiguous()?.reshape((rows, width))?;
        if !x.device().is_cpu() {
            return self.compose_encode(&x);
        }
        let (storage, layout) = x.storage_and_layout();
        let elements = layout.start_offset()..layout.start_offset() + rows * width;
        let encoded = match &*storage {
            Storage::Cpu(CpuStorage::F32(all)) => vectorised(Encode { code: self, x: &all[elements], width }),
            Storage::Cpu(CpuStorage::F64(all)) => vectorised(Encode { code: self, x: &all[elements], width }),
            _ => candle_core::bail!("rows of {:?} are not encoded: they must be F32 or F64", x.dtype()),
        };
        let codes = match self {
            Self::Half => CpuStorage::F16(encoded.halves),
            Self::Byte | Self::Nibble => CpuStorage::U8(encoded.bytes),
        };
        let codes = on_cpu(codes, (rows, self.columns(width)));
        Ok((codes, on_cpu(CpuStorage::F32(encoded.scales), (rows, 1)), Finite::Host(encoded.finite)))
    }

    /// The tensor again, of that shape and dtype (F32 or F64).
    ///
    /// # Errors
    /// Another dtype; a device that fails.
    pub(crate) fn decode(self, codes: &Tensor, scales: &Tensor, shape: &Shape, dtype: DType) -> Result<Tensor> {
        if shape.elem_count() == 0 {
            return Tensor::zeros(shape, dtype, codes.device());
        }
        if !codes.device().is_cpu() {
            return self.compose_decode(codes, scales, shape, dtype);
        }
        let (rows, width) = rows(shape);
        let (codes, scales) = (codes.contiguous()?, scales.contiguous()?);
        let (storage, layout) = codes.storage_and_layout();
        let (scaling, scale_layout) = scales.storage_and_layout();
        let elements = layout.start_offset()..layout.start_offset() + rows * self.columns(width);
        let Storage::Cpu(CpuStorage::F32(scales)) = &*scaling else {
            candle_core::bail!("the scales of rows must be F32")
        };
        let scales = &scales[scale_layout.start_offset()..scale_layout.start_offset() + rows];
        let codes = match &*storage {
            Storage::Cpu(CpuStorage::F16(all)) => Codes::Halves(&all[elements]),
            Storage::Cpu(CpuStorage::U8(all)) if self == Self::Byte => Codes::Bytes(&all[elements]),
            Storage::Cpu(CpuStorage::U8(all)) => Codes::Nibbles(&all[elements]),
            _ => candle_core::bail!("the codes of rows must be {:?}", self.dtype()),
        };
        let storage = match dtype {
            DType::F32 => CpuStorage::F32(vectorised(Decode::new(codes, scales, width))),
            DType::F64 => CpuStorage::F64(vectorised(Decode::new(codes, scales, width))),
            other => candle_core::bail!("rows are decoded to F32 or F64, not to {other:?}"),
        };
        Ok(on_cpu(storage, shape))
    }

    fn compose_encode(self, x: &Tensor) -> Result<(Tensor, Tensor, Finite)> {
        let largest = x.abs()?.max_keepdim(1)?;
        let scales = (&largest / self.largest())?.to_dtype(DType::F32)?;
        let lost = (scales.eq(0.0)?.to_dtype(DType::F32)? * largest.gt(0.0)?.to_dtype(DType::F32)?)?;
        let scales = (scales + (lost * f64::from(SMALLEST))?)?;
        let finite = combine::finite(&scales)?;
        let scaled = x.broadcast_div(&(&scales + scales.eq(0.0)?.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)?;
        let codes = match self {
            Self::Half => scaled.to_dtype(DType::F16)?,
            Self::Byte => self.integers(&scaled)?.to_dtype(DType::U8)?,
            Self::Nibble => {
                let (rows, width) = x.dims2()?;
                // A column for an odd width to pair up with.
                let codes = self.integers(&scaled)?.pad_with_zeros(1, 0, width % 2)?;
                let pairs = codes.reshape((rows, width.div_ceil(2), 2))?;
                (pairs.narrow(2, 0, 1)? + (pairs.narrow(2, 1, 1)? * 16.0)?)?.squeeze(2)?.to_dtype(DType::U8)?
            }
        };
        Ok((codes, scales, finite))
    }

    fn integers(self, scaled: &Tensor) -> Result<Tensor> {
        scaled.round()?.clamp(-self.largest(), self.largest())? + self.largest()
    }

    fn compose_decode(self, codes: &Tensor, scales: &Tensor, shape: &Shape, dtype: DType) -> Result<Tensor> {
        let codes = codes.to_dtype(dtype)?;
        let scaled = match self {
            Self::Half => codes,
            Self::Byte => (codes - self.largest())?,
            Self::Nibble => {
                let high = (&codes / 16.0)?.floor()?;
                let low = (codes - (&high * 16.0)?)?;
                (Tensor::stack(&[low, high], 2)?.flatten(1, 2)?.narrow(1, 0, rows(shape).1)? - self.largest())?
            }
        };
        scaled.broadcast_mul(&scales.to_dtype(dtype)?)?.reshape(shape)
    }
}

/// Rows of a shape, and the elements of one.
fn rows(shape: &Shape) -> (usize, usize) {
    let rows = if shape.rank() < 2 { 1 } else { shape.dims()[0] };
    (rows, shape.elem_count() / rows.max(1))
}

fn on_cpu(storage: CpuStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false)
}

/// F32 or F64: what rows are encoded from and decoded to.
trait Wide: Copy {
    fn wide(self) -> f64;
    fn magnitude(self) -> Self;
    fn larger(self, other: Self) -> Self;
    fn nothing(self) -> Self;
    fn add(self, other: Self) -> Self;
    fn divided(self, by: f32) -> Self;
    fn integer(self, within: f32) -> u8;
    fn half(self) -> f16;
    fn of(code: f32, scale: f32) -> Self;
    const ZERO: Self;
}

macro_rules! wide {
    ($wide:ty, $half:ident) => {
        impl Wide for $wide {
            const ZERO: Self = 0.0;

            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self)
            }

            #[inline(always)]
            fn magnitude(self) -> Self {
                self.abs()
            }

            #[inline(always)]
            fn larger(self, other: Self) -> Self {
                if self > other { self } else { other }
            }

            /// 0, or NaN of what is not finite.
            #[inline(always)]
            fn nothing(self) -> Self {
                self * 0.0
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }

            #[inline(always)]
            fn divided(self, by: f32) -> Self {
                self / <$wide>::from(by)
            }

            /// The nearest integer, moved up so that none is negative.
            #[inline(always)]
            fn integer(self, within: f32) -> u8 {
                let most = <$wide>::from(within);
                let rounded = self.round_ties_even();
                let rounded = if rounded > most { most } else { rounded };
                let rounded = if rounded < -most { -most } else { rounded };
                (rounded + most) as u8
            }

            #[inline(always)]
            fn half(self) -> f16 {
                f16::$half(self)
            }

            #[inline(always)]
            fn of(code: f32, scale: f32) -> Self {
                <$wide>::from(code) * <$wide>::from(scale)
            }
        }
    };
}
wide!(f32, from_f32);
wide!(f64, from_f64);

/// Encodes rows of `width` elements.
struct Encode<'a, T> {
    code: Code,
    x: &'a [T],
    width: usize,
}

#[derive(Default)]
struct Encoded {
    halves: Vec<f16>,
    bytes: Vec<u8>,
    scales: Vec<f32>,
    finite: bool,
}

impl<T: Wide> Kernel for Encode<'_, T> {
    type Output = Encoded;

    #[inline(always)]
    fn run(self) -> Encoded {
        let Self { code, x, width } = self;
        let mut encoded = Encoded { finite: true, ..Encoded::default() };
        let rows = x.len() / width;
        match code {
            Code::Half => encoded.halves.reserve_exact(x.len()),
            Code::Byte | Code::Nibble => encoded.bytes.reserve_exact(rows * code.columns(width)),
        }
        encoded.scales.reserve_exact(rows);
        let most = code.largest() as f32;
        for row in x.chunks(width) {
            let (largest, nothing) = extent(row);
            let scale = (largest.wide() / code.largest()) as f32;
            let scale = if scale == 0.0 && largest.wide() > 0.0 { SMALLEST } else { scale };
            encoded.finite &= nothing.wide() == 0.0 && scale.is_finite();
            encoded.scales.push(scale);
            // A row of zeros.
            let by = if scale == 0.0 { f32::INFINITY } else { scale };
            match code {
                Code::Half => encoded.halves.extend(row.iter().map(|x| x.divided(by).half())),
                Code::Byte => encoded.bytes.extend(row.iter().map(|x| x.divided(by).integer(most))),
                Code::Nibble => encoded.bytes.extend(row.chunks(2).map(|pair| {
                    let low = pair[0].divided(by).integer(most);
                    let high = pair.get(1).map_or(0, |x| x.divided(by).integer(most));
                    low | high << 4
                })),
            }
        }
        encoded
    }
}

/// max |x|, and 0 or NaN.
#[inline(always)]
fn extent<T: Wide>(row: &[T]) -> (T, T) {
    const LANES: usize = 16;
    let (mut largest, mut nothing) = ([T::ZERO; LANES], [T::ZERO; LANES]);
    for row in row.chunks(LANES) {
        for ((largest, nothing), x) in largest.iter_mut().zip(&mut nothing).zip(row) {
            *largest = x.magnitude().larger(*largest);
            *nothing = nothing.add(x.nothing());
        }
    }
    (largest.into_iter().fold(T::ZERO, T::larger), nothing.into_iter().fold(T::ZERO, T::add))
}

/// Codes of all rows.
#[derive(Clone, Copy)]
enum Codes<'a> {
    Halves(&'a [f16]),
    Bytes(&'a [u8]),
    Nibbles(&'a [u8]),
}

/// Decodes rows of `width` elements.
struct Decode<'a, T> {
    codes: Codes<'a>,
    scales: &'a [f32],
    width: usize,
    to: std::marker::PhantomData<T>,
}

impl<'a, T> Decode<'a, T> {
    fn new(codes: Codes<'a>, scales: &'a [f32], width: usize) -> Self {
        Self { codes, scales, width, to: std::marker::PhantomData }
    }
}

impl<T: Wide> Kernel for Decode<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run(self) -> Vec<T> {
        let width = self.width;
        let mut values = Vec::with_capacity(self.scales.len() * width);
        for (row, &scale) in self.scales.iter().enumerate() {
            match self.codes {
                Codes::Halves(codes) => {
                    let codes = &codes[row * width..(row + 1) * width];
                    values.extend(codes.iter().map(|code| T::of(code.to_f32(), scale)));
                }
                Codes::Bytes(codes) => {
                    let codes = &codes[row * width..(row + 1) * width];
                    values.extend(codes.iter().map(|&code| T::of(f32::from(code) - 127.0, scale)));
                }
                Codes::Nibbles(codes) => {
                    let columns = width.div_ceil(2);
                    let codes = &codes[row * columns..(row + 1) * columns];
                    let both = codes.iter().flat_map(|&code| [code & 15, code >> 4]);
                    values.extend(both.take(width).map(|code| T::of(f32::from(code) - 7.0, scale)));
                }
            }
        }
        values
    }
}

#[cfg(test)]
mod tests;
