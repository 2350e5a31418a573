//! Activations: y = f(x) element by element, each one fused op.
//!
//! Any shape, any strides; F16 and BF16 are calculated in F32 and rounded once; every function has its second
//! derivative too, so that tangents made of them can be differentiated with respect to θ. F32 values and
//! [`Activation::derivative`] are within 5 ulp of the exact ones; they do not depend on the CPU, nor on where in the
//! tensor an element lies. Gradients in F32 are made of y where f′ is a function of that: within 3e-7, where |f′| is at
//! most 1.

mod composed;
mod functions;
pub(super) mod in_place;
#[cfg(test)]
mod tests;

use super::chain::{Chain, Linked};
use super::cpu::{CHUNK, Element, Kernel, dense, vectorised, with_element};
use super::precomputed::{Precomputed, hand_over};
use super::real::Real;
use crate::Time;
use crate::field::Tangent;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Module, Result, Shape, Tensor};
use functions::{Function, with_function};
use in_place::Keeps;

/// A scalar function applied to every element.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_ode::ops::Activation;
///
/// let x = Tensor::new(&[-1000.0_f32, 0.0, 1000.0], &Device::Cpu)?;
/// assert_eq!(Activation::Tanh.forward(&x)?.to_vec1::<f32>()?, [-1.0, 0.0, 1.0]);
/// assert_eq!(Activation::Softplus.forward(&x)?.to_vec1::<f32>()?, [0.0, std::f32::consts::LN_2, 1000.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Activation {
    /// tanh x
    #[default]
    Tanh,
    /// 1 / (1 + e⁻ˣ)
    Sigmoid,
    /// ln(1 + eˣ)
    Softplus,
    /// x / (1 + e⁻ˣ), also called swish.
    Silu,
    /// x Φ(x) with the normal distribution Φ: the exact GELU, not its tanh approximation.
    Gelu,
    /// max(x, 0)
    Relu,
    /// x for x > 0, α (eˣ − 1) otherwise.
    Elu(f64),
    /// sin x
    Sin,
    /// cos x
    Cos,
    /// ln cosh x
    LogCosh,
    /// x
    Identity,
}

impl Activation {
    /// f′(x), of the shape and dtype of `x`; itself differentiable once.
    ///
    /// # Errors
    /// Integer tensors; whatever the device reports.
    pub fn derivative(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Identity => x.ones_like(),
            _ => apply(*self, 1, x),
        }
    }

    /// f′(x) · v: the directional derivative; differentiable once in both.
    ///
    /// # Errors
    /// Integer tensors, `v` of another shape or dtype than `x`; whatever the device reports.
    pub fn push(&self, x: &Tensor, v: &Tensor) -> Result<Tensor> {
        match self {
            Self::Identity => Ok(v.clone()),
            _ => {
                let scale = Scale { activation: *self, order: 1, ready: scaled_off_cpu(*self, 1, x, &[v])? };
                x.apply_op2(v, scale)
            }
        }
    }
}

impl Linked for Activation {
    fn link(&self, _: Option<&Time>, _: &Tensor, chain: &mut Chain) -> bool {
        chain.activation(*self)
    }

    fn value(&self, _: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        self.forward(x)
    }
}

impl Module for Activation {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Identity => Ok(x.clone()),
            _ => apply(*self, 0, x),
        }
    }
}

impl Tangent for Activation {
    fn tangent(&self, _: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.forward(y)?, self.push(y, v)?))
    }
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident($($parameter:ident)?) => $activation:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// Integer tensors; whatever the device reports.
        pub fn $name(x: &Tensor $(, $parameter: f64)?) -> Result<Tensor> {
            $activation.forward(x)
        }
    )*};
}

functions! {
    /// tanh x; see [`Activation::Tanh`].
    tanh() => Activation::Tanh;
    /// 1 / (1 + e⁻ˣ); see [`Activation::Sigmoid`].
    sigmoid() => Activation::Sigmoid;
    /// ln(1 + eˣ); see [`Activation::Softplus`].
    softplus() => Activation::Softplus;
    /// x / (1 + e⁻ˣ); see [`Activation::Silu`].
    silu() => Activation::Silu;
    /// x Φ(x); see [`Activation::Gelu`].
    gelu() => Activation::Gelu;
    /// max(x, 0); see [`Activation::Relu`].
    relu() => Activation::Relu;
    /// x for x > 0, α (eˣ − 1) otherwise; see [`Activation::Elu`].
    elu(alpha) => Activation::Elu(alpha);
    /// sin x; see [`Activation::Sin`].
    sin() => Activation::Sin;
    /// cos x; see [`Activation::Cos`].
    cos() => Activation::Cos;
    /// ln cosh x; see [`Activation::LogCosh`].
    log_cosh() => Activation::LogCosh;
}

/// x ↦ f⁽ⁿ⁾(x)
struct Apply {
    activation: Activation,
    order: u32,
    ready: Precomputed,
}

/// (x, v) ↦ f⁽ⁿ⁾(x) · v: the pullback of [`Apply`] for n one less, and the tangent.
struct Scale {
    activation: Activation,
    order: u32,
    ready: Precomputed,
}

fn apply(activation: Activation, order: u32, x: &Tensor) -> Result<Tensor> {
    let ready = scaled_off_cpu(activation, order, x, &[])?;
    x.apply_op1(Apply { activation, order, ready })
}

fn scaled_off_cpu(activation: Activation, order: u32, x: &Tensor, by: &[&Tensor]) -> Result<Precomputed> {
    #[cfg(feature = "cuda")]
    if let Some(value) = super::cuda::scaled(activation, order, x, by)? {
        return Ok(Precomputed::on_device(value));
    }
    Precomputed::off_cpu(x, || composed::scaled(activation, order, x, by))
}

/// f⁽ⁿ⁾(x) times up to two tensors, outside any graph.
fn scaled(activation: Activation, order: u32, x: &Tensor, by: &[&Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(value) = super::cuda::scaled(activation, order, x, by)? {
        return Ok(value.tensor());
    }
    if !x.device().is_cpu() {
        return composed::scaled(activation, order, x, by);
    }
    let once = Once { activation, order };
    match by {
        [v] => x.apply_op2_no_bwd(v, &once),
        [v, w] => x.apply_op3_no_bwd(v, w, &once),
        _ => x.apply_op1_no_bwd(&Apply { activation, order, ready: Precomputed::default() }),
    }
}

impl Apply {
    fn label(&self) -> &'static str {
        self.activation.label()
    }
}

impl CustomOp1 for Apply {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(self.activation, self.order, (x, layout), &[])
    }

    hand_over!(ready, 1);

    fn bwd(&self, x: &Tensor, value: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let order = differentiated(self.label(), self.order)?;
        let of_value = self.order == 0 && self.activation.keeps() == Keeps::Value;
        if of_value && x.dtype() == DType::F32 && x.device().is_cpu() {
            // In F32 f′ is made of y = f(x) without another exponential.
            return value.apply_op2_no_bwd(grad, &OfValue(self.activation)).map(Some);
        }
        Ok(Some(scaled(self.activation, order, x, &[grad])?))
    }
}

/// (y, g) ↦ f′ g, f′ of y = f(x).
struct OfValue(Activation);

impl CustomOp2 for OfValue {
    fn name(&self) -> &'static str {
        self.0.label()
    }

    fn cpu_fwd(&self, y: &CpuStorage, ly: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let (y, mut g) = (dense::<f32>(y, ly)?, dense::<f32>(g, lg)?.into_owned());
        self.0.times_slope(&y, &mut g);
        Ok((CpuStorage::F32(g), ly.shape().clone()))
    }
}

impl Scale {
    fn label(&self) -> &'static str {
        self.activation.label()
    }
}

impl CustomOp2 for Scale {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, v: &CpuStorage, lv: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(self.activation, self.order, (x, lx), &[(v, lv)])
    }

    hand_over!(ready, 2);

    fn bwd(&self, x: &Tensor, v: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let order = differentiated(self.label(), self.order)?;
        let for_x = x.track_op().then(|| scaled(self.activation, order, x, &[v, grad])).transpose()?;
        let for_v = v.track_op().then(|| scaled(self.activation, self.order, x, &[grad])).transpose()?;
        Ok((for_x, for_v))
    }
}

/// The kernels outside any graph.
struct Once {
    activation: Activation,
    order: u32,
}

impl CustomOp2 for Once {
    fn name(&self) -> &'static str {
        self.activation.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, v: &CpuStorage, lv: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu(self.activation, self.order, (x, lx), &[(v, lv)])
    }
}

impl candle_core::CustomOp3 for Once {
    fn name(&self) -> &'static str {
        self.activation.label()
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        v: &CpuStorage,
        lv: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        on_cpu(self.activation, self.order, (x, lx), &[(v, lv), (w, lw)])
    }
}

/// The order of the derivative that the backward pass of order `order` needs.
fn differentiated(op: &'static str, order: u32) -> Result<u32> {
    if order < 2 { Ok(order + 1) } else { Err(candle_core::Error::BackwardNotSupported { op }) }
}

impl Activation {
    fn label(self) -> &'static str {
        match self {
            Self::Tanh => "tanh",
            Self::Sigmoid => "sigmoid",
            Self::Softplus => "softplus",
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::Relu => "relu",
            Self::Elu(_) => "elu",
            Self::Sin => "sin",
            Self::Cos => "cos",
            Self::LogCosh => "log-cosh",
            Self::Identity => "identity",
        }
    }
}

type View<'a> = (&'a CpuStorage, &'a Layout);

fn on_cpu(activation: Activation, order: u32, x: View<'_>, by: &[View<'_>]) -> Result<(CpuStorage, Shape)> {
    let shape = x.1.shape();
    for (_, layout) in by {
        if layout.shape() != shape {
            candle_core::bail!("`{}`: shapes {shape:?} and {:?} differ", activation.label(), layout.shape())
        }
    }
    with_element!(x.0.dtype(), activation.label(), T => {
        let dense_x = dense::<T>(x.0, x.1)?;
        let factors = by.iter().map(|(storage, layout)| dense::<T>(storage, layout)).collect::<Result<Vec<_>>>()?;
        let factors: Vec<&[T]> = factors.iter().map(AsRef::as_ref).collect();
        let y = of_order(activation, order, &dense_x, &factors);
        Ok((<T as candle_core::WithDType>::to_cpu_storage_owned(y), shape.clone()))
    })
}

fn of_order<T: Element>(activation: Activation, order: u32, x: &[T], by: &[&[T]]) -> Vec<T> {
    match order {
        0 => of_function::<T, 0>(activation, x, by),
        1 => of_function::<T, 1>(activation, x, by),
        _ => of_function::<T, 2>(activation, x, by),
    }
}

fn of_function<T: Element, const ORDER: u32>(activation: Activation, x: &[T], by: &[&[T]]) -> Vec<T> {
    with_function!(activation, f => vectorised(Map::<_, _, ORDER> { f, x, by }))
}

/// f⁽ⁿ⁾(x), times the tensors of `by`, rounded once.
struct Map<'a, T, F, const ORDER: u32> {
    f: F,
    x: &'a [T],
    by: &'a [&'a [T]],
}

impl<T: Element, F: Function, const ORDER: u32> Kernel for Map<'_, T, F, ORDER> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run(self) -> Vec<T> {
        let (mut wide, mut y, mut factor) = ([T::Wide::ZERO; CHUNK], [T::Wide::ZERO; CHUNK], [T::Wide::ZERO; CHUNK]);
        let mut out = Vec::with_capacity(self.x.len());
        for (n, x) in self.x.chunks(CHUNK).enumerate() {
            let (start, len) = (n * CHUNK, x.len());
            let (x, y) = (T::widened(x, &mut wide[..len]), &mut y[..len]);
            for (y, &x) in y.iter_mut().zip(x) {
                *y = self.f.order::<_, ORDER>(x);
            }
            if let Some(quarters) = F::SINE {
                beyond_turns(x, y, quarters + ORDER);
            }
            for by in self.by {
                let factor = T::widened(&by[start..start + len], &mut factor[..len]);
                y.iter_mut().zip(factor).for_each(|(y, &factor)| *y *= factor);
            }
            T::append(y, &mut out);
        }
        out
    }
}

/// Replaces the sines whose argument is too large for the fast form.
#[inline(always)]
fn beyond_turns<R: Real>(x: &[R], y: &mut [R], quarters: u32) {
    let limit = R::of(R::TURNS);
    if x.iter().all(|x| x.abs() <= limit) {
        return;
    }
    for (y, &x) in y.iter_mut().zip(x) {
        if x.abs() > limit {
            *y = x.sin_anywhere(quarters);
        }
    }
}
