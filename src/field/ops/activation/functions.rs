//! The scalar functions with their first and second derivatives, finite wherever the mathematics is.

use super::super::real::{LN_2, Real};

/// A scalar function that is differentiated twice.
pub(super) trait Function: Copy + Send + Sync + 'static {
    /// `Some(quarters)` if the function is sin(x + quarters · π/2), whose fast form holds for moderate x only.
    const SINE: Option<u32> = None;

    fn value<R: Real>(self, x: R) -> R;
    fn slope<R: Real>(self, x: R) -> R;
    fn curvature<R: Real>(self, x: R) -> R;

    /// f′(x) from what [`Activation::keeps`](super::Activation::keeps) says: y = f(x), or x itself.
    #[inline(always)]
    fn slope_of_kept<R: Real>(self, kept: R) -> R {
        self.slope(kept)
    }

    /// f″(x) from the same.
    #[inline(always)]
    fn curvature_of_kept<R: Real>(self, kept: R) -> R {
        self.curvature(kept)
    }

    /// The derivative of order 0, 1 or 2.
    #[inline(always)]
    fn order<R: Real, const ORDER: u32>(self, x: R) -> R {
        match ORDER {
            0 => self.value(x),
            1 => self.slope(x),
            _ => self.curvature(x),
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Tanh;

impl Function for Tanh {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        x.tanh()
    }
    /// sech² x = 4 e / (1 + e)², e = exp(−2|x|)
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        let e = (x.abs() * R::of(-2.0)).exp_negative();
        let d = R::ONE + e;
        R::of(4.0) * e / (d * d)
    }
    /// 1 − y²
    #[inline(always)]
    fn slope_of_kept<R: Real>(self, y: R) -> R {
        (R::ONE - y) * (R::ONE + y)
    }
    /// −2 y (1 − y²)
    #[inline(always)]
    fn curvature_of_kept<R: Real>(self, y: R) -> R {
        R::of(-2.0) * y * self.slope_of_kept(y)
    }
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        R::of(-2.0) * self.value(x) * self.slope(x)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Sigmoid;

impl Function for Sigmoid {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let e = (-x.abs()).exp_negative();
        let top = if x < R::ZERO { e } else { R::ONE };
        top / (R::ONE + e)
    }
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        let e = (-x.abs()).exp_negative();
        let d = R::ONE + e;
        e / (d * d)
    }
    /// y (1 − y)
    #[inline(always)]
    fn slope_of_kept<R: Real>(self, y: R) -> R {
        y * (R::ONE - y)
    }
    /// y (1 − y) (1 − 2 y)
    #[inline(always)]
    fn curvature_of_kept<R: Real>(self, y: R) -> R {
        self.slope_of_kept(y) * (R::ONE - R::of(2.0) * y)
    }
    /// s (1 − s) (1 − 2 s), where 1 − 2 s = −tanh(x / 2)
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        -self.slope(x) * Tanh.value(R::of(0.5) * x)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Softplus;

impl Function for Softplus {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        Relu.value(x) + (-x.abs()).exp_negative().ln_1p_unit()
    }
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        Sigmoid.value(x)
    }
    /// 1 − e⁻ʸ
    #[inline(always)]
    fn slope_of_kept<R: Real>(self, y: R) -> R {
        -(-y).exp_m1_negative()
    }
    /// (1 − e⁻ʸ) e⁻ʸ
    #[inline(always)]
    fn curvature_of_kept<R: Real>(self, y: R) -> R {
        let less = (-y).exp_m1_negative();
        -less * (R::ONE + less)
    }
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        Sigmoid.slope(x)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let size = -x.abs();
        let below = if x < R::LOWEST { R::LOWEST } else { x };
        let top = if x < R::ZERO { R::times_exp_negative(below, size) } else { x };
        top / (R::ONE + size.exp_negative())
    }
    /// s (1 + x (1 − s))
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        Sigmoid.value(x) * (R::ONE + x * Sigmoid.value(-x))
    }
    /// s (1 − s) (2 + x (1 − 2 s))
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        Sigmoid.slope(x) * (R::of(2.0) - x * Tanh.value(R::of(0.5) * x))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Gelu;

impl Function for Gelu {
    /// x Φ(x)
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        // Below, Φ is zero, and zero times infinity would not be.
        let below = if x < R::LOWEST { R::LOWEST } else { x };
        let tail = R::times_normal_tail(if x < R::ZERO { below } else { R::ONE }, x.abs());
        if x < R::ZERO { tail } else { x * (R::ONE - tail) }
    }
    /// Φ(x) + x φ(x), which is 1 less its value at −x.
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        let size = if x.abs() > -R::LOWEST { -R::LOWEST } else { x.abs() };
        let below = R::times_normal_tail(R::ONE, size) - size * size.normal_density();
        if x < R::ZERO { below } else { R::ONE - below }
    }
    /// φ(x) (2 − x²)
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        let square = x * x;
        // Beyond, the density is zero, and zero times an overflown square would not be.
        let square = if square > R::of(1e4) { R::of(1e4) } else { square };
        x.abs().normal_density() * (R::of(2.0) - square)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Relu;

impl Function for Relu {
    /// A NaN stays one.
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        if x < R::ZERO { R::ZERO } else { x }
    }
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        if x > R::ZERO { R::ONE } else { R::ZERO }
    }
    #[inline(always)]
    fn curvature<R: Real>(self, _: R) -> R {
        R::ZERO
    }
}

#[derive(Clone, Copy)]
pub(super) struct Elu(pub(super) f64);

impl Function for Elu {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let below = if x > R::ZERO { R::ZERO } else { x };
        let curve = R::of(self.0) * below.exp_m1_negative();
        if x > R::ZERO { x } else { curve }
    }
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        let below = if x > R::ZERO { R::ZERO } else { x };
        let curve = R::of(self.0) * below.exp_negative();
        if x > R::ZERO { R::ONE } else { curve }
    }
    /// y + α where y ≤ 0; for α ≥ 0, that is where x ≤ 0. For α < 0, x is kept.
    #[inline(always)]
    fn slope_of_kept<R: Real>(self, kept: R) -> R {
        let alpha = R::of(self.0);
        if self.0 < 0.0 {
            self.slope(kept)
        } else if kept > R::ZERO {
            R::ONE
        } else {
            kept + alpha
        }
    }
    /// As f′ where that is not 1.
    #[inline(always)]
    fn curvature_of_kept<R: Real>(self, kept: R) -> R {
        if kept > R::ZERO { R::ZERO } else { self.slope_of_kept(kept) }
    }
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        let below = if x > R::ZERO { R::ZERO } else { x };
        let curve = R::of(self.0) * below.exp_negative();
        if x > R::ZERO { R::ZERO } else { curve }
    }
}

/// sin(x + `QUARTERS` · π/2)
#[derive(Clone, Copy)]
pub(super) struct Sine<const QUARTERS: u32>;

impl<const QUARTERS: u32> Function for Sine<QUARTERS> {
    const SINE: Option<u32> = Some(QUARTERS);

    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        x.sin_within(QUARTERS)
    }
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        x.sin_within(QUARTERS + 1)
    }
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        x.sin_within(QUARTERS + 2)
    }
}

#[derive(Clone, Copy)]
pub(super) struct LogCosh;

impl Function for LogCosh {
    /// |x| + ln(1 + exp(−2|x|)) − ln 2 for |x| ≥ 1.
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let size = x.abs();
        let near = (if size < R::ONE { size * size } else { R::ONE }).log_cosh_unit();
        let e = (-size).exp_negative();
        let far = size - R::of(LN_2) + (e * e).ln_1p_unit();
        if size < R::ONE { near } else { far }
    }
    #[inline(always)]
    fn slope<R: Real>(self, x: R) -> R {
        Tanh.value(x)
    }
    #[inline(always)]
    fn curvature<R: Real>(self, x: R) -> R {
        Tanh.slope(x)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Identity;

impl Function for Identity {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        x
    }
    #[inline(always)]
    fn slope<R: Real>(self, _: R) -> R {
        R::ONE
    }
    #[inline(always)]
    fn curvature<R: Real>(self, _: R) -> R {
        R::ZERO
    }
}

/// Runs `$body` with `$f` standing for the [`Function`] of `$activation`.
macro_rules! with_function {
    ($activation:expr, $f:ident => $body:expr) => {{
        use crate::field::ops::activation::{Activation, functions};
        match $activation {
            Activation::Tanh => with_function!(functions::Tanh, $f, $body),
            Activation::Sigmoid => with_function!(functions::Sigmoid, $f, $body),
            Activation::Softplus => with_function!(functions::Softplus, $f, $body),
            Activation::Silu => with_function!(functions::Silu, $f, $body),
            Activation::Gelu => with_function!(functions::Gelu, $f, $body),
            Activation::Relu => with_function!(functions::Relu, $f, $body),
            Activation::Elu(alpha) => with_function!(functions::Elu(alpha), $f, $body),
            Activation::Sin => with_function!(functions::Sine::<0>, $f, $body),
            Activation::Cos => with_function!(functions::Sine::<1>, $f, $body),
            Activation::LogCosh => with_function!(functions::LogCosh, $f, $body),
            Activation::Identity => with_function!(functions::Identity, $f, $body),
        }
    }};
    ($function:expr, $f:ident, $body:expr) => {{
        let $f = $function;
        $body
    }};
}
pub(super) use with_function;
