//! One run: a flow, its optimiser, and the iterations that bring them on.

use crate::checkpoint;
use crate::cli::Config;
use crate::data::{Batch, Source};
use crate::draws::{Purpose, draws};
use crate::metrics::{Metrics, Row};
use crate::model::{Flow, adam};
use crate::progress::Progress;
use crate::stop::Stop;
use crate::weights;
use candle_core::{DType, Device};
use candle_nn::{Optimizer, VarMap};
use candle_ode::memory::{MemoryProfiler, MemoryReport, Meter, meter_for};
use candle_ode::optim::Adam;
use candle_ode::{OdeError, Result, Stats};
use rand::Rng;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Points that judge a toy density.
pub const JUDGES: usize = 10_000;
/// Iterations between two looks at the validation points, and between two checkpoints.
const PAUSE: u64 = 100;

/// The state of a run between two iterations.
pub struct Run {
    config: Config,
    source: Source,
    judges: Batch,
    vars: VarMap,
    flow: Flow,
    adam: Adam,
    device: Device,
    meter: Box<dyn Meter>,
    iteration: u64,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Seconds in iterations, without validation and saving.
    pub seconds: f64,
    /// Iterations done here.
    pub iterations: u64,
    /// Most bytes alive at once in any iteration.
    pub peak_bytes: u64,
    /// Bytes one forward pass kept for its backward pass.
    pub trajectory_bytes: u64,
    /// NLL of the validation points at the end, in nats.
    pub val_nll: f64,
    /// What the last iteration did.
    pub last: Stats,
    /// Steps and whole backward passes done again after an overflow.
    pub redone: (usize, usize),
    /// Whether it was stopped before its time.
    pub stopped: bool,
}

impl Run {
    /// A run from its start.
    ///
    /// # Errors
    /// Those of opening the data and building the model.
    pub fn fresh(config: Config, device: &Device) -> Result<Self> {
        let source = Source::open(&config.data)?;
        let vars = VarMap::new();
        let flow = Flow::new(&vars, &config, source.dim(), device)?;
        weights::initialise(&vars, config.seed)?;
        let adam = adam(&vars, config.lr)?;
        let (judges, meter) = (source.validation(JUDGES), meter_for(device)?);
        Ok(Self { config, source, judges, vars, flow, adam, device: device.clone(), meter, iteration: 0 })
    }

    /// The run that left its checkpoint in `dir`, with `config` made of the saved one.
    ///
    /// # Errors
    /// Those of [`fresh`](Self::fresh) and of reading the checkpoint.
    pub fn resumed(dir: &Path, saved: &checkpoint::State, config: Config, device: &Device) -> Result<Self> {
        let mut run = Self::fresh(config, device)?;
        checkpoint::load(dir, &run.vars, &mut run.adam, saved)?;
        run.flow.scaling().set_headroom(run.adam.extra(HEADROOM).unwrap_or(0.0) as i32);
        run.iteration = saved.iteration;
        Ok(run)
    }

    /// Trains up to `config.iters`, with checkpoints and `metrics.csv` in `out`. Whatever ends it, Ctrl-C and errors
    /// included, the last whole iteration is saved.
    ///
    /// # Errors
    /// Those of a solve, and of writing files.
    pub fn train(&mut self, out: &Path, stop: &Stop) -> Result<Outcome> {
        fs::create_dir_all(out).map_err(|source| OdeError::Io { path: out.to_owned(), source })?;
        let mut metrics = Metrics::open(&out.join("metrics.csv"), self.iteration)?;
        let mut progress = Progress::new(self.iteration, self.config.iters);
        let mut outcome = Outcome::default();
        let trained = self.iterate(out, stop, &mut metrics, &mut progress, &mut outcome);
        progress.finish();
        let saved = self.save(out);
        trained.and(saved)?;
        if !outcome.stopped {
            outcome.val_nll = self.validate()?;
        }
        Ok(outcome)
    }

    fn iterate(
        &mut self,
        out: &Path,
        stop: &Stop,
        metrics: &mut Metrics,
        progress: &mut Progress,
        outcome: &mut Outcome,
    ) -> Result<()> {
        while self.iteration < self.config.iters {
            if stop.reached(self.iteration) {
                outcome.stopped = true;
                return Ok(());
            }
            let mut row = self.step(outcome)?;
            if self.iteration.is_multiple_of(PAUSE) || self.iteration == self.config.iters {
                row.val_nll = Some(self.validate()?);
                self.save(out)?;
            }
            metrics.push(&row)?;
            progress.show(&row);
        }
        Ok(())
    }

    /// One iteration: everything is as before unless all of it succeeds.
    fn step(&mut self, outcome: &mut Outcome) -> Result<Row> {
        let iteration = self.iteration + 1;
        self.meter.reset_peak()?;
        let start = Instant::now();
        let batch = self.source.batch(self.config.seed, iteration, self.config.batch as usize);
        let loss = self.flow.loss(&batch.values, self.solve_seed(iteration))?;
        let train_nll = loss.nll.to_dtype(DType::F64)?.to_scalar::<f64>()? - batch.log_det;
        let forward_s = start.elapsed().as_secs_f64();
        if !train_nll.is_finite() {
            return Err(OdeError::Setting {
                setting: "--lr",
                value: format!("{} made a loss of {train_nll} at iteration {iteration}", self.config.lr),
                hint: "take a smaller one, or more --steps",
            });
        }
        let between = Instant::now();
        let gradients = loss.nll.backward()?;
        self.device.synchronize()?;
        let backward_s = between.elapsed().as_secs_f64();
        self.adam.set_learning_rate(self.config.learning_rate(iteration));
        self.adam.step(&gradients)?;
        self.iteration = iteration;

        let peak_bytes = self.meter.peak()?;
        let (stats, trajectory_bytes) = (loss.solution.stats(), loss.solution.trajectory_bytes() as u64);
        outcome.seconds += start.elapsed().as_secs_f64();
        outcome.iterations += 1;
        outcome.peak_bytes = outcome.peak_bytes.max(peak_bytes);
        outcome.trajectory_bytes = trajectory_bytes;
        outcome.redone.0 += stats.redone_steps;
        outcome.redone.1 += stats.redone_passes;
        outcome.last = stats;
        let scale = (-f64::from(self.flow.scaling().headroom())).exp2();
        let val_nll = None;
        Ok(Row { iter: iteration, train_nll, val_nll, forward_s, backward_s, peak_bytes, trajectory_bytes, scale })
    }

    /// Mean NLL of the validation points in the data's coordinates, by the flow in the precision of the run.
    fn validate(&self) -> Result<f64> {
        let all = self.flow.nll(&self.judges.values)?;
        Ok(all.iter().sum::<f64>() / all.len() as f64 - self.judges.log_det)
    }

    fn save(&mut self, out: &Path) -> Result<()> {
        self.adam.set_extra(HEADROOM, f64::from(self.flow.scaling().headroom()));
        let state = checkpoint::State { iteration: self.iteration, config: self.config.clone() };
        checkpoint::save(out, &self.vars, &mut self.adam, &state)
    }

    /// Where the memory of one iteration goes: forward and backward of the next one, which changes nothing.
    ///
    /// # Errors
    /// Those of the solve; [`OdeError::Meter`] when memory cannot be read.
    pub fn profile(&self) -> Result<MemoryReport> {
        let iteration = self.iteration + 1;
        let batch = self.source.batch(self.config.seed, iteration, self.config.batch as usize);
        let settings = serde_json::to_value(&self.config).unwrap_or_default();
        let mut profiler = MemoryProfiler::new(&self.device);
        for (name, value) in settings.as_object().into_iter().flatten() {
            profiler = profiler.set(name, value.clone());
        }
        let recording = profiler.span_limit(8192).install()?;
        self.flow.loss(&batch.values, self.solve_seed(iteration))?.nll.backward()?;
        recording.finish()
    }

    fn solve_seed(&self, iteration: u64) -> u64 {
        draws(self.config.seed, Purpose::Solve, iteration).random()
    }

    /// Iterations done.
    pub fn iteration(&self) -> u64 {
        self.iteration
    }

    /// How many points judge it.
    pub fn judges(&self) -> usize {
        self.judges.len()
    }

    /// The flow.
    pub fn flow(&self) -> &Flow {
        &self.flow
    }

    /// Where its points come from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Its settings.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

/// The name under which a checkpoint keeps what adjoint scaling has learned.
const HEADROOM: &str = "headroom";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{PrecisionName, TraceName};
    use crate::metrics;
    use candle_ode::memory::TrackingAllocator;

    fn config(precision: PrecisionName, data: &str, trace: TraceName) -> Config {
        let small = Config { steps: 2, batch: 16, iters: 30, drop_after: 20, ..Config::default() };
        Config { precision, data: data.to_owned(), trace: Some(trace), ..small }
    }

    /// A row without what a clock or a meter says.
    type Numbers = (u64, f64, Option<f64>, u64, f64);

    fn numbers(dir: &Path) -> Result<Vec<Numbers>> {
        let rows = metrics::read(&dir.join("metrics.csv"))?.into_iter();
        Ok(rows.map(|row| (row.iter, row.train_nll, row.val_nll, row.trajectory_bytes, row.scale)).collect())
    }

    #[test]
    fn resumed_run_ends_with_the_same_bits_as_a_straight_one() -> Result<()> {
        assert!(TrackingAllocator::is_installed());
        for config in [
            config(PrecisionName::F32, "checkerboard", TraceName::Exact),
            config(PrecisionName::F16, "2spirals", TraceName::Hutchinson),
            config(PrecisionName::Bf16, "digits", TraceName::Hutchinson),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (straight, halves) = (dir.path().join("straight"), dir.path().join("halves"));
            let whole = Run::fresh(config.clone(), &Device::Cpu)?.train(&straight, &Stop::after(u64::MAX))?;
            assert!(!whole.stopped && whole.iterations == 30 && whole.val_nll.is_finite());

            let first = Run::fresh(config, &Device::Cpu)?.train(&halves, &Stop::after(15))?;
            assert!(first.stopped && first.iterations == 15);
            let saved = checkpoint::state(&halves)?;
            assert_eq!(saved.iteration, 15);
            let mut second = Run::resumed(&halves, &saved, saved.config.clone(), &Device::Cpu)?;
            let second = second.train(&halves, &Stop::after(u64::MAX))?;
            assert_eq!((second.iterations, second.val_nll), (15, whole.val_nll));

            for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
                assert_eq!(fs::read(straight.join(file)).unwrap(), fs::read(halves.join(file)).unwrap(), "{file}");
            }
            assert_eq!(numbers(&straight)?, numbers(&halves)?);
        }
        Ok(())
    }

    #[test]
    fn what_ends_a_run_early_leaves_its_last_whole_iteration() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { lr: 1e30, ..config(PrecisionName::F32, "moons", TraceName::Exact) };
        let error = Run::fresh(config, &Device::Cpu)?.train(dir.path(), &Stop::after(u64::MAX));
        assert!(error.is_err());
        let saved = checkpoint::state(dir.path())?;
        assert_eq!(saved.iteration, metrics::read(&dir.path().join("metrics.csv"))?.len() as u64);
        assert!(saved.iteration < 30);
        Ok(())
    }
}
