//! One cell measured in this process: timing runs without a recording, then memory runs, then the gradient's error.

use crate::cell::Cell;
use crate::failure::Result;
use crate::names::{CODECS, PRECISIONS, SOLVERS, adjoint, find};
use crate::problem::{FIELDS, Problem};
use candle_core::Device;
use candle_ode::memory::{MemoryProfiler, MemoryReport, cuda_device};
use candle_ode::prelude::*;
use std::time::Instant;

/// Steps before anything is measured: caches fill, threads start, and products take the buffers that they keep.
const WARM_UP: usize = 3;

/// Room for Candle's own backward pass, which recurses, through a long unrolled solve.
const STACK: usize = 1 << 30;

/// Measures a cell: the memory run with the lowest peak of `repeat` (a thread of a matrix product that first joins in
/// takes a buffer, which is not the solve's), and the median time of `repeat` others.
pub(crate) fn measure(cell: &Cell, repeat: usize) -> Result<MemoryReport> {
    std::thread::scope(|scope| {
        let work = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || measured(cell, repeat))?;
        work.join().unwrap_or_else(|_| Err("the cell panicked; its message is above".into()))
    })
}

fn measured(cell: &Cell, repeat: usize) -> Result<MemoryReport> {
    let device = device(&cell.device)?;
    let problem = find(FIELDS, &cell.field)?(cell.batch, &device)?;
    let ode = cell.ode(&problem)?;
    for _ in 1..WARM_UP {
        problem.step(&ode)?;
    }
    let (stats, trajectory_bytes) = {
        let (solution, _) = problem.step(&ode)?;
        (solution.stats(), solution.trajectory_bytes())
    };
    let mut times = (0..repeat).map(|_| timed(&problem, &ode, &device)).collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    let runs = (0..repeat).map(|_| recorded(cell, &problem, &ode, &device)).collect::<Result<Vec<_>>>()?;
    let above = |report: &MemoryReport| report.peak().saturating_sub(report.baseline());
    let mut report = runs.into_iter().min_by_key(above).ok_or("nothing was recorded: --repeat is at least 1")?;
    let error = gradient_error(&problem, &ode, &cell.reference(&problem)?)?;
    let settings = &mut report.environment.settings;
    let mut set = |name: &str, value: serde_json::Value| settings.insert(name.to_owned(), value);
    set("time_ns", times[times.len() / 2].into());
    set("time_least_ns", times[0].into());
    set("repeat", repeat.into());
    set("trajectory_bytes", trajectory_bytes.into());
    set("evaluations", (stats.evaluations + stats.linearizations).into());
    set("pullbacks", stats.pullbacks.into());
    set("gradient_error", error.into());
    let times = "Bytes and the times of spans are of a memory run; time_ns is the median of separate timing runs.";
    set("times", times.into());
    Ok(report)
}

fn timed(problem: &Problem, ode: &Ode, device: &Device) -> Result<u64> {
    device.synchronize()?;
    let start = Instant::now();
    problem.step(ode)?;
    device.synchronize()?;
    Ok(start.elapsed().as_nanos() as u64)
}

fn recorded(cell: &Cell, problem: &Problem, ode: &Ode, device: &Device) -> Result<MemoryReport> {
    let profiler = cell
        .settings()
        .into_iter()
        .fold(MemoryProfiler::new(device), |profiler, (name, value)| profiler.set(name, value));
    let recording = profiler.install()?;
    problem.step(ode)?;
    Ok(recording.finish()?)
}

/// |g − g₆₄| / |g₆₄| over dL/dy0 and dL/dθ together, where g₆₄ is the discrete gradient of the same steps in F64.
fn gradient_error(problem: &Problem, ode: &Ode, reference: &Ode) -> Result<f64> {
    let (found, expected) = (problem.gradient(ode)?, problem.gradient(reference)?);
    if found.len() != expected.len() {
        return Err(format!("{} gradients, and {} in F64", found.len(), expected.len()).into());
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
    Ok(difference / norm(&mut expected.iter().copied()).max(f64::MIN_POSITIVE))
}

/// `cpu`, or `cuda:0`.
pub(crate) fn device(name: &str) -> Result<Device> {
    match name.split_once(':') {
        None if name == "cpu" => Ok(Device::Cpu),
        Some(("cuda", number)) => {
            let number =
                number.parse().map_err(|_| format!("`{name}`: the number of a GPU belongs behind the colon"))?;
            Ok(cuda_device(number)?)
        }
        _ => Err(format!("`{name}` is no device; take cpu or cuda:0").into()),
    }
}

impl Cell {
    /// The solve of this cell.
    pub(crate) fn ode(&self, problem: &Problem) -> Result<Ode> {
        let adjoint = adjoint(&self.adjoint, find(CODECS, &self.codec)?)?;
        let (from, to) = problem.span;
        let ode =
            Ode::new(&problem.field).span(from, to).steps(self.steps).precision(find(PRECISIONS, &self.precision)?);
        Ok(find(SOLVERS, &self.solver)?(ode).adjoint(adjoint))
    }

    /// The same steps with everything in F64.
    fn reference(&self, problem: &Problem) -> Result<Ode> {
        let same =
            Self { precision: "f64".into(), codec: "storage".into(), adjoint: "discrete".into(), ..self.clone() };
        same.ode(problem)
    }
}
