//! Time against memory of a gradient, for every adjoint: an MLP 64-64-64 with tanh, batch 128, 256 steps of RK4.
//!
//! Seconds are the least of a few runs on an otherwise idle machine, and comparable inside one table alone; bytes are the
//! least peak of the heap above its start.

use super::plot::{Series, log_log};
use super::publish;
use crate::failure::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::path::Path;
use std::time::Instant;

const BATCH: usize = 128;
const DIM: usize = 64;
const STEPS: usize = 256;
const RUNS: usize = 3;

/// One way of finding the gradient.
struct Way {
    family: &'static str,
    name: String,
    ode: Ode,
}

fn ways(field: &ModelField) -> Vec<Way> {
    let ode = Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(STEPS);
    let way = |family, name: &str, ode: Ode| Way { family, name: name.to_owned(), ode };
    let one = Discrete::default().stage_memory(StageMemory::One);
    let halved = Precision::new().storage(DType::F16);
    let reversible = ode.clone().solver(Reversible::new(Rk4));
    let thrifty = Reconstruct::default().stage_memory(StageMemory::One);
    let mut ways = vec![
        way("keep all", "F32 states", ode.clone()),
        way("keep all", "F32 states, one stage", ode.clone().adjoint(one.clone())),
        way("keep all", "F16 states", ode.clone().precision(halved)),
        way("keep all", "F16 states, one stage", ode.clone().precision(halved).adjoint(one)),
        way("reversible", "Reconstruct", reversible.clone().adjoint(Reconstruct::default())),
        way("reversible", "Reconstruct, one stage", reversible.clone().adjoint(thrifty)),
        way("reversible", "Discrete", reversible),
        way("continuous", "Backsolve", ode.clone().adjoint(Backsolve::default())),
    ];
    ways.extend([1, 2, 4, 8, 16, 32, 64].map(|slots| {
        let adjoint = Discrete::default().checkpoints(slots);
        way("checkpoints", &format!("{slots} F32 states"), ode.clone().adjoint(adjoint))
    }));
    ways
}

/// Seconds, bytes at the peak, bytes kept.
fn measure(ode: &Ode, y0: &Var) -> Result<(f64, u64, usize)> {
    let (mut seconds, mut peak, mut kept) = (f64::INFINITY, u64::MAX, 0);
    for _ in 0..RUNS {
        let (baseline, start) = (TrackingAllocator::live(), Instant::now());
        TrackingAllocator::reset_peak();
        let solution = ode.solve(y0.as_tensor())?;
        solution.last().sqr()?.mean_all()?.backward()?;
        seconds = seconds.min(start.elapsed().as_secs_f64());
        peak = peak.min(TrackingAllocator::peak().saturating_sub(baseline));
        kept = solution.trajectory_bytes();
    }
    Ok((seconds, peak, kept))
}

fn normal(rng: &mut ChaCha8Rng, shape: &[usize], scale: f64) -> Result<Tensor> {
    let draws = (0..shape.iter().product()).map(|_| {
        let draw: f64 = StandardNormal.sample(rng);
        scale * draw
    });
    Ok(Tensor::from_vec(draws.collect::<Vec<_>>(), shape, &Device::Cpu)?.to_dtype(DType::F32)?)
}

/// Prints, `pareto.csv` and `pareto.svg`.
pub(super) fn run(out: &Path) -> Result<()> {
    let (vars, mut rng) = (VarMap::new(), ChaCha8Rng::seed_from_u64(0));
    let build = |vb: VarBuilder| Mlp::new(&[DIM, 64, DIM], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |mlp: &Mlp, _: &Time, y| mlp.forward(y))?;
    for var in vars.all_vars() {
        let scale = 1.0 / (var.dims().last().copied().unwrap_or(1) as f64).sqrt();
        var.set(&normal(&mut rng, var.dims(), scale)?)?;
    }
    let y0 = Var::from_tensor(&normal(&mut rng, &[BATCH, DIM], 1.0)?)?;
    let head = ["adjoint", "seconds", "over the first", "peak bytes", "kept bytes"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let (mut series, mut first): (Vec<Series>, Option<f64>) = (vec![], None);
    for Way { family, name, ode } in ways(&field) {
        let (seconds, peak, kept) = measure(&ode, &y0)?;
        let ratio = seconds / *first.get_or_insert(seconds);
        let name = format!("{family}: {name}");
        let cells = [format!("{seconds:.3}"), format!("{ratio:.2}"), peak.to_string(), kept.to_string()];
        rows.push(std::iter::once(name.replace(',', " with")).chain(cells).collect());
        series.push(Series { name, points: vec![(peak as f64, seconds)], dashed: false });
    }
    publish(&rows, &out.join("pareto.csv"))?;
    let axes = ["peak heap / bytes", "seconds per gradient"];
    log_log(&out.join("pareto.svg"), "Time against memory of a gradient, 256 steps of RK4", axes, &series)
}
