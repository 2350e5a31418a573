//! Neural ODEs on [Candle](candle_core): mixed precision, a manual reverse pass, and an account of every byte.
//!
//! A model written against a `VarBuilder` becomes a vector field; [`Ode::solve`] integrates it; the states it hands out
//! are part of Candle's graph, so that `loss.backward()` reaches the parameters and everything upstream of y0. The
//! forward pass evaluates the field in F16, BF16 or F32, sums y in F32 and keeps a compact trajectory; the backward
//! pass linearises each step again and pulls cotangents back through it, scaled against underflow and summed in F32.
//!
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{AdamW, Linear, Module, Optimizer, VarBuilder, VarMap, linear};
//! use candle_ode::prelude::*;
//!
//! struct Velocity(Linear, Linear);
//! impl Velocity {
//!     fn new(vb: VarBuilder) -> Result<Self> {
//!         Ok(Self(linear(2, 32, vb.pp("in"))?, linear(32, 2, vb.pp("out"))?))
//!     }
//!     fn forward(&self, t: &Tensor, y: &Tensor) -> Result<Tensor> {
//!         self.1.forward(&self.0.forward(&y.broadcast_add(t)?)?.tanh()?)
//!     }
//! }
//!
//! let (vars, device) = (VarMap::new(), Device::Cpu);
//! let field = ModelField::new(&vars, &device, |vb| Velocity::new(vb), |m, t: &Time, y| m.forward(&t.like(y)?, y))?;
//! let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-3)?;
//!
//! let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(16).precision(Precision::F16);
//! let y0 = Tensor::randn(0f32, 1.0, (64, 2), &device)?;
//! let solution = ode.solve(&y0)?;
//! let loss = solution.last().sqr()?.mean_all()?;
//! optimizer.step(&loss.backward()?)?;
//! assert_eq!(solution.trajectory_bytes(), 15 * 64 * 2 * 2);          // N − 1 states, two bytes an element
//! assert_eq!(solution.last().dtype(), DType::F32);                   // never rounded to the storage dtype
//! # Ok::<(), OdeError>(())
//! ```
//!
//! # Where to look
//!
//! | you want | look at |
//! |---|---|
//! | to integrate a model, a closure, a state of several tensors | [`ModelField`], [`FnField`], [`State`] |
//! | another method, or your own | [`solver`], [`Tableau`] |
//! | steps of adaptive length | [`Ode::tolerances`], [`Controller`] |
//! | the solution between the steps, gradients of times | [`Ode::dense`], [`Ode::span_tensors`] |
//! | half precision, and what keeps it right | [`Precision`], [`AdjointScaling`], [`OnOverflow`] |
//! | layers whose gradients are right in half precision | [`ops`] |
//! | a continuous normalizing flow | [`field::divergence`] |
//! | to see the bytes | [`memory`] |
//! | optimisers that resume to the same bits | [`optim`] |
//!
//! Cargo features only add: `cuda`, `cudnn`, `nccl`, `metal`, `mkl` and `accelerate` forward to Candle's.

pub mod account;
mod adjoint;
pub mod controller;
mod error;
pub mod field;
pub use field::ops;
pub mod file;
mod forward;
mod graph;
pub mod memory;
pub mod optim;
mod precision;
mod scaling;
mod solve;
pub mod solver;
mod state;
mod stats;
mod tiles;
mod time;
mod trajectory;
mod workers;

pub use adjoint::{Adjoint, Backsolve, Discrete, Reconstruct, Unrolled};
pub use controller::{AtFloor, Controller, Norm, Tolerance};
pub use error::{Interrupted, OdeError, PassKind, Place, Result, Worst};
pub use field::{Casts, Field, FnField, Gradients, Linearization, ModelField, Params, Tangent, VectorField};
pub use forward::{OnOverflow, StepInfo};
pub use precision::{Precision, largest_finite, unit_roundoff};
pub use scaling::{AdjointScaling, Scale};
pub use solve::{Ode, Solution, odeint};
pub use solver::{
    Bosh3, Dopri5, Euler, ExplicitRungeKutta, Heun, Midpoint, Ralston, Reversal, Reversible, ReversibleHeun, Rk3, Rk4,
    Solver, StageMemory, Tableau, ThreeEighths, Tsit5,
};
pub use state::State;
pub use stats::Stats;
pub use time::{Time, TimeGrid};
pub use trajectory::schedule::{self, Checkpoints, InputOnly, KeepAll, Schedule};
pub use trajectory::{
    Codec, Encodes, Entry, Followed, Increment, Increments4, Increments8, Increments16, SecondLevel, States,
};

/// What most programs need: `use candle_ode::prelude::*`.
pub mod prelude {
    pub use crate::solver::{
        Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Reversible, ReversibleHeun, Rk3, Rk4, Solver, StageMemory,
        Tableau, ThreeEighths, Tsit5,
    };
    pub use crate::{
        Adjoint, AdjointScaling, Backsolve, Controller, Discrete, Field, FnField, ModelField, Ode, OdeError,
        OnOverflow, Precision, Reconstruct, Solution, State, Stats, Tangent, Time, TimeGrid, Unrolled, odeint,
    };
}
