//! The same training by each way of finding the gradient.

use super::problem::Problem;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, VarBuilder, VarMap};
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Mlp};
use candle_ode::optim::{Adam, AdamConfig};
use candle_ode::prelude::*;
use candle_ode::{ExplicitRungeKutta, Result};
use cpu_time::ProcessTime;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// What all runs share.
pub struct Settings {
    /// Steps of the optimiser.
    pub iterations: u32,
    /// Seed of the weights.
    pub seed: u64,
}

/// What a run came to.
pub struct Outcome {
    /// Solver and adjoint.
    pub name: String,
    /// Mean squared error after the last iteration.
    pub loss: f32,
    /// CPU time of all threads.
    pub seconds: f64,
    /// Bytes of heap that one iteration took at most.
    pub peak: u64,
    /// Bytes kept for the backward pass.
    pub trajectory: usize,
    /// Of the last iteration, if states were reconstructed.
    pub drift: Option<f64>,
}

/// Trains by the reversible solver over `base`, its steps undone or kept, and by `base` itself, every state kept or
/// some.
///
/// # Errors
/// Whatever a solve reports.
pub fn compare(base: impl ExplicitRungeKutta + Clone, problem: &Problem, settings: &Settings) -> Result<Vec<Outcome>> {
    let reversible = Reversible::new(base.clone());
    let root = (problem.steps as f64).sqrt().ceil() as usize;
    let mut outcomes = vec![
        run("Reconstruct", reversible.clone(), Reconstruct::default(), problem, settings)?,
        run("Discrete", reversible, Discrete::default(), problem, settings)?,
        run("Discrete", base.clone(), Discrete::default(), problem, settings)?,
    ];
    for slots in [2, root / 2, root, 4 * root] {
        let name = format!("{slots} checkpoints");
        outcomes.push(run(&name, base.clone(), Discrete::default().checkpoints(slots), problem, settings)?);
    }
    Ok(outcomes)
}

fn run(
    how: &str,
    solver: impl Solver,
    adjoint: impl Into<Adjoint>,
    problem: &Problem,
    settings: &Settings,
) -> Result<Outcome> {
    let name = format!("{how} over {}", solver.name());
    let vars = VarMap::new();
    let field = field(&vars, problem, settings.seed)?;
    let (from, to) = problem.span;
    let ode = Ode::new(&field).solver(solver).span(from, to).steps(problem.steps);
    let ode = ode.save_at(&problem.times).adjoint(adjoint);
    let mut optimizer = Adam::from_varmap(&vars, AdamConfig { lr: RATE, ..Default::default() })?;
    let mut outcome = Outcome { name, loss: f32::NAN, seconds: 0.0, peak: u64::MAX, trajectory: 0, drift: None };
    let start = ProcessTime::now();
    for iteration in 0..settings.iterations {
        let done = f64::from(iteration) / f64::from(settings.iterations);
        optimizer.set_learning_rate(RATE * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()));
        let baseline = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        let solution = ode.solve(&problem.y0)?;
        let loss = error(&solution, problem)?;
        optimizer.step(&loss.backward()?)?;
        // Buffers that are made once, by threads that join later, are not the iteration's.
        outcome.peak = outcome.peak.min(TrackingAllocator::peak().saturating_sub(baseline));
        outcome.trajectory = solution.trajectory_bytes();
        outcome.drift = solution.stats().drift;
        if iteration % 100 == 0 {
            println!("{} {iteration:>5} {:.3e}", outcome.name, loss.to_scalar::<f32>()?);
        }
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    outcome.loss = error(&ode.no_grad().solve(&problem.y0)?, problem)?.to_scalar::<f32>()?;
    Ok(outcome)
}

/// The learning rate at first; it falls to zero along a cosine.
const RATE: f64 = 1e-2;

/// Mean squared error over times, batch and components.
fn error(solution: &Solution, problem: &Problem) -> candle_core::Result<Tensor> {
    let found: Vec<&Tensor> = solution.states().iter().map(|state| &state[0]).collect();
    Tensor::stack(&found, 0)?.sub(&problem.measured)?.sqr()?.mean_all()
}

/// dy/dt by an MLP of y and t, with reproducible weights.
fn field(vars: &VarMap, problem: &Problem, seed: u64) -> Result<ModelField> {
    let dim = problem.y0.dims()[1];
    let build = move |vb: VarBuilder| Mlp::builder(&[dim, 32, 32, dim], Activation::Tanh).in_time().build(vb);
    let field = ModelField::of_layers(VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu), build)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed + 2);
    for name in field.params().names() {
        // The field has made every variable that it names.
        let Some(var) = vars.data().lock().ok().and_then(|vars| vars.get(name).cloned()) else { continue };
        let fan_in = var.dims().last().copied().unwrap_or(1) as f64;
        let scale = if var.rank() == 2 { 1.0 / fan_in.sqrt() } else { 0.0 };
        let draws = (0..var.elem_count()).map(|_| {
            let draw: f64 = StandardNormal.sample(&mut rng);
            scale * draw
        });
        var.set(&Tensor::from_iter(draws, &Device::Cpu)?.reshape(var.shape())?.to_dtype(DType::F32)?)?;
    }
    Ok(field)
}
