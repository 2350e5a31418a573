//! The elementary functions behind the activations, written so that plain loops over them become vector code.
//!
//! No branches, no tables, no calls: every function is a fixed sequence of adds, multiplications, divisions and
//! selections, without fused multiply-adds, so each CPU gives the same bits. exp and expm1 are Taylor polynomials on
//! |r| ≤ ln 2 / 2 after x = k ln 2 + r; log1p is 2 artanh(u / (2 + u)); erfc is a Chebyshev series of
//! ln(erfc(z) e^{z²} / t) in t = 2 / (2 + z).

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
    /// Terms of the erfc series that matter in this precision.
    const ERFC_TERMS: usize;
    /// eˣ is zero here and below, even after multiplication by −x.
    const LOWEST: Self;
    /// Largest |x| for which [`sin_within`](Self::sin_within) holds.
    const TURNS: f64;

    fn of(value: f64) -> Self;
    fn wide(self) -> f64;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    fn copysign(self, sign: Self) -> Self;

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
    /// sin(x + quarters · π/2) for |x| ≤ [`TURNS`](Self::TURNS).
    fn sin_within(self, quarters: u32) -> Self;
    /// sin(x + quarters · π/2) for any x.
    fn sin_anywhere(self, quarters: u32) -> Self;
}

macro_rules! real {
    ($real:ident, $int:ident, $bits:ident, mantissa: $mantissa:literal, bias: $bias:literal, magic: $magic:literal,
     ln2: ($ln2_high:literal, $ln2_low:literal), lowest: $lowest:literal, exp_terms: $exp_terms:literal,
     log_terms: $log_terms:literal, erfc_terms: $erfc_terms:literal, turns: $turns:literal) => {
        impl Real for $real {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const ERFC_TERMS: usize = $erfc_terms;
            const LOWEST: Self = $lowest;
            const TURNS: f64 = $turns;

            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $real
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self)
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
            fn copysign(self, sign: Self) -> Self {
                $real::copysign(self, sign)
            }

            #[inline(always)]
            fn times_exp_negative(factor: Self, x: Self) -> Self {
                let (p, a, b) = x.exp_parts();
                // Two powers of two, so that a subnormal result is rounded once, at the end.
                factor * (1.0 + p) * a * b
            }
            #[inline(always)]
            fn exp_m1_negative(self) -> Self {
                let (p, a, b) = self.exp_parts();
                let scale = a * b;
                p * scale + (scale - 1.0)
            }
            #[inline(always)]
            fn ln_1p_unit(self) -> Self {
                let s = self / (2.0 + self);
                let square = s * s;
                let mut sum = 0.0;
                let mut n = $log_terms;
                while n > 0 {
                    sum = (sum + 1.0 / (2 * n + 1) as $real) * square;
                    n -= 1;
                }
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
        }

        impl Exponential for $real {
            #[inline(always)]
            fn exp_parts(self) -> (Self, Self, Self) {
                /// 1 / n! for n = 2, 3, …
                const COEFFICIENTS: [$real; $exp_terms] = {
                    let mut table = [0.0; $exp_terms];
                    let (mut n, mut factorial) = (0, 1.0_f64);
                    while n < $exp_terms {
                        factorial *= (n + 2) as f64;
                        table[n] = (1.0 / factorial) as $real;
                        n += 1;
                    }
                    table
                };
                let power = |k: $int| $real::from_bits((k.wrapping_add($bias) as $bits) << $mantissa);
                // A NaN passes this selection.
                let x = if self < $lowest { $lowest } else { self };
                // Adding 1.5 · 2^mantissa rounds to an integer and leaves it in the low bits.
                let shifted = x * std::f64::consts::LOG2_E as $real + $magic;
                let rounded = shifted - $magic;
                let k = (shifted.to_bits() as $int).wrapping_sub(($magic as $real).to_bits() as $int);
                let r = x - rounded * $ln2_high - rounded * $ln2_low;
                let mut tail = 0.0;
                let mut n = $exp_terms;
                while n > 0 {
                    n -= 1;
                    tail = tail * r + COEFFICIENTS[n];
                }
                let half = k >> 1;
                (r + r * r * tail, power(half), power(k.wrapping_sub(half)))
            }
        }
    };
}

/// The reduction x = k ln 2 + r.
trait Exponential: Sized {
    /// (p, a, b) with eˣ = (1 + p) a b, a and b powers of two.
    fn exp_parts(self) -> (Self, Self, Self);
}

real!(f32, i32, u32, mantissa: 23, bias: 127, magic: 12_582_912.0,
      ln2: (0.693_359_4, -2.121_944_4e-4), lowest: -125.0, exp_terms: 7, log_terms: 8, erfc_terms: 16,
      turns: 1e6);
real!(f64, i64, u64, mantissa: 52, bias: 1023, magic: 6_755_399_441_055_744.0,
      ln2: (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10), lowest: -800.0, exp_terms: 13, log_terms: 17,
      erfc_terms: 28, turns: 0.0);

/// ln 2 for the activations that need it.
pub(super) const LN_2: f64 = std::f64::consts::LN_2;

/// sin(x + quarters · π/2) in F64 arithmetic, good to 1e-11 for |x| ≤ 1e6: what F32 needs.
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
    let mut sum = 0.0;
    let mut n = 7;
    while n > 0 {
        sum = (1.0 + sum) * -square / ((2 * n) * (2 * n + 1)) as f64;
        n -= 1;
    }
    let value = r + r * sum;
    // Each half turn changes the sign; so do two quarters.
    let flips = shifted.to_bits() ^ u64::from(quarters / 2);
    f64::from_bits(value.to_bits() ^ (flips << 63))
}

/// The upper tail of the normal distribution, ½ erfc(z / √2), for z ≥ 0, to the precision of `R`.
#[inline(always)]
pub(super) fn normal_tail<R: Real>(z: f64) -> f64 {
    let z = z * std::f64::consts::FRAC_1_SQRT_2;
    let t = 2.0 / (2.0 + z);
    let u = 2.0 * t - 1.0;
    let (mut before, mut sum) = (0.0, 0.0);
    let mut n = R::ERFC_TERMS - 1;
    while n > 0 {
        (before, sum) = (sum, 2.0 * u * sum - before + ERFC[n]);
        n -= 1;
    }
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
    fn the_normal_tail_matches_known_values() {
        // mpmath: erfc(z / sqrt(2)) / 2
        for (z, exact) in [
            (0.0, 0.5),
            (0.5, 0.308_537_538_725_986_9),
            (1.0, 0.158_655_253_931_457_05),
            (3.0, 1.349_898_031_630_094_6e-3),
            (10.0, 7.619_853_024_160_527e-24),
        ] {
            assert!((normal_tail::<f64>(z) / exact - 1.0).abs() < 3e-14, "{z}: {}", normal_tail::<f64>(z));
            assert!((normal_tail::<f32>(z) / exact - 1.0).abs() < 3e-9, "{z}: {}", normal_tail::<f32>(z));
        }
    }
}
