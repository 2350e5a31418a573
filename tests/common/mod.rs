//! Problems and comparisons shared by the tests.
#![allow(dead_code, missing_docs, unreachable_pub)]

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
use candle_ode::prelude::*;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

pub mod against_f64;
pub mod gradcheck;
pub mod memory;
pub mod problem;

/// A plain Candle model: y ↦ W₂ tanh(W₁ y + b₁ + t) + b₂.
pub struct Mlp(Linear, Linear);

impl Mlp {
    pub fn new(dim: usize, hidden: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self(linear(dim, hidden, vb.pp("in"))?, linear(hidden, dim, vb.pp("out"))?))
    }

    pub fn forward(&self, t: &Time, y: &Tensor) -> Result<Tensor> {
        let hidden = self.0.forward(y)?;
        let t = t.like(&hidden)?;
        self.1.forward(&hidden.broadcast_add(&t)?.tanh()?)
    }
}

pub fn mlp_field(vars: &VarMap, masters: DType, dim: usize, hidden: usize) -> ModelField {
    ModelField::new_in(masters, vars, &Device::Cpu, move |vb| Mlp::new(dim, hidden, vb), |m, t, y| m.forward(t, y))
        .unwrap()
}

/// Variables in a fixed order with reproducible values of standard deviation `scale`/√(last dimension).
pub fn fill(vars: &VarMap, seed: u64, scale: f64) {
    for (n, (_, var)) in sorted(vars).into_iter().enumerate() {
        let fan_in = var.dims().last().copied().unwrap_or(1) as f64;
        let values = normal(seed + n as u64, var.dims(), var.dtype());
        var.set(&(values * (scale / fan_in.sqrt())).unwrap()).unwrap();
    }
}

pub fn sorted(vars: &VarMap) -> BTreeMap<String, Var> {
    vars.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

/// Standard normal numbers, the same for every dtype up to rounding.
pub fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let count: usize = shape.iter().product();
    let draws = (0..count).map(|_| {
        let (u, v): (f64, f64) = (rng.random(), rng.random());
        (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    });
    Tensor::from_iter(draws, &Device::Cpu).unwrap().reshape(shape).unwrap().to_dtype(dtype).unwrap()
}

pub fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Every element as its bits: equal only if the tensors are.
pub fn bits(x: &Tensor) -> Vec<u64> {
    values(x).into_iter().map(f64::to_bits).collect()
}

/// The bits of all variables, by name.
pub fn snapshot(vars: &VarMap) -> BTreeMap<String, Vec<u64>> {
    sorted(vars).into_iter().map(|(name, var)| (name, bits(&var))).collect()
}

/// A variable of standard normal numbers.
pub fn variable(seed: u64, shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&normal(seed, shape, dtype)).unwrap()
}

/// A field over a state of one tensor whose missing parameters are created in F64.
pub fn field64<M: 'static>(
    vars: &VarMap,
    build: impl Fn(VarBuilder<'static>) -> Result<M> + Send + Sync + 'static,
    eval: impl Fn(&M, &Time, &State, &[Tensor]) -> Result<State> + Send + Sync + 'static,
) -> ModelField {
    ModelField::from_var_builder(VarBuilder::from_varmap(vars, DType::F64, &Device::Cpu), build, eval).unwrap()
}

/// ‖a − b‖ / ‖b‖ in the 2-norm.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (values(a), values(b));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b));
    difference / norm(&mut b.iter().copied()).max(f64::MIN_POSITIVE)
}

/// Runs something that recurses deeply (Candle's backward through an unrolled solve).
pub fn with_large_stack<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::Builder::new().stack_size(256 << 20).spawn(run).unwrap().join().unwrap()
}
