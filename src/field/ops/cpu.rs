//! What the ops share on the CPU: dense views of storages, arithmetic in F32 or F64 whatever the dtype, and loops
//! compiled for the widest vectors at hand.

use super::kernel::Held;
use super::real::Real;
use crate::error::OdeError;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::borrow::Cow;

/// Elements that a loop widens, works on and narrows at a time: a few KiB of stack that stay in the first cache.
pub(super) const CHUNK: usize = 256;

/// A floating-point dtype that tensors have, and the wide one that its ops calculate in.
pub(super) trait Element: WithDType {
    /// F32 for F16, BF16 and F32; F64 for F64.
    type Wide: Real + Element;

    /// `wide[i] = narrow[i]`, exactly.
    fn widen(narrow: &[Self], wide: &mut [Self::Wide]);
    /// `narrow[i] = wide[i]`, rounded to nearest.
    fn narrow(wide: &[Self::Wide], narrow: &mut [Self]);
    /// The same values: these, where they are wide, or `space`, as long as they are.
    fn widened<'a>(narrow: &'a [Self], space: &'a mut [Self::Wide]) -> &'a [Self::Wide];
    /// The values themselves, where they are wide.
    fn same(wide: &[Self::Wide]) -> Option<&[Self]>;
    /// Lets `change` change the values, in `space` if they are not wide; rounded to nearest.
    fn change(narrow: &mut [Self], space: &mut [Self::Wide], change: impl FnOnce(&mut [Self::Wide]));
    /// Appends the values, rounded to nearest.
    fn append(wide: &[Self::Wide], to: &mut Vec<Self>);
}

macro_rules! wide_element {
    ($element:ty) => {
        impl Element for $element {
            type Wide = $element;

            #[inline(always)]
            fn widen(narrow: &[Self], wide: &mut [Self]) {
                wide.copy_from_slice(narrow);
            }
            #[inline(always)]
            fn narrow(wide: &[Self], narrow: &mut [Self]) {
                narrow.copy_from_slice(wide);
            }
            #[inline(always)]
            fn widened<'a>(narrow: &'a [Self], _: &'a mut [Self]) -> &'a [Self] {
                narrow
            }
            #[inline(always)]
            fn same(wide: &[Self]) -> Option<&[Self]> {
                Some(wide)
            }
            #[inline(always)]
            fn change(narrow: &mut [Self], _: &mut [Self], change: impl FnOnce(&mut [Self])) {
                change(narrow);
            }
            #[inline(always)]
            fn append(wide: &[Self], to: &mut Vec<Self>) {
                to.extend_from_slice(wide);
            }
        }
    };
}
wide_element!(f32);
wide_element!(f64);

macro_rules! half_element {
    ($element:ty, $widen:expr, $narrow:expr) => {
        impl Element for $element {
            type Wide = f32;

            #[inline(always)]
            fn widen(narrow: &[Self], wide: &mut [f32]) {
                $widen(narrow, wide)
            }
            #[inline(always)]
            fn narrow(wide: &[f32], narrow: &mut [Self]) {
                $narrow(wide, narrow)
            }
            #[inline(always)]
            fn widened<'a>(narrow: &'a [Self], space: &'a mut [f32]) -> &'a [f32] {
                Self::widen(narrow, space);
                space
            }
            #[inline(always)]
            fn same(_: &[f32]) -> Option<&[Self]> {
                None
            }
            #[inline(always)]
            fn change(narrow: &mut [Self], space: &mut [f32], change: impl FnOnce(&mut [f32])) {
                Self::widen(narrow, space);
                change(space);
                Self::narrow(space, narrow);
            }
            #[inline(always)]
            fn append(wide: &[f32], to: &mut Vec<Self>) {
                let before = to.len();
                to.resize(before + wide.len(), <$element>::ZERO);
                Self::narrow(wide, &mut to[before..]);
            }
        }
    };
}
half_element!(f16, |from: &[f16], to: &mut [f32]| from.convert_to_f32_slice(to), |from: &[f32], to: &mut [f16]| to
    .convert_from_f32_slice(from));
// Without a branch for each element, these loops become vector code.
half_element!(
    bf16,
    |from: &[bf16], to: &mut [f32]| to.iter_mut().zip(from).for_each(|(to, from)| *to = from.wide()),
    |from: &[f32], to: &mut [bf16]| to.iter_mut().zip(from).for_each(|(to, from)| *to = Held::of(*from))
);

/// The dtype that sums over a batch are made in.
pub(super) fn wide_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Runs `$body` with `$element` standing for the Rust type of `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $op:expr, $element:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F16 => {
                type $element = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $element = half::bf16;
                $body
            }
            candle_core::DType::F32 => {
                type $element = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $element = f64;
                $body
            }
            other => Err($crate::field::ops::cpu::not_float($op, other)),
        }
    };
}
pub(super) use with_element;

/// The error of an op that was given integers.
pub(super) fn not_float(op: &str, dtype: DType) -> candle_core::Error {
    let hint = "it takes F16, BF16, F32 or F64; convert with .to_dtype(..)";
    OdeError::UnsupportedDType { what: format!("the argument of `{op}`"), dtype, hint }.into()
}

/// The elements of a tensor in row-major order: a view where they lie so, a copy where they do not.
pub(super) fn dense<'a, T: Element>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [T]>> {
    if let Some((start, end)) = layout.contiguous_offsets() {
        return Ok(Cow::Borrowed(&T::cpu_storage_as_slice(storage)?[start..end]));
    }
    let mut copy = T::to_cpu_storage_owned(vec![T::from_f64(0.0); layout.shape().elem_count()]);
    storage.copy_strided_src(&mut copy, 0, layout)?;
    T::cpu_storage_data(copy).map(Cow::Owned)
}

/// The elements of a tensor in row-major order, widened to `W`, whatever their dtype.
pub(super) fn dense_wide<W: Element>(storage: &CpuStorage, layout: &Layout) -> Result<Vec<W>> {
    let wide = storage.to_dtype(layout, W::DTYPE)?;
    W::cpu_storage_data(wide)
}

/// Work on slices that is to be compiled for the widest vectors of the CPU at hand.
///
/// `run` and what it calls must be `#[inline(always)]` to be part of it.
pub(super) trait Kernel {
    /// What it gives.
    type Output;
    /// Does the work.
    fn run(self) -> Self::Output;
}

/// Runs a kernel with the widest vectors of this CPU. No variant fuses what others do not, or reorders, so all give the
/// same bits.
pub(super) fn vectorised<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the features were found on this CPU.
            return unsafe { avx512(kernel) };
        }
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            // SAFETY: the features were found on this CPU.
            return unsafe { avx2(kernel) };
        }
    }
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma,avx512f,avx512dq,avx512bw,avx512vl")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// Partial sums of [`sum`].
const LANES: usize = 16;

/// Σ f(aᵢ, bᵢ) in a fixed order with many partial sums, so that its error grows slowly and it runs in vectors.
/// `a` and `b` have the same length.
#[inline(always)]
pub(super) fn sum<W: Real>(a: &[W], b: &[W], f: impl Fn(W, W) -> W) -> W {
    const BLOCK: usize = 64 * LANES;
    let mut total = W::ZERO;
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let mut lanes = [W::ZERO; LANES];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let rest = a_rest.iter().zip(b_rest).fold(W::ZERO, |sum, (&a, &b)| sum + f(a, b));
        for (a, b) in a.iter().zip(b) {
            for n in 0..LANES {
                lanes[n] += f(a[n], b[n]);
            }
        }
        total += by_halves(&lanes) + rest;
    }
    total
}

/// Their sum. Not inlined, and so no part of the kernel: the compiler would split the loop before it into pairs of
/// lanes.
#[inline(never)]
fn by_halves<W: Real>(lanes: &[W; LANES]) -> W {
    let eight: [W; 8] = std::array::from_fn(|n| lanes[n] + lanes[n + 8]);
    let four: [W; 4] = std::array::from_fn(|n| eight[n] + eight[n + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Sums over the rows of a `(rows, columns)` matrix, in F32 or F64, by blocks of rows.
pub(super) struct ColumnSums<'a, T> {
    /// The matrix, row-major.
    pub(super) matrix: &'a [T],
    /// How long a row is; at least 1.
    pub(super) columns: usize,
}

impl<T: Element> Kernel for ColumnSums<'_, T> {
    type Output = Vec<T::Wide>;

    #[inline(always)]
    fn run(self) -> Vec<T::Wide> {
        const BLOCK: usize = 64;
        // Narrow matrices are added up several rows side by side.
        let width = self.columns * (CHUNK / self.columns).max(1);
        let zeros = || vec![<T::Wide as Real>::ZERO; width];
        let (mut total, mut block, mut wide) = (zeros(), zeros(), zeros());
        for rows in self.matrix.chunks(width * BLOCK) {
            block.fill(Real::ZERO);
            for row in rows.chunks(width) {
                for (sum, &value) in block.iter_mut().zip(T::widened(row, &mut wide[..row.len()])) {
                    *sum += value;
                }
            }
            for (total, &block) in total.iter_mut().zip(&block) {
                *total += block;
            }
        }
        let (first, others) = total.split_at_mut(self.columns);
        for row in others.chunks(self.columns) {
            for (sum, &value) in first.iter_mut().zip(row) {
                *sum += value;
            }
        }
        total.truncate(self.columns);
        total
    }
}

/// `y[i] += pattern[i % pattern.len()]`, rounded once.
pub(super) struct AddPattern<'a, T: Element> {
    /// What is added to.
    pub(super) y: &'a mut [T],
    /// What is added, again and again; not empty.
    pub(super) pattern: &'a [T::Wide],
}

impl<T: Element> Kernel for AddPattern<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut wide = [<T::Wide as Real>::ZERO; CHUNK];
        let repeated;
        let pattern = if self.pattern.len() < CHUNK {
            repeated = self.pattern.repeat(CHUNK / self.pattern.len());
            &repeated
        } else {
            self.pattern
        };
        for period in self.y.chunks_mut(pattern.len()) {
            for (y, pattern) in period.chunks_mut(CHUNK).zip(pattern.chunks(CHUNK)) {
                let count = y.len();
                T::change(y, &mut wide[..count], |y| {
                    for (value, &add) in y.iter_mut().zip(pattern) {
                        *value += add;
                    }
                });
            }
        }
    }
}
