//! Neural ODEs on Candle: mixed precision, a manual reverse pass, and an account of every byte.

pub mod account;
mod adjoint;
mod error;
pub mod field;
pub use field::ops;
mod file;
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
mod time;
mod trajectory;

pub use adjoint::{Adjoint, Discrete, Unrolled};
pub use error::{OdeError, PassKind, Place, Result};
pub use field::{Casts, Field, FnField, Gradients, Linearization, ModelField, Params, Tangent, VectorField};
pub use precision::{Precision, largest_finite, unit_roundoff};
pub use scaling::{AdjointScaling, Scale};
pub use solve::{Ode, OnOverflow, Solution, StepInfo, odeint};
pub use solver::{
    Bosh3, Dopri5, Euler, ExplicitRungeKutta, Heun, Midpoint, Ralston, Rk3, Rk4, Solver, StageMemory, Tableau,
    ThreeEighths, Tsit5,
};
pub use state::State;
pub use stats::Stats;
pub use time::{Time, TimeGrid};
pub use trajectory::{Codec, Entry, States};

/// What most programs need: `use candle_ode::prelude::*`.
pub mod prelude {
    pub use crate::solver::{
        Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Rk3, Rk4, Solver, StageMemory, Tableau, ThreeEighths, Tsit5,
    };
    pub use crate::{
        Adjoint, AdjointScaling, Discrete, Field, FnField, ModelField, Ode, OdeError, OnOverflow, Precision, Solution,
        State, Stats, Tangent, Time, TimeGrid, Unrolled, odeint,
    };
}
