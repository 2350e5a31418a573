//! Activations on slices in place, for kernels that hold tiles: the same functions and the same bits as the ops.

use super::functions::{Function, with_function};
use super::{Activation, beyond_turns};
use crate::field::ops::cpu::{CHUNK, Kernel, vectorised};
use crate::field::ops::kernel::Held;
use crate::field::ops::real::Real;

/// What a pullback needs of an activation's forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// Nothing: f′ is 1.
    Nothing,
    /// y = f(x)
    Value,
    /// x
    Input,
}

impl Activation {
    /// What [`slope_in_place`](Self::slope_in_place) is to be given.
    pub(crate) fn keeps(self) -> Keeps {
        match self {
            Self::Identity => Keeps::Nothing,
            Self::Tanh | Self::Sigmoid | Self::Softplus | Self::Relu => Keeps::Value,
            Self::Elu(alpha) if alpha >= 0.0 => Keeps::Value,
            Self::Elu(_) | Self::Silu | Self::Gelu | Self::Sin | Self::Cos | Self::LogCosh => Keeps::Input,
        }
    }

    /// x ← f(x)
    pub(in crate::field::ops) fn value_in_place<R: Real>(self, x: &mut [R]) {
        if self != Self::Identity {
            with_function!(self, f => vectorised(InPlace::<_, _, 0> { x, f }));
        }
    }

    /// x ← f(x) for what tiles hold, rounded once.
    pub(crate) fn value_of_held<T: Held>(self, x: &mut [T]) {
        if self != Self::Identity {
            with_function!(self, f => vectorised(OfHeld { x, f }));
        }
    }

    /// out ← out f′, f′ from what [`keeps`](Self::keeps) says; as many of both.
    pub(crate) fn times_slope<T: Held>(self, kept: &[T], out: &mut [T]) {
        with_function!(self, f => vectorised(TimesSlope { kept, out, f }));
    }

    /// f′(x) in place of what [`keeps`](Self::keeps) says: of y = f(x), or of x.
    pub(in crate::field::ops) fn slope_in_place<R: Real>(self, kept: &mut [R]) {
        with_function!(self, f => vectorised(InPlace::<_, _, 1> { x: kept, f }));
    }

    /// f″(x) in place of what [`keeps`](Self::keeps) says.
    pub(in crate::field::ops) fn curvature_in_place<R: Real>(self, kept: &mut [R]) {
        with_function!(self, f => vectorised(InPlace::<_, _, 2> { x: kept, f }));
    }
}

/// x ← f(x), or the derivative of that order in place of what is kept.
struct InPlace<'a, R, F, const ORDER: u32> {
    x: &'a mut [R],
    f: F,
}

impl<R: Real, F: Function, const ORDER: u32> InPlace<'_, R, F, ORDER> {
    #[inline(always)]
    fn apply(f: F, x: &mut [R]) {
        for x in x {
            *x = match ORDER {
                0 => f.value(*x),
                1 => f.slope_of_kept(*x),
                _ => f.curvature_of_kept(*x),
            };
        }
    }
}

impl<R: Real, F: Function, const ORDER: u32> Kernel for InPlace<'_, R, F, ORDER> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Some(quarters) = F::SINE else { return Self::apply(self.f, self.x) };
        let mut before = [R::ZERO; CHUNK];
        for x in self.x.chunks_mut(CHUNK) {
            let before = &mut before[..x.len()];
            before.copy_from_slice(x);
            Self::apply(self.f, x);
            beyond_turns(before, x, quarters + ORDER);
        }
    }
}

/// x ← f(x)
struct OfHeld<'a, T, F> {
    x: &'a mut [T],
    f: F,
}

impl<T: Held, F: Function> Kernel for OfHeld<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut wide = [0.0; CHUNK];
        for x in self.x.chunks_mut(CHUNK) {
            let wide = &mut wide[..x.len()];
            wide.iter_mut().zip(&*x).for_each(|(wide, x)| *wide = x.wide());
            InPlace::<_, _, 0> { x: wide, f: self.f }.run();
            x.iter_mut().zip(wide).for_each(|(x, wide)| *x = T::of(*wide));
        }
    }
}

/// out ← out f′
struct TimesSlope<'a, T, F> {
    kept: &'a [T],
    out: &'a mut [T],
    f: F,
}

impl<T: Held, F: Function> Kernel for TimesSlope<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { kept, out, f } = self;
        let times = |out: &mut T, slope: f32| *out = T::of(out.wide() * slope);
        if F::SINE.is_none() {
            return out.iter_mut().zip(kept).for_each(|(out, kept)| times(out, f.slope_of_kept(kept.wide())));
        }
        let mut slopes = [0.0; CHUNK];
        for (out, kept) in out.chunks_mut(CHUNK).zip(kept.chunks(CHUNK)) {
            let slopes = &mut slopes[..kept.len()];
            slopes.iter_mut().zip(kept).for_each(|(slope, kept)| *slope = kept.wide());
            InPlace::<_, _, 1> { x: slopes, f }.run();
            out.iter_mut().zip(&*slopes).for_each(|(out, slope)| times(out, *slope));
        }
    }
}
