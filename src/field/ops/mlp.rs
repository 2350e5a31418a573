//! The multilayer perceptron: linear layers with an activation between them, optionally seeing the time.

use super::Activation;
use super::chain::{self, Linked, Stacked};
use super::concat_time::{ConcatLinear, concat_linear};
use super::linear::{Linear, linear};
use super::sequential::{Layers, Timed};
use crate::Time;
use crate::error::OdeError;
use crate::field::Tangent;
use crate::field::bare::{Bare, Site};
use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

/// Linear layers of sizes `sizes[0] → sizes[1] → …` with an activation after each but the last.
///
/// Parameters: `0.weight`, `0.bias`, `1.weight`, … With [`in_time`](MlpBuilder::in_time) every layer sees [x, t] and
/// its weight has one column more.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_ode::{Time, ops::{Activation, Mlp, Timed}};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let x = Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?;
/// let plain = Mlp::new(&[2, 64, 64, 2], Activation::Tanh, vb.pp("plain"))?;
/// assert_eq!(plain.forward(&x)?.dims(), [4, 2]);
/// let field = Mlp::builder(&[2, 64, 2], Activation::Softplus).in_time().build(vb.pp("field"))?;
/// assert_eq!(field.forward_at(&Time::new(0.5, &Device::Cpu), &x)?.dims(), [4, 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mlp {
    layers: Vec<Stage>,
    activation: Activation,
}

/// What an [`Mlp`] is to be.
#[derive(Clone, Debug)]
#[must_use = "call .build(vb)"]
pub struct MlpBuilder {
    sizes: Vec<usize>,
    activation: Activation,
    in_time: bool,
}

impl Mlp {
    /// An MLP that does not see the time.
    ///
    /// # Errors
    /// Fewer than two sizes, or a size of 0; whatever the `VarBuilder` reports.
    pub fn new(sizes: &[usize], activation: Activation, vb: VarBuilder) -> Result<Self> {
        Self::builder(sizes, activation).build(vb)
    }

    /// Starts an MLP; by default it does not see the time.
    pub fn builder(sizes: &[usize], activation: Activation) -> MlpBuilder {
        MlpBuilder { sizes: sizes.to_vec(), activation, in_time: false }
    }

    /// The value of an MLP of one input at the time itself, `(outputs)`, in the dtype of `like`: for networks that make
    /// weights of the time.
    ///
    /// Inside a solve, with kernels of ours, all layers are one op, which reads their weights where they lie; as with
    /// layers on the state, the field itself makes no backward pass through it.
    ///
    /// # Errors
    /// [`OdeError::Setting`] from an MLP of more inputs, or one that was built to see the time beside them; else as
    /// [`forward`](Module::forward).
    pub fn of_time(&self, t: &Time, like: &Tensor) -> Result<Tensor> {
        if !matches!(self.layers.first(), Some(Stage::Plain(first)) if first.weight().dims()[1..] == [1]) {
            let hint = "build it with sizes that begin with 1, without .in_time()";
            let value = "an MLP of other inputs than one".to_owned();
            return Err(OdeError::Setting { setting: "Mlp::of_time", value, hint }.into());
        }
        let t = chain::column(t, like)?;
        let value = match chain::of_time(self.layers(), &t)? {
            Some(value) => value,
            None => chain::by_ops(|| self.forward(&t))?,
        };
        value.flatten_all()
    }

    fn layers(&self) -> impl Iterator<Item = &dyn Linked> {
        self.layers.iter().enumerate().flat_map(|(n, layer)| {
            let layer: &dyn Linked = match layer {
                Stage::Plain(layer) => layer,
                Stage::InTime(layer) => layer,
            };
            (n > 0).then_some(&self.activation as &dyn Linked).into_iter().chain([layer])
        })
    }

    fn run(&self, t: Option<&Time>, x: &Tensor) -> Result<Tensor> {
        chain::run(self.layers(), t, x)
    }

    fn push(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (mut y, mut v) = (y.clone(), v.clone());
        for (n, layer) in self.layers.iter().enumerate() {
            if n > 0 {
                (y, v) = self.activation.tangent(t, &y, &v)?;
            }
            (y, v) = match layer {
                Stage::Plain(layer) => layer.tangent(t, &y, &v)?,
                Stage::InTime(layer) => layer.tangent(t, &y, &v)?,
            };
        }
        Ok((y, v))
    }
}

impl Layers for Mlp {}

impl Stacked for Mlp {
    fn bare(&self, site: &Site<'_>) -> Option<Bare> {
        chain::bare(self.layers(), site)
    }
}

impl MlpBuilder {
    /// Lets every layer see [x, t].
    pub fn in_time(mut self) -> Self {
        self.in_time = true;
        self
    }

    /// The MLP, its parameters from `vb`.
    ///
    /// # Errors
    /// Fewer than two sizes, or a size of 0; whatever the `VarBuilder` reports.
    pub fn build(self, vb: VarBuilder) -> Result<Mlp> {
        if self.sizes.len() < 2 || self.sizes.contains(&0) {
            let hint = "give the widths of input, hidden layers and output, at least two, none of them 0";
            return Err(OdeError::Setting { setting: "Mlp sizes", value: format!("{:?}", self.sizes), hint }.into());
        }
        let stage = |(n, pair): (usize, &[usize])| {
            if self.in_time {
                concat_linear(pair[0], pair[1], vb.pp(n)).map(Stage::InTime)
            } else {
                linear(pair[0], pair[1], vb.pp(n)).map(Stage::Plain)
            }
        };
        let layers = self.sizes.windows(2).enumerate().map(stage).collect::<Result<_>>()?;
        Ok(Mlp { layers, activation: self.activation })
    }
}

/// Without the time; an error if the MLP was built to see it.
impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(None, x)
    }
}

impl Timed for Mlp {
    fn forward_at(&self, t: &Time, x: &Tensor) -> Result<Tensor> {
        self.run(Some(t), x)
    }
}

/// Inside a solve, with kernels of ours, all layers and all directions are one op; as with the layers' values, the
/// field itself makes no backward pass through it.
impl Tangent for Mlp {
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (value, along) = self.tangents(t, y, &v.unsqueeze(0)?)?;
        Ok((value, along.squeeze(0)?))
    }

    fn tangents(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        chain::tangents(self.layers(), t, y, v, |v| self.push(t, y, v))
    }
}

#[derive(Clone, Debug)]
enum Stage {
    Plain(Linear),
    InTime(ConcatLinear),
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check_tangent, distance, dot, noise, values};
    use super::*;
    use candle_core::{DType, Device, Var};
    use candle_nn::{VarBuilder, VarMap};

    fn mlp(in_time: bool) -> (VarMap, Mlp) {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let builder = Mlp::builder(&[3, 7, 5, 3], Activation::Tanh);
        let builder = if in_time { builder.in_time() } else { builder };
        let mlp = builder.build(vb).unwrap();
        for (n, var) in sorted(&vars).iter().enumerate() {
            var.set(&noise(var.dims(), n as u64)).unwrap();
        }
        (vars, mlp)
    }

    fn sorted(vars: &VarMap) -> Vec<Var> {
        let data = vars.data().lock().unwrap();
        let mut names: Vec<_> = data.keys().cloned().collect();
        names.sort();
        names.iter().map(|name| data[name].clone()).collect()
    }

    #[test]
    fn tangents_match_pullbacks() {
        let t = Time::new(0.3, &Device::Cpu);
        for in_time in [false, true] {
            let (_vars, mlp) = mlp(in_time);
            check_tangent(&mlp, &|args| mlp.forward_at(&t, &args[0]), &noise(&[4, 3], 6));
        }
    }

    #[test]
    fn what_is_no_function_of_the_time_alone_is_refused() {
        let t = Time::new(0.3, &Device::Cpu);
        let like = noise(&[1], 1);
        for (sizes, in_time) in [([3, 4], false), ([1, 4], true)] {
            let vb = VarBuilder::zeros(DType::F64, &Device::Cpu);
            let builder = Mlp::builder(&sizes, Activation::Tanh);
            let mlp = if in_time { builder.in_time() } else { builder }.build(vb).unwrap();
            let error = OdeError::from(mlp.of_time(&t, &like).unwrap_err());
            assert!(matches!(error, OdeError::Setting { setting: "Mlp::of_time", .. }), "{error}");
        }
    }

    /// The gradient of a Hutchinson trace εᵀ J ε with respect to the weights.
    #[test]
    fn a_trace_made_of_tangents_is_differentiable_in_the_weights() {
        let t = Time::new(0.3, &Device::Cpu);
        for in_time in [false, true] {
            let (vars, mlp) = mlp(in_time);
            let (y, e) = (noise(&[4, 3], 6), noise(&[4, 3], 7));
            let trace = || mlp.tangent(&t, &y, &e).unwrap().1.mul(&e).unwrap().sum_all().unwrap();
            let grads = trace().backward().unwrap();
            for var in sorted(&vars) {
                let direction = noise(var.dims(), 8);
                let Some(exact) = grads.get(&var).map(|grad| dot(grad, &direction)) else { continue };
                let (start, h) = (var.as_tensor().copy().unwrap(), 1e-6);
                let at = |h: f64| {
                    var.set(&(&start + (&direction * h).unwrap()).unwrap()).unwrap();
                    values(&trace())[0]
                };
                let slope = (at(h) - at(-h)) / (2.0 * h);
                var.set(&start).unwrap();
                assert!((slope - exact).abs() < 1e-7 * exact.abs().max(1.0), "{slope} and {exact}");
            }
        }
    }

    #[test]
    fn parameters_are_those_of_candle() {
        let (vars, mlp) = mlp(false);
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let mut x = noise(&[4, 3], 6);
        for (n, (input, output)) in [(3, 7), (7, 5), (5, 3)].into_iter().enumerate() {
            x = if n > 0 { x.tanh().unwrap() } else { x };
            x = candle_nn::linear(input, output, vb.pp(n)).unwrap().forward(&x).unwrap();
        }
        assert!(distance(&mlp.forward(&noise(&[4, 3], 6)).unwrap(), &x) < 1e-14);
    }

    #[test]
    fn sizes_are_checked() {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        for sizes in [&[][..], &[3], &[3, 0, 3]] {
            let error = OdeError::from(Mlp::new(sizes, Activation::Tanh, vb.clone()).unwrap_err());
            assert!(matches!(error, OdeError::Setting { .. }), "{error}");
        }
    }
}
