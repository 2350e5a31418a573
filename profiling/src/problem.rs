//! The fields that the tool knows, with a loss: what a cell of a matrix solves and differentiates.
//!
//! | field | y | f | loss |
//! |---|---|---|---|
//! | `mlp` | `(batch, 64)` | 64 → 64 → 64 with tanh, time added to the hidden layer | mean y(1)² |
//! | `conv` | `(batch, 8, 16, 16)` | two 3 × 3 convolutions of 8 channels with tanh between them | mean y(1)² |
//! | `cnf` | z `(batch, 2)`, log p `(batch)` | the reference flow of the example `cnf` with its exact trace | mean −log p |
//! | `ffjord` | the same | FFJORD's layers, as in that example, with the exact trace | mean −log p |

#[path = "../../examples/cnf/flow.rs"]
#[allow(unreachable_pub, reason = "the example's own file")]
mod flow;

use crate::names::Named;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::ops::{Activation, Conv2d, Linear, conv2d, linear};
use candle_ode::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use std::collections::BTreeMap;

/// Units of the MLP, channels and pixels a side of the image.
const UNITS: usize = 64;
const CHANNELS: usize = 8;
const SIDE: usize = 16;

/// A field over its parameters, where it starts, and what is minimised.
pub(crate) struct Problem {
    pub(crate) field: ModelField,
    /// From here to there.
    pub(crate) span: (f64, f64),
    pub(crate) loss: fn(&Solution) -> Result<Tensor>,
    vars: VarMap,
    start: Vec<Var>,
}

/// Makes the problem of a batch on a device.
pub(crate) type Makes = fn(usize, &Device) -> candle_ode::Result<Problem>;

pub(crate) const FIELDS: &[Named<Makes>] = &[
    Named { name: "mlp", says: "64 → 64 → 64 with tanh", makes: mlp },
    Named { name: "conv", says: "two 3 × 3 convolutions over 8 × 16 × 16", makes: conv },
    Named { name: "cnf", says: "the reference flow in the plane with its log-density", makes: cnf },
    Named { name: "ffjord", says: "FFJORD's concat-squash layers in the plane with their log-density", makes: ffjord },
];

impl Problem {
    pub(crate) fn start(&self) -> State {
        State::from(self.start.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>())
    }

    /// One training step without the optimiser: solution, loss, gradients.
    pub(crate) fn step(&self, ode: &Ode) -> candle_ode::Result<(Solution, candle_core::backprop::GradStore)> {
        let solution = ode.solve(self.start())?;
        let gradients = (self.loss)(&solution)?.backward()?;
        Ok((solution, gradients))
    }

    /// dL/dy0 and dL/dθ, one after another, in F64.
    pub(crate) fn gradient(&self, ode: &Ode) -> candle_ode::Result<Vec<f64>> {
        let (_, gradients) = self.step(ode)?;
        let parameters = sorted(&self.vars);
        let mut values = Vec::new();
        for var in self.start.iter().chain(parameters.values()) {
            if let Some(gradient) = gradients.get(var) {
                values.extend(gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?);
            }
        }
        Ok(values)
    }
}

fn mlp(batch: usize, device: &Device) -> candle_ode::Result<Problem> {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| Ok((linear(UNITS, UNITS, vb.pp("in"))?, linear(UNITS, UNITS, vb.pp("out"))?));
    let field = ModelField::new(&vars, device, build, |(first, last): &(Linear, Linear), t: &Time, y| {
        let hidden = first.forward(y)?;
        let hidden = hidden.broadcast_add(&t.like(&hidden)?)?;
        last.forward(&Activation::Tanh.forward(&hidden)?)
    })?;
    Problem::new(field, vars, device, &[&[batch, UNITS]], (0.0, 1.0), mean_square)
}

fn conv(batch: usize, device: &Device) -> candle_ode::Result<Problem> {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'_>| {
        let same = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
        Ok((conv2d(CHANNELS, CHANNELS, 3, same, vb.pp("in"))?, conv2d(CHANNELS, CHANNELS, 3, same, vb.pp("out"))?))
    };
    let field = ModelField::new(&vars, device, build, |(first, last): &(Conv2d, Conv2d), _: &Time, y| {
        last.forward(&Activation::Tanh.forward(&first.forward(y)?)?)
    })?;
    Problem::new(field, vars, device, &[&[batch, CHANNELS, SIDE, SIDE]], (0.0, 1.0), mean_square)
}

fn cnf(batch: usize, device: &Device) -> candle_ode::Result<Problem> {
    in_the_plane(flow::Velocity::new, batch, device)
}

fn ffjord(batch: usize, device: &Device) -> candle_ode::Result<Problem> {
    in_the_plane(flow::Velocity::ffjord, batch, device)
}

fn in_the_plane(
    velocity: fn(usize, VarBuilder<'_>) -> Result<flow::Velocity>,
    batch: usize,
    device: &Device,
) -> candle_ode::Result<Problem> {
    let vars = VarMap::new();
    let build = move |vb: VarBuilder<'_>| Ok(LogDensity::new(velocity(2, vb)?, Trace::Exact));
    let field = ModelField::with_state(&vars, device, build, |flow, t, state| flow.eval(t, state))?;
    // From the data to the base, and log p grows from 0.
    let mut problem = Problem::new(field, vars, device, &[&[batch, 2], &[batch]], (1.0, 0.0), |solution| {
        let end = solution.last_state();
        (flow::base_nll(&end[0])? + &end[1])?.mean_all()
    })?;
    problem.start[1] = Var::zeros(batch, DType::F32, device)?;
    Ok(problem)
}

fn mean_square(solution: &Solution) -> Result<Tensor> {
    solution.last().sqr()?.mean_all()
}

impl Problem {
    /// Parameters and start are drawn in F32, the same in every process: normal, over the root of the fan-in.
    fn new(
        field: ModelField,
        vars: VarMap,
        device: &Device,
        shapes: &[&[usize]],
        span: (f64, f64),
        loss: fn(&Solution) -> Result<Tensor>,
    ) -> candle_ode::Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for var in sorted(&vars).values() {
            let fan_in: usize = var.dims().iter().skip(1).product();
            var.set(&normal(&mut rng, var.dims(), 1.0 / (fan_in as f64).sqrt(), device)?)?;
        }
        let drawn = shapes.iter().map(|shape| Var::from_tensor(&normal(&mut rng, shape, 1.0, device)?));
        Ok(Self { field, span, loss, vars, start: drawn.collect::<Result<_>>()? })
    }
}

fn normal(rng: &mut ChaCha8Rng, shape: &[usize], scale: f64, device: &Device) -> Result<Tensor> {
    let mut values = room(shape)?;
    let draws = rng.sample_iter::<f64, _>(StandardNormal);
    values.extend(draws.take(shape.iter().product()).map(|value| (value * scale) as f32));
    Tensor::from_vec(values, shape, device)
}

/// An empty list with room for the numbers of a tensor.
pub(crate) fn room<T>(shape: &[usize]) -> Result<Vec<T>> {
    let count = shape.iter().try_fold(1_usize, |count, rows| count.checked_mul(*rows));
    let mut values = Vec::new();
    match count.map(|count| values.try_reserve_exact(count)) {
        Some(Ok(())) => Ok(values),
        _ => candle_core::bail!("there is no memory for a tensor of shape {shape:?}; take a smaller --batch"),
    }
}

fn sorted(vars: &VarMap) -> BTreeMap<String, Var> {
    let data = vars.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}
