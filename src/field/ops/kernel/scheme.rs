//! How products are summed: F32 one by one, BF16 in pairs along the summed index.

use super::held::Held;
use super::lanes::Lanes;
use half::bf16;
use std::marker::PhantomData;

/// A way of making Σ a b in F32 lanes from elements in memory.
///
/// # Safety
/// The functions read [`DEPTH`](Self::DEPTH) elements a lane, which lie side by side; `_first` and `_last` read less.
pub(crate) unsafe trait Scheme {
    /// What lies in memory.
    type Element: Copy;
    /// What the sums are made in.
    type Lanes: Lanes;
    /// What is multiplied: `DEPTH` elements for each lane.
    type Factor: Copy;
    /// Elements of the summed index that one accumulation takes.
    const DEPTH: usize;

    /// # Safety
    /// All functions: the CPU has the instructions, and the pointer leads to what is read. It needs no alignment.
    unsafe fn vector(from: *const Self::Element) -> Self::Factor;
    /// A vector of which only the first `count` lanes are read, the others zero.
    unsafe fn vector_first(from: *const Self::Element, count: usize) -> Self::Factor;
    /// The same `DEPTH` elements in every lane.
    unsafe fn everywhere(from: *const Self::Element) -> Self::Factor;
    /// One element in every lane, and zeros for the others.
    unsafe fn everywhere_last(from: *const Self::Element) -> Self::Factor;
    /// sum + Σ a b over the `DEPTH` elements.
    unsafe fn accumulate(sum: Self::Lanes, a: Self::Factor, b: Self::Factor) -> Self::Lanes;

    /// Sums as elements, rounded to nearest.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn narrow(sums: &[f32], to: &mut [Self::Element]);
}

/// Each sum by itself.
#[inline(always)]
fn narrow_each<T: Held>(sums: &[f32], to: &mut [T]) {
    to.iter_mut().zip(sums).for_each(|(to, &sum)| *to = T::of(sum));
}

/// F32 one by one.
pub(crate) struct Single<L>(PhantomData<L>);

// SAFETY: one element a lane is read. Callers of the functions promise the instructions and the memory.
unsafe impl<L: Lanes> Scheme for Single<L> {
    type Element = f32;
    type Lanes = L;
    type Factor = L;
    const DEPTH: usize = 1;

    #[inline(always)]
    unsafe fn vector(from: *const f32) -> L {
        unsafe { L::load(from) }
    }
    #[inline(always)]
    unsafe fn vector_first(from: *const f32, count: usize) -> L {
        unsafe { L::load_first(from, count) }
    }
    #[inline(always)]
    unsafe fn everywhere(from: *const f32) -> L {
        unsafe { L::splat(from.read()) }
    }
    #[inline(always)]
    unsafe fn everywhere_last(from: *const f32) -> L {
        unsafe { L::splat(from.read()) }
    }
    #[inline(always)]
    unsafe fn accumulate(sum: L, a: L, b: L) -> L {
        unsafe { sum.plus_product(a, b) }
    }
    #[inline(always)]
    unsafe fn narrow(sums: &[f32], to: &mut [f32]) {
        narrow_each(sums, to);
    }
}

/// BF16 in pairs, widened to F32 before they are multiplied.
pub(crate) struct Widened<L>(PhantomData<L>);

// SAFETY: one pair a lane is read. Callers of the functions promise the instructions and the memory.
unsafe impl<L: Lanes> Scheme for Widened<L> {
    type Element = bf16;
    type Lanes = L;
    type Factor = (L, L);
    const DEPTH: usize = 2;

    #[inline(always)]
    unsafe fn vector(from: *const bf16) -> (L, L) {
        unsafe { L::load(from.cast()).split() }
    }
    #[inline(always)]
    unsafe fn vector_first(from: *const bf16, count: usize) -> (L, L) {
        unsafe { L::load_first(from.cast(), count).split() }
    }
    #[inline(always)]
    unsafe fn everywhere(from: *const bf16) -> (L, L) {
        unsafe { L::splat(from.cast::<f32>().read_unaligned()).split() }
    }
    #[inline(always)]
    unsafe fn everywhere_last(from: *const bf16) -> (L, L) {
        unsafe { (L::splat(from.read().to_f32()), L::splat(0.0)) }
    }
    #[inline(always)]
    unsafe fn accumulate(sum: L, a: (L, L), b: (L, L)) -> L {
        unsafe { sum.plus_product(a.0, b.0).plus_product(a.1, b.1) }
    }
    #[inline(always)]
    unsafe fn narrow(sums: &[f32], to: &mut [bf16]) {
        narrow_each(sums, to);
    }
}
