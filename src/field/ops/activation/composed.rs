//! The activations as compositions of Candle's ops, for devices without kernels of ours: the same formulas, in F32
//! (F64 for F64), outside any graph.

use super::super::cpu::wide_dtype;
use super::Activation;
use crate::field::ops::cpu::not_float;
use candle_core::{DType, Result, Tensor};
use std::f64::consts::{FRAC_2_SQRT_PI, LN_2, SQRT_2};

/// f⁽ⁿ⁾(x), times the tensors of `by`, in the dtype of `x`.
pub(super) fn scaled(activation: Activation, order: u32, x: &Tensor, by: &[&Tensor]) -> Result<Tensor> {
    if !matches!(x.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(not_float(activation.label(), x.dtype()));
    }
    let wide = x.detach().to_dtype(wide_dtype(x.dtype()))?;
    let mut y = match order {
        0 => value(activation, &wide)?,
        1 => slope(activation, &wide)?,
        _ => curvature(activation, &wide)?,
    };
    for factor in by {
        y = (y * factor.detach().to_dtype(wide.dtype())?)?;
    }
    y.to_dtype(x.dtype())
}

fn value(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Tanh => {
            let m = exp_m1(&(x.abs()? * -2.0)?)?;
            let size = (m.neg()? / (m + 2.0)?)?;
            x.lt(0.0)?.where_cond(&size.neg()?, &size)
        }
        Activation::Sigmoid => {
            let e = exp_minus_abs(x, 1.0)?;
            x.lt(0.0)?.where_cond(&e, &e.ones_like()?)? / (e + 1.0)?
        }
        Activation::Softplus => x.relu()? + ln_1p(&exp_minus_abs(x, 1.0)?)?,
        Activation::Silu => x * value(Activation::Sigmoid, x)?,
        Activation::Gelu => x * distribution(x)?,
        Activation::Relu => x.relu(),
        Activation::Elu(alpha) => x.gt(0.0)?.where_cond(x, &(exp_m1(&below(x)?)? * alpha)?),
        Activation::Sin => x.sin(),
        Activation::Cos => x.cos(),
        Activation::LogCosh => (x.abs()? + ln_1p(&exp_minus_abs(x, 2.0)?)?)? - LN_2,
        Activation::Identity => Ok(x.clone()),
    }
}

fn slope(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Tanh => bell(x, 2.0)? * 4.0,
        Activation::Sigmoid => bell(x, 1.0),
        Activation::Softplus => value(Activation::Sigmoid, x),
        Activation::Silu => {
            let rising = ((x * value(Activation::Sigmoid, &x.neg()?)?)? + 1.0)?;
            value(Activation::Sigmoid, x)? * rising
        }
        Activation::Gelu => distribution(x)? + (x * density(x)?)?,
        Activation::Relu => x.gt(0.0)?.to_dtype(x.dtype()),
        Activation::Elu(alpha) => x.gt(0.0)?.where_cond(&x.ones_like()?, &(below(x)?.exp()? * alpha)?),
        Activation::Sin => x.cos(),
        Activation::Cos => x.sin()?.neg(),
        Activation::LogCosh => value(Activation::Tanh, x),
        Activation::Identity => x.ones_like(),
    }
}

fn curvature(activation: Activation, x: &Tensor) -> Result<Tensor> {
    let tanh_half = |x: &Tensor| value(Activation::Tanh, &(x * 0.5)?);
    match activation {
        Activation::Tanh => (value(Activation::Tanh, x)? * slope(Activation::Tanh, x)?)? * -2.0,
        Activation::Sigmoid => (bell(x, 1.0)? * tanh_half(x)?)?.neg(),
        Activation::Softplus => bell(x, 1.0),
        Activation::Silu => bell(x, 1.0)? * ((x * tanh_half(x)?)?.neg()? + 2.0)?,
        Activation::Gelu => density(x)? * (x.sqr()?.minimum(1e4)?.neg()? + 2.0)?,
        Activation::Relu | Activation::Identity => x.zeros_like(),
        Activation::Elu(alpha) => x.gt(0.0)?.where_cond(&x.zeros_like()?, &(below(x)?.exp()? * alpha)?),
        Activation::Sin => x.sin()?.neg(),
        Activation::Cos => x.cos()?.neg(),
        Activation::LogCosh => slope(Activation::Tanh, x),
    }
}

/// exp(−a |x|)
fn exp_minus_abs(x: &Tensor, a: f64) -> Result<Tensor> {
    (x.abs()? * -a)?.exp()
}

/// e / (1 + e)², e = exp(−a |x|)
fn bell(x: &Tensor, a: f64) -> Result<Tensor> {
    let e = exp_minus_abs(x, a)?;
    let d = (&e + 1.0)?;
    e / d.sqr()?
}

/// min(x, 0)
fn below(x: &Tensor) -> Result<Tensor> {
    x.minimum(0.0)
}

/// Φ(x)
fn distribution(x: &Tensor) -> Result<Tensor> {
    (((x / SQRT_2)?.erf()? + 1.0)? * 0.5)?.maximum(0.0)
}

/// φ(x)
fn density(x: &Tensor) -> Result<Tensor> {
    (x.sqr()? * -0.5)?.exp()? * (0.25 * SQRT_2 * FRAC_2_SQRT_PI)
}

/// ln(1 + e) for 0 ≤ e ≤ 1, right for small e as well: ln(u) e / (u − 1) with the rounded u = 1 + e.
fn ln_1p(e: &Tensor) -> Result<Tensor> {
    let u = (e + 1.0)?;
    let ratio = (e / (&u - 1.0)?)?;
    u.eq(1.0)?.where_cond(e, &(u.log()? * ratio)?)
}

/// eˣ − 1 for x ≤ 0, right for small x as well: (u − 1) x / ln(u) with the rounded u = eˣ.
fn exp_m1(x: &Tensor) -> Result<Tensor> {
    let u = x.exp()?;
    let below = (&u - 1.0)?;
    let ratio = (x / u.log()?)?;
    let near = u.eq(1.0)?.where_cond(x, &(&below * ratio)?)?;
    // Where u has underflowed, ln(u) is no longer x.
    u.lt(1e-6)?.where_cond(&below, &near)
}
