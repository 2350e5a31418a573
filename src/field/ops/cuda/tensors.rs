//! Ops on tensors that lie on CUDA, outside any graph. `None` where kernels of ours do not take them.

use super::arguments::{Activate, Element, NormGroups, PlanarUnits, Windows};
use super::convolution::Convolution;
use super::device::{Gpu, LARGEST, Value, address, dense, runs};
use super::layer::Layer;
use super::machine::{Machine, Matrix, Product};
use super::sums::{Sum, add_channels};
use crate::field::ops::Activation;
use crate::field::ops::conv::windows;
use crate::field::ops::norm::Norm;
use candle_core::{DType, Result, Tensor, bail};
use candle_nn::Conv2dConfig;

/// The dtype of a tensor that kernels of ours take, together with the others.
fn element(x: &Tensor, others: &[&Tensor]) -> Option<Element> {
    let same = |other: &&Tensor| other.dtype() == x.dtype() && other.device().same_device(x.device());
    Element::of(x.dtype()).filter(|_| runs(x) && others.iter().all(same))
}

/// f⁽ⁿ⁾(x), times up to two tensors.
pub(in crate::field::ops) fn scaled(
    activation: Activation,
    order: u32,
    x: &Tensor,
    by: &[&Tensor],
) -> Result<Option<Value>> {
    let same_shape = by.iter().all(|factor| factor.shape() == x.shape()) && by.len() <= 2;
    let Some(element) = element(x, by).filter(|_| same_shape) else { return Ok(None) };
    let (gpu, x) = (Gpu::of(x)?, dense(x)?);
    let by = by.iter().map(|factor| dense(factor)).collect::<Result<Vec<_>>>()?;
    let y = gpu.output(element, x.shape())?;
    let mut call = Activate::new((activation, order), address(&x)?, y.at(), x.elem_count() as u32);
    for (place, factor) in [&mut call.v, &mut call.w].into_iter().zip(&by) {
        *place = address(factor)?;
    }
    // SAFETY: all are dense tensors of the same shape and dtype on this device.
    unsafe { gpu.launch(&call.launch(element))? };
    Ok(Some(y))
}

/// x + b, where x is `(…, channels, inner)` and b in its dtype or F32.
pub(in crate::field::ops) fn add_bias(x: &Tensor, bias: &Tensor, inner: usize) -> Result<Option<Value>> {
    let Some(element) = element(x, &[]).filter(|_| is_parameter(bias, x)) else { return Ok(None) };
    let (gpu, x, bias) = (Gpu::of(x)?, dense(x)?, dense(bias)?);
    let y = gpu.output(element, x.shape())?;
    let mut call = Activate::new((Activation::Identity, 0), address(&x)?, y.at(), x.elem_count() as u32);
    (call.bias, call.bias_is_f32) = (address(&bias)?, i32::from(bias.dtype() == DType::F32));
    (call.channels, call.inner) = (bias.elem_count() as u32, inner as u32);
    // SAFETY: dense tensors on this device; the bias has an element for each channel.
    unsafe { gpu.launch(&call.launch(element))? };
    Ok(Some(y))
}

fn is_parameter(parameter: &Tensor, x: &Tensor) -> bool {
    let has_kernels = parameter.dtype() == x.dtype() || parameter.dtype() == DType::F32;
    parameter.device().same_device(x.device()) && has_kernels
}

/// The sums of x, `(rows, channels)` or `(rows, channels, inner)`, over all but the channels, in F32.
pub(in crate::field::ops) fn sum_channels(x: &Tensor, inner: usize) -> Result<Option<Tensor>> {
    let Some(element) = element(x, &[]) else { return Ok(None) };
    let (rows, channels) = (x.dim(0)?, x.dim(1)?);
    let (gpu, x) = (Gpu::of(x)?, dense(x)?);
    let sums = gpu.zeros(channels)?;
    let sizes = (rows as u32, channels as u32, inner as u32);
    // SAFETY: a dense tensor of these sizes on this device, and sums for all channels.
    unsafe { add_channels(&gpu, element, address(&x)?, sizes, Sum::plain(address(&sums)?))? };
    Ok(Some(sums))
}

/// x W[:, ..inputs]ᵀ + b for x `(…, inputs)`.
pub(in crate::field::ops) fn affine(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    inputs: usize,
) -> Result<Option<Value>> {
    let (outputs, pitch) = weight.dims2()?;
    let rows = x.elem_count() / inputs.max(1);
    let fits = outputs > 0 && rows * outputs <= LARGEST && bias.is_none_or(|bias| is_parameter(bias, x));
    let Some(element) = element(x, &[weight]).filter(|_| fits) else { return Ok(None) };
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    let (gpu, x, weight) = (Gpu::of(x)?, dense(x)?, dense(weight)?);
    let bias = bias.map(dense).transpose()?;
    let y = gpu.output(element, dims)?;
    let bias_at = match &bias {
        Some(bias) => (address(bias)?, bias.dtype() == DType::F32),
        None => (0, false),
    };
    let then = Activation::Identity;
    let (weight_at, time) = (address(&weight)?, None);
    let layer = Layer { element, rows, inputs, outputs, weight: weight_at, pitch, bias: bias_at, time, then };
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { layer.value(&gpu, address(&x)?, 0, y.at())? };
    Ok(Some(y))
}

/// a b for matrices, with sums in F32.
pub(in crate::field::ops) fn matmul(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let ((m, k), (rows, n)) = (a.dims2()?, b.dims2()?);
    let fits = rows == k && m * n <= LARGEST && n > 0;
    let Some(element) = element(a, &[b]).filter(|_| fits) else { return Ok(None) };
    let (gpu, a, b) = (Gpu::of(a)?, dense(a)?, dense(b)?);
    let c = gpu.output(element, (m, n))?;
    let matrix = |at, pitch| Matrix::new(at, element, pitch);
    let product = Product::new(matrix(address(&a)?, k), matrix(address(&b)?, n), matrix(c.at(), n), (m, n, k));
    // SAFETY: dense matrices of these sizes on this device.
    unsafe { gpu.multiply(&product.column_major()?)? };
    Ok(Some(c.tensor()))
}

/// gᵀ x in F32 for matrices `(rows, outputs)` and `(rows, inputs)`.
pub(in crate::field::ops) fn outer(g: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
    let ((rows, outputs), (others, inputs)) = (g.dims2()?, x.dims2()?);
    let fits = rows == others && outputs * inputs <= LARGEST && inputs > 0;
    let Some(element) = element(g, &[x]).filter(|_| fits) else { return Ok(None) };
    let (gpu, g, x) = (Gpu::of(g)?, dense(g)?, dense(x)?);
    let c = gpu.output(Element::F32, (outputs, inputs))?;
    let (a, b) = (Matrix::new(address(&g)?, element, outputs).t(), Matrix::new(address(&x)?, element, inputs));
    let product = Product::new(a, b, Matrix::new(c.at(), Element::F32, inputs), (outputs, inputs, rows));
    // SAFETY: dense matrices of these sizes on this device.
    unsafe { gpu.multiply(&product.column_major()?)? };
    Ok(Some(c.tensor()))
}

/// The convolution of x with a weight, and y's dimensions, if kernels of ours take them.
fn convolution(x: &Tensor, weight: &Tensor, config: &Conv2dConfig) -> Result<Option<(Convolution, [usize; 4])>> {
    let ((images, channels, height, width), (outputs, depth, tall, wide)) = (x.dims4()?, weight.dims4()?);
    let Conv2dConfig { padding, stride, dilation, groups, .. } = *config;
    let Some(element) = element(x, &[weight]) else { return Ok(None) };
    let Some([out_height, out_width]) = windows(x.dims4()?.into(), weight.dims4()?.into(), config) else {
        return Ok(None);
    };
    let columns = channels * tall * wide * out_height * out_width;
    let y = [images, outputs, out_height, out_width];
    let small = [columns, y.iter().product(), weight.elem_count()].iter().all(|count| *count <= LARGEST);
    let fits = outputs > 0 && groups > 0 && outputs % groups == 0 && depth * groups == channels;
    if !(fits && small) {
        return Ok(None);
    }
    let windows = Windows {
        from: 0,
        to: 0,
        images: images as u32,
        channels: channels as u32,
        height: height as u32,
        width: width as u32,
        kernel_height: tall as u32,
        kernel_width: wide as u32,
        out_height: out_height as u32,
        out_width: out_width as u32,
        step: stride as u32,
        padding: padding as u32,
        dilation: dilation as u32,
    };
    Ok(Some((Convolution { element, windows, outputs, groups }, y)))
}

/// x ∗ w; with the feature `cudnn` that is left to cuDNN.
pub(in crate::field::ops) fn convolve(x: &Tensor, weight: &Tensor, config: &Conv2dConfig) -> Result<Option<Value>> {
    if cfg!(feature = "cudnn") {
        return Ok(None);
    }
    let Some((convolution, dims)) = convolution(x, weight, config)? else { return Ok(None) };
    let (gpu, x, weight) = (Gpu::of(x)?, dense(x)?, dense(weight)?);
    let y = gpu.output(convolution.element, dims.to_vec())?;
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { convolution.value(&gpu, address(&x)?, address(&weight)?, y.at())? };
    Ok(Some(y))
}

/// A convolution whose gradients kernels of ours make.
fn pulled_back(x: &Tensor, weight: &Tensor, grad: &Tensor, config: &Conv2dConfig) -> Result<Option<Convolution>> {
    let Some((convolution, dims)) = convolution(x, weight, config)? else { return Ok(None) };
    let fits = grad.dims() == dims && element(x, &[grad]).is_some();
    Ok(fits.then_some(convolution))
}

/// dL/dx of a convolution.
pub(in crate::field::ops) fn pull_input(
    x: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    config: &Conv2dConfig,
) -> Result<Option<Tensor>> {
    let Some(convolution) = pulled_back(x, weight, grad, config)? else { return Ok(None) };
    let (gpu, grad, weight) = (Gpu::of(x)?, dense(grad)?, dense(weight)?);
    let for_x = gpu.output(convolution.element, x.shape())?;
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { convolution.pull_input(&gpu, address(&grad)?, address(&weight)?, for_x.at())? };
    Ok(Some(for_x.tensor()))
}

/// dL/dW of a convolution in F32.
pub(in crate::field::ops) fn pull_weight(
    x: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    config: &Conv2dConfig,
) -> Result<Option<Tensor>> {
    let Some(convolution) = pulled_back(x, weight, grad, config)? else { return Ok(None) };
    let (gpu, x, grad) = (Gpu::of(x)?, dense(x)?, dense(grad)?);
    let sum = gpu.zeros(weight.shape())?;
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { convolution.pull_weight(&gpu, address(&x)?, address(&grad)?, Sum::plain(address(&sum)?))? };
    Ok(Some(sum))
}

/// How planar units at z are launched, if kernels of ours take them; `units` `(count, 2 dim + 1)` are rows of w, b and
/// u.
fn planar_units(z: &Tensor, units: &Tensor, activation: Activation) -> Result<Option<(Element, PlanarUnits)>> {
    let (count, columns) = units.dims2()?;
    let dim = (columns - 1) / 2;
    let fits = dim <= PlanarUnits::MOST && z.elem_count() <= LARGEST / 2 && units.elem_count() <= LARGEST / 64;
    let Some(element) = element(z, &[units]).filter(|_| fits) else { return Ok(None) };
    let sizes = ((z.elem_count() / dim) as u32, dim as u32, count as u32);
    Ok(Some((element, PlanarUnits::new(sizes, activation))))
}

/// f of all rows and, behind it, their divergences.
pub(in crate::field::ops) fn planar(z: &Tensor, units: &Tensor, activation: Activation) -> Result<Option<Value>> {
    let Some((element, call)) = planar_units(z, units, activation)? else { return Ok(None) };
    let (gpu, z, units) = (Gpu::of(z)?, dense(z)?, dense(units)?);
    let both = gpu.output(element, z.elem_count() + call.rows as usize)?;
    let call = PlanarUnits { z: address(&z)?, units: address(&units)?, both: both.at(), ..call };
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { gpu.launch(&call.value(element))? };
    Ok(Some(both))
}

/// The cotangents of z and, if it is wanted, of the units in F32, from that of both results.
pub(in crate::field::ops) fn pull_planar(
    z: &Tensor,
    units: &Tensor,
    activation: Activation,
    grad: &Tensor,
    of_units: bool,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let Some((element, call)) = planar_units(z, units, activation)? else { return Ok(None) };
    if grad.dtype() != z.dtype() {
        bail!("a cotangent in {:?} of planar units at points in {:?}", grad.dtype(), z.dtype())
    }
    let (gpu, z, units, grad) = (Gpu::of(z)?, dense(z)?, dense(units)?, dense(grad)?);
    let of_z = gpu.output(element, z.shape())?;
    let of_units = of_units.then(|| gpu.zeros(units.shape())).transpose()?;
    let sum = of_units.as_ref().map(address).transpose()?;
    let (at_z, at_units, grad) = (address(&z)?, address(&units)?, address(&grad)?);
    let call = PlanarUnits { z: at_z, units: at_units, grad, of_z: of_z.at(), ..call };
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { call.pull(&gpu, element, sum)? };
    Ok(Some((of_z.tensor(), of_units)))
}

/// How the groups of x are normalised, if kernels of ours take them.
fn norm_groups(
    norm: &Norm,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Option<(Element, NormGroups)> {
    let fits = |parameter: Option<&Tensor>| parameter.is_none_or(|parameter| is_parameter(parameter, x));
    let fits = fits(weight) && fits(bias) && x.elem_count() <= LARGEST / 2;
    let element = element(x, &[]).filter(|_| fits)?;
    let is_f32 = |of: Option<&Tensor>| i32::from(of.is_some_and(|of| of.dtype() == DType::F32));
    let (weight_is_f32, bias_is_f32) = (is_f32(weight), is_f32(bias));
    Some((element, NormGroups { weight_is_f32, bias_is_f32, ..NormGroups::new(norm, x.elem_count()) }))
}

/// The normalised x times w plus b.
pub(in crate::field::ops) fn normalise(
    norm: &Norm,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Option<Value>> {
    let Some((element, call)) = norm_groups(norm, x, weight, bias) else { return Ok(None) };
    let (gpu, x) = (Gpu::of(x)?, dense(x)?);
    let (weight, bias) = (weight.map(dense).transpose()?, bias.map(dense).transpose()?);
    let y = gpu.output(element, x.shape())?;
    let at = |of: &Option<Tensor>| of.as_ref().map_or(Ok(0), address);
    let call = NormGroups { x: address(&x)?, weight: at(&weight)?, bias: at(&bias)?, y: y.at(), ..call };
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { gpu.launch(&call.value(element))? };
    Ok(Some(y))
}

/// The gradient of x and, if they are wanted, Σ g x̂ and Σ g per parameter, `(2, parameters)` in F32.
pub(in crate::field::ops) fn pull_norm(
    norm: &Norm,
    x: &Tensor,
    weight: Option<&Tensor>,
    grad: &Tensor,
    sums: bool,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let same = element(x, &[grad]).is_some();
    let Some((element, call)) = norm_groups(norm, x, weight, None).filter(|_| same) else { return Ok(None) };
    let (gpu, x, grad) = (Gpu::of(x)?, dense(x)?, dense(grad)?);
    let weight = weight.map(dense).transpose()?;
    let for_x = gpu.output(element, x.shape())?;
    let sums = sums.then(|| gpu.zeros((2, call.parameters() as usize))).transpose()?;
    let sum = sums.as_ref().map(address).transpose()?;
    let at = weight.as_ref().map_or(Ok(0), address)?;
    let call = NormGroups { x: address(&x)?, weight: at, grad: address(&grad)?, of_x: for_x.at(), ..call };
    // SAFETY: dense tensors of these sizes on this device.
    unsafe { call.pull(&gpu, element, sum)? };
    Ok(Some((for_x.tensor(), sums)))
}
