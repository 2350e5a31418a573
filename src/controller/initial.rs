//! The first step to try, from the sizes of y, of f and of f's change along an Euler step.
//!
//! d₀ = ‖y₀‖, d₁ = ‖f(t₀, y₀)‖ in the norm of scaled errors; h₀ = d₀/(100 d₁); with f₁ = f(t₀ + h₀, y₀ + h₀ f₀),
//! d₂ = ‖f₁ − f₀‖/h₀ and h₁ = (1/(100 max(d₁, d₂)))^(1/k), k the order of the estimate plus one, h = min(100 h₀, h₁).
//!
//! # Reference
//! E. Hairer, S. P. Nørsett, G. Wanner, *Solving Ordinary Differential Equations I*, II.4.

use super::Tolerances;
use crate::State;
use crate::error::Result;
use crate::field::Finite;
use crate::field::ops::combine;

/// The length of the first step: positive, from `shortest` to `longest`. `slope` is f(t₀, y₀); `euler` evaluates f
/// after an Euler step of the given length from there. Both in any dtype; `y` is in the accumulate dtype. An f that is
/// not finite gives a short step: what is wrong is found when it is tried.
pub(crate) fn initial_step(
    tolerances: &Tolerances,
    k: f64,
    (shortest, longest): (f64, f64),
    y: &State,
    slope: &State,
    euler: impl FnOnce(f64) -> Result<State>,
) -> Result<f64> {
    let wide = |x: &State| x.try_map(|x| combine::combine(Some(x), &[], y[0].dtype()));
    let size = |x: &State| tolerances.measure(x, y, y, Finite::default());
    let slope = wide(slope)?;
    let (d0, d1) = (size(y)?, size(&slope)?);
    let h0 = if d0 > 1e-5 && d1 > 1e-5 { 0.01 * d0 / d1 } else { SHORT };
    let h0 = h0.max(shortest).min(longest);
    let change = wide(&euler(h0)?)?;
    let pairs = change.tensors().iter().zip(slope.tensors());
    let change = State::from(pairs.map(|(a, b)| a - b).collect::<candle_core::Result<Vec<_>>>()?);
    let d2 = size(&change)? / h0;
    let steepest = d1.max(d2);
    let h1 =
        if steepest.is_nan() || steepest <= 1e-15 { (1e-3 * h0).max(SHORT) } else { (0.01 / steepest).powf(1.0 / k) };
    Ok(h1.min(100.0 * h0).max(shortest).min(longest))
}

/// A step for problems that do not tell their scale.
const SHORT: f64 = 1e-6;
