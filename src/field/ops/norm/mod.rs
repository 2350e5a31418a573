//! Normalisations: y = (x − mean) / sqrt(var + ε) · w + b over groups of elements.
//!
//! Layer, root-mean-square, group and instance norm differ in what a group is and along which elements w and b run.
//! Statistics are calculated in F32 (F64 for F64) whatever the dtype of x; w and b have x's dtype or F32, and their
//! gradients are summed over the batch in F32. Nothing but x is kept for the backward pass: the statistics are made
//! again. Group norms beside convolutions are part of their op inside a solve on the CPU: see `conv/image_norm.rs`.

mod composed;
mod kernel;
#[cfg(test)]
mod tests;

use super::chain::{Chain, Linked};
use super::cpu::{Element, dense, dense_wide, vectorised, wide_dtype, with_element};
use super::precomputed::{Precomputed, hand_over};
use super::weight::give;
use crate::Time;
use crate::error::OdeError;
use crate::field::Tangent;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Module, Result, Shape, Tensor, WithDType, bail,
};
use candle_nn::{Init, LayerNormConfig, VarBuilder};
pub(super) use kernel::Groups;
use kernel::Normalise;

/// Layer norm over the last dimension, with or without removing the mean, with or without bias: the differentiable
/// twin of [`candle_nn::LayerNorm`], which takes F32 weights on half-precision input.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = candle_ode::ops::layer_norm(8, 1e-5, vb)?;
/// let x = Tensor::ones((4, 8), DType::F16, &Device::Cpu)?;        // F16 input, F32 weights
/// assert_eq!(norm.forward(&x)?.dtype(), DType::F16);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    remove_mean: bool,
    eps: f64,
}

/// Layer norm over a last dimension of `size`; parameters `weight` `(size)` = 1 and, if `config.affine`, `bias`
/// `(size)` = 0. `config` is ε or a [`LayerNormConfig`].
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn layer_norm<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder) -> Result<LayerNorm> {
    let norm = candle_nn::layer_norm(size, config, vb)?;
    let (weight, bias) = (norm.weight().clone(), norm.bias().cloned());
    Ok(LayerNorm { weight, bias, remove_mean: norm.remove_mean(), eps: norm.eps() })
}

/// Layer norm without bias.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: true, affine: false }, vb)
}

/// Root-mean-square norm, x / sqrt(mean x² + ε) · w: layer norm without removing the mean and without bias.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(size, LayerNormConfig { eps, remove_mean: false, affine: false }, vb)
}

impl LayerNorm {
    /// A norm of existing tensors, both `(size)`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias: Some(bias), remove_mean: true, eps }
    }

    /// A norm without bias of an existing tensor, `(size)`.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self { weight, bias: None, remove_mean: true, eps }
    }

    /// A root-mean-square norm of an existing tensor, `(size)`.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        Self { weight, bias: None, remove_mean: false, eps }
    }

    /// w, `(size)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// b, `(size)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    fn op(&self, x: &Tensor) -> Result<Norm> {
        let size = self.weight.elem_count();
        if x.dims().last() != Some(&size) {
            bail!("layer-norm: x has shape {:?}, its last dimension must be {size}", x.shape())
        }
        let groups = Groups { per_sample: 1, channels: size, inner: 1 };
        Ok(Norm { name: "layer-norm", groups, remove_mean: self.remove_mean, eps: self.eps })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.op(x)?.forward(x, Some(&self.weight), self.bias.as_ref())
    }
}

impl Tangent for LayerNorm {
    fn tangent(&self, _: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.forward(y)?, self.op(y)?.push(y, Some(&self.weight), v)?))
    }
}

/// Group norm over `(batch, channels, …)`: the twin of [`candle_nn::GroupNorm`] with mixed dtypes. Each group holds
/// `channels / groups` channels of one sample; w and b run along the channels.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    channels: usize,
    groups: usize,
    eps: f64,
}

/// Instance norm over `(batch, channels, …)`: every channel of every sample on its own.
pub type InstanceNorm = GroupNorm;

/// Group norm; parameters `weight` `(num_channels)` = 1 and `bias` `(num_channels)` = 0.
///
/// # Errors
/// Groups that do not divide the channels; whatever the `VarBuilder` reports.
pub fn group_norm(num_groups: usize, num_channels: usize, eps: f64, vb: VarBuilder) -> Result<GroupNorm> {
    let weight = vb.get_with_hints(num_channels, "weight", Init::Const(1.0))?;
    let bias = vb.get_with_hints(num_channels, "bias", Init::Const(0.0))?;
    GroupNorm::new(weight, bias, num_channels, num_groups, eps)
}

/// Instance norm with parameters `weight` `(num_channels)` = 1 and `bias` `(num_channels)` = 0.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn instance_norm(num_channels: usize, eps: f64, vb: VarBuilder) -> Result<InstanceNorm> {
    group_norm(num_channels, num_channels, eps, vb)
}

impl GroupNorm {
    /// A norm of existing tensors, both `(num_channels)`.
    ///
    /// # Errors
    /// Groups that do not divide the channels.
    pub fn new(weight: Tensor, bias: Tensor, num_channels: usize, num_groups: usize, eps: f64) -> Result<Self> {
        let norm = Self::plain(num_channels, num_groups, eps)?;
        Ok(Self { weight: Some(weight), bias: Some(bias), ..norm })
    }

    /// A norm without parameters; with `num_groups` = `num_channels` PyTorch's default instance norm.
    ///
    /// # Errors
    /// Groups that do not divide the channels.
    pub fn plain(num_channels: usize, num_groups: usize, eps: f64) -> Result<Self> {
        if num_groups == 0 || num_channels == 0 || !num_channels.is_multiple_of(num_groups) {
            let value = format!("{num_groups} for {num_channels} channels");
            let hint = "the number of groups must divide the number of channels";
            return Err(OdeError::Setting { setting: "GroupNorm groups", value, hint }.into());
        }
        Ok(Self { weight: None, bias: None, channels: num_channels, groups: num_groups, eps })
    }

    /// w, `(num_channels)`.
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// b, `(num_channels)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    fn op(&self, x: &Tensor) -> Result<Norm> {
        if x.rank() < 2 || x.dims()[1] != self.channels {
            bail!("group-norm: x has shape {:?}, it must be (batch, {}, …)", x.shape(), self.channels)
        }
        Ok(self.of_pixels(x.dims()[2..].iter().product()))
    }

    /// The norm where each channel has so many elements.
    fn of_pixels(&self, inner: usize) -> Norm {
        let groups = Groups { per_sample: self.groups, channels: self.channels / self.groups, inner };
        Norm { name: "group-norm", groups, remove_mean: true, eps: self.eps }
    }
}

/// Beside convolutions it becomes part of their op.
impl Linked for GroupNorm {
    fn link(&self, _: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
        let of = |channels, pixels| (channels == self.channels).then(|| self.of_pixels(pixels));
        chain.norm(x, of, (self.weight.as_ref(), self.bias.as_ref()))
    }

    fn value(&self, _: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        self.forward(x)
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.op(x)?.forward(x, self.weight.as_ref(), self.bias.as_ref())
    }
}

impl Tangent for GroupNorm {
    fn tangent(&self, _: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.forward(y)?, self.op(y)?.push(y, self.weight.as_ref(), v)?))
    }
}

/// One normalisation of an x of known shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub(super) name: &'static str,
    pub(super) groups: Groups,
    pub(super) remove_mean: bool,
    pub(super) eps: f64,
}

impl Norm {
    pub(super) fn forward(self, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
        for parameter in [weight, bias].into_iter().flatten() {
            self.validate(x, parameter)?;
        }
        let op = NormOp { norm: self, ready: self.ready(x, weight, bias)? };
        match (weight, bias) {
            (Some(weight), Some(bias)) => x.apply_op3(weight, bias, op),
            (Some(weight), None) => x.apply_op2(weight, op),
            _ => x.apply_op1(op),
        }
    }

    /// The value where x is not on the CPU: by a kernel of ours or of Candle's ops.
    fn ready(self, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Precomputed> {
        #[cfg(feature = "cuda")]
        if let Some(value) = super::cuda::normalise(&self, x, weight, bias)? {
            return Ok(Precomputed::on_device(value));
        }
        Precomputed::off_cpu(x, || {
            composed::value(self, &x.detach(), weight.map(Tensor::detach).as_ref(), bias.map(Tensor::detach).as_ref())
        })
    }

    /// J v, of ops that can themselves be differentiated in x, w and v.
    fn push(self, x: &Tensor, weight: Option<&Tensor>, v: &Tensor) -> Result<Tensor> {
        composed::tangent(self, x, weight, v)
    }

    fn validate(&self, x: &Tensor, parameter: &Tensor) -> Result<()> {
        let channels = self.groups.parameters();
        if parameter.dims() != [channels] {
            bail!("{}: weight and bias must have shape [{channels}], not {:?}", self.name, parameter.shape())
        }
        if parameter.dtype() != x.dtype() && parameter.dtype() != wide_dtype(x.dtype()) {
            let what = format!("a parameter of {} on {:?} input", self.name, x.dtype());
            let hint = "weight and bias must have the dtype of the input, or F32";
            return Err(OdeError::UnsupportedDType { what, dtype: parameter.dtype(), hint }.into());
        }
        Ok(())
    }
}

struct NormOp {
    norm: Norm,
    ready: Precomputed,
}

type View<'a> = (&'a CpuStorage, &'a Layout);

/// Gradients of x, w and b.
type Pulled = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl NormOp {
    fn label(&self) -> &'static str {
        self.norm.name
    }

    fn on_cpu(&self, x: View<'_>, weight: Option<View<'_>>, bias: Option<View<'_>>) -> Result<(CpuStorage, Shape)> {
        let Norm { groups, remove_mean, eps, .. } = self.norm;
        with_element!(x.0.dtype(), self.label(), T => {
            type Wide = <T as Element>::Wide;
            let weight = weight.map(|(s, l)| dense_wide::<Wide>(s, l)).transpose()?;
            let bias = bias.map(|(s, l)| dense_wide::<Wide>(s, l)).transpose()?;
            let data = dense::<T>(x.0, x.1)?;
            let (weight, bias) = (weight.as_deref(), bias.as_deref());
            let y = vectorised(Normalise::<T> { x: &data, groups, remove_mean, eps, weight, bias });
            Ok((<T as WithDType>::to_cpu_storage_owned(y), x.1.shape().clone()))
        })
    }

    fn pull(&self, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, grad: &Tensor) -> Result<Pulled> {
        let (x_value, grad) = (x.detach(), grad.detach());
        let weight_value = weight.map(Tensor::detach);
        let wanted = [weight, bias].into_iter().flatten().any(Tensor::track_op);
        let (for_x, sums) = self.pull_values(&x_value, weight_value.as_ref(), &grad, wanted)?;
        let tracked = |parameter: Option<&Tensor>, row: usize| match (parameter, &sums) {
            (Some(parameter), Some(sums)) if parameter.track_op() => give(parameter, &sums.get(row)?),
            _ => Ok(None),
        };
        Ok((x.track_op().then_some(for_x), tracked(weight, 0)?, tracked(bias, 1)?))
    }

    /// The gradient of x and, at least if they are wanted, the sums Σ g x̂ and Σ g per parameter, `(2, parameters)`.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn pull_values(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        grad: &Tensor,
        sums: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if let Some(pulled) = super::cuda::pull_norm(&self.norm, x, weight, grad, sums)? {
            return Ok(pulled);
        }
        let pull = if x.device().is_cpu() { kernel::pull_on_cpu } else { composed::pull };
        let (for_x, sums) = pull(self.norm, x, weight, grad)?;
        Ok((for_x, Some(sums)))
    }
}

impl CustomOp1 for NormOp {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((x, lx), None, None)
    }

    hand_over!(ready, 1);

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.pull(x, None, None, grad).map(|(x, _, _)| x)
    }
}

impl CustomOp2 for NormOp {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((x, lx), Some((w, lw)), None)
    }

    hand_over!(ready, 2);

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.pull(x, Some(w), None, grad).map(|(x, w, _)| (x, w))
    }
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((x, lx), Some((w, lw)), Some((b, lb)))
    }

    hand_over!(ready, 3);

    fn bwd(&self, x: &Tensor, w: &Tensor, b: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Pulled> {
        self.pull(x, Some(w), Some(b), grad)
    }
}
