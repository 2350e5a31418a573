//! A convolution, the ODE block, a norm, means over quarters of the image, a linear layer.

use super::digits::SIDE;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::Result;
use candle_ode::ops::{
    Activation, Conv2d, GroupNorm, Linear, Sequential, concat_conv2d, conv2d, group_norm, linear, seq,
};
use candle_ode::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::PoisonError;

/// Groups of every norm.
pub const GROUPS: usize = 8;

const CLASSES: usize = 10;
const EPS: f64 = 1e-5;

fn same() -> Conv2dConfig {
    Conv2dConfig { padding: 1, ..Default::default() }
}

/// f of the block: norm, ReLU, convolution of y and t, twice, and a norm.
fn block(vb: &VarBuilder, channels: usize) -> candle_core::Result<Sequential> {
    let norm = |n: usize| group_norm(GROUPS, channels, EPS, vb.pp("norm").pp(n));
    let convolution = |n: usize| concat_conv2d(channels, channels, 3, same(), vb.pp("conv").pp(n));
    let layers = seq().add(norm(0)?).add(Activation::Relu).add_timed(convolution(0)?);
    Ok(layers.add(norm(1)?).add(Activation::Relu).add_timed(convolution(1)?).add(norm(2)?))
}

/// The network, whose parameters are in `vars`.
pub struct Network {
    pub vars: VarMap,
    stem: Conv2d,
    block: Ode,
    norm: GroupNorm,
    head: Linear,
}

impl Network {
    /// # Errors
    /// What the block's field reports.
    pub fn new(channels: usize, steps: usize, precision: Precision, seed: u64) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let field = ModelField::of_layers(vb.pp("block"), move |vb| block(&vb, channels))?.row_wise();
        let network = Self {
            stem: conv2d(1, channels, 3, same(), vb.pp("stem"))?,
            block: Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(steps).precision(precision),
            norm: group_norm(GROUPS, channels, EPS, vb.pp("norm"))?,
            head: linear(4 * channels, CLASSES, vb.pp("head"))?,
            vars,
        };
        network.draw(seed)?;
        Ok(network)
    }

    /// Weights of variance 2/fan-in, as layers before a ReLU like them; biases of zero, scales of norms of one.
    fn draw(&self, seed: u64) -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let named = self.vars.data().lock().unwrap_or_else(PoisonError::into_inner);
        // By name: a map has an order of its own in every process.
        for (name, var) in named.iter().collect::<BTreeMap<_, _>>() {
            let fan_in: usize = var.dims().iter().skip(1).product();
            let bound = (6.0 / fan_in as f32).sqrt();
            let mut value = || match var.rank() {
                1 if name.ends_with("bias") => 0.0,
                1 => 1.0,
                _ => rng.random_range(-bound..=bound),
            };
            let values: Vec<f32> = (0..var.elem_count()).map(|_| value()).collect();
            var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
        }
        Ok(())
    }

    /// Scores `(batch, 10)` of images `(batch, 1, 8, 8)`, and the bytes that are kept for the block's backward pass.
    ///
    /// # Errors
    /// Whatever the solve reports.
    pub fn forward(&self, images: &Tensor, is_trained: bool) -> Result<(Tensor, usize)> {
        let pixels = self.stem.forward(images)?;
        let solution = match is_trained {
            true => self.block.solve(&pixels)?,
            false => self.block.clone().no_grad().solve(&pixels)?,
        };
        let features = Activation::Relu.forward(&self.norm.forward(solution.last())?)?;
        let scores = self.head.forward(&features.avg_pool2d(SIDE / 2)?.flatten_from(1)?)?;
        Ok((scores, solution.trajectory_bytes()))
    }
}
