//! The flow as a model: points ↔ base by a solve, and the density that follows.
//!
//! With ℓ(1) = 0, dz/dt = f and dℓ/dt = −tr ∂f/∂z from t = 1 (data) to t = 0 (base):
//! −log p(x) = −log N(z(0)) + ℓ(0).

use crate::cli::{AdjointName, Config, FieldName, PrecisionName, SolverName, TraceName};
use crate::draws::{Purpose, draws};
use crate::flow::{Velocity, base_nll};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::prelude::*;
use candle_ode::{Result, optim};
use rand::Rng;
use rand_distr::StandardNormal;

/// Points that go through the flow together where nothing is trained.
const CHUNK: usize = 2048;

/// The time of the data and that of the base.
const DATA: f64 = 1.0;
const BASE: f64 = 0.0;

/// A flow with the settings of its solves.
pub struct Flow {
    ode: Ode,
    device: Device,
    dim: usize,
    precision: PrecisionName,
    scaling: AdjointScaling,
}

/// A training loss: mean −log p of the batch, in nats and the model's coordinates, in Candle's graph.
pub struct Loss {
    /// The loss.
    pub nll: Tensor,
    /// The solve it comes from.
    pub solution: Solution,
}

impl Flow {
    /// A flow for points of `dim` columns. Its parameters are created in `vars`.
    ///
    /// # Errors
    /// Those of building the model.
    pub fn new(vars: &VarMap, config: &Config, dim: usize, device: &Device) -> Result<Self> {
        let trace = match config.trace.unwrap_or(if dim == 2 { TraceName::Exact } else { TraceName::Hutchinson }) {
            TraceName::Exact => Trace::Exact,
            TraceName::Hutchinson => Trace::Rademacher,
        };
        let velocity = match config.field {
            None => Velocity::new,
            Some(FieldName::Reference) => Velocity::reference,
            Some(FieldName::Mlp) => Velocity::mlp,
            Some(FieldName::Ffjord) => Velocity::ffjord,
        };
        let field = ModelField::with_state(
            vars,
            device,
            move |vb| Ok(LogDensity::new(velocity(dim, vb)?, trace)),
            |flow, t, state| flow.eval(t, state),
        )?
        .row_wise();
        let precision = match config.precision {
            PrecisionName::F32 => Precision::F32,
            PrecisionName::Bf16 => Precision::BF16,
            PrecisionName::F16 => Precision::F16,
        };
        let scaling = AdjointScaling::default_for(precision.compute_dtype());
        let adjoint = match config.adjoint {
            AdjointName::Discrete => Adjoint::from(Discrete::default()),
            AdjointName::Unrolled => Adjoint::from(Unrolled),
        };
        let ode = Ode::new(&field)
            .precision(precision)
            .adjoint(adjoint)
            .scaling(scaling.clone())
            .on_overflow(OnOverflow::Retry);
        let ode = match config.tolerances {
            Some((rtol, atol)) => ode.tolerances(rtol, atol),
            None => ode.steps(config.steps as usize),
        };
        let (ode, device) = (with_solver(ode, config.solver), device.clone());
        Ok(Self { ode, device, dim, precision: config.precision, scaling })
    }

    /// How cotangents are scaled; what it has learned is part of a checkpoint.
    pub fn scaling(&self) -> &AdjointScaling {
        &self.scaling
    }

    /// What the field runs in.
    pub fn precision(&self) -> PrecisionName {
        self.precision
    }

    /// The loss of a batch `(rows, dim)`.
    ///
    /// # Errors
    /// Those of the solve.
    pub fn loss(&self, values: &[f32], seed: u64) -> Result<Loss> {
        let solution = self.ode.clone().span(DATA, BASE).seed(seed).solve(self.start(values)?)?;
        Ok(Loss { nll: nll(&solution)?.mean_all()?, solution })
    }

    /// −log p of every row of `values`, `(rows, dim)`, in nats and the model's coordinates.
    ///
    /// # Errors
    /// Those of the solve.
    pub fn nll(&self, values: &[f32]) -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(values.len() / self.dim);
        for (index, chunk) in values.chunks(CHUNK * self.dim).enumerate() {
            let ode = self.ode.clone().span(DATA, BASE).seed(index as u64).no_grad();
            all.extend(nll(&ode.solve(self.start(chunk)?)?)?.to_dtype(DType::F64)?.to_vec1::<f64>()?);
        }
        Ok(all)
    }

    /// `rows` points drawn from the flow, `(rows, dim)` in the model's coordinates.
    ///
    /// # Errors
    /// Those of the solve.
    pub fn samples(&self, rows: usize, seed: u64) -> Result<Vec<f64>> {
        let rng = draws(seed, Purpose::Samples, 0);
        let base: Vec<f32> = rng.sample_iter(StandardNormal).take(rows * self.dim).collect();
        let mut all = Vec::with_capacity(base.len());
        for chunk in base.chunks(CHUNK * self.dim) {
            let solution = self.ode.clone().span(BASE, DATA).no_grad().solve(self.start(chunk)?)?;
            all.extend(solution.last().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?);
        }
        Ok(all)
    }

    fn start(&self, values: &[f32]) -> Result<State> {
        let rows = values.len() / self.dim;
        let z = Tensor::from_slice(values, (rows, self.dim), &self.device)?;
        Ok(State::from([z, Tensor::zeros(rows, DType::F32, &self.device)?]))
    }
}

/// −log p of every point, `(rows,)`, at the end of a solve towards the base.
fn nll(solution: &Solution) -> Result<Tensor> {
    let end = solution.last_state();
    Ok((base_nll(&end[0])? + &end[1])?)
}

/// Adam for the parameters in `vars`.
///
/// # Errors
/// When the moments cannot be allocated.
pub fn adam(vars: &VarMap, lr: f64) -> Result<optim::Adam> {
    Ok(optim::Adam::from_varmap(vars, optim::AdamConfig { lr, ..Default::default() })?)
}

fn with_solver(ode: Ode, name: SolverName) -> Ode {
    match name {
        SolverName::Euler => ode.solver(Euler),
        SolverName::Midpoint => ode.solver(Midpoint),
        SolverName::Heun => ode.solver(Heun),
        SolverName::Ralston => ode.solver(Ralston),
        SolverName::Rk3 => ode.solver(Rk3),
        SolverName::Rk4 => ode.solver(Rk4),
        SolverName::Rk38 => ode.solver(ThreeEighths),
        SolverName::Bosh3 => ode.solver(Bosh3),
        SolverName::Dopri5 => ode.solver(Dopri5),
        SolverName::Tsit5 => ode.solver(Tsit5),
    }
}
