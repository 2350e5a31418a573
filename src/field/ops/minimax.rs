//! What F32 calculates by minimax approximations, relative errors below 2⁻²⁴; F64 uses series in their place.
//!
//! Fitted with 50 digits; all but those that alternate have positive coefficients, so that sums lose nothing.
//! Polynomials are made with fused products: the same bits on every CPU, slow on one that lacks the instruction.

/// F32, one number or several at a time.
pub(super) trait Number: Copy {
    /// The number, as many times as these are.
    fn like(self, number: f32) -> Self;
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn over(self, other: Self) -> Self;
    /// self · a + b, rounded once.
    fn fused(self, a: Self, b: Self) -> Self;
    /// The lesser of it and a bound; a NaN stays what it is.
    fn at_most(self, bound: Self) -> Self;
    fn magnitude(self) -> Self;
    fn with_sign_of(self, other: Self) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn like(self, number: f32) -> Self {
        number
    }
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self + other
    }
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self * other
    }
    #[inline(always)]
    fn over(self, other: Self) -> Self {
        self / other
    }
    #[inline(always)]
    fn fused(self, a: Self, b: Self) -> Self {
        self.mul_add(a, b)
    }
    #[inline(always)]
    fn at_most(self, bound: Self) -> Self {
        if self > bound { bound } else { self }
    }
    #[inline(always)]
    fn magnitude(self) -> Self {
        self.abs()
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        self.copysign(other)
    }
}

/// c₀ + c₁ x + c₂ x² + …
#[inline(always)]
fn polynomial<V: Number, const N: usize>(x: V, coefficients: [f32; N]) -> V {
    let coefficients = coefficients.map(|c| x.like(c));
    coefficients.into_iter().rev().reduce(|sum, c| sum.fused(x, c)).unwrap_or(x.like(0.0))
}

/// tanh x = 2 n d / (d² + n²), where n / d = x P(x²) / Q(x²) is tanh(x / 2), for |x| ≤ 9, where it becomes 1.
///
/// The form damps what n and d have lost to rounding. P(0) is 1.75, not 1, because numbers just above a power of two
/// lose most. Of all F32 the worst is 3.3 ulp off.
#[inline(always)]
pub(super) fn tanh<V: Number>(x: V) -> V {
    const END: f32 = 9.0;
    const P: [f32; 3] = [1.75, 5.209_635_2e-2, 1.997_909_2e-4];
    const Q: [f32; 4] = [3.5, 0.395_859_2, 4.221_330_4e-3, 4.295_832e-6];
    let size = x.magnitude().at_most(x.like(END));
    let square = size.times(size);
    let n = size.times(polynomial(square, P));
    let d = polynomial(square, Q);
    let product = n.times(d);
    let y = product.plus(product).over(d.fused(d, n.times(n)));
    y.at_most(x.like(1.0)).with_sign_of(x)
}

/// ln cosh x for 0 ≤ x² = `square` ≤ 1.
#[inline(always)]
pub(super) fn log_cosh_unit(square: f32) -> f32 {
    const P: [f32; 7] =
        [0.5, -8.333_299e-2, 2.221_658_7e-2, -6.710_485_4e-3, 2.077_436_6e-3, -5.563_058e-4, 8.659_814e-5];
    square * polynomial(square, P)
}

/// ½ erfc(z / √2) / e^(−z²/2) = Q(z) / (√(2π) z Q(z) + P(z)) for 0 ≤ z ≤ 15.
///
/// Where z is large, what Q has lost to rounding cancels. As in [`tanh`], P and Q do not begin at a power of two.
#[inline(always)]
pub(super) fn scaled_normal_tail(z: f32) -> f32 {
    const ROOT: f32 = 2.506_628_3;
    const P: [f32; 4] = [3.5, 1.749_112_2, 0.451_323_9, 0.050_773_98];
    const Q: [f32; 5] = [1.75, 1.671_553, 0.747_896_6, 0.179_439_35, 0.020_272_195];
    let q = polynomial(z, Q);
    q / (ROOT * z * q + polynomial(z, P))
}
