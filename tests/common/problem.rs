//! Small problems in any dtype with a loss at their end: an MLP, and two convolutions.

use super::*;
use candle_nn::{Conv2dConfig, conv2d};
use candle_ode::{Solution, ops};
use std::sync::{Arc, Mutex};

/// Where its solves start; f depends on the time.
pub const START: f64 = 0.1;

/// A problem with a loss over its last state, and its variables by name.
pub struct Problem {
    pub name: &'static str,
    pub vars: VarMap,
    pub y0: Var,
    pub field: ModelField,
}

/// What a solve of it and the backward pass have given.
pub struct Found {
    /// Each dL/dθ by name, and dL/dy0.
    pub gradients: Vec<Tensor>,
    pub solution: Solution,
    /// The ends of the steps, the start included.
    pub times: Vec<f64>,
}

impl Problem {
    fn new(name: &'static str, vars: VarMap, field: ModelField, shape: &[usize], masters: DType) -> Self {
        fill(&vars, 1, 1.0);
        Self { name, vars, y0: variable(9, shape, masters), field }
    }

    /// The MLP of [`mlp_field`].
    pub fn mlp(masters: DType, batch: usize, dim: usize, hidden: usize) -> Self {
        let vars = VarMap::new();
        let field = mlp_field(&vars, masters, dim, hidden);
        Self::new("MLP", vars, field, &[batch, dim], masters)
    }

    /// y ↦ tanh(y ∗ w + b + t) over `shape` (batch, channels, height, width), by the convolution of this crate.
    pub fn convolution(masters: DType, shape: [usize; 4]) -> Self {
        let (vars, channels) = (VarMap::new(), shape[1]);
        let build = move |vb: VarBuilder<'static>| ops::conv2d(channels, channels, 3, padded(), vb.pp("conv"));
        let eval = |conv: &ops::Conv2d, t: &Time, y: &Tensor| conv.forward(y)?.broadcast_add(&t.like(y)?)?.tanh();
        let field = ModelField::new_in(masters, &vars, &Device::Cpu, build, eval).unwrap();
        Self::new("convolution", vars, field, &shape, masters)
    }

    /// The same by Candle's own, which has no BF16 on the CPU.
    pub fn candle_convolution(masters: DType, shape: [usize; 4]) -> Self {
        let (vars, channels) = (VarMap::new(), shape[1]);
        let build = move |vb: VarBuilder<'static>| conv2d(channels, channels, 3, padded(), vb.pp("conv"));
        let eval = |conv: &candle_nn::Conv2d, t: &Time, y: &Tensor| conv.forward(y)?.broadcast_add(&t.like(y)?)?.tanh();
        let field = ModelField::new_in(masters, &vars, &Device::Cpu, build, eval).unwrap();
        Self::new("Candle's convolution", vars, field, &shape, masters)
    }

    /// dL/dθ and dL/dy0 for L = the mean of (y(T) + 1)².
    pub fn gradients(&self, ode: &Ode, adjoint: impl Into<Adjoint>) -> std::result::Result<Found, OdeError> {
        let seen = Arc::new(Mutex::new(vec![]));
        let times = seen.clone();
        let ode = ode.clone().adjoint(adjoint).on_step(move |step| {
            let mut seen = seen.lock().unwrap();
            // A pass that is done again begins at its first step.
            seen.truncate(step.index);
            seen.push(step.t);
            std::ops::ControlFlow::Continue(())
        });
        let solution = ode.solve(self.y0.as_tensor())?;
        let grads = (solution.last() + 1.0)?.sqr()?.mean_all()?.backward()?;
        let all = sorted(&self.vars).into_values().chain([self.y0.clone()]);
        let gradients = all.map(|var| grads.get(&var).unwrap().clone()).collect();
        let times = std::iter::once(START).chain(times.lock().unwrap().iter().copied()).collect();
        Ok(Found { gradients, solution, times })
    }
}

fn padded() -> Conv2dConfig {
    Conv2dConfig { padding: 1, ..Default::default() }
}

/// The largest of the relative errors of these tensors; NaN if one is.
pub fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
    assert_eq!(a.len(), b.len());
    let errors = a.iter().zip(b).map(|(a, b)| relative(a, b));
    errors.fold(0.0, |worst, error| if error <= worst { worst } else { error })
}

pub fn equal_bits(a: &[Tensor], b: &[Tensor]) -> bool {
    a.iter().zip(b).all(|(a, b)| bits(a) == bits(b))
}
