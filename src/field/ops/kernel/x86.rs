//! The lanes of AVX2 with FMA and of AVX-512.

use super::lanes::Lanes;
use super::scheme::Scheme;
use half::bf16;
use std::arch::x86_64::*;
use std::mem::transmute;

/// Eight lanes: AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Eight(__m256);

/// The mask of the first `count` of eight lanes.
#[inline(always)]
unsafe fn first_of_eight(count: usize) -> __m256i {
    static MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: eight elements from 8 − count on lie in the table; the caller has AVX2.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - count.min(8)).cast()) }
}

// SAFETY: the intrinsics touch eight elements, or those that the mask selects. Callers of the functions promise the
// instruction set and the memory.
unsafe impl Lanes for Eight {
    const WIDTH: usize = 8;
    const HEIGHT: usize = 6;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        Self(unsafe { _mm256_maskload_ps(from, first_of_eight(count)) })
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        unsafe { _mm256_maskstore_ps(to, first_of_eight(count), self.0) }
    }
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn minus(self, other: Self) -> Self {
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn times(self, other: Self) -> Self {
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn over(self, other: Self) -> Self {
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn at_most(self, bound: Self) -> Self {
        // Of a pair with a NaN the instruction gives the second.
        Self(unsafe { _mm256_min_ps(bound.0, self.0) })
    }
    #[inline(always)]
    unsafe fn magnitude(self) -> Self {
        Self(unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0) })
    }
    #[inline(always)]
    unsafe fn with_sign_of(self, other: Self) -> Self {
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            Self(_mm256_or_ps(_mm256_andnot_ps(sign, self.0), _mm256_and_ps(sign, other.0)))
        }
    }
    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn interleaved(self, other: Self) -> (Self, Self) {
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(self.0, other.0), _mm256_unpackhi_ps(self.0, other.0));
            (Self(_mm256_permute2f128_ps::<0x20>(low, high)), Self(_mm256_permute2f128_ps::<0x31>(low, high)))
        }
    }
    #[inline(always)]
    unsafe fn split(self) -> (Self, Self) {
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let high = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            (Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))), Self(_mm256_castsi256_ps(high)))
        }
    }
}

/// Sixteen lanes: AVX-512.
#[derive(Clone, Copy)]
pub(crate) struct Sixteen(pub(super) __m512);

// SAFETY: as for `Eight`, with sixteen elements.
unsafe impl Lanes for Sixteen {
    const WIDTH: usize = 16;
    const HEIGHT: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        Self(unsafe { _mm512_maskz_loadu_ps(first_of_sixteen(count), from) })
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, first_of_sixteen(count), self.0) }
    }
    #[inline(always)]
    unsafe fn plus(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn minus(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn times(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn over(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn at_most(self, bound: Self) -> Self {
        // Of a pair with a NaN the instruction gives the second.
        Self(unsafe { _mm512_min_ps(bound.0, self.0) })
    }
    #[inline(always)]
    unsafe fn magnitude(self) -> Self {
        Self(unsafe { _mm512_andnot_ps(_mm512_set1_ps(-0.0), self.0) })
    }
    #[inline(always)]
    unsafe fn with_sign_of(self, other: Self) -> Self {
        unsafe {
            let sign = _mm512_set1_ps(-0.0);
            Self(_mm512_or_ps(_mm512_andnot_ps(sign, self.0), _mm512_and_ps(sign, other.0)))
        }
    }
    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn interleaved(self, other: Self) -> (Self, Self) {
        unsafe {
            let lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let upper = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            let of = |half| Self(_mm512_permutex2var_ps(self.0, half, other.0));
            (of(lower), of(upper))
        }
    }
    #[inline(always)]
    unsafe fn split(self) -> (Self, Self) {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let high = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))), Self(_mm512_castsi512_ps(high)))
        }
    }
}

/// The mask of the first `count` of sixteen lanes.
#[inline(always)]
fn first_of_sixteen(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// BF16 in pairs by `vdpbf16ps`, which takes subnormal numbers for zero, as does the rounding of its sums.
pub(crate) struct Dots;

// SAFETY: one pair a lane is read. Callers of the functions promise the instructions and the memory.
unsafe impl Scheme for Dots {
    type Element = bf16;
    type Lanes = Sixteen;
    type Factor = __m512i;
    const DEPTH: usize = 2;

    #[inline(always)]
    unsafe fn vector(from: *const bf16) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn vector_first(from: *const bf16, count: usize) -> __m512i {
        unsafe { _mm512_maskz_loadu_epi32(first_of_sixteen(count), from.cast()) }
    }
    #[inline(always)]
    unsafe fn everywhere(from: *const bf16) -> __m512i {
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn everywhere_last(from: *const bf16) -> __m512i {
        unsafe { _mm512_set1_epi32(i32::from(from.read().to_bits())) }
    }
    #[inline(always)]
    unsafe fn accumulate(sum: Sixteen, a: __m512i, b: __m512i) -> Sixteen {
        // SAFETY: both types are 512 bits; the caller has the instruction.
        unsafe {
            Sixteen(_mm512_dpbf16_ps(sum.0, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)))
        }
    }
    #[inline(always)]
    unsafe fn narrow(sums: &[f32], to: &mut [bf16]) {
        let count = sums.len().min(to.len());
        let mut at = 0;
        // SAFETY: what is loaded and stored lies in the slices; both types are 256 bits; the caller has the
        // instructions.
        unsafe {
            while at + 16 <= count {
                let narrow = _mm512_cvtneps_pbh(_mm512_loadu_ps(sums.as_ptr().add(at)));
                _mm256_storeu_si256(to.as_mut_ptr().add(at).cast(), transmute::<__m256bh, __m256i>(narrow));
                at += 16;
            }
            if at < count {
                let last = first_of_sixteen(count - at);
                let narrow = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(last, sums.as_ptr().add(at)));
                _mm256_mask_storeu_epi16(to.as_mut_ptr().add(at).cast(), last, transmute::<__m256bh, __m256i>(narrow));
            }
        }
    }
}
