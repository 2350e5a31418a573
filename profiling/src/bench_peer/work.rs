//! The works that peers are measured on: mean y(1)² by RK4 over [0, 1], with gradients to θ and y0.
//!
//! | work | state | field | N |
//! |---|---|---|---|
//! | W1 | 1024 × 64 | 64 → 256 → 256 → 64, tanh | 64 |
//! | W2 | 256 × 2 | 2 → 64 → 2, tanh | 100 |
//! | W3 | 16 × 32 × 16 × 16 | conv 3 × 3 → ReLU → conv 3 × 3 | 16 |
//! | W4:N | as W1 | as W1 | N |
//! | W5 | 64 × 64 × 48 × 48 | as W3, of 64 channels | 4 |
//!
//! Weights are normal over the root of the fan-in, biases a tenth of a normal number.

use crate::failure::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::ops::{self, Activation, Mlp};
use candle_ode::prelude::*;
use cpu_time::ProcessTime;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use std::path::Path;

/// A work by its name.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) name: String,
    pub(super) steps: usize,
    shape: Vec<usize>,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Widths of input, hidden layers and output.
    Mlp(Vec<usize>),
    /// Channels.
    Conv(usize),
}

/// Whose layers the field is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Layers {
    /// `candle_ode::ops`; a field that is layers alone where the work is.
    Ours,
    /// `candle_ode::ops`, called by a closure.
    Called,
    /// `candle_nn` as it is.
    Candle,
}

impl std::str::FromStr for Work {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let (base, steps) = name.split_once(':').map_or((name, None), |(base, steps)| (base, Some(steps)));
        let wide = || Kind::Mlp(vec![64, 256, 256, 64]);
        let (shape, kind, own) = match base {
            "W1" | "W4" => (vec![1024, 64], wide(), 64),
            "W2" => (vec![256, 2], Kind::Mlp(vec![2, 64, 2]), 100),
            "W3" => (vec![16, 32, 16, 16], Kind::Conv(32), 16),
            "W5" => (vec![64, 64, 48, 48], Kind::Conv(64), 4),
            _ => return Err(format!("`{name}` is not known; take W1, W2, W3, W4:N or W5")),
        };
        let steps = match steps.map(str::parse) {
            None => own,
            Some(Ok(steps)) if steps > 0 => steps,
            Some(_) => return Err(format!("`{name}`: behind the colon belongs a number of steps, as in W4:256")),
        };
        Ok(Self { name: name.to_owned(), steps, shape, kind })
    }
}

/// y0, then W and b of each layer.
pub(super) struct Inputs(Vec<Tensor>);

impl Work {
    fn shapes(&self) -> Vec<Vec<usize>> {
        let layers: Vec<[Vec<usize>; 2]> = match &self.kind {
            Kind::Mlp(sizes) => sizes.windows(2).map(|pair| [vec![pair[1], pair[0]], vec![pair[1]]]).collect(),
            Kind::Conv(channels) => vec![[vec![*channels, *channels, 3, 3], vec![*channels]]; 2],
        };
        std::iter::once(self.shape.clone()).chain(layers.into_iter().flatten()).collect()
    }

    /// CPU seconds of the bare products of a step by `Tensor::matmul` in F32, each the fastest of a few: forward and
    /// recomputed 4 N evaluations of every layer each, in the pullback as many products with W and sums over the batch.
    /// Convolutions count as products with the windows of the images, 3 × 3 pixels each.
    pub(super) fn bare_products(&self) -> Result<f64> {
        let (rows, layers): (usize, Vec<[usize; 2]>) = match &self.kind {
            Kind::Mlp(sizes) => (self.shape[0], sizes.windows(2).map(|pair| [pair[0], pair[1]]).collect()),
            Kind::Conv(channels) => (self.shape[0] * self.shape[2] * self.shape[3], vec![[9 * channels, *channels]; 2]),
        };
        let mut seconds = 0.0;
        for [inputs, outputs] in layers {
            let random = |shape: (usize, usize)| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
            let (x, w, g) = (random((rows, inputs))?, random((outputs, inputs))?, random((rows, outputs))?);
            let (w_turned, g_turned) = (w.t()?, g.t()?);
            for (a, b, times) in [(&x, &w_turned, 2), (&g, &w, 1), (&g_turned, &x, 1)] {
                let once = |_| {
                    let before = ProcessTime::now();
                    a.matmul(b).map(|_| before.elapsed().as_secs_f64())
                };
                let each = (0..12).map(once).collect::<candle_core::Result<Vec<_>>>()?;
                seconds += (4 * self.steps * times) as f64 * each.into_iter().fold(f64::INFINITY, f64::min);
            }
        }
        Ok(seconds)
    }

    /// The same work on another number of rows.
    pub(super) fn batch(mut self, rows: usize) -> Self {
        self.shape[0] = rows;
        self
    }

    /// Drawn from a fixed seed, in F64.
    pub(super) fn draw(&self) -> Result<Inputs> {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let tensors = self.shapes().into_iter().enumerate().map(|(n, shape)| {
            let fan_in: usize = shape[1..].iter().product();
            let scale = if n == 0 {
                1.0
            } else if shape.len() == 1 {
                0.1
            } else {
                1.0 / (fan_in as f64).sqrt()
            };
            let mut values = crate::problem::room(&shape)?;
            let normal = (&mut rng).sample_iter::<f64, _>(StandardNormal).map(|x| x * scale);
            values.extend(normal.take(shape.iter().product()));
            Tensor::from_vec(values, shape, &Device::Cpu)
        });
        Ok(Inputs(tensors.collect::<candle_core::Result<_>>()?))
    }

    /// From the arrays `y0`, `p0`, `p1` … of an NPZ file.
    pub(super) fn read(&self, path: &Path) -> Result<Inputs> {
        let arrays: std::collections::HashMap<String, Tensor> = Tensor::read_npz(path)?.into_iter().collect();
        let tensors = self.shapes().into_iter().enumerate().map(|(n, shape)| {
            let name = n.checked_sub(1).map_or_else(|| "y0".to_owned(), |n| format!("p{n}"));
            match arrays.get(&name) {
                Some(array) if array.dims() == shape => Ok(array.to_dtype(DType::F64)?),
                Some(array) => Err(format!(
                    "{}: `{name}` has shape {:?}, {} has {shape:?}",
                    path.display(),
                    array.dims(),
                    self.name
                )
                .into()),
                None => Err(format!("{} holds no array `{name}`", path.display()).into()),
            }
        });
        Ok(Inputs(tensors.collect::<Result<_>>()?))
    }

    /// The field and y0 with masters in `dtype`.
    pub(super) fn problem(&self, inputs: &Inputs, layers: Layers, dtype: DType, device: &Device) -> Result<Problem> {
        let vars = VarMap::new();
        let field = match &self.kind {
            Kind::Mlp(sizes) => mlp(sizes.clone(), layers, dtype, &vars, device)?,
            Kind::Conv(channels) => conv(*channels, layers, dtype, &vars, device)?,
        };
        let cast = |x: &Tensor| x.to_dtype(dtype)?.to_device(device);
        let mut parameters = vec![];
        let data = vars.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (n, input) in inputs.0[1..].iter().enumerate() {
            let name = format!("{}.{}", n / 2, if n % 2 == 0 { "weight" } else { "bias" });
            let var = data.get(&name).ok_or_else(|| format!("the field has no parameter `{name}`"))?;
            var.set(&cast(input)?)?;
            parameters.push(var.clone());
        }
        drop(data);
        let y0 = Var::from_tensor(&cast(&inputs.0[0])?)?;
        let ode = Ode::new(&field.row_wise()).solver(Rk4).span(0.0, 1.0).steps(self.steps);
        Ok(Problem { ode, y0, parameters, _vars: vars })
    }
}

fn mlp(
    sizes: Vec<usize>,
    layers: Layers,
    dtype: DType,
    vars: &VarMap,
    device: &Device,
) -> candle_ode::Result<ModelField> {
    match layers {
        Layers::Ours => {
            let vb = VarBuilder::from_varmap(vars, dtype, device);
            ModelField::of_layers(vb, move |vb| Mlp::new(&sizes, Activation::Tanh, vb))
        }
        Layers::Called => {
            let build = move |vb| Mlp::new(&sizes, Activation::Tanh, vb);
            ModelField::new_in(dtype, vars, device, build, |m, _: &Time, y| m.forward(y))
        }
        Layers::Candle => {
            let build = move |vb: VarBuilder<'static>| {
                let mut model = candle_nn::seq();
                for (n, pair) in sizes.windows(2).enumerate() {
                    model = if n > 0 { model.add_fn(|x| x.tanh()) } else { model };
                    model = model.add(candle_nn::linear(pair[0], pair[1], vb.pp(n))?);
                }
                Ok(model)
            };
            ModelField::new_in(dtype, vars, device, build, |m, _: &Time, y| m.forward(y))
        }
    }
}

fn conv(
    channels: usize,
    layers: Layers,
    dtype: DType,
    vars: &VarMap,
    device: &Device,
) -> candle_ode::Result<ModelField> {
    let same = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
    match layers {
        Layers::Ours => {
            let layer = move |vb: VarBuilder<'static>| ops::conv2d(channels, channels, 3, same, vb);
            let build = move |vb: VarBuilder<'static>| {
                Ok(ops::seq().add(layer(vb.pp(0))?).add(Activation::Relu).add(layer(vb.pp(1))?))
            };
            ModelField::of_layers(VarBuilder::from_varmap(vars, dtype, device), build)
        }
        Layers::Called => {
            let layer = move |vb: VarBuilder<'static>| ops::conv2d(channels, channels, 3, same, vb);
            let build = move |vb: VarBuilder<'static>| Ok((layer(vb.pp(0))?, layer(vb.pp(1))?));
            ModelField::new_in(dtype, vars, device, build, |m, _: &Time, y| m.1.forward(&ops::relu(&m.0.forward(y)?)?))
        }
        Layers::Candle => {
            let layer = move |vb: VarBuilder<'static>| candle_nn::conv2d(channels, channels, 3, same, vb);
            let build = move |vb: VarBuilder<'static>| Ok((layer(vb.pp(0))?, layer(vb.pp(1))?));
            ModelField::new_in(dtype, vars, device, build, |m, _: &Time, y| m.1.forward(&m.0.forward(y)?.relu()?))
        }
    }
}

/// A work that can be stepped.
pub(super) struct Problem {
    pub(super) ode: Ode,
    pub(super) y0: Var,
    pub(super) parameters: Vec<Var>,
    _vars: VarMap,
}

/// Loss, dL/dθ and dL/dy0.
pub(super) struct Outcome {
    pub(super) loss: f64,
    pub(super) parameters: Vec<f64>,
    pub(super) y0: Vec<f64>,
}

impl Problem {
    /// One training step but for the optimiser.
    pub(super) fn step(&self, ode: &Ode) -> Result<(Tensor, candle_core::backprop::GradStore)> {
        let loss = ode.solve(self.y0.as_tensor())?.last().sqr()?.mean_all()?;
        let gradients = loss.backward()?;
        Ok((loss, gradients))
    }

    pub(super) fn outcome(&self, ode: &Ode) -> Result<Outcome> {
        let (loss, gradients) = self.step(ode)?;
        let of = |var: &Var| -> Result<Vec<f64>> {
            let gradient = gradients.get(var).ok_or("a gradient is missing")?;
            Ok(gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
        };
        let parameters = self.parameters.iter().map(of).collect::<Result<Vec<_>>>()?.concat();
        Ok(Outcome { loss: loss.to_dtype(DType::F64)?.to_scalar()?, parameters, y0: of(&self.y0)? })
    }
}
