//! The convolution that sees the time: y = [x, t] ∗ w + b, where t is one more channel, the same at every pixel.
//!
//! Shapes: x `(batch, in, h, w)`, weight `(out, in + 1, k, k)` whose last channel belongs to t, b `(out)`. Dtypes as
//! [`conv2d`](super::conv2d); t has that of x, and is rounded to it. Inside a solve on the CPU t is written where the
//! windows look, as part of the op that [`fused`](super::fused) makes of the layers, which holds F16 in F32; elsewhere
//! [x, t] is made.

use super::{Conv2d, conv2d};
use crate::Time;
use crate::field::Tangent;
use crate::field::ops::chain::{self, Chain, Linked};
use crate::field::ops::cpu::wide_dtype;
use crate::field::ops::sequential::{Timed, no_time};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder};

/// A 2-d convolution over [x, t]: the layer that ODE nets and FFJORD's flows of images are made of.
///
/// It needs the time, so it is no `Module`: call [`forward_at`](Timed::forward_at), or put it into a
/// [`Sequential`](crate::ops::Sequential) with `add_timed`. Others put the channel of the time before those of x: move
/// it to the end of weights that come from them.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
/// use candle_ode::{Time, ops::Timed};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let same = Conv2dConfig { padding: 1, ..Default::default() };
/// let layer = candle_ode::ops::concat_conv2d(3, 8, 3, same, vb)?;        // weight (8, 4, 3, 3), bias (8)
/// let x = Tensor::zeros((2, 3, 6, 6), DType::F32, &Device::Cpu)?;
/// assert_eq!(layer.forward_at(&Time::new(0.5, &Device::Cpu), &x)?.dims(), [2, 8, 6, 6]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConcatConv2d(Conv2d);

/// A convolution over [x, t]; parameters `weight` `(out, in + 1, k, k)` and `bias` `(out)`, initialised as
/// `conv2d(in + 1, out, …)`.
///
/// # Errors
/// Groups other than 1, since the time is for all; whatever the `VarBuilder` reports.
pub fn concat_conv2d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv2dConfig,
    vb: VarBuilder,
) -> Result<ConcatConv2d> {
    check_groups(&config)?;
    Ok(ConcatConv2d(conv2d(in_channels + 1, out_channels, kernel_size, config, vb)?))
}

fn check_groups(config: &Conv2dConfig) -> Result<()> {
    match config.groups {
        1 => Ok(()),
        groups => {
            candle_core::bail!("concat-conv2d: {groups} groups; the time is for all channels, so there must be 1")
        }
    }
}

impl ConcatConv2d {
    /// A convolution of existing tensors: `weight` `(out, in + 1, k, k)`, `bias` `(out)`.
    ///
    /// # Errors
    /// Groups other than 1.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Result<Self> {
        check_groups(&config)?;
        Ok(Self(Conv2d::new(weight, bias, config)))
    }

    /// The kernel, `(out, in + 1, k, k)`; the last channel belongs to t.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// b, `(out)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }

    /// Stride, padding and dilation.
    pub fn config(&self) -> &Conv2dConfig {
        self.0.config()
    }

    /// [x, t]
    fn joined(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        let (batch, _, height, width) = x.dims4()?;
        // Wide as long as it is one number: its cotangent is a sum over all pixels.
        let wide = if wide_dtype(x.dtype()) == DType::F64 { t.like(x)? } else { t.tensor()? };
        let t = wide.broadcast_as((batch, 1, height, width))?.to_dtype(x.dtype())?;
        Tensor::cat(&[x, &t], 1)
    }
}

impl Timed for ConcatConv2d {
    fn forward_at(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        chain::run([self], Some(t), x)
    }
}

impl Linked for ConcatConv2d {
    fn link(&self, t: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
        t.is_some_and(|t| chain.convolution(x, &self.0, Some(t)))
    }

    fn value(&self, t: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        self.0.forward(&self.joined(t.ok_or_else(no_time)?, x)?)
    }
}

impl Tangent for ConcatConv2d {
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let of_x = self.weight().narrow(1, 0, v.dim(1)?)?.contiguous()?;
        Ok((self.forward_at(t, y)?, Conv2d::new(of_x, None, *self.config()).forward(v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::ops::gradcheck::{check, check_tangent, distance, noise, values};
    use candle_core::Device;

    fn same() -> Conv2dConfig {
        Conv2dConfig { padding: 1, ..Default::default() }
    }

    fn of(args: &[Tensor]) -> ConcatConv2d {
        ConcatConv2d::new(args[0].clone(), args.get(1).cloned(), same()).unwrap()
    }

    #[test]
    fn the_time_is_a_channel() {
        let (t, x) = (Time::new(0.3, &Device::Cpu), noise(&[2, 3, 4, 5], 1));
        let layer = of(&[noise(&[4, 4, 3, 3], 2), noise(&[4], 3)]);
        let channel = Tensor::full(0.3, (2, 1, 4, 5), &Device::Cpu).unwrap();
        let joined = Tensor::cat(&[&x, &channel], 1).unwrap();
        let y = joined.conv2d(layer.weight(), 1, 1, 1, 1).unwrap();
        let y = y.broadcast_add(&layer.bias().unwrap().reshape((1, 4, 1, 1)).unwrap()).unwrap();
        assert!(distance(&layer.forward_at(&t, &x).unwrap(), &y) < 1e-15);
    }

    #[test]
    fn gradients_and_tangents_match_finite_differences() {
        let (t, x) = (Time::new(0.3, &Device::Cpu), noise(&[2, 3, 4, 5], 1));
        let (weight, bias) = (noise(&[4, 4, 3, 3], 2), noise(&[4], 3));
        check(&|args| of(&args[1..]).forward_at(&t, &args[0]), &[x.clone(), weight.clone(), bias.clone()]);
        let layer = of(&[weight.clone(), bias]);
        check_tangent(&layer, &|args| layer.forward_at(&t, &args[0]), &x);
        check(&|args| Ok(of(&args[..1]).tangent(&t, &x, &args[1])?.1), &[weight, x.clone()]);
    }

    #[test]
    fn the_time_gets_its_gradient_in_f32() {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let weight = Tensor::ones((1, 2, 1, 1), dtype, &Device::Cpu).unwrap();
            let layer = ConcatConv2d::new(weight, None, Conv2dConfig::default()).unwrap();
            let t = Time::new(0.5, &Device::Cpu).tracked();
            // More pixels than F16 can count.
            let x = noise(&[3, 1, 40, 41], 4).to_dtype(dtype).unwrap();
            let grads = layer.forward_at(&t, &x).unwrap().backward().unwrap();
            let total: f64 = t.leaves().iter().filter_map(|leaf| grads.get(leaf)).map(|g| values(g)[0]).sum();
            assert_eq!(total, 4920.0, "{dtype:?}");
        }
    }

    #[test]
    fn groups_and_calls_without_a_time_are_errors() {
        let grouped = Conv2dConfig { groups: 2, ..Default::default() };
        let error = ConcatConv2d::new(noise(&[4, 4, 3, 3], 2), None, grouped).unwrap_err().to_string();
        assert!(error.contains("2 groups"), "{error}");
        let layers = crate::ops::seq().add_timed(of(&[noise(&[4, 4, 3, 3], 2)]));
        assert!(layers.forward(&noise(&[2, 3, 4, 5], 1)).is_err());
        assert!(layers.forward_at(&Time::new(0.0, &Device::Cpu), &noise(&[2, 4, 4, 5], 1)).is_err());
    }
}
