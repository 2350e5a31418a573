//! `memory-report bench-peer`: training steps of the works on which peers are measured, with time, heap and error of
//! each.

mod work;

use crate::failure::Result;
use crate::measure::device;
use crate::names::{CODECS, PRECISIONS, adjoint, adjoint_word, find, parser};
use candle_core::DType;
use candle_ode::Precision;
use candle_ode::memory::{TrackingAllocator, meter_for};
use candle_ode::ops::cuda_kernels;
use candle_ode::prelude::*;
use clap::Args;
use cpu_time::ProcessTime;
use serde_json::{Value, json};
use std::io::BufRead;
use std::path::PathBuf;
use std::time::Instant;
use work::{Layers, Outcome, Problem, Work};

pub(crate) const EXAMPLES: &str = "\
Prints one JSON line: seconds of wall clock and of all threads (medians), the peaks of the heap and, on CUDA, of the memory
pool above what was live before a step, and the relative errors of dL/dθ and dL/dy0 against a solve in F64 on the CPU. On the
CPU also a roofline: how many times the CPU seconds of the step's bare products by Candle's matmul, in F32.

Examples:
  memory-report bench-peer W1
  memory-report bench-peer W1 --precision bf16 --codec increments8
  memory-report bench-peer W4:1024 --adjoint checkpoints:32
  memory-report bench-peer W1 --batch 65536 --precision f16 --device cuda:0 --no-error
  memory-report bench-peer W1 --serve      (one step for each line of the input)";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchPeer {
    /// W1, W2, W3, W4:N or W5.
    work: Work,
    /// Rows of the state, in place of the work's own.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Dtypes of field, trajectory and sums.
    #[arg(long, default_value = "f32", value_parser = parser(PRECISIONS))]
    precision: String,
    /// How kept states are encoded.
    #[arg(long, default_value = "storage", value_parser = parser(CODECS))]
    codec: String,
    /// How gradients come back.
    #[arg(long, default_value = "discrete", value_parser = adjoint_word)]
    adjoint: String,
    /// Whose layers the field is made of.
    #[arg(long, value_enum, default_value = "ours")]
    layers: Layers,
    /// Rows of a tile.
    #[arg(long)]
    tile: Option<usize>,
    /// Threads that take tiles.
    #[arg(long)]
    threads: Option<usize>,
    /// cpu or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Arrays y0, p0, p1 … (NPZ) in place of drawn ones.
    #[arg(long)]
    inputs: Option<PathBuf>,
    /// Steps that are timed, after one that is not.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Says when it is ready, then takes a step for each line of its input and prints its times.
    #[arg(long)]
    serve: bool,
    /// Leaves out the solve in F64 and the errors against it.
    #[arg(long)]
    no_error: bool,
}

impl BenchPeer {
    pub(crate) fn run(&self) -> Result<()> {
        let begun = Instant::now();
        let work = match self.batch {
            Some(rows) => self.work.clone().batch(rows as usize),
            None => self.work.clone(),
        };
        let inputs = match &self.inputs {
            Some(path) => work.read(path)?,
            None => work.draw()?,
        };
        let device = device(&self.device)?;
        let precision: Precision = find(PRECISIONS, &self.precision)?;
        let masters = precision.accumulate_dtype();
        let problem = work.problem(&inputs, self.layers, masters, &device)?;
        let ode = self.ode(&problem, precision)?;
        problem.step(&ode)?;
        let setup = begun.elapsed().as_secs_f64();
        if self.serve {
            println!("{}", json!({ "ready": self.settings(), "setup_s": setup }));
            for line in std::io::stdin().lock().lines() {
                line?;
                let (wall, cpu) = timed(&problem, &ode)?;
                println!("{}", json!({ "wall": wall, "cpu": cpu }));
            }
            return Ok(());
        }
        let (mut walls, mut cpus) = (vec![], vec![]);
        for _ in 0..self.runs.max(1) {
            let (wall, cpu) = timed(&problem, &ode)?;
            walls.push(wall);
            cpus.push(cpu);
        }
        let pool = if device.is_cpu() { None } else { Some(meter_for(&device)?) };
        let before = pool.as_ref().map(|pool| pool.mark()).transpose()?;
        let live = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        problem.step(&ode)?;
        let heap = TrackingAllocator::peak().saturating_sub(live);
        let after = pool.as_ref().map(|pool| pool.mark()).transpose()?;
        let pool = after.zip(before).map(|(after, before)| after.peak.saturating_sub(before.live));
        let mut row = self.settings();
        let mut add = |measured: Value| {
            if let (Value::Object(row), Value::Object(measured)) = (&mut row, measured) {
                row.extend(measured);
            }
        };
        add(json!({
            "wall_s": median(&walls),
            "cpu_s": median(&cpus),
            "runs_s": walls,
            "setup_s": setup,
            "heap_peak_mib": mebibytes(heap),
            "pool_peak_mib": pool.map(mebibytes),
            "cuda_kernels": !device.is_cpu() && cuda_kernels(),
        }));
        if device.is_cpu() {
            let products = work.bare_products()?;
            add(json!({ "bare_products_cpu_s": products, "roofline": median(&cpus) / products }));
        }
        if !self.no_error {
            let found = problem.outcome(&ode)?;
            let exact = work.problem(&inputs, Layers::Candle, DType::F64, &candle_core::Device::Cpu)?;
            let exact = exact.outcome(&exact.ode.clone().precision(Precision::F64))?;
            add(json!({
                "loss": found.loss,
                "loss_rel_err": (found.loss - exact.loss).abs() / exact.loss,
                "grad_params_rel_l2": error(&found, &exact, |outcome| &outcome.parameters),
                "grad_y0_rel_l2": error(&found, &exact, |outcome| &outcome.y0),
            }));
        }
        crate::print(format!("{row}\n").as_bytes())
    }

    fn ode(&self, problem: &Problem, precision: Precision) -> Result<Ode> {
        let codec = find(CODECS, &self.codec)?;
        let mut ode = problem.ode.clone().precision(precision).adjoint(adjoint(&self.adjoint, codec)?);
        ode = self.tile.into_iter().fold(ode, Ode::tile);
        Ok(self.threads.into_iter().fold(ode, Ode::threads))
    }

    fn settings(&self) -> Value {
        json!({
            "work": self.work.name,
            "batch": self.batch,
            "steps": self.work.steps,
            "peer": "candle-ode",
            "version": env!("CARGO_PKG_VERSION"),
            "precision": self.precision,
            "codec": self.codec,
            "adjoint": self.adjoint,
            "layers": format!("{:?}", self.layers).to_lowercase(),
            "tile": self.tile,
            "threads": self.threads,
            "device": self.device,
        })
    }
}

/// Seconds of wall clock and of all threads.
fn timed(problem: &Problem, ode: &Ode) -> Result<(f64, f64)> {
    let (wall, cpu) = (Instant::now(), ProcessTime::now());
    let (loss, _gradients) = problem.step(ode)?;
    loss.device().synchronize()?;
    Ok((wall.elapsed().as_secs_f64(), cpu.elapsed().as_secs_f64()))
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

/// ‖found − exact‖ / ‖exact‖.
fn error(found: &Outcome, exact: &Outcome, of: impl Fn(&Outcome) -> &Vec<f64>) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let off = square(&mut of(found).iter().zip(of(exact)).map(|(a, b)| a - b));
    (off / square(&mut of(exact).iter().copied())).sqrt()
}
