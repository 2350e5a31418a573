//! What `Ode::plan` says against what is measured, over the whole matrix of solvers, precisions, codecs, adjoints,
//! fields and numbers of steps, for the whole batch and in tiles of half of it.
//!
//! Each field in each precision has a process of its own, and everything in it runs on one thread: threads that join a
//! matrix product or not, as the scheduler likes, have buffers of their own. The first solves of a field are its
//! warm-up and count for nothing. The loss is Σ y(T), which hands back one cotangent and takes nothing itself.

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
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// Predicted bytes against measured ones.
#[derive(Args)]
pub(super) struct Plan {
    /// A small part of the matrix: seconds, not minutes.
    #[arg(long)]
    quick: bool,
    /// The rows of this field and precision alone, as CSV: what a process of its own does.
    #[arg(long, num_args = 2, value_names = ["FIELD", "PRECISION"], hide = true)]
    only: Option<Vec<String>>,
    #[command(flatten)]
    output: Output,
}

/// Which batch of each field is small, and large enough for what is not planned to be little: Candle's graph around the
/// solve, a few kibibytes.
const BATCHES: [(&str, usize); 2] = [("mlp", 64), ("conv", 4)];
/// By how much a measured peak may differ.
const BOUND: f64 = 0.03;

const HEAD: [&str; 13] = [
    "field",
    "solver",
    "precision",
    "codec",
    "adjoint",
    "steps",
    "rows of a tile",
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
/// Those whose trajectory has a codec, and those that keep linearisations.
const KEEPING: [&str; 5] = ["discrete", "discrete-one-stage", "consume", "checkpoints:8", "input-only"];
const LINEARIZED: [&str; 2] = ["linearizations", "linearized-checkpoints:8"];
/// Solvers whose steps can be undone.
const REVERSIBLE: [&str; 2] = ["reversible-midpoint", "reversible-rk4"];

impl Axes {
    /// Solver, codec and adjoint of every row, for one field and precision, and whether it is in tiles.
    fn ways(&self) -> Vec<([&'static str; 3], bool)> {
        let mut ways = vec![];
        for solver in self.solvers {
            let stored = |adjoint: &&'static str| [*solver, "storage", *adjoint];
            ways.extend(KEEPING.iter().flat_map(|adjoint| self.codecs.iter().map(|codec| [*solver, *codec, *adjoint])));
            ways.extend(LINEARIZED.iter().chain(&["backsolve"]).map(stored));
        }
        ways.extend(REVERSIBLE.map(|solver| [solver, "storage", "reconstruct"]));
        // In tiles one codec says enough.
        let last = self.codecs.last();
        let in_tiles = |way: &[&'static str; 3]| !KEEPING.contains(&way[2]) || last == Some(&way[1]);
        let tiled: Vec<_> = ways.iter().copied().filter(in_tiles).map(|way| (way, true)).collect();
        ways.into_iter().map(|way| (way, false)).chain(tiled).collect()
    }
}

impl Plan {
    pub(super) fn run(&self) -> Result<()> {
        let axes = if self.quick { QUICK } else { WHOLE };
        if let Some([field, precision]) = self.only.as_deref() {
            return axes.rows(field, precision);
        }
        let groups =
            BATCHES.iter().flat_map(|(field, _)| axes.precisions.iter().map(move |precision| [*field, *precision]));
        let groups: Vec<_> = groups.collect();
        let progress = ProgressBar::new((groups.len() * axes.ways().len() * axes.steps.len()) as u64);
        // The template is a constant that indicatif knows.
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}").unwrap_or(ProgressStyle::default_bar());
        progress.set_style(style);
        let found = self.in_processes(&groups, &progress)?;
        progress.finish_and_clear();
        let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
        rows.extend(found.iter().flatten().map(|line| line.split(',').map(str::to_owned).collect()));
        publish(&rows, &self.output.folder()?.join("plan.csv"))?;
        verdict(&rows[1..])
    }

    /// The lines of every group, as many groups at once as there are cores.
    fn in_processes(&self, groups: &[[&str; 2]], progress: &ProgressBar) -> Result<Vec<Vec<String>>> {
        let program = std::env::current_exe()?;
        let run = |group: &[&str; 2]| -> std::io::Result<Vec<String>> {
            let mut command = Command::new(&program);
            command.args(["study", "plan", "--only"]).args(group).args(self.quick.then_some("--quick"));
            let mut child = command.stdout(Stdio::piped()).spawn()?;
            let lines = child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines);
            let lines = lines.inspect(|_| progress.inc(1)).collect::<std::io::Result<Vec<_>>>()?;
            match child.wait()?.success() {
                true => Ok(lines),
                false => Err(std::io::Error::other(format!("{} failed; its message is above", group.join(", ")))),
            }
        };
        let (next, found) = (AtomicUsize::new(0), Mutex::new(vec![vec![]; groups.len()]));
        let work = || -> std::io::Result<()> {
            while let Some((n, group)) = Some(next.fetch_add(1, Relaxed)).and_then(|n| Some((n, groups.get(n)?))) {
                let lines = run(group)?;
                found.lock().unwrap_or_else(PoisonError::into_inner)[n] = lines;
            }
            Ok(())
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..cores.min(groups.len())).map(|_| scope.spawn(work)).collect();
            // A worker that panicked has said why.
            workers.into_iter().try_for_each(|worker| {
                worker.join().unwrap_or_else(|_| Err(std::io::Error::other("a worker panicked")))
            })
        })?;
        Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How many rows hold; an error that names those that do not.
fn verdict(rows: &[Vec<String>]) -> Result<()> {
    let [ratio, holds] =
        ["measured / planned", "holds"].map(|name| HEAD.iter().position(|head| *head == name).unwrap_or(0));
    let broken: Vec<_> = rows.iter().filter(|row| row[holds] != "yes").map(|row| row.join(", ")).collect();
    let off = |row: &Vec<String>| row[ratio].parse::<f64>().map_or(f64::INFINITY, |ratio| (ratio - 1.0).abs());
    let worst = rows.iter().map(off).fold(0.0, f64::max);
    let summary = format!(
        "{} of {} rows hold: owned bytes equal, peaks within {:.0} %; the worst peak is {:.2} % off its plan.\n",
        rows.len() - broken.len(),
        rows.len(),
        100.0 * BOUND,
        100.0 * worst
    );
    crate::print(summary.as_bytes())?;
    if broken.is_empty() { Ok(()) } else { Err(broken.join("\nmemory-report: ").into()) }
}

impl Axes {
    /// Prints the rows of one field in one precision.
    fn rows(&self, field: &str, precision: &str) -> Result<()> {
        rayon::ThreadPoolBuilder::new().num_threads(1).build_global()?;
        let batch = BATCHES.iter().find(|(name, _)| *name == field).map_or(1, |(_, batch)| *batch);
        let problem = find(FIELDS, field)?(batch, &Device::Cpu)?;
        let (from, to) = problem.span;
        let ode = Ode::new(&problem.field).span(from, to).precision(find(PRECISIONS, precision)?);
        let rows = batch / 2;
        let tiled = Ode::new(&problem.field.clone().row_wise()).span(from, to).precision(find(PRECISIONS, precision)?);
        let tiled = tiled.tile(rows).threads(1);
        for warm_up in [&ode, &tiled] {
            let warm_up = warm_up.clone().solver(Rk4).steps(8);
            (0..3).try_for_each(|_| Row::of(&problem, &warm_up).map(|_| ()))?;
        }
        for ([solver, codec, adjoint_word], in_tiles) in self.ways() {
            for steps in self.steps {
                let (ode, rows) = if in_tiles { (&tiled, rows.to_string()) } else { (&ode, String::new()) };
                let ode = find(SOLVERS, solver)?(ode.clone().steps(*steps));
                let ode = ode.adjoint(adjoint(adjoint_word, find(CODECS, codec)?)?);
                let row = Row::of(&problem, &ode)?;
                let cells =
                    [field, solver, precision, codec, adjoint_word, &steps.to_string(), &rows].map(str::to_owned);
                let line = [&cells[..], &row.cells()[..]].concat().join(",") + "\n";
                crate::print(line.as_bytes())?;
                if !row.holds() {
                    eprintln!("memory-report: {}: {}", cells.join(", "), row.words());
                }
            }
        }
        Ok(())
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
