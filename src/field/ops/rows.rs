//! The rows of a tensor in few bits, with one scale a row.
//!
//! Row r of x (everything behind the first dimension; a tensor of at most one dimension is one row) is kept as codes
//! qᵢ = Q(xᵢ / s_r) and the F32 scale s_r = max |x_r| / L, and read back as qᵢ·s_r. No scale of a row that is not zero
//! is below 2⁻¹⁴⁹, the smallest F32: what Q tells apart, 2⁻¹⁷⁴ or 2⁻¹⁴⁹ in integers, is then the least that is kept. On
//! the CPU that is one pass over a row, on CUDA two kernels in F32, to the same bits where all is finite; elsewhere it
//! is a composition of Candle's ops with the same meaning.

use super::combine::{self, Finite};
use super::cpu::{Kernel, vectorised};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Result, Shape, Storage, StorageRef, Tensor, WithDType};
use half::f16;
use std::ops::Range;

/// What an element of a row becomes; the numbers are those of `Code` in `cuda/rows.cu`.
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

    pub(super) fn columns(self, width: usize) -> usize {
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
        #[cfg(feature = "cuda")]
        if let Some(encoded) = super::cuda::encode_rows(self, x)? {
            return Ok(encoded);
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
        Ok(encoded.tensors(self, rows, width))
    }

    /// The increment from `before` to `after` and `left`, what rounding has left over so far, encoded in the pass that
    /// sums it; `None` where operands are not contiguous tensors on the CPU of one dtype, F32 or F64, or tensors in F32
    /// on CUDA, or are tracked.
    pub(crate) fn follow(self, before: &Tensor, after: &Tensor, left: Option<&Tensor>) -> Result<Option<Followed>> {
        #[cfg(feature = "cuda")]
        if let Some(followed) = super::cuda::follow_rows(self, before, after, left)? {
            return Ok(Some(followed));
        }
        let operands = || [Some(before), Some(after), left].into_iter().flatten();
        let fits = |x: &Tensor| x.dtype() == before.dtype() && x.dims() == before.dims() && !x.track_op();
        let lies = |x: &Tensor| x.device().is_cpu() && x.is_contiguous();
        if before.elem_count() == 0 || !operands().all(|x| fits(x) && lies(x)) {
            return Ok(None);
        }
        match before.dtype() {
            DType::F32 => self.follow_in::<f32>(before, after, left).map(Some),
            DType::F64 => self.follow_in::<f64>(before, after, left).map(Some),
            _ => Ok(None),
        }
    }

    fn follow_in<T: Wide>(self, before: &Tensor, after: &Tensor, left: Option<&Tensor>) -> Result<Followed> {
        let (shape, (rows, width)) = (before.shape(), rows(before.shape()));
        let (before, after, left) = (Elements::of(before), Elements::of(after), left.map(Elements::of));
        let left = left.as_ref().map(Elements::slice::<T>).transpose()?;
        let follow = Follow { code: self, before: before.slice::<T>()?, after: after.slice()?, left, width };
        let Led { encoded, next, residual, largest } = vectorised(follow);
        let (codes, scales, finite) = encoded.tensors(self, rows, width);
        let tensor = |values| on_cpu(T::to_cpu_storage_owned(values), shape);
        Ok(Followed { codes, scales, finite, next: tensor(next), residual: tensor(residual), largest: Some(largest) })
    }

    /// The tensor again, of that shape and dtype (F32 or F64).
    ///
    /// # Errors
    /// Another dtype; a device that fails.
    pub(crate) fn decode(self, codes: &Tensor, scales: &Tensor, shape: &Shape, dtype: DType) -> Result<Tensor> {
        if shape.elem_count() == 0 {
            return Tensor::zeros(shape, dtype, codes.device());
        }
        #[cfg(feature = "cuda")]
        if dtype == DType::F32
            && let Some(values) = super::cuda::decode_rows(self, codes, scales, shape)?
        {
            return Ok(values);
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

/// An increment in codes, and where it leads.
pub(crate) struct Followed {
    /// As [`Code::encode`] gives them.
    pub(crate) codes: Tensor,
    pub(crate) scales: Tensor,
    pub(crate) finite: Finite,
    /// `before` and the increment as it is decoded.
    pub(crate) next: Tensor,
    /// What rounding has left over now.
    pub(crate) residual: Tensor,
    /// The largest |x| of `next`, NaN if any is not finite, where it was found on the way.
    pub(crate) largest: Option<f64>,
}

/// A contiguous tensor on the CPU.
struct Elements<'a>(StorageRef<'a>, Range<usize>);

impl<'a> Elements<'a> {
    fn of(x: &'a Tensor) -> Self {
        let (storage, layout) = x.storage_and_layout();
        let first = layout.start_offset();
        Self(storage, first..first + x.elem_count())
    }

    fn slice<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.0 {
            Storage::Cpu(storage) => Ok(&T::cpu_storage_as_slice(storage)?[self.1.clone()]),
            _ => candle_core::bail!("expected a tensor on the CPU"),
        }
    }
}

/// Rows of a shape, and the elements of one.
pub(super) fn rows(shape: &Shape) -> (usize, usize) {
    let rows = if shape.rank() < 2 { 1 } else { shape.dims()[0] };
    (rows, shape.elem_count() / rows.max(1))
}

fn on_cpu(storage: CpuStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false)
}

/// F32 or F64: what rows are encoded from and decoded to.
trait Wide: WithDType {
    fn wide(self) -> f64;
    fn magnitude(self) -> Self;
    fn larger(self, other: Self) -> Self;
    fn nothing(self) -> Self;
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

impl<T: Wide> Kernel for Encode<'_, T> {
    type Output = Encoded;

    #[inline(always)]
    fn run(self) -> Encoded {
        let Self { code, x, width } = self;
        let mut encoded = Encoded::of(code, x.len() / width, width);
        x.chunks(width).for_each(|row| _ = encoded.push(code, row));
        encoded
    }
}

struct Encoded {
    halves: Vec<f16>,
    bytes: Vec<u8>,
    scales: Vec<f32>,
    finite: bool,
}

impl Encoded {
    #[inline(always)]
    fn of(code: Code, rows: usize, width: usize) -> Self {
        let (halves, bytes) = if code == Code::Half { (width, 0) } else { (0, code.columns(width)) };
        let (halves, bytes) = (Vec::with_capacity(rows * halves), Vec::with_capacity(rows * bytes));
        Self { halves, bytes, scales: Vec::with_capacity(rows), finite: true }
    }

    /// Appends a row; its scale.
    #[inline(always)]
    fn push<T: Wide>(&mut self, code: Code, row: &[T]) -> f32 {
        let (largest, nothing) = extent(row);
        let scale = (largest.wide() / code.largest()) as f32;
        let scale = if scale == 0.0 && largest.wide() > 0.0 { SMALLEST } else { scale };
        self.finite &= nothing.wide() == 0.0 && scale.is_finite();
        self.scales.push(scale);
        // A row of zeros.
        let by = if scale == 0.0 { f32::INFINITY } else { scale };
        let most = code.largest() as f32;
        match code {
            Code::Half => self.halves.extend(row.iter().map(|x| x.divided(by).half())),
            Code::Byte => self.bytes.extend(row.iter().map(|x| x.divided(by).integer(most))),
            Code::Nibble => self.bytes.extend(row.chunks(2).map(|pair| {
                let low = pair[0].divided(by).integer(most);
                let high = pair.get(1).map_or(0, |x| x.divided(by).integer(most));
                low | high << 4
            })),
        }
        scale
    }

    /// The codes of the row that was appended last.
    #[inline(always)]
    fn last(&self, code: Code, width: usize) -> Codes<'_> {
        match code {
            Code::Half => Codes::Halves(&self.halves[self.halves.len() - width..]),
            Code::Byte => Codes::Bytes(&self.bytes[self.bytes.len() - width..]),
            Code::Nibble => Codes::Nibbles(&self.bytes[self.bytes.len() - code.columns(width)..]),
        }
    }

    /// Codes, scales, and whether all of it is finite.
    fn tensors(self, code: Code, rows: usize, width: usize) -> (Tensor, Tensor, Finite) {
        let codes = match code {
            Code::Half => CpuStorage::F16(self.halves),
            Code::Byte | Code::Nibble => CpuStorage::U8(self.bytes),
        };
        let codes = on_cpu(codes, (rows, code.columns(width)));
        (codes, on_cpu(CpuStorage::F32(self.scales), (rows, 1)), Finite::Host(self.finite))
    }
}

/// Encodes increments of `width` elements a row, and goes where they lead.
struct Follow<'a, T> {
    code: Code,
    before: &'a [T],
    after: &'a [T],
    left: Option<&'a [T]>,
    width: usize,
}

struct Led<T> {
    encoded: Encoded,
    next: Vec<T>,
    residual: Vec<T>,
    largest: f64,
}

impl<T: Wide> Kernel for Follow<'_, T> {
    type Output = Led<T>;

    #[inline(always)]
    fn run(self) -> Led<T> {
        let Self { code, before, after, left, width } = self;
        let mut encoded = Encoded::of(code, before.len() / width, width);
        let (mut next, mut residual) = (Vec::with_capacity(before.len()), Vec::with_capacity(before.len()));
        let mut most = T::ZERO;
        let mut finite = true;
        for at in (0..before.len()).step_by(width) {
            let row = at..at + width;
            let differences =
                after[row.clone()].iter().zip(&before[row.clone()]).map(|(after, before)| *after - *before);
            match left {
                None => residual.extend(differences),
                Some(left) => {
                    residual.extend(differences.zip(&left[row.clone()]).map(|(increment, left)| increment + *left))
                }
            }
            let increment = &mut residual[row.clone()];
            let scale = encoded.push(code, increment);
            encoded.last(code, width).decode(scale, width, &mut next);
            let decoded = &mut next[row.clone()];
            for ((next, residual), before) in decoded.iter_mut().zip(increment).zip(&before[row]) {
                let rounded = *next;
                *next = *before + rounded;
                *residual -= rounded;
            }
            let (largest, nothing) = extent(decoded);
            most = largest.larger(most);
            finite &= nothing.wide() == 0.0;
        }
        Led { encoded, next, residual, largest: if finite { most.wide() } else { f64::NAN } }
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
            *nothing += x.nothing();
        }
    }
    (largest.into_iter().fold(T::ZERO, T::larger), nothing.into_iter().fold(T::ZERO, |sum, x| sum + x))
}

/// Codes of some rows.
#[derive(Clone, Copy)]
enum Codes<'a> {
    Halves(&'a [f16]),
    Bytes(&'a [u8]),
    Nibbles(&'a [u8]),
}

impl<'a> Codes<'a> {
    /// Those of a row of `width` elements.
    #[inline(always)]
    fn row(&self, row: usize, width: usize) -> Codes<'a> {
        match *self {
            Self::Halves(codes) => Self::Halves(&codes[row * width..(row + 1) * width]),
            Self::Bytes(codes) => Self::Bytes(&codes[row * width..(row + 1) * width]),
            Self::Nibbles(codes) => {
                let columns = width.div_ceil(2);
                Self::Nibbles(&codes[row * columns..(row + 1) * columns])
            }
        }
    }

    /// Appends what the codes of a row mean.
    #[inline(always)]
    fn decode<T: Wide>(&self, scale: f32, width: usize, values: &mut Vec<T>) {
        match *self {
            Self::Halves(codes) => values.extend(codes.iter().map(|code| T::of(code.to_f32(), scale))),
            Self::Bytes(codes) => values.extend(codes.iter().map(|&code| T::of(f32::from(code) - 127.0, scale))),
            Self::Nibbles(codes) => {
                let both = codes.iter().flat_map(|&code| [code & 15, code >> 4]);
                values.extend(both.take(width).map(|code| T::of(f32::from(code) - 7.0, scale)));
            }
        }
    }
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
            self.codes.row(row, width).decode(scale, width, &mut values);
        }
        values
    }
}

#[cfg(test)]
mod tests;
