//! The elementary functions behind the activations, written so that plain loops over them become vector code.
//!
//! No branches, no tables, no calls: every function is a fixed sequence of adds, multiplications, divisions and
//! selections, of which none but those of [`minimax`] are fused, so each CPU gives the same bits. exp and expm1 are
//! polynomials on |r| ≤ ln 2 / 2 after x = k ln 2 + r; log1p is 2 artanh(u / (2 + u)). The polynomials are Taylor's in
//! F64 and minimax in F32, which has more such forms in [`minimax`]; erfc in F64 is a Chebyshev series of
//! ln(erfc(z) e^{z²} / t) in t = 2 / (2 + z).

use super::minimax;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub};

/// F32 or F64: what the ops calculate in.
pub(super) trait Real:
    Copy
    + PartialOrd
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + MulAssign
    + Div<Output = Self>
    + DivAssign
    + Neg<Output = Self>
    + Send
    + Sync
    + 'static
{
    const ZERO: Self;
    const ONE: Self;
    /// eˣ is zero here and below, even after multiplication by −x.
    const LOWEST: Self;
    /// Largest |x| for which [`sin_within`](Self::sin_within) holds; below 0, it holds for none.
    const TURNS: f64;

    fn of(value: f64) -> Self;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;

    /// factor · eˣ for x ≤ 0.
    fn times_exp_negative(factor: Self, x: Self) -> Self;
    /// eˣ for x ≤ 0.
    #[inline(always)]
    fn exp_negative(self) -> Self {
        Self::times_exp_negative(Self::ONE, self)
    }
    /// eˣ − 1 for x ≤ 0.
    fn exp_m1_negative(self) -> Self;
    /// ln(1 + u) for 0 ≤ u ≤ 1.
    fn ln_1p_unit(self) -> Self;
    /// tanh x
    fn tanh(self) -> Self;
    /// ln cosh x for 0 ≤ x² = `self` ≤ 1.
    fn log_cosh_unit(self) -> Self;
    /// factor · ½ erfc(z / √2), the normal distribution's upper tail, for z ≥ 0.
    fn times_normal_tail(factor: Self, z: Self) -> Self;
    /// e^(−z²/2) / √(2π), the normal distribution's density, for z ≥ 0.
    fn normal_density(self) -> Self;
    /// sin(x + quarters · π/2) for |x| ≤ [`TURNS`](Self::TURNS).
    fn sin_within(self, quarters: u32) -> Self;
    /// sin(x + quarters · π/2) for any x.
    fn sin_anywhere(self, quarters: u32) -> Self;
}

macro_rules! real {
    ($real:ident, $int:ident, $bits:ident, mantissa: $mantissa:literal, bias: $bias:literal, magic: $magic:literal,
     ln2: ($ln2_high:literal, $ln2_low:literal), lowest: $lowest:literal, exp: $exp:expr, log: $log:expr,
     turns: $turns:literal, forms: { $($form:item)* }) => {
        impl Real for $real {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const LOWEST: Self = $lowest;
            const TURNS: f64 = $turns;

            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $real
            }
            #[inline(always)]
            fn abs(self) -> Self {
                $real::abs(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $real::sqrt(self)
            }

            #[inline(always)]
            fn times_exp_negative(factor: Self, x: Self) -> Self {
                let (p, a, b) = x.exp_parts(0.0);
                // Two powers of two, so that a subnormal result is rounded once, at the end.
                factor * (1.0 + p) * a * b
            }
            #[inline(always)]
            fn exp_m1_negative(self) -> Self {
                let (p, a, b) = self.exp_parts(0.0);
                let scale = a * b;
                p * scale + (scale - 1.0)
            }
            #[inline(always)]
            fn ln_1p_unit(self) -> Self {
                /// artanh(s) / s = 1 + c₁ s² + c₂ s⁴ + …
                const COEFFICIENTS: &[$real] = &$log;
                let s = self / (2.0 + self);
                let square = s * s;
                let sum = COEFFICIENTS.iter().rev().fold(0.0, |sum, c| (sum + c) * square);
                2.0 * (s + s * sum)
            }
            #[inline(always)]
            fn sin_within(self, quarters: u32) -> Self {
                sin_reduced(f64::from(self), quarters) as $real
            }
            #[inline(always)]
            fn sin_anywhere(self, quarters: u32) -> Self {
                match quarters % 4 {
                    0 => self.sin(),
                    1 => self.cos(),
                    2 => -self.sin(),
                    _ => -self.cos(),
                }
            }
            $($form)*
        }

        impl Exponential for $real {
            #[inline(always)]
            fn exp_parts(self, more: Self) -> (Self, Self, Self) {
                /// (eʳ − 1 − r) / r² = c₀ + c₁ r + …
                const COEFFICIENTS: &[$real] = &$exp;
                let power = |k: $int| $real::from_bits((k.wrapping_add($bias) as $bits) << $mantissa);
                // A NaN passes this selection.
                let x = if self < $lowest { $lowest } else { self };
                // Adding 1.5 · 2^mantissa rounds to an integer and leaves it in the low bits.
                let shifted = x * std::f64::consts::LOG2_E as $real + $magic;
                let rounded = shifted - $magic;
                let k = (shifted.to_bits() as $int).wrapping_sub(($magic as $real).to_bits() as $int);
                let r = x - rounded * $ln2_high - rounded * $ln2_low + more;
                let tail = COEFFICIENTS.iter().rev().fold(0.0, |tail, c| tail * r + c);
                let half = k >> 1;
                (r + r * r * tail, power(half), power(k.wrapping_sub(half)))
            }
        }
    };
}

/// The reduction x = k ln 2 + r.
trait Exponential: Sized {
    /// (p, a, b) with exp(x + `more`) = (1 + p) a b, a and b powers of two; |`more`| ≤ 0.1.
    fn exp_parts(self, more: Self) -> (Self, Self, Self);
}

real!(f32, i32, u32, mantissa: 23, bias: 127, magic: 12_582_912.0,
      ln2: (0.693_359_4, -2.121_944_4e-4), lowest: -125.0,
      exp: [0.5, 0.166_665_74, 4.166_686e-2, 8.363_74e-3, 1.390_15e-3],
      log: [0.333_333_2, 0.200_038_03, 0.141_176_71, 0.134_298_76],
      turns: 1e6, forms: {
    #[inline(always)]
    fn tanh(self) -> Self {
        minimax::tanh(self)
    }
    #[inline(always)]
    fn log_cosh_unit(self) -> Self {
        minimax::log_cosh_unit(self)
    }
    #[inline(always)]
    fn times_normal_tail(factor: Self, z: Self) -> Self {
        times_bell(factor * minimax::scaled_normal_tail(if z > BELL_END { BELL_END } else { z }), z)
    }
    #[inline(always)]
    fn normal_density(self) -> Self {
        times_bell(DENSITY_AT_ZERO as f32, self)
    }
});
real!(f64, i64, u64, mantissa: 52, bias: 1023, magic: 6_755_399_441_055_744.0,
      ln2: (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10), lowest: -800.0,
      exp: TAYLOR_EXP, log: TAYLOR_ARTANH,
      turns: -1.0, forms: {
    #[inline(always)]
    fn tanh(self) -> Self {
        let m = (self.abs() * -2.0).exp_m1_negative();
        (-m / (m + 2.0)).copysign(self)
    }
    /// ln(1 + u) with u = cosh x − 1 by its Taylor series.
    #[inline(always)]
    fn log_cosh_unit(self) -> Self {
        const TERMS: u32 = 10;
        let series = (2..=TERMS).rev().fold(1.0, |sum, n| 1.0 + sum * self * (1.0 / f64::from(2 * n * (2 * n - 1))));
        (0.5 * self * series).ln_1p_unit()
    }
    #[inline(always)]
    fn times_normal_tail(factor: Self, z: Self) -> Self {
        factor * normal_tail(if z > 100.0 { 100.0 } else { z })
    }
    #[inline(always)]
    fn normal_density(self) -> Self {
        DENSITY_AT_ZERO * (-0.5 * self * self).exp_negative()
    }
});

/// 1 / (n + 2)! for n = 0, 1, …
const TAYLOR_EXP: [f64; 13] = {
    let mut table = [0.0; 13];
    let (mut n, mut factorial) = (0, 1.0);
    while n < table.len() {
        factorial *= (n + 2) as f64;
        table[n] = 1.0 / factorial;
        n += 1;
    }
    table
};

/// 1 / (2 n + 3) for n = 0, 1, …
const TAYLOR_ARTANH: [f64; 17] = {
    let mut table = [0.0; 17];
    let mut n = 0;
    while n < table.len() {
        table[n] = 1.0 / (2 * n + 3) as f64;
        n += 1;
    }
    table
};

/// 1 / √(2π)
const DENSITY_AT_ZERO: f64 = 0.398_942_280_401_432_7;

/// Where e^(−z²/2) is zero in F32.
const BELL_END: f32 = 15.0;

/// factor · e^(−z²/2) for z ≥ 0.
#[inline(always)]
fn times_bell(factor: f32, z: f32) -> f32 {
    let z = if z > BELL_END { BELL_END } else { z };
    // z² in two parts: the square of a number of twelve bits is exact.
    let short = f32::from_bits(z.to_bits() & 0xffff_f000);
    let (p, a, b) = (-0.5 * short * short).exp_parts(-0.5 * (z - short) * (z + short));
    factor * (1.0 + p) * a * b
}

/// ln 2 for the activations that need it.
pub(super) const LN_2: f64 = std::f64::consts::LN_2;

/// sin(x + quarters · π/2) in F64 arithmetic, good to 1e-9 for |x| ≤ 1e6: what F32 needs.
#[inline(always)]
fn sin_reduced(x: f64, quarters: u32) -> f64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0;
    // π in two parts; the first has 33 bits, so that its multiples are exact.
    const PI_HIGH: f64 = 3.141_592_653_468_251_2;
    const PI_LOW: f64 = 1.215_420_101_301_238_5e-10;
    // Even quarters: sin r = Σ; odd ones: the reduction aims at half-odd multiples of π instead.
    let (offset, odd) = if quarters % 2 == 1 { (0.5, 1.0) } else { (0.0, 0.0) };
    let shifted = x * std::f64::consts::FRAC_1_PI + offset + MAGIC;
    let turns = (shifted - MAGIC) - 0.5 * odd;
    let r = x - turns * PI_HIGH - turns * PI_LOW;
    let square = r * r;
    let sum = SINE.iter().rev().fold(0.0, |sum, c| (sum + c) * square);
    // A negative zero stays one.
    let value = r * (1.0 + sum);
    // Each half turn changes the sign; so do two quarters.
    let flips = shifted.to_bits() ^ u64::from(quarters / 2);
    f64::from_bits(value.to_bits() ^ (flips << 63))
}

/// sin(r) / r = 1 + c₁ r² + c₂ r⁴ + … for |r| ≤ π/2, to a relative error of 2e-10.
const SINE: [f64; 5] =
    [-1.666_666_666_4e-1, 8.333_332_745_6e-3, -1.984_108_162e-4, 2.753_613_015_3e-6, -2.407_319_210_2e-8];

/// The upper tail of the normal distribution, ½ erfc(z / √2), for z ≥ 0.
#[inline(always)]
fn normal_tail(z: f64) -> f64 {
    let z = z * std::f64::consts::FRAC_1_SQRT_2;
    let t = 2.0 / (2.0 + z);
    let u = 2.0 * t - 1.0;
    let (before, sum) =
        ERFC.iter().skip(1).rev().fold((0.0, 0.0), |(before, sum), c| (sum, 2.0 * u * sum - before + c));
    let exponent = u * sum - before + ERFC[0] - z * z;
    0.5 * t * if exponent > 0.0 { 1.0 } else { exponent.exp_negative() }
}

/// Chebyshev coefficients of ln(erfc(z) e^{z²} / t) over u = 2t − 1, t = 2 / (2 + z); computed with 40 digits.
const ERFC: [f64; 28] = [
    -6.513_268_598_908_547e-1,
    6.419_697_923_564_902e-1,
    1.947_647_320_418_583_6e-2,
    -9.561_514_786_808_632e-3,
    -9.465_953_444_820_37e-4,
    3.668_394_978_527_614_4e-4,
    4.252_332_480_690_778e-5,
    -2.027_857_811_253_424_3e-5,
    -1.624_290_004_647_025_6e-6,
    1.303_655_835_580_523_2e-6,
    1.562_644_172_206_614_2e-8,
    -8.523_809_591_492_655e-8,
    6.529_054_439_098_851e-9,
    5.059_343_495_551_469e-9,
    -9.913_641_564_930_33e-10,
    -2.273_651_222_931_836e-10,
    9.646_791_102_015_526e-11,
    2.394_038_083_039_115e-12,
    -6.886_027_526_497_553e-12,
    8.944_879_273_090_726e-13,
    3.130_921_399_342_958e-13,
    -1.127_082_236_136_725_3e-13,
    3.810_905_255_189_232e-16,
    7.106_097_613_609_237e-15,
    -1.523_028_201_457_104_3e-15,
    -9.457_494_571_291_235e-17,
    1.210_237_189_224_279e-16,
    -2.816_663_087_747_177e-17,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance from the F64 reference in units of the last place of F32.
    fn ulps(got: f32, exact: f64) -> f64 {
        let near = exact as f32;
        let gap = f64::from(near.abs().max(f32::MIN_POSITIVE).next_up()) - f64::from(near.abs().max(f32::MIN_POSITIVE));
        (f64::from(got) - exact).abs() / gap
    }

    fn sweep(from: f32, to: f32, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let steps = 400_000;
        (0..=steps)
            .map(|n| from + (to - from) * (n as f32 / steps as f32))
            .map(|x| ulps(f(x), exact(f64::from(x))))
            .fold(0.0, f64::max)
    }

    #[test]
    fn exponentials_are_good_to_two_ulp() {
        let exp = sweep(-87.0, 0.0, f32::exp_negative, f64::exp);
        let expm1 = sweep(-20.0, 0.0, f32::exp_m1_negative, f64::exp_m1);
        let tiny = sweep(-1e-3, 0.0, f32::exp_m1_negative, f64::exp_m1);
        assert!(exp <= 2.0 && expm1 <= 2.0 && tiny <= 2.0, "{exp} {expm1} {tiny}");
        for n in 0..=74_000 {
            let x = -f64::from(n) / 100.0;
            let exact = x.exp();
            assert!((x.exp_negative() - exact).abs() <= 4e-16 * exact.max(f64::MIN_POSITIVE), "{x}");
            assert!((x.exp_m1_negative() - x.exp_m1()).abs() <= 4e-16 * x.exp_m1().abs(), "{x}");
        }
    }

    #[test]
    fn exponentials_underflow_gradually_and_keep_nan() {
        assert_eq!((-100.0_f32).exp_negative(), (-100.0_f64).exp() as f32);
        assert_eq!(f32::MIN.exp_negative(), 0.0);
        assert_eq!(f32::NEG_INFINITY.exp_m1_negative(), -1.0);
        assert!(f32::NAN.exp_negative().is_nan() && f64::NAN.exp_m1_negative().is_nan());
    }

    #[test]
    fn log1p_is_good_to_two_ulp() {
        let all = sweep(0.0, 1.0, f32::ln_1p_unit, f64::ln_1p);
        let tiny = sweep(0.0, 1e-5, f32::ln_1p_unit, f64::ln_1p);
        assert!(all <= 2.0 && tiny <= 2.0, "{all} {tiny}");
        for n in 0..=10_000 {
            let u = f64::from(n) / 10_000.0;
            assert!((u.ln_1p_unit() - u.ln_1p()).abs() <= 4e-16 * u.ln_1p(), "{u}");
        }
    }

    #[test]
    fn sines_are_good_to_one_ulp_in_every_quarter() {
        for quarters in 0..4 {
            let exact = |x: f64| x.sin_anywhere(quarters);
            let near = sweep(-20.0, 20.0, |x| x.sin_within(quarters), exact);
            let far = sweep(-1e6, 1e6, |x| x.sin_within(quarters), exact);
            println!("{quarters}: {near} {far}");
            assert!(near <= 1.0 && far <= 1.0, "{quarters}: {near} {far}");
        }
    }

    #[test]
    fn the_normal_tail_and_density_match_known_values() {
        // mpmath: erfc(z / sqrt(2)) / 2
        for (z, exact) in [
            (0.0, 0.5),
            (0.5, 0.308_537_538_725_986_9),
            (1.0, 0.158_655_253_931_457_05),
            (3.0, 1.349_898_031_630_094_6e-3),
            (10.0, 7.619_853_024_160_527e-24),
        ] {
            let (tail, density) = (f64::times_normal_tail(2.0, z), z.normal_density());
            assert!((tail / exact / 2.0 - 1.0).abs() < 3e-14, "{z}: {tail}");
            let (tail, density_in_f32) = (f32::times_normal_tail(2.0, z as f32), (z as f32).normal_density());
            assert!(ulps(tail, 2.0 * exact) < 3.0, "{z}: {tail}");
            assert!(ulps(density_in_f32, density) < 3.0, "{z}: {density_in_f32}");
        }
    }
}
