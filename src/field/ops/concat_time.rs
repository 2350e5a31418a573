//! The linear layer that sees the time: y = [x, t] Wᵀ + b, without making [x, t].
//!
//! Shapes: x `(…, in)`, W `(out, in + 1)` whose last column belongs to t, b `(out)`, y `(…, out)`. Dtypes as
//! [`linear`](super::linear()); t enters in F32 (F64 for F64), and so does its product with W's last column.

use super::chain::{self, Chain, Linked};
use super::linear::{Columns, leading_columns};
use super::precomputed::{Precomputed, hand_over};
use super::sequential::{Timed, no_time};
use super::weight::give;
use crate::Time;
use crate::field::Tangent;
use crate::field::ops::cpu::wide_dtype;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};

/// A linear layer over [x, t]: the "concat" layer of FFJORD.
///
/// It needs the time, so it is no `Module`: call [`forward_at`](Timed::forward_at), or put it into a
/// [`Sequential`](super::Sequential) with `add_timed`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_ode::{Time, ops::Timed};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = candle_ode::ops::concat_linear(2, 8, vb)?;         // weight (8, 3), bias (8)
/// let y = layer.forward_at(&Time::new(0.5, &Device::Cpu), &Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [4, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConcatLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// A linear layer over [x, t]; parameters `weight` `(output, input + 1)` and `bias` `(output)`, initialised as
/// `linear(input + 1, output)`.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn concat_linear(input: usize, output: usize, vb: VarBuilder) -> Result<ConcatLinear> {
    let weight = vb.get_with_hints((output, input + 1), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let bound = 1.0 / ((input + 1) as f64).sqrt();
    let bias = vb.get_with_hints(output, "bias", Init::Uniform { lo: -bound, up: bound })?;
    Ok(ConcatLinear::new(weight, Some(bias)))
}

impl ConcatLinear {
    /// A layer of existing tensors: `weight` `(output, input + 1)`, `bias` `(output)`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// W, `(output, input + 1)`; the last column belongs to t.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// b, `(output)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    fn inputs(&self) -> Result<usize> {
        match self.weight.dims2()? {
            (_, 0) => candle_core::bail!("concat-linear: the weight has no column for the time"),
            (_, columns) => Ok(columns - 1),
        }
    }

    /// b + t w, the bias at time `t` in F32 or F64, where w is W's last column.
    fn bias_at(&self, t: &Tensor) -> Result<Tensor> {
        let column = self.weight.detach().narrow(1, self.inputs()?, 1)?.flatten_all()?.to_dtype(t.dtype())?;
        let moved = column.broadcast_mul(&t.detach())?;
        match &self.bias {
            Some(bias) => {
                let ready = Precomputed::of((moved + bias.detach().to_dtype(t.dtype())?)?);
                t.apply_op2(bias, TimeBias { column, ready })
            }
            None => column.broadcast_mul(t),
        }
    }
}

impl Timed for ConcatLinear {
    fn forward_at(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        chain::run([self], Some(t), x)
    }
}

impl Linked for ConcatLinear {
    fn link(&self, t: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
        t.is_some_and(|t| chain.linear(x, &self.weight, self.bias.as_ref(), Some(t)))
    }

    fn value(&self, t: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        let t = t.ok_or_else(no_time)?;
        let time = match wide_dtype(x.dtype()) {
            DType::F64 => t.like(&x.flatten_all()?)?.reshape(())?,
            _ => t.tensor()?,
        };
        let columns = Columns { inputs: self.inputs()?, beyond: Some(time.detach()) };
        leading_columns(x, &self.weight, Some(&self.bias_at(&time)?), columns)
    }
}

impl Tangent for ConcatLinear {
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let columns = Columns { inputs: self.inputs()?, beyond: None };
        Ok((self.forward_at(t, y)?, leading_columns(v, &self.weight, None, columns)?))
    }
}

/// (t, b) ↦ b + t w. The gradient of w is part of W's, which the linear op gives; here w is a constant.
struct TimeBias {
    column: Tensor,
    ready: Precomputed,
}

impl TimeBias {
    fn label(&self) -> &'static str {
        "time-bias"
    }
}

impl CustomOp2 for TimeBias {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.ready.cpu(self.label())
    }

    hand_over!(ready, 2);

    fn bwd(&self, t: &Tensor, bias: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach();
        let for_t = t.track_op().then(|| (&grad * &self.column)?.sum_all()).transpose()?;
        let for_bias = if bias.track_op() { give(bias, &grad)? } else { None };
        Ok((for_t, for_bias))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check, check_tangent, distance, noise, values};
    use super::*;
    use candle_core::{Device, Var};

    fn layer(dtype: DType) -> ConcatLinear {
        let cast = |x: Tensor| x.to_dtype(dtype).unwrap();
        ConcatLinear::new(cast(noise(&[4, 4], 1)), Some(cast(noise(&[4], 2))))
    }

    fn concatenated(x: &Tensor, t: f64, layer: &ConcatLinear) -> Tensor {
        let mut dims = x.dims().to_vec();
        *dims.last_mut().unwrap() = 1;
        let t = (Tensor::ones(dims, x.dtype(), x.device()).unwrap() * t).unwrap();
        let joined = Tensor::cat(&[x, &t], x.rank() - 1).unwrap();
        joined.broadcast_matmul(&layer.weight().t().unwrap()).unwrap().broadcast_add(layer.bias().unwrap()).unwrap()
    }

    #[test]
    fn it_equals_a_linear_layer_on_the_concatenation() {
        let layer = layer(DType::F64);
        let t = Time::new(0.3, &Device::Cpu);
        for shape in [&[5, 3][..], &[2, 5, 3], &[1, 3]] {
            let x = noise(shape, 3);
            let got = layer.forward_at(&t, &x).unwrap();
            assert!(distance(&got, &concatenated(&x, 0.3, &layer)) < 1e-15);
        }
        assert_eq!(layer.forward_at(&t, &noise(&[3], 3)).unwrap().dims(), [4]);
    }

    #[test]
    fn gradients_match_finite_differences() {
        let t = Time::new(-0.7, &Device::Cpu);
        check(
            &|args| ConcatLinear::new(args[1].clone(), Some(args[2].clone())).forward_at(&t, &args[0]),
            &[noise(&[5, 3], 3), noise(&[4, 4], 1), noise(&[4], 2)],
        );
        check(
            &|args| ConcatLinear::new(args[1].clone(), None).forward_at(&t, &args[0]),
            &[noise(&[2, 5, 3], 3), noise(&[4, 4], 1)],
        );
    }

    #[test]
    fn the_time_gets_its_gradient() {
        for dtype in [DType::F16, DType::F32, DType::F64] {
            let layer = layer(dtype);
            let t = Time::new(0.3, &Device::Cpu).tracked();
            let x = noise(&[6, 3], 4).to_dtype(dtype).unwrap();
            let y = layer.forward_at(&t, &x).unwrap();
            let grads = y.to_dtype(DType::F64).unwrap().sum_all().unwrap().backward().unwrap();
            let total: f64 = t.leaves().iter().filter_map(|l| grads.get(l)).map(|g| values(g)[0]).sum();
            let exact = 6.0 * values(&layer.weight().narrow(1, 3, 1).unwrap()).iter().sum::<f64>();
            assert!((total - exact).abs() < 1e-6, "{dtype:?}: {total} and {exact}");
        }
    }

    #[test]
    fn tangents_match_pullbacks_and_are_differentiable() {
        let t = Time::new(0.3, &Device::Cpu);
        let layer = layer(DType::F64);
        check_tangent(&layer, &|args| layer.forward_at(&t, &args[0]), &noise(&[5, 3], 3));
        let pushed =
            |args: &[Tensor]| Ok(ConcatLinear::new(args[0].clone(), None).tangent(&t, &noise(&[5, 3], 5), &args[1])?.1);
        check(&pushed, &[noise(&[4, 4], 1), noise(&[5, 3], 3)]);
    }

    #[test]
    fn in_f16_the_sums_over_the_batch_are_in_f32() {
        let layer = layer(DType::F16);
        let weight = Var::from_tensor(layer.weight()).unwrap();
        let layer = ConcatLinear::new(weight.as_tensor().clone(), None);
        let x = Tensor::ones((4096, 3), DType::F16, &Device::Cpu).unwrap();
        let y = layer.forward_at(&Time::new(0.5, &Device::Cpu), &x).unwrap();
        let grad = y.backward().unwrap().get(&weight).unwrap().clone();
        assert_eq!(values(&grad), [4096.0, 4096.0, 4096.0, 2048.0].repeat(4));
    }
}
