//! Vectors of F32 lanes: what every micro-kernel is written in, once for all instruction sets.

use crate::field::ops::minimax::Number;

/// A vector of F32 lanes.
///
/// # Safety
/// `load` and `store` touch exactly [`WIDTH`](Self::WIDTH) elements, the `_first` forms exactly `count`.
pub(crate) unsafe trait Lanes: Copy {
    /// How many lanes there are.
    const WIDTH: usize;
    /// How many rows a tile of sums has at most, two vectors wide, so that it stays in registers with what the compiler
    /// likes to load ahead.
    const HEIGHT: usize;

    /// # Safety
    /// All functions: the CPU has the instructions, and what a pointer leads to is as long as is read or written. The
    /// pointers need no alignment.
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// The first `count` ≤ `WIDTH` lanes from memory, the others zero.
    unsafe fn load_first(from: *const f32, count: usize) -> Self;
    /// The first `count` ≤ `WIDTH` lanes to memory.
    unsafe fn store_first(self, to: *mut f32, count: usize);
    unsafe fn plus(self, other: Self) -> Self;
    unsafe fn minus(self, other: Self) -> Self;
    unsafe fn times(self, other: Self) -> Self;
    unsafe fn over(self, other: Self) -> Self;
    /// The lesser of each lane and a bound; a NaN stays what it is.
    unsafe fn at_most(self, bound: Self) -> Self;
    unsafe fn magnitude(self) -> Self;
    unsafe fn with_sign_of(self, other: Self) -> Self;
    /// `self + a b`, fused where the CPU can.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
    /// The sum of the lanes, halves first.
    unsafe fn total(self) -> f32;
    /// The lanes of both in turn: (those of the lower halves, those of the upper halves).
    unsafe fn interleaved(self, other: Self) -> (Self, Self);
    /// Each lane taken for two BF16 side by side: (those in the low halves, those in the high halves), widened.
    unsafe fn split(self) -> (Self, Self);
}

/// Has the cache fetch what lies at `at`, which will be read and written soon. Nothing need lie there.
#[inline(always)]
pub(super) fn fetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and no address makes it fail.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Lanes without intrinsics: the compiler makes of them what the target has.
#[derive(Clone, Copy)]
pub(crate) struct Plain([f32; 4]);

// SAFETY: only slices of `WIDTH` and of `count` elements are touched.
unsafe impl Lanes for Plain {
    const WIDTH: usize = 4;
    const HEIGHT: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's; an array has the layout of its elements.
        Self(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        // SAFETY: the caller's: `count` elements may be read.
        Self(std::array::from_fn(|n| if n < count { unsafe { from.add(n).read_unaligned() } } else { 0.0 }))
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        for (n, lane) in self.0.into_iter().enumerate().take(count) {
            // SAFETY: the caller's: `count` elements may be written.
            unsafe { to.add(n).write_unaligned(lane) }
        }
    }
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] + other.0[n]))
    }
    #[inline(always)]
    unsafe fn minus(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] - other.0[n]))
    }
    #[inline(always)]
    unsafe fn times(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] * other.0[n]))
    }
    #[inline(always)]
    unsafe fn over(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n] / other.0[n]))
    }
    #[inline(always)]
    unsafe fn at_most(self, bound: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n].at_most(bound.0[n])))
    }
    #[inline(always)]
    unsafe fn magnitude(self) -> Self {
        Self(self.0.map(f32::abs))
    }
    #[inline(always)]
    unsafe fn with_sign_of(self, other: Self) -> Self {
        Self(std::array::from_fn(|n| self.0[n].copysign(other.0[n])))
    }
    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        // Elsewhere a fused multiply-add may be a call.
        const FUSED: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        Self(std::array::from_fn(
            |n| {
                if FUSED { a.0[n].mul_add(b.0[n], self.0[n]) } else { self.0[n] + a.0[n] * b.0[n] }
            },
        ))
    }
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let [a, b, c, d] = self.0;
        (a + c) + (b + d)
    }
    #[inline(always)]
    unsafe fn interleaved(self, other: Self) -> (Self, Self) {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        (Self([a, e, b, f]), Self([c, g, d, h]))
    }
    #[inline(always)]
    unsafe fn split(self) -> (Self, Self) {
        let bits = self.0.map(f32::to_bits);
        (Self(bits.map(|pair| f32::from_bits(pair << 16))), Self(bits.map(|pair| f32::from_bits(pair & 0xffff_0000))))
    }
}

/// Vectors side by side, on which each operation is made for all before the next: whoever waits for one works on
/// another.
#[derive(Clone, Copy)]
pub(super) struct Beside<L, const N: usize>([L; N]);

impl<L: Lanes, const N: usize> Beside<L, N> {
    /// # Safety
    /// The CPU has the instructions of `L`, with products that are fused.
    #[inline(always)]
    pub(super) unsafe fn new(lanes: [L; N]) -> Self {
        Self(lanes)
    }

    #[inline(always)]
    pub(super) fn into_lanes(self) -> [L; N] {
        self.0
    }

    #[inline(always)]
    fn with(self, other: Self, of: impl Fn(L, L) -> L) -> Self {
        Self(std::array::from_fn(|n| of(self.0[n], other.0[n])))
    }
}

// SAFETY, of all: whoever has made `self` has promised the instructions.
impl<L: Lanes, const N: usize> Number for Beside<L, N> {
    #[inline(always)]
    fn like(self, number: f32) -> Self {
        Self([unsafe { L::splat(number) }; N])
    }
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self.with(other, |a, b| unsafe { a.plus(b) })
    }
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self.with(other, |a, b| unsafe { a.times(b) })
    }
    #[inline(always)]
    fn over(self, other: Self) -> Self {
        self.with(other, |a, b| unsafe { a.over(b) })
    }
    #[inline(always)]
    fn fused(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|n| unsafe { b.0[n].plus_product(self.0[n], a.0[n]) }))
    }
    #[inline(always)]
    fn at_most(self, bound: Self) -> Self {
        self.with(bound, |a, b| unsafe { a.at_most(b) })
    }
    #[inline(always)]
    fn magnitude(self) -> Self {
        Self(self.0.map(|a| unsafe { a.magnitude() }))
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        self.with(other, |a, b| unsafe { a.with_sign_of(b) })
    }
}
