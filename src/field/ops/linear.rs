//! Linear layers: y = x Wᵀ + b.
//!
//! Shapes: x `(…, in)` of any rank ≥ 1, W `(out, in)`, b `(out)`, y `(…, out)`. Dtypes: x and W share one of F16, BF16,
//! F32, F64; b has theirs, or F32. In half precision every dot product is accumulated in F32, also where Candle's is
//! not (one row, or one column); dL/dW and dL/db are summed over the batch in F32, and F32 is what a solve receives.

use super::bias::{add_channels, sum_channels};
use super::chain::{self, Chain, Linked};
use super::cpu::{Element, dense, dense_wide, wide_dtype, with_element};
use super::precomputed::{Precomputed, hand_over};
use super::product::{self, multiply};
use super::weight::give;
use crate::Time;
use crate::error::OdeError;
use crate::field::Tangent;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, DType, Layout, Module, Result, Shape, Tensor, WithDType, bail};
use candle_nn::VarBuilder;

/// A linear layer, y = x Wᵀ + b: the twin of [`candle_nn::Linear`].
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F16, &Device::Cpu);
/// let layer = candle_ode::ops::linear(3, 1, vb)?;
/// let x = Tensor::ones((4096, 3), DType::F16, &Device::Cpu)?;
/// let grads = layer.forward(&x)?.backward()?;
/// // The batch was summed in F32; a sum in F16 would have stopped at 2048.
/// let bias = grads.get(layer.bias().unwrap()).unwrap().to_dtype(DType::F32)?;
/// assert_eq!(bias.to_vec1::<f32>()?, [4096.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// A linear layer with bias; parameters `weight` `(output, input)` and `bias` `(output)`, initialised as candle-nn
/// does.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn linear(input: usize, output: usize, vb: VarBuilder) -> Result<Linear> {
    let layer = candle_nn::linear(input, output, vb)?;
    Ok(Linear::new(layer.weight().clone(), layer.bias().cloned()))
}

/// A linear layer without bias; parameter `weight` `(output, input)`, initialised as candle-nn does.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn linear_no_bias(input: usize, output: usize, vb: VarBuilder) -> Result<Linear> {
    let layer = candle_nn::linear_no_bias(input, output, vb)?;
    Ok(Linear::new(layer.weight().clone(), None))
}

/// [`linear`] if `bias`, else [`linear_no_bias`].
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn linear_b(input: usize, output: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    if bias { linear(input, output, vb) } else { linear_no_bias(input, output, vb) }
}

/// y = x Wᵀ + b with tensors of any origin (a hypernetwork's, say); all three receive gradients.
///
/// # Errors
/// Shapes or dtypes that do not fit; whatever the device reports.
pub fn affine(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    leading_columns(x, weight, bias, Columns::all(weight)?)
}

impl Linear {
    /// A layer of existing tensors: `weight` `(output, input)`, `bias` `(output)`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// W, `(output, input)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// b, `(output)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        chain::run([self], None, x)
    }
}

impl Linked for Linear {
    fn link(&self, _: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
        chain.linear(x, &self.weight, self.bias.as_ref(), None)
    }

    fn value(&self, _: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        affine(x, &self.weight, self.bias.as_ref())
    }
}

impl Tangent for Linear {
    fn tangent(&self, _: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok((self.forward(y)?, affine(v, &self.weight, None)?))
    }
}

/// Which columns of W multiply x, and what stands for x in the one beyond, if there is one.
#[derive(Clone, Debug)]
pub(super) struct Columns {
    /// The leading columns that x multiplies.
    pub(super) inputs: usize,
    /// The value, a 0-d tensor in F32 or F64, whose product with column `inputs` came in through the bias.
    pub(super) beyond: Option<Tensor>,
}

impl Columns {
    fn all(weight: &Tensor) -> Result<Self> {
        Ok(Self { inputs: weight.dims2()?.1, beyond: None })
    }
}

/// y = x W[:, ..inputs]ᵀ + b; W's gradient has all columns: that of the one beyond is `beyond` · dL/db, the others' 0.
pub(super) fn leading_columns(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, columns: Columns) -> Result<Tensor> {
    validate(x, weight, bias, columns.inputs)?;
    let ready = off_cpu(x, weight, bias, columns.inputs)?;
    let op = LinearOp { columns, ready };
    match bias {
        Some(bias) => x.apply_op3(weight, bias, op),
        None => x.apply_op2(weight, op),
    }
}

/// The value where x is not on the CPU: by kernels of ours or of Candle's ops.
fn off_cpu(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, inputs: usize) -> Result<Precomputed> {
    #[cfg(feature = "cuda")]
    if let Some(value) = super::cuda::affine(x, weight, bias, inputs)? {
        return Ok(Precomputed::on_device(value));
    }
    Precomputed::off_cpu(x, || composed(&x.detach(), &weight.detach(), bias, inputs))
}

fn validate(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, inputs: usize) -> Result<()> {
    let outputs = weight.dims2()?.0;
    if x.rank() == 0 || x.dim(D::Minus1)? != inputs {
        bail!("linear: x has shape {:?}, its last dimension must be {inputs}", x.shape())
    }
    if x.dtype() != weight.dtype() {
        let hint = "a linear layer's weight must have the dtype of its input";
        let what = format!("the weight of a linear layer on {:?} input", x.dtype());
        return Err(OdeError::UnsupportedDType { what, dtype: weight.dtype(), hint }.into());
    }
    let Some(bias) = bias else { return Ok(()) };
    if bias.dims() != [outputs] {
        bail!("linear: the bias has shape {:?}, it must be [{outputs}]", bias.shape())
    }
    if bias.dtype() != x.dtype() && bias.dtype() != wide_dtype(x.dtype()) {
        let hint = "a bias must have the dtype of the input, or F32";
        let what = format!("the bias of a linear layer on {:?} input", x.dtype());
        return Err(OdeError::UnsupportedDType { what, dtype: bias.dtype(), hint }.into());
    }
    Ok(())
}

struct LinearOp {
    columns: Columns,
    ready: Precomputed,
}

type View<'a> = (&'a CpuStorage, &'a Layout);

impl LinearOp {
    fn label(&self) -> &'static str {
        "linear"
    }

    fn on_cpu(&self, x: View<'_>, weight: View<'_>, bias: Option<View<'_>>) -> Result<(CpuStorage, Shape)> {
        with_element!(x.0.dtype(), self.label(), T => {
            let mut y = product::<T>(x, (weight.0, &weight.1.narrow(1, 0, self.columns.inputs)?))?;
            let outputs = weight.1.dims()[0];
            if let Some((bias, layout)) = bias {
                let bias = dense_wide::<<T as Element>::Wide>(bias, layout)?;
                add_channels(&mut y, &bias, 1);
            }
            let mut dims = x.1.dims().to_vec();
            if let Some(last) = dims.last_mut() {
                *last = outputs;
            }
            Ok((<T as WithDType>::to_cpu_storage_owned(y), Shape::from(dims)))
        })
    }

    fn pull(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Columns { inputs, beyond } = &self.columns;
        let outputs = weight.dim(0)?;
        let grad = grad.detach().reshape(((), outputs))?;
        let for_x = if x.track_op() {
            let weight = weight.detach().narrow(1, 0, *inputs)?;
            Some(matmul(&grad, &weight)?.reshape(x.shape())?)
        } else {
            None
        };
        let tracked_bias = bias.filter(|bias| bias.track_op());
        let wide = wide_dtype(x.dtype());
        let sums = match (tracked_bias, beyond) {
            (Some(_), _) | (None, Some(_)) => Some(sum_channels(&grad, 1)?),
            (None, None) => None,
        };
        let for_weight = if weight.track_op() {
            let mut contribution = outer(&grad, &x.detach().reshape(((), *inputs))?)?;
            let more = weight.dim(1)? - inputs;
            if more > 0 {
                let last = match (beyond, &sums) {
                    (Some(value), Some(sums)) => sums.broadcast_mul(value)?.reshape((outputs, 1))?,
                    _ => Tensor::zeros((outputs, more), wide, grad.device())?,
                };
                contribution = Tensor::cat(&[contribution, last], 1)?;
            }
            give(weight, &contribution)?
        } else {
            None
        };
        let for_bias = match (tracked_bias, &sums) {
            (Some(bias), Some(sums)) => give(bias, sums)?,
            _ => None,
        };
        Ok((for_x, for_weight, for_bias))
    }
}

impl CustomOp2 for LinearOp {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((x, lx), (w, lw), None)
    }

    hand_over!(ready, 2);

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.pull(x, w, None, grad).map(|(x, w, _)| (x, w))
    }
}

impl CustomOp3 for LinearOp {
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
        self.on_cpu((x, lx), (w, lw), Some((b, lb)))
    }

    hand_over!(ready, 3);

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.pull(x, w, Some(b), grad)
    }
}

/// x Wᵀ for x `(…, k)` and W `(n, k)`, row-major, every dot product accumulated in F32 at least.
fn product<T: Element>(x: View<'_>, weight: View<'_>) -> Result<Vec<T>> {
    let (n, k) = weight.1.shape().dims2()?;
    let m = x.1.shape().elem_count() / k.max(1);
    if m * n * k == 0 {
        return Ok(vec![T::from_f64(0.0); m * n]);
    }
    let thin = (m == 1 || n == 1) && T::DTYPE != <T::Wide as WithDType>::DTYPE;
    if thin {
        let (x, weight) = (dense_wide::<T::Wide>(x.0, x.1)?, dense_wide::<T::Wide>(weight.0, weight.1)?);
        let y = dense_product(&x, &weight, (m, n, k))?;
        let mut narrow = vec![T::from_f64(0.0); m * n];
        T::narrow(&y, &mut narrow);
        return Ok(narrow);
    }
    match (x.1.contiguous_offsets(), weight.1.contiguous_offsets()) {
        (Some((start, _)), Some((weight_start, _))) => {
            let x_layout = Layout::contiguous_with_offset((m, k), start);
            let weight_layout = Layout::contiguous_with_offset((n, k), weight_start).transpose(0, 1)?;
            T::cpu_storage_data(multiply(x.0, &x_layout, weight.0, &weight_layout)?)
        }
        _ => dense_product::<T>(&dense(x.0, x.1)?, &dense(weight.0, weight.1)?, (m, n, k)),
    }
}

fn dense_product<T: Element>(x: &[T], weight: &[T], (m, n, k): (usize, usize, usize)) -> Result<Vec<T>> {
    let (x, weight) = (T::to_cpu_storage(x), T::to_cpu_storage(weight));
    let weight_layout = Layout::contiguous((n, k)).transpose(0, 1)?;
    T::cpu_storage_data(multiply(&x, &Layout::contiguous((m, k)), &weight, &weight_layout)?)
}

/// gᵀ x in F32 (F64 for F64) for matrices `(rows, outputs)` and `(rows, inputs)`.
fn outer(g: &Tensor, x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(product) = super::cuda::outer(g, x)? {
        return Ok(product);
    }
    let wide = wide_dtype(x.dtype());
    product::matmul(&g.to_dtype(wide)?.t()?, &x.to_dtype(wide)?)
}

/// a b for matrices, every dot product accumulated in F32 at least.
fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(product) = super::cuda::matmul(a, b)? {
        return Ok(product);
    }
    let half = matches!(a.dtype(), DType::F16 | DType::BF16);
    let (rows, columns) = (a.dim(0)?, b.dim(1)?);
    if half && (rows == 1 || columns == 1) {
        return product::matmul(&a.to_dtype(DType::F32)?, &b.to_dtype(DType::F32)?)?.to_dtype(a.dtype());
    }
    product::matmul(a, b)
}

/// The same value made of Candle's ops, for devices without kernels of ours.
fn composed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, inputs: usize) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = weight.dim(0)?;
    }
    let weight = weight.narrow(1, 0, inputs)?.contiguous()?;
    let y = matmul(&x.reshape(((), inputs))?, &weight.t()?)?;
    let y = match bias {
        Some(bias) => {
            let wide = wide_dtype(x.dtype());
            y.to_dtype(wide)?.broadcast_add(&bias.detach().to_dtype(wide)?)?.to_dtype(x.dtype())?
        }
        None => y,
    };
    y.reshape(dims)
}

#[cfg(test)]
mod tests;
