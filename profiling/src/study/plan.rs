//! What `Ode::plan` says against what is measured, over the whole matrix of solvers, precisions, codecs, adjoints, fields
//! and numbers of steps.
//!
//! Everything runs on one thread: threads that join a matrix product or not, as the scheduler likes, have buffers of
//! their own. The first solves of a field are its warm-up and count for nothing. The loss is Σ y(T), which hands back one
//! cotangent and takes nothing itself.

use super::{Output, publish};
use crate::failure::Result;
use crate::names::{CODECS, PRECISIONS, SOLVERS, adjoint, find};
use crate::problem::{FIELDS, Problem};
use candle_core::Device;
use candle_ode::account::Category;
use candle_ode::memory::{MemoryPlan, MemoryProfiler};
use candle_ode::prelude::*;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

/// Predicted bytes against measured ones.
#[derive(Args)]
pub(super) struct Plan {
    /// A small part of the matrix: seconds, not minutes.
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    output: Output,
}

/// Which batch of each field is small, and large enough for what is not planned to be little: Candle's graph around the
/// solve, a few kibibytes.
const BATCHES: [(&str, usize); 2] = [("mlp", 64), ("conv", 2)];
/// By how much a measured peak may differ.
const BOUND: f64 = 0.03;

const HEAD: [&str; 12] = [
    "field",
    "solver",
    "precision",
    "codec",
    "adjoint",
    "steps",
    "planned owned",
    "measured owned",
    "planned peak",
    "measured peak",
    "measured / planned",
    "holds",
];

/// What one axis of the matrix lists, quick or not.
struct Axes {
    solvers: &'static [&'static str],
    precisions: &'static [&'static str],
    codecs: &'static [&'static str],
    steps: &'static [usize],
}

const WHOLE: Axes = Axes {
    solvers: &["euler", "heun", "rk4", "dopri5"],
    precisions: &["f32", "f16", "bf16"],
    codecs: &["f32", "f16", "bf16", "increments16", "increments8", "increments4"],
    steps: &[16, 64, 256],
};
const QUICK: Axes =
    Axes { solvers: &["euler", "rk4"], precisions: &["f32", "f16"], codecs: &["f16", "increments8"], steps: &[16] };
/// Those whose trajectory has a codec, and those that keep next to nothing.
const KEEPING: [&str; 5] = ["discrete", "discrete-one-stage", "consume", "checkpoints:8", "input-only"];
/// Solvers whose steps can be undone.
const REVERSIBLE: [&str; 2] = ["reversible-midpoint", "reversible-rk4"];

impl Axes {
    /// Solver, codec and adjoint of every row, for one field and precision.
    fn ways(&self) -> Vec<[&'static str; 3]> {
        let kept = |solver: &'static str| {
            KEEPING.iter().flat_map(move |adjoint| self.codecs.iter().map(move |codec| [solver, codec, adjoint]))
        };
        let kept = self.solvers.iter().flat_map(|solver| kept(solver));
        let backwards = self.solvers.iter().map(|solver| [*solver, "storage", "backsolve"]);
        kept.chain(backwards).chain(REVERSIBLE.map(|solver| [solver, "storage", "reconstruct"])).collect()
    }
}

impl Plan {
    pub(super) fn run(&self) -> Result<()> {
        rayon::ThreadPoolBuilder::new().num_threads(1).build_global()?;
        let axes = if self.quick { QUICK } else { WHOLE };
        let ways = axes.ways();
        let count = BATCHES.len() * axes.precisions.len() * ways.len() * axes.steps.len();
        let progress = ProgressBar::new(count as u64);
        // The template is a constant that indicatif knows.
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").unwrap_or(ProgressStyle::default_bar());
        progress.set_style(style);
        let (mut rows, mut broken, mut worst) = (vec![HEAD.map(str::to_owned).to_vec()], vec![], 1.0_f64);
        for (field, batch) in BATCHES {
            for precision in axes.precisions {
                // One field at a time is alive: the ledger tells the masters of all.
                let problem = find(FIELDS, field)?(batch, &Device::Cpu)?;
                let (from, to) = problem.span;
                let ode = Ode::new(&problem.field).span(from, to).precision(find(PRECISIONS, precision)?);
                let warm_up = ode.clone().solver(Rk4).steps(8);
                (0..3).try_for_each(|_| Row::of(&problem, &warm_up).map(|_| ()))?;
                for way @ [solver, codec, adjoint_word] in &ways {
                    for steps in axes.steps {
                        let ode = find(SOLVERS, solver)?(ode.clone().steps(*steps));
                        let ode = ode.adjoint(adjoint(adjoint_word, find(CODECS, codec)?)?);
                        let row = Row::of(&problem, &ode)?;
                        if (row.ratio() - 1.0).abs() > (worst - 1.0).abs() {
                            worst = row.ratio();
                        }
                        let cells = [field, way[0], precision, way[1], way[2], &steps.to_string()].map(str::to_owned);
                        if !row.holds() {
                            broken.push(format!("{}: {}", cells.join(", "), row.words()));
                        }
                        rows.push(cells.into_iter().chain(row.cells()).collect());
                        progress.inc(1);
                    }
                }
            }
        }
        progress.finish_and_clear();
        publish(&rows, &self.output.folder()?.join("plan.csv"))?;
        let summary = format!(
            "{} of {count} rows hold: owned bytes equal, peaks within {:.0} %; the worst peak is {worst:.4} of its plan.\n",
            count - broken.len(),
            100.0 * BOUND
        );
        crate::print(summary.as_bytes())?;
        if broken.is_empty() { Ok(()) } else { Err(broken.join("\nmemory-report: ").into()) }
    }
}

/// What was planned and what was measured.
struct Row {
    plan: MemoryPlan,
    planned: u64,
    owned: [u64; Category::ALL.len()],
    owned_peak: u64,
    peak: u64,
}

impl Row {
    fn of(problem: &Problem, ode: &Ode) -> Result<Self> {
        let plan = ode.plan(problem.start())?;
        let planned = plan.peak.ok_or("the heap is not counted")?;
        let profiler = MemoryProfiler::new(&Device::Cpu).span_limit(0).filter(|metadata| metadata.is_event());
        let recording = profiler.install()?;
        train(problem, ode)?;
        let owned = Category::ALL.map(|category| recording.ledger().highest(category));
        let owned_peak = recording.ledger().highest_total();
        let report = recording.finish()?;
        Ok(Self { plan, planned, owned, owned_peak, peak: report.peak() - report.baseline() })
    }

    fn ratio(&self) -> f64 {
        self.peak as f64 / self.planned as f64
    }

    fn holds(&self) -> bool {
        let same = Category::ALL.map(|category| self.plan.owned(category)) == self.owned;
        same && self.plan.owned_peak == self.owned_peak && (self.ratio() - 1.0).abs() <= BOUND
    }

    fn cells(&self) -> [String; 6] {
        let [planned, found] = [self.plan.owned_peak, self.owned_peak].map(|bytes| bytes.to_string());
        let holds = if self.holds() { "yes" } else { "no" };
        let [of, peak] = [self.planned, self.peak].map(|bytes| bytes.to_string());
        [planned, found, of, peak, format!("{:.4}", self.ratio()), holds.to_owned()]
    }

    /// Every category that differs, and the peaks.
    fn words(&self) -> String {
        let differs = Category::ALL
            .into_iter()
            .zip(self.owned)
            .filter(|(category, _)| self.plan.owned(*category) != self.owned[*category as usize]);
        let words = differs.map(|(category, found)| format!("{category} {} and {found}", self.plan.owned(category)));
        let words: Vec<_> = words.chain([format!("peak {} and {}", self.planned, self.peak)]).collect();
        format!("planned and measured differ: {}", words.join(", "))
    }
}

/// One training step.
fn train(problem: &Problem, ode: &Ode) -> Result<()> {
    ode.solve(problem.start())?.last().sum_all()?.backward()?;
    Ok(())
}
