//! Time against memory of a gradient, for every adjoint: M2, an MLP 64-64-64 with tanh, batch 512, by 256 steps of RK4.
//!
//! Seconds are CPU time of all threads, so that what else runs on the machine counts little. Every way is run once a
//! round, one after the other; a way's seconds are its least, and its ratio to another the median over the rounds.
//! Bytes are the least peak of the heap above its start.

use super::plot::{Series, log_log};
use super::{Output, publish};
use crate::failure::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_ode::memory::TrackingAllocator;
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use clap::Args;
use cpu_time::ProcessTime;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

const BATCH: usize = 512;
const DIM: usize = 64;
const STEPS: usize = 256;
/// √N.
const ROOT: usize = 16;
/// What √N slots may cost, every state kept being 1; the count of steps alone says 1.32.
const BAR: f64 = 1.4;

/// Time against memory of a gradient, for every adjoint.
#[derive(Args)]
pub(super) struct Pareto {
    /// How often each is run.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    #[command(flatten)]
    output: Output,
}

/// One way of finding the gradient, and what it has cost.
struct Way {
    family: &'static str,
    name: String,
    ode: Ode,
    /// By round.
    seconds: Vec<f64>,
    peak: u64,
    kept: usize,
}

/// Runs over RK4 that keep some states, with this at the start of their family, and runs over its reversible solver.
const CHECKPOINTS: &str = "checkpoints";
const OF_REVERSIBLE: &str = "reversible with checkpoints";
const RECONSTRUCT: &str = "Reconstruct";

fn ways(field: &ModelField) -> Vec<Way> {
    let ode = Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(STEPS);
    let reversible = ode.clone().solver(Reversible::new(Rk4));
    let halved = ode.clone().precision(Precision::new().storage(DType::F16));
    let (mut ways, all) = (vec![], Discrete::default);
    let mut way = |family, name: &str, ode: &Ode, adjoint: Adjoint| {
        let (name, ode) = (name.to_owned(), ode.clone().adjoint(adjoint));
        ways.push(Way { family, name, ode, seconds: vec![], peak: u64::MAX, kept: 0 });
    };
    way("keep all", "F32 states", &ode, all().into());
    way("keep all", "F16 states", &halved, all().into());
    way("keep all", "linearisations", &ode, all().keep_linearizations().into());
    way("reversible", "every state", &reversible, all().into());
    way("continuous", "Backsolve", &ode, Backsolve::default().into());
    for (memory, family, name) in
        [(StageMemory::All, CHECKPOINTS, "every stage"), (StageMemory::One, "checkpoints with one stage", "one stage")]
    {
        way(RECONSTRUCT, name, &reversible, Reconstruct::default().stage_memory(memory).into());
        for slots in [1, 2, 3, 4, 8, ROOT, 32, 64] {
            way(family, &format!("{slots} states"), &ode, all().checkpoints(slots).stage_memory(memory).into());
        }
    }
    for slots in [1, 4, ROOT, 64] {
        way(OF_REVERSIBLE, &format!("{slots} states"), &reversible, all().checkpoints(slots).into());
    }
    ways
}

impl Way {
    fn run(&mut self, y0: &Var) -> Result<()> {
        let (baseline, start) = (TrackingAllocator::live(), ProcessTime::now());
        TrackingAllocator::reset_peak();
        let solution = self.ode.solve(y0.as_tensor())?;
        solution.last().sqr()?.mean_all()?.backward()?;
        self.seconds.push(start.elapsed().as_secs_f64());
        self.peak = self.peak.min(TrackingAllocator::peak().saturating_sub(baseline));
        self.kept = solution.trajectory_bytes();
        Ok(())
    }

    fn least(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// How many times as long as `other`, as a median over the rounds.
    fn over(&self, other: &Self) -> f64 {
        let mut ratios: Vec<f64> = self.seconds.iter().zip(&other.seconds).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        (ratios[(ratios.len() - 1) / 2] + ratios[ratios.len() / 2]) / 2.0
    }

    fn title(&self) -> String {
        format!("{}: {}", self.family, self.name)
    }
}

fn normal(rng: &mut ChaCha8Rng, shape: &[usize], scale: f64) -> Result<Tensor> {
    let draws = (0..shape.iter().product()).map(|_| {
        let draw: f64 = StandardNormal.sample(rng);
        scale * draw
    });
    Ok(Tensor::from_vec(draws.collect::<Vec<_>>(), shape, &Device::Cpu)?.to_dtype(DType::F32)?)
}

/// √N slots beside every state kept, and `Reconstruct` beside checkpoints.
fn verdicts(ways: &[Way]) -> String {
    let mut text = String::new();
    let root = format!("{ROOT} states");
    if let Some(way) = ways.iter().find(|way| way.family == CHECKPOINTS && way.name == root) {
        let ratio = way.over(&ways[0]);
        let holds = if ratio <= BAR { "holds" } else { "does not hold" };
        text += &format!("\nc = √N = {ROOT} slots: {ratio:.3} times keeping all; at most {BAR}: {holds}\n");
    }
    for way in ways.iter().filter(|way| way.family == RECONSTRUCT) {
        text += &format!("\n{}, {} bytes:\n", way.title(), way.peak);
        let among = |family, fits: &dyn Fn(u64) -> bool| {
            let rivals = ways.iter().filter(|rival| rival.family.starts_with(family) && fits(rival.peak));
            rivals.min_by(|a, b| a.over(way).total_cmp(&b.over(way)))
        };
        let rivals = [
            ("of equal or lower peak", among(CHECKPOINTS, &|peak| peak <= way.peak)),
            ("of higher peak", among(CHECKPOINTS, &|peak| peak > way.peak)),
            ("of the same solver, of any peak", among(OF_REVERSIBLE, &|_| true)),
        ];
        for (words, rival) in rivals {
            text += &match rival {
                Some(rival) => {
                    let (ratio, title, peak) = (way.over(rival), rival.title(), rival.peak);
                    format!("  {ratio:.3} times the best run with checkpoints {words}: {title}, {peak} bytes\n")
                }
                None => format!("  there is no run with checkpoints {words}\n"),
            };
        }
    }
    text
}

/// Prints, `pareto.csv` and `pareto.svg`.
pub(super) fn run(arguments: &Pareto) -> Result<()> {
    let out = arguments.output.folder()?;
    let (vars, mut rng) = (VarMap::new(), ChaCha8Rng::seed_from_u64(0));
    let build = |vb: VarBuilder| Mlp::new(&[DIM, 64, DIM], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |mlp: &Mlp, _: &Time, y| mlp.forward(y))?;
    for var in vars.all_vars() {
        let scale = 1.0 / (var.dims().last().copied().unwrap_or(1) as f64).sqrt();
        var.set(&normal(&mut rng, var.dims(), scale)?)?;
    }
    let y0 = Var::from_tensor(&normal(&mut rng, &[BATCH, DIM], 1.0)?)?;
    let mut ways = ways(&field);
    for _ in 0..arguments.rounds {
        ways.iter_mut().try_for_each(|way| way.run(&y0))?;
    }
    let head = ["adjoint", "CPU seconds", "over the first", "peak bytes", "kept bytes"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for way in &ways {
        let (seconds, ratio) = (format!("{:.3}", way.least()), format!("{:.2}", way.over(&ways[0])));
        rows.push(vec![way.title(), seconds, ratio, way.peak.to_string(), way.kept.to_string()]);
    }
    publish(&rows, &out.join("pareto.csv"))?;
    crate::print(verdicts(&ways).as_bytes())?;
    let mut series: Vec<Series> = vec![];
    for way in &ways {
        let is_curve = way.family.contains(CHECKPOINTS);
        let (name, point) =
            (if is_curve { way.family.to_owned() } else { way.title() }, (way.peak as f64, way.least()));
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name, points: vec![point], dashed: false }),
        }
    }
    let axes = ["peak heap / bytes", "CPU seconds per gradient"];
    log_log(&out.join("pareto.svg"), "Time against memory of a gradient, 256 steps of RK4", axes, &series)
}
