//! 2-d convolution: y = x ∗ w + b.
//!
//! Shapes: x `(batch, in, h, w)`, weight `(out, in / groups, k, k)`, b `(out)`. Dtypes: x and weight share one of F16,
//! BF16, F32, F64; b has theirs, or F32. Half precision is accumulated in F32, and dL/dw and dL/db are summed over
//! batch and pixels in F32. On the CPU half precision is calculated in F32 altogether, BF16, which Candle lacks,
//! included. Inside a solve on the CPU, kernels of ours do it, and those of several convolutions with activations
//! and group norms between them, as one op ([`fused`]), except with dilation, groups or strides above 2. On CUDA value and
//! gradients are products with columns of windows, some images at a time, so that no direct kernel is needed.

mod convolution;
mod frame;
pub(super) mod fused;
mod image_norm;
mod in_time;
mod layer;
mod method;

use super::bias::add_bias;
use super::chain::{self, Chain, Linked};
use super::cpu::wide_dtype;
use super::precomputed::Precomputed;
use super::weight::give;
use crate::Time;
use crate::field::Tangent;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, MetalStorage, Module, Result, Shape, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder};
pub(super) use convolution::Convolution;
pub(super) use image_norm::ImageNorm;
pub use in_time::{ConcatConv2d, concat_conv2d};
pub(super) use layer::ImageLayer;
pub(super) use method::Convolved;

/// A 2-d convolution: the twin of [`candle_nn::Conv2d`].
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::BF16, &Device::Cpu);
/// let conv = candle_ode::ops::conv2d(3, 8, 3, Conv2dConfig { padding: 1, ..Default::default() }, vb)?;
/// let y = conv.forward(&Tensor::zeros((2, 3, 6, 6), DType::BF16, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 8, 6, 6]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv2dConfig,
}

/// A convolution with bias; parameters `weight` and `bias`, initialised as candle-nn does.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn conv2d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let layer = candle_nn::conv2d(in_channels, out_channels, kernel_size, config, vb)?;
    Ok(Conv2d::new(layer.weight().clone(), layer.bias().cloned(), config))
}

/// A convolution without bias; parameter `weight`, initialised as candle-nn does.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn conv2d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let layer = candle_nn::conv2d_no_bias(in_channels, out_channels, kernel_size, config, vb)?;
    Ok(Conv2d::new(layer.weight().clone(), None, config))
}

impl Conv2d {
    /// A convolution of existing tensors: `weight` `(out, in / groups, k, k)`, `bias` `(out)`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Self {
        Self { weight, bias, config }
    }

    /// The kernel, `(out, in / groups, k, k)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// b, `(out)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Stride, padding, dilation and groups.
    pub fn config(&self) -> &Conv2dConfig {
        &self.config
    }

    fn convolve(&self, x: &Tensor) -> Result<Tensor> {
        let ready = value(&x.detach(), &self.weight.detach(), &self.config)?;
        x.apply_op2(&self.weight, ConvOp { config: self.config, ready })
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        chain::run([self], None, x)
    }
}

impl Linked for Conv2d {
    fn link(&self, _: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
        chain.convolution(x, self, None)
    }

    fn value(&self, _: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        let y = self.convolve(x)?;
        match &self.bias {
            Some(bias) => add_bias(&y, bias, 1),
            None => Ok(y),
        }
    }
}

impl Tangent for Conv2d {
    fn tangent(&self, _: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.forward(y)?, self.convolve(v)?))
    }
}

struct ConvOp {
    config: Conv2dConfig,
    ready: Precomputed,
}

impl CustomOp2 for ConvOp {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.ready.cpu(self.name())
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.ready.cuda(self.name())
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.ready.metal(self.name())
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach();
        let for_x = x.track_op().then(|| pull_input(x, &w.detach(), &grad, &self.config)).transpose()?;
        let for_weight = if w.track_op() { give(w, &pull_weight(&x.detach(), w, &grad, &self.config)?)? } else { None };
        Ok((for_x, for_weight))
    }
}

/// The dtype a convolution runs in: Candle's own on a GPU, F32 for half precision on the CPU.
fn working_dtype(x: &Tensor) -> DType {
    if x.device().is_cpu() { wide_dtype(x.dtype()) } else { x.dtype() }
}

fn value(x: &Tensor, weight: &Tensor, config: &Conv2dConfig) -> Result<Precomputed> {
    #[cfg(feature = "cuda")]
    if let Some(value) = super::cuda::convolve(x, weight, config)? {
        return Ok(Precomputed::on_device(value));
    }
    forward(x, weight, config).map(Precomputed::of)
}

fn forward(x: &Tensor, weight: &Tensor, config: &Conv2dConfig) -> Result<Tensor> {
    if x.dtype() != weight.dtype() {
        candle_core::bail!("conv2d: x is {:?} and the weight {:?}; they must be the same", x.dtype(), weight.dtype())
    }
    check(x, weight, config)?;
    let Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo } = *config;
    let dtype = working_dtype(x);
    x.to_dtype(dtype)?
        .conv2d_with_algo(&weight.to_dtype(dtype)?, padding, stride, dilation, groups, cudnn_fwd_algo)?
        .to_dtype(x.dtype())
}

/// How many windows there are, down and across, in images of shape x for a weight of that shape; `None` if there is none,
/// or no way from one to the next, or if all they look at is more than can be counted.
pub(super) fn windows(x: [usize; 4], weight: [usize; 4], config: &Conv2dConfig) -> Option<[usize; 2]> {
    let ([images, channels, height, width], [outputs, _, tall, wide]) = (x, weight);
    let Conv2dConfig { padding, stride, dilation, .. } = *config;
    let padded = |size: usize| size.checked_add(padding.checked_mul(2)?);
    let along = |size: usize, kernel: usize| {
        let reach = dilation.checked_mul(kernel.checked_sub(1)?)?.checked_add(1)?;
        Some(padded(size)?.checked_sub(reach).filter(|_| dilation > 0)?.checked_div(stride)? + 1)
    };
    let looked_at = [images, channels.max(outputs), tall, wide, padded(height)?, padded(width)?];
    let elements = looked_at.into_iter().try_fold(size_of::<f64>(), usize::checked_mul)?;
    isize::try_from(elements).ok()?;
    Some([along(height, tall)?, along(width, wide)?])
}

/// What Candle does not look at.
fn check(x: &Tensor, weight: &Tensor, config: &Conv2dConfig) -> Result<()> {
    let Conv2dConfig { padding, stride, dilation, groups, .. } = *config;
    if [stride, dilation, groups].contains(&0) {
        candle_core::bail!("conv2d: stride {stride}, dilation {dilation} and groups {groups} must be 1 at least")
    }
    let (of_x, of_weight) = (x.dims4()?, weight.dims4()?);
    let ((_, _, height, width), (outputs, _, tall, wide)) = (of_x, of_weight);
    if !outputs.is_multiple_of(groups) {
        candle_core::bail!("conv2d: {outputs} output channels are not divided by {groups} groups")
    }
    if windows(of_x.into(), of_weight.into(), config).is_none() {
        candle_core::bail!(
            "conv2d: a kernel of {tall} × {wide} with dilation {dilation} has no window, or too many to count, in images \
             of {height} × {width} with padding {padding}"
        )
    }
    Ok(())
}

/// The gradient of x: a transposed convolution, group by group.
fn pull_input(x: &Tensor, weight: &Tensor, grad: &Tensor, config: &Conv2dConfig) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gradient) = super::cuda::pull_input(x, weight, grad, config)? {
        return Ok(gradient);
    }
    let Conv2dConfig { padding, stride, dilation, groups, .. } = *config;
    let (_, _, height, width) = x.dims4()?;
    let (_, _, kernel_height, kernel_width) = weight.dims4()?;
    let (_, _, grad_height, grad_width) = grad.dims4()?;
    // Padded rows (columns) that no window reached; the larger number serves both, and the rest is cut off.
    let beyond = |size: usize, grad: usize, kernel: usize| {
        size + 2 * padding - (grad - 1) * stride - dilation * (kernel - 1) - 1
    };
    let beyond = beyond(height, grad_height, kernel_height).max(beyond(width, grad_width, kernel_width));
    let dtype = working_dtype(x);
    let (grad, weight) = (grad.to_dtype(dtype)?, weight.to_dtype(dtype)?);
    let parts = grad.chunk(groups, 1)?.into_iter().zip(weight.chunk(groups, 0)?).map(|(grad, weight)| {
        let part = grad.contiguous()?.conv_transpose2d(&weight.contiguous()?, padding, beyond, stride, dilation)?;
        part.narrow(2, 0, height)?.narrow(3, 0, width)
    });
    joined(parts, 1)?.to_dtype(x.dtype())
}

/// The gradient of the weight in F32 (F64 for F64): x convolved with the cotangent, group by group.
fn pull_weight(x: &Tensor, weight: &Tensor, grad: &Tensor, config: &Conv2dConfig) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(gradient) = super::cuda::pull_weight(x, weight, grad, config)? {
        return Ok(gradient);
    }
    let Conv2dConfig { padding, stride, dilation, groups, .. } = *config;
    let (_, _, kernel_height, kernel_width) = weight.dims4()?;
    let wide = wide_dtype(x.dtype());
    let (x, grad) = (x.to_dtype(wide)?, grad.to_dtype(wide)?);
    let parts = x.chunk(groups, 1)?.into_iter().zip(grad.chunk(groups, 1)?).map(|(x, grad)| {
        let (x, grad) = (x.transpose(0, 1)?.contiguous()?, grad.transpose(0, 1)?.contiguous()?);
        let part = x.conv2d(&grad, padding, dilation, stride, 1)?.transpose(0, 1)?;
        part.narrow(2, 0, kernel_height)?.narrow(3, 0, kernel_width)
    });
    joined(parts, 0)
}

fn joined(parts: impl Iterator<Item = Result<Tensor>>, dim: usize) -> Result<Tensor> {
    let parts = parts.collect::<Result<Vec<_>>>()?;
    match parts.as_slice() {
        [only] => only.contiguous(),
        several => Tensor::cat(several, dim),
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check, check_half, check_tangent, distance, gradients, noise, values};
    use super::*;
    use candle_core::{DType, Device};

    fn configs() -> Vec<Conv2dConfig> {
        let of = |padding, stride, dilation, groups| Conv2dConfig {
            padding,
            stride,
            dilation,
            groups,
            cudnn_fwd_algo: None,
        };
        vec![of(1, 1, 1, 1), of(0, 1, 1, 1), of(1, 2, 1, 1), of(2, 1, 2, 1), of(1, 2, 1, 2), of(0, 3, 1, 4)]
    }

    fn conv(args: &[Tensor], config: Conv2dConfig) -> Result<Tensor> {
        Conv2d::new(args[1].clone(), args.get(2).cloned(), config).forward(&args[0])
    }

    #[test]
    fn gradients_match_finite_differences() {
        for config in configs() {
            for (height, width) in [(5, 5), (6, 7), (5, 8)] {
                let args = [noise(&[2, 4, height, width], 1), noise(&[4, 4 / config.groups, 3, 3], 2), noise(&[4], 3)];
                check(&|args| conv(args, config), &args);
                check(&|args| conv(args, config), &args[..2]);
            }
        }
        let tiny = Conv2dConfig { padding: 1, stride: 3, ..Default::default() };
        check(&|args| conv(args, tiny), &[noise(&[2, 1, 1, 2], 1), noise(&[3, 1, 1, 1], 2)]);
        check(
            &|a| conv(&[a[0].transpose(2, 3)?, a[1].clone()], configs()[0]),
            &[noise(&[1, 2, 4, 5], 1), noise(&[3, 2, 1, 1], 2)],
        );
    }

    #[test]
    fn tangents_match_pullbacks_and_are_differentiable() {
        let t = Time::new(0.0, &Device::Cpu);
        for config in configs() {
            let weight = noise(&[4, 4 / config.groups, 3, 3], 2);
            let layer = Conv2d::new(weight.clone(), Some(noise(&[4], 3)), config);
            check_tangent(&layer, &|args| layer.forward(&args[0]), &noise(&[2, 4, 6, 5], 1));
            let pushed = |args: &[Tensor]| {
                let layer = Conv2d::new(args[1].clone(), None, config);
                Ok(layer.tangent(&t, &args[0], &args[0])?.1)
            };
            check(&pushed, &[noise(&[1, 4, 6, 5], 1), weight]);
        }
    }

    #[test]
    fn values_are_those_of_candle() {
        for config in configs() {
            let args = [noise(&[2, 4, 6, 7], 1), noise(&[4, 4 / config.groups, 3, 3], 2), noise(&[4], 3)];
            let theirs =
                candle_nn::Conv2d::new(args[1].clone(), Some(args[2].clone()), config).forward(&args[0]).unwrap();
            assert!(distance(&conv(&args, config).unwrap(), &theirs) < 1e-15);
        }
    }

    #[test]
    fn half_precision_is_right_and_sums_are_in_f32() {
        let args = [noise(&[3, 4, 9, 8], 1), noise(&[5, 4, 3, 3], 2), noise(&[5], 3)];
        for (dtype, bound) in [(DType::F16, 2e-3), (DType::BF16, 1.2e-2)] {
            check_half(&|args| conv(args, configs()[0]), &args, dtype, bound);
            let ones = |shape: &[usize]| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
            let g = ones(&[4, 1, 100, 100]);
            let got = gradients(
                &|args| conv(args, configs()[1]),
                &[ones(&[4, 1, 102, 102]), ones(&[1, 1, 3, 3]), ones(&[1])],
                &g,
            );
            for sums in &got[1..] {
                assert!(values(sums).iter().all(|v| (v - 40_000.0).abs() <= 160.0), "{dtype:?} {sums}");
            }
        }
    }

    /// The reason for a gradient of our own, besides half precision: when this fails, Candle has mended it.
    #[test]
    fn candle_fails_on_oblong_strided_images() {
        let (x, w) = (noise(&[1, 1, 5, 8], 1), noise(&[1, 1, 3, 3], 2));
        let config = Conv2dConfig { padding: 1, stride: 2, ..Default::default() };
        let x = candle_core::Var::from_tensor(&x).unwrap();
        let theirs = candle_nn::Conv2d::new(w.clone(), None, config).forward(&x).unwrap();
        assert!(theirs.backward().is_err());
        assert!(Conv2d::new(w, None, config).forward(&x).unwrap().backward().is_ok());
    }

    #[test]
    fn a_kernel_without_a_window_is_an_error() {
        let of = |padding, stride, dilation, groups| Conv2dConfig { padding, stride, dilation, groups, ..configs()[0] };
        let (x, w) = (noise(&[2, 4, 3, 5], 1), noise(&[4, 4, 4, 2], 2));
        let endless = [usize::MAX / 2 + 2, usize::MAX / 4, 1 << 31].map(|padding| of(padding, 1, 1, 1));
        for config in [of(0, 1, 1, 1), of(1, 1, 2, 1), of(1, 1, usize::MAX, 1)].into_iter().chain(endless) {
            let error = conv(&[x.clone(), w.clone()], config).unwrap_err().to_string();
            assert!(error.contains("a kernel of 4 × 2") && error.contains("images of 3 × 5"), "{error}");
        }
        for config in [of(1, 0, 1, 1), of(1, 1, 0, 1)] {
            assert!(windows([2, 4, 3, 5], [4, 4, 4, 2], &config).is_none());
        }
        let error = conv(&[x.clone(), w.clone()], of(1, 1, 1, 3)).unwrap_err().to_string();
        assert!(error.contains("4 output channels") && error.contains("3 groups"), "{error}");
        for config in [of(1, 0, 1, 1), of(1, 1, 0, 1), of(1, 1, 1, 0)] {
            let error = conv(&[x.clone(), w.clone()], config).unwrap_err().to_string();
            assert!(error.contains("must be 1 at least"), "{error}");
        }
        assert_eq!(conv(&[x, w], of(1, 1, 1, 1)).unwrap().dims(), [2, 4, 2, 6]);
    }

    #[test]
    fn dtypes_are_checked() {
        let (x, w) = (noise(&[1, 1, 4, 4], 1), noise(&[1, 1, 3, 3], 2).to_dtype(DType::F16).unwrap());
        assert!(conv(&[x, w], configs()[0]).unwrap_err().to_string().contains("conv2d"));
    }
}
