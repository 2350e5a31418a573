//! Linear layers whose weight and bias are functions of the time: y = x W(t)ᵀ + b(t).
//!
//! Shapes: x `(…, in)`, W(t) `(out, in)`, b(t) `(out)`, y `(…, out)`. Dtypes as [`linear`](super::linear()). W(t) and
//! b(t) are part of Candle's graph: what they are made of gets its gradient through them, after the sums over the
//! batch. Inside a solve on the CPU the layers are part of chains.

use super::activation::{Activation, sigmoid};
use super::chain::{self, Chain, Linked, by_ops, column};
use super::linear::{Linear, affine, linear};
use super::mlp::Mlp;
use super::sequential::{Timed, no_time};
use crate::Time;
use crate::error::OdeError;
use crate::field::Tangent;
use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// A linear layer whose weight and bias a network of its own makes of the time: the "hyper" layer of FFJORD, where that
/// network is linear.
///
/// It needs the time, so it is no `Module`: call [`forward_at`](Timed::forward_at), or put it into a
/// [`Sequential`](super::Sequential) with `add_timed`.
///
/// Cost: beside the product, one pass of a row through the network in each evaluation.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_ode::{Time, ops::Timed};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = candle_ode::ops::hyper_linear(2, 8, &[32], vb)?;   // t → 32 → 8 · 2 + 8
/// let y = layer.forward_at(&Time::new(0.5, &Device::Cpu), &Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [4, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Reference
/// W. Grathwohl, R. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud, *FFJORD*, arXiv 1810.01367.
#[derive(Clone, Debug)]
pub struct HyperLinear {
    hyper: Mlp,
    input: usize,
    output: usize,
}

/// A [`HyperLinear`] whose network has hidden layers of these widths, with tanh between them; its parameters are those
/// of an [`Mlp`] under `hyper`.
///
/// # Errors
/// A size of 0; whatever the `VarBuilder` reports.
pub fn hyper_linear(input: usize, output: usize, hidden: &[usize], vb: VarBuilder) -> Result<HyperLinear> {
    let Some(made) = input.checked_add(1).and_then(|columns| columns.checked_mul(output)).filter(|_| input > 0) else {
        let hint = "give the widths of x and y, neither of them 0";
        let value = format!("{input} → {output}");
        return Err(OdeError::Setting { setting: "hyper_linear sizes", value, hint }.into());
    };
    let sizes: Vec<usize> = [1].into_iter().chain(hidden.iter().copied()).chain([made]).collect();
    Ok(HyperLinear { hyper: Mlp::new(&sizes, Activation::Tanh, vb.pp("hyper"))?, input, output })
}

impl HyperLinear {
    /// W(t), `(output, input)`, and b(t), `(output)`, for x of this dtype.
    fn at(&self, t: &Time, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let made = self.hyper.of_time(t, x)?;
        let count = self.output * self.input;
        Ok((made.narrow(0, 0, count)?.reshape((self.output, self.input))?, made.narrow(0, count, self.output)?))
    }

    fn link_at(&self, t: &Time, x: &Tensor, chain: &mut Chain) -> bool {
        chain.given(x, [self.output, self.input], || self.hyper.of_time(t, x))
    }
}

/// A linear layer that the time opens and moves: y = (x Wᵀ + b) ∘ σ(t g + c) + t s, the "concat-squash" layer of
/// FFJORD.
///
/// As (x Wᵀ) ∘ σ + (σ ∘ b + t s) in chains (inside a solve on the CPU), where the gate multiplies the product before it
/// is stored, and as x (σ ∘ W)ᵀ + (σ ∘ b + t s) elsewhere, so that nothing of the batch's size is made beside y. The
/// gradients of W and b are summed in F32 in chains, and rounded to their dtype once per evaluation elsewhere.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_ode::{Time, ops::{self, Activation, Timed}};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let field = ops::seq()
///     .add_timed(ops::concat_squash_linear(2, 64, vb.pp(0))?)
///     .add(Activation::Softplus)
///     .add_timed(ops::concat_squash_linear(64, 2, vb.pp(1))?);
/// let y = field.forward_at(&Time::new(0.5, &Device::Cpu), &Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [4, 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Reference
/// As [`HyperLinear`].
#[derive(Clone, Debug)]
pub struct ConcatSquashLinear {
    weight: Tensor,
    bias: Tensor,
    gate: Linear,
    shift: Tensor,
}

/// A [`ConcatSquashLinear`]; parameters `layer.weight` `(output, input)`, `layer.bias`, `gate.weight` `(output, 1)`,
/// `gate.bias` and `shift.weight` `(output, 1)`, initialised as linear layers.
///
/// # Errors
/// Whatever the `VarBuilder` reports.
pub fn concat_squash_linear(input: usize, output: usize, vb: VarBuilder) -> Result<ConcatSquashLinear> {
    let shift = vb.get_with_hints((output, 1), "shift.weight", Init::Uniform { lo: -1.0, up: 1.0 })?;
    let layer = vb.pp("layer");
    let weight = layer.get_with_hints((output, input), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let bound = 1.0 / (input as f64).sqrt();
    let bias = layer.get_with_hints(output, "bias", Init::Uniform { lo: -bound, up: bound })?;
    Ok(ConcatSquashLinear { weight, bias, gate: linear(1, output, vb.pp("gate"))?, shift })
}

impl ConcatSquashLinear {
    /// σ(t g + c) and t s, both `(output)`, for x of this dtype.
    fn gate_and_shift(&self, t: &Time, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let t = column(t, x)?;
        let gate = by_ops(|| sigmoid(&self.gate.forward(&t)?))?.flatten_all()?;
        Ok((gate, self.shift.broadcast_mul(&t)?.flatten_all()?))
    }

    /// σ ∘ W, `(output, input)`, and σ ∘ b + t s, `(output)`, for x of this dtype.
    fn at(&self, t: &Time, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (gate, shift) = self.gate_and_shift(t, x)?;
        let bias = (&self.bias * &gate)?.add(&shift)?;
        Ok((self.weight.broadcast_mul(&gate.unsqueeze(1)?)?, bias))
    }

    fn link_at(&self, t: &Time, x: &Tensor, chain: &mut Chain) -> bool {
        chain.gated(x, (&self.weight, &self.bias), || {
            let (gate, shift) = self.gate_and_shift(t, x)?;
            Tensor::cat(&[gate, shift], 0)
        })
    }
}

macro_rules! layer_of_time {
    ($layer:ty) => {
        impl Timed for $layer {
            fn forward_at(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
                chain::run([self], Some(t), x)
            }
        }

        impl Linked for $layer {
            fn link(&self, t: Option<&Time>, x: &Tensor, chain: &mut Chain) -> bool {
                t.is_some_and(|t| self.link_at(t, x, chain))
            }

            fn value(&self, t: Option<&Time>, x: &Tensor) -> Result<Tensor> {
                let (weight, bias) = self.at(t.ok_or_else(no_time)?, x)?;
                affine(x, &weight, Some(&bias))
            }
        }

        impl Tangent for $layer {
            fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
                let (weight, bias) = self.at(t, y)?;
                Ok((affine(y, &weight, Some(&bias))?, affine(v, &weight, None)?))
            }
        }
    };
}
layer_of_time!(HyperLinear);
layer_of_time!(ConcatSquashLinear);

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check, check_tangent, distance, noise, values};
    use super::*;
    use crate::field::session::{Call, Session};
    use candle_core::{DType, Device};
    use std::collections::HashMap;

    fn tensors(shapes: &[(&str, &[usize])]) -> HashMap<String, Tensor> {
        shapes.iter().enumerate().map(|(n, (name, shape))| ((*name).to_owned(), noise(shape, n as u64 + 1))).collect()
    }

    fn from(tensors: HashMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
        VarBuilder::from_tensors(tensors, dtype, &Device::Cpu)
    }

    const HYPER: [(&str, &[usize]); 4] =
        [("hyper.0.weight", &[5, 1]), ("hyper.0.bias", &[5]), ("hyper.1.weight", &[8, 5]), ("hyper.1.bias", &[8])];
    const SQUASH: [(&str, &[usize]); 5] = [
        ("layer.weight", &[2, 3]),
        ("layer.bias", &[2]),
        ("gate.weight", &[2, 1]),
        ("gate.bias", &[2]),
        ("shift.weight", &[2, 1]),
    ];

    fn hyper(tensors: HashMap<String, Tensor>) -> HyperLinear {
        hyper_linear(3, 2, &[5], from(tensors, DType::F64)).unwrap()
    }

    fn squash(tensors: HashMap<String, Tensor>) -> ConcatSquashLinear {
        concat_squash_linear(3, 2, from(tensors, DType::F64)).unwrap()
    }

    #[test]
    fn a_network_makes_the_weights_of_the_time() {
        let all = tensors(&HYPER);
        let t = Time::new(0.3, &Device::Cpu);
        for shape in [&[4, 3][..], &[2, 4, 3], &[3]] {
            let x = noise(shape, 9);
            let hidden = (&all["hyper.0.weight"].flatten_all().unwrap() * 0.3).unwrap();
            let hidden = (hidden + &all["hyper.0.bias"]).unwrap().tanh().unwrap().unsqueeze(1).unwrap();
            let made = all["hyper.1.weight"].matmul(&hidden).unwrap().flatten_all().unwrap();
            let made = values(&(made + &all["hyper.1.bias"]).unwrap());
            let rows = values(&x);
            let exact: Vec<f64> = rows
                .chunks(3)
                .flat_map(|x| {
                    let made = &made;
                    (0..2).map(move |o| (0..3).map(|i| x[i] * made[3 * o + i]).sum::<f64>() + made[6 + o])
                })
                .collect();
            let mut dims = shape.to_vec();
            *dims.last_mut().unwrap() = 2;
            let exact = Tensor::from_vec(exact, dims, &Device::Cpu).unwrap();
            assert!(distance(&hyper(all.clone()).forward_at(&t, &x).unwrap(), &exact) < 1e-14, "{shape:?}");
        }
    }

    #[test]
    fn the_time_opens_a_gate_and_shifts() {
        let (all, t, x) = (tensors(&SQUASH), 0.3, noise(&[4, 3], 9));
        let of = |name: &str| values(&all[name]);
        let (w, b, g, c, s) =
            (of("layer.weight"), of("layer.bias"), of("gate.weight"), of("gate.bias"), of("shift.weight"));
        let rows = values(&x);
        let value = |row: usize, o: usize| {
            let product = (0..3).map(|i| rows[3 * row + i] * w[3 * o + i]).sum::<f64>() + b[o];
            product / (1.0 + (-(t * g[o] + c[o])).exp()) + t * s[o]
        };
        let exact: Vec<f64> = (0..4).flat_map(|row| [value(row, 0), value(row, 1)]).collect();
        let exact = Tensor::from_vec(exact, (4, 2), &Device::Cpu).unwrap();
        let got = squash(all).forward_at(&Time::new(t, &Device::Cpu), &x).unwrap();
        assert!(distance(&got, &exact) < 1e-14);
    }

    #[test]
    fn gradients_match_finite_differences() {
        let t = Time::new(-0.7, &Device::Cpu);
        let named = |shapes: &[(&str, &[usize])], args: &[Tensor]| {
            shapes.iter().zip(&args[1..]).map(|((name, _), x)| ((*name).to_owned(), x.clone())).collect()
        };
        let args = |shapes: &[(&str, &[usize])]| -> Vec<Tensor> {
            let all = tensors(shapes);
            std::iter::once(noise(&[5, 3], 7)).chain(shapes.iter().map(|(name, _)| all[*name].clone())).collect()
        };
        check(&|all| hyper(named(&HYPER, all)).forward_at(&t, &all[0]), &args(&HYPER));
        check(&|all| squash(named(&SQUASH, all)).forward_at(&t, &all[0]), &args(&SQUASH));
    }

    #[test]
    fn tangents_match_pullbacks() {
        let t = Time::new(0.3, &Device::Cpu);
        let (hyper, squash) = (hyper(tensors(&HYPER)), squash(tensors(&SQUASH)));
        check_tangent(&hyper, &|args| hyper.forward_at(&t, &args[0]), &noise(&[5, 3], 3));
        check_tangent(&squash, &|args| squash.forward_at(&t, &args[0]), &noise(&[5, 3], 3));
    }

    /// Whether both layers, one behind the other, are one op on an x of that dtype: their parts of Candle's graph then
    /// begin at weights, and no result of a layer lies between; with their tangents, too.
    #[test]
    fn inside_a_solve_they_are_one_op() {
        for (dtype, is_one) in [(DType::F32, true), (DType::F16, true), (DType::BF16, true), (DType::F64, false)] {
            let all: HashMap<_, _> = HYPER.into_iter().chain(SQUASH).collect::<Vec<_>>().into_iter().collect();
            let leaves: HashMap<String, Tensor> = all
                .into_iter()
                .map(|(name, shape)| {
                    let shape = if name == "layer.weight" { &[2, 2] } else { shape };
                    let values = noise(shape, 1).to_dtype(dtype).unwrap();
                    (name.to_owned(), candle_core::Var::from_tensor(&values).unwrap().as_tensor().clone())
                })
                .collect();
            let vb = || from(leaves.clone(), dtype);
            let layers = crate::ops::seq()
                .add_timed(hyper_linear(3, 2, &[5], vb()).unwrap())
                .add(Activation::Tanh)
                .add_timed(concat_squash_linear(2, 2, vb()).unwrap());
            let leaves: Vec<Tensor> = leaves.into_values().collect();
            let t = Time::new(0.3, &Device::Cpu);
            let x = candle_core::Var::from_tensor(&noise(&[5, 3], 9).to_dtype(dtype).unwrap()).unwrap();
            let hidden = |y: &Tensor| y.sorted_nodes().iter().filter(|node| node.dims() == [5, 2]).count();
            let count = || hidden(&layers.forward_at(&t, &x).unwrap());
            let session = Session::new(&leaves, Default::default(), true);
            // The value, and where layers run one by one the two results before it.
            assert_eq!(session.open(Call::Graph, count).0, if is_one { 1 } else { 3 }, "{dtype:?}");
            assert_eq!(count(), 3, "outside of a solve");
            let v = Tensor::stack(&[x.as_tensor(), x.as_tensor()], 0).unwrap();
            let along = || hidden(&layers.tangents(&t, &x, &v).unwrap().1);
            assert_eq!(session.open(Call::Graph, along).0 == 0, is_one, "tangents in {dtype:?}");
            assert!(along() > 0, "tangents outside of a solve");
        }
    }

    #[test]
    fn in_half_precision_the_batch_is_summed_in_f32() {
        for dtype in [DType::F16, DType::BF16] {
            let layer = concat_squash_linear(3, 2, from(tensors(&SQUASH), dtype)).unwrap();
            let bias = candle_core::Var::from_tensor(&layer.bias).unwrap();
            let layer = ConcatSquashLinear { bias: bias.as_tensor().clone(), ..layer };
            let t = Time::new(0.3, &Device::Cpu);
            let x = Tensor::ones((4096, 3), dtype, &Device::Cpu).unwrap();
            let grads = layer.forward_at(&t, &x).unwrap().backward().unwrap();
            let gate = sigmoid(&layer.gate.forward(&column(&t, &x).unwrap()).unwrap()).unwrap();
            let exact = (gate.to_dtype(DType::F64).unwrap().flatten_all().unwrap() * 4096.0).unwrap();
            assert!(distance(grads.get(&bias).unwrap(), &exact) < 1e-2, "{dtype:?}");
        }
    }
}
