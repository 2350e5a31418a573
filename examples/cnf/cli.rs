//! The command line, and the checked settings of a run that come out of it.

use candle_ode::{OdeError, Result};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Trains a continuous normalizing flow in mixed precision.
#[derive(Debug, Parser)]
#[command(name = "cnf")]
pub struct Cli {
    /// checkerboard, 8gaussians, 2spirals, pinwheel, moons, circles, swissroll, rings, digits, or a path to rows of
    /// numbers (.csv, .npy, .npz); with --compare as many as there are [default: checkerboard]
    #[arg(long)]
    pub data: Vec<String>,
    /// One step of the integration [default: rk4]
    #[arg(long)]
    pub solver: Option<SolverName>,
    /// Steps of the integration [default: 8]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub steps: Option<u32>,
    /// Steps as long as this relative tolerance allows, by a solver with an error estimate [default with --atol: 1e-3]
    #[arg(long, value_parser = tolerance, conflicts_with = "steps", allow_negative_numbers = true)]
    pub rtol: Option<f64>,
    /// The same with an absolute tolerance [default with --rtol: 1e-5]
    #[arg(long, value_parser = tolerance, conflicts_with = "steps", allow_negative_numbers = true)]
    pub atol: Option<f64>,
    /// What the vector field runs in and the trajectory is kept in [default: f32]
    #[arg(long, conflicts_with = "compare")]
    pub precision: Option<PrecisionName>,
    /// How gradients come back [default: discrete]
    #[arg(long)]
    pub adjoint: Option<AdjointName>,
    /// Training iterations [default: 800]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub iters: Option<u64>,
    /// Points in a batch [default: 256]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub batch: Option<u32>,
    /// Learning rate of Adam, divided by ten for the last quarter of the iterations [default: 0.01]
    #[arg(long, value_parser = learning_rate, allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// Seed of weights, batches and noise [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Runs on the CPU even where there is a GPU
    #[arg(long)]
    pub cpu: bool,
    /// Where plots, metrics and weights go [default: out/cnf]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Goes on with the run that left its checkpoint in DIR, to the same bits as if it had not stopped
    #[arg(long, value_name = "DIR", conflicts_with_all = ["compare", "seeds"])]
    pub resume: Option<PathBuf>,
    /// The velocity field [default: reference for two columns, mlp for others]
    #[arg(long)]
    pub field: Option<FieldName>,
    /// Divergence of the field [default: exact for two columns, hutchinson for others]
    #[arg(long)]
    pub trace: Option<TraceName>,
    /// Trains once in each of these precisions, on each --data, and prints a table
    #[arg(long, value_delimiter = ',', value_name = "PRECISIONS")]
    pub compare: Option<Vec<PrecisionName>>,
    /// With --compare: trains with that many seeds, from --seed on, and prints mean and spread [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000), requires = "compare")]
    pub seeds: Option<u32>,
}

macro_rules! names {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[value(name = $text)] #[serde(rename = $text)] $variant),*
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self { $(Self::$variant => $text),* })
            }
        }
    };
}

names! {
    /// Solvers by name.
    SolverName {
        /// Order 1.
        Euler = "euler",
        /// Order 2.
        Midpoint = "midpoint",
        /// Order 2.
        Heun = "heun",
        /// Order 2.
        Ralston = "ralston",
        /// Order 3.
        Rk3 = "rk3",
        /// Order 4.
        Rk4 = "rk4",
        /// Order 4, the 3/8 rule.
        Rk38 = "rk38",
        /// Order 3, Bogacki and Shampine.
        Bosh3 = "bosh3",
        /// Order 5, Dormand and Prince.
        Dopri5 = "dopri5",
        /// Order 5, Tsitouras.
        Tsit5 = "tsit5",
    }
}

names! {
    /// Precisions by name.
    PrecisionName {
        /// 32 bits throughout.
        F32 = "f32",
        /// bfloat16 field and trajectory, F32 sums.
        Bf16 = "bf16",
        /// Half field and trajectory, F32 sums.
        F16 = "f16",
    }
}

names! {
    /// Gradients by name.
    AdjointName {
        /// Step by step, from the kept states.
        Discrete = "discrete",
        /// By Candle's own graph through all steps.
        Unrolled = "unrolled",
    }
}

names! {
    /// Velocity fields by name.
    FieldName {
        /// Planar units whose weights a network makes of the time.
        Reference = "reference",
        /// An MLP whose layers see the time.
        Mlp = "mlp",
        /// FFJORD's concat-squash layers.
        Ffjord = "ffjord",
    }
}

names! {
    /// Divergences by name.
    TraceName {
        /// Every diagonal entry of the Jacobian.
        Exact = "exact",
        /// One random direction per solve.
        Hutchinson = "hutchinson",
    }
}

fn tolerance(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(tolerance) if tolerance.is_finite() && tolerance > 0.0 => Ok(tolerance),
        Ok(tolerance) => Err(format!("{tolerance} is no tolerance; give a positive number")),
        Err(error) => Err(error.to_string()),
    }
}

fn learning_rate(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(lr) if lr.is_finite() && lr > 0.0 => Ok(lr),
        Ok(lr) => Err(format!("{lr} is no learning rate; give a positive number")),
        Err(error) => Err(error.to_string()),
    }
}

/// Everything the numbers of a run depend on; kept in its checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Name of a density, `digits`, or a path.
    pub data: String,
    /// One step.
    pub solver: SolverName,
    /// Steps of a solve, unless there are tolerances.
    pub steps: u32,
    /// Relative and absolute tolerance of adaptive steps.
    #[serde(default)]
    pub tolerances: Option<(f64, f64)>,
    /// Precision of field and trajectory.
    pub precision: PrecisionName,
    /// How gradients come back.
    pub adjoint: AdjointName,
    /// Iterations.
    pub iters: u64,
    /// The iteration after which the learning rate is a tenth.
    pub drop_after: u64,
    /// Points in a batch.
    pub batch: u32,
    /// Learning rate at the start.
    pub lr: f64,
    /// Seed of weights, batches and noise.
    pub seed: u64,
    /// Divergence; by the number of columns if not given.
    pub trace: Option<TraceName>,
    /// The velocity field; by the number of columns if not given.
    #[serde(default)]
    pub field: Option<FieldName>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: "checkerboard".into(),
            solver: SolverName::Rk4,
            steps: 8,
            tolerances: None,
            precision: PrecisionName::F32,
            adjoint: AdjointName::Discrete,
            iters: 800,
            drop_after: 600,
            batch: 256,
            lr: 1e-2,
            seed: 0,
            trace: None,
            field: None,
        }
    }
}

impl Config {
    /// The learning rate of an iteration, counted from 1.
    pub fn learning_rate(&self, iteration: u64) -> f64 {
        if iteration <= self.drop_after { self.lr } else { self.lr / 10.0 }
    }
}

impl Cli {
    /// Flags that parse, but not together.
    ///
    /// # Errors
    /// [`OdeError::Setting`].
    pub fn check(&self) -> Result<()> {
        if self.data.len() > 1 && self.compare.is_none() {
            let hint = "several data sets are for --compare; give one";
            return Err(OdeError::Setting { setting: "--data", value: self.data.join(" and "), hint });
        }
        if self.tolerances().is_some() && self.adjoint == Some(AdjointName::Unrolled) {
            let hint =
                "nobody knows how deep a stack Candle's backward needs over adaptive steps; take discrete, or --steps";
            return Err(OdeError::Setting { setting: "--adjoint", value: "unrolled".into(), hint });
        }
        Ok(())
    }

    fn tolerances(&self) -> Option<(f64, f64)> {
        let given = self.rtol.is_some() || self.atol.is_some();
        given.then(|| (self.rtol.unwrap_or(1e-3), self.atol.unwrap_or(1e-5)))
    }

    /// The settings of a fresh run.
    pub fn config(&self) -> Config {
        let base = Config::default();
        let iters = self.iters.unwrap_or(base.iters);
        Config {
            data: self.data.first().cloned().unwrap_or(base.data),
            solver: self.solver.unwrap_or(base.solver),
            steps: self.steps.unwrap_or(base.steps),
            tolerances: self.tolerances(),
            precision: self.precision.unwrap_or(base.precision),
            adjoint: self.adjoint.unwrap_or(base.adjoint),
            iters,
            drop_after: iters - iters / 4,
            batch: self.batch.unwrap_or(base.batch),
            lr: self.lr.unwrap_or(base.lr),
            seed: self.seed.unwrap_or(base.seed),
            trace: self.trace,
            field: self.field,
        }
    }

    /// The settings of a run that goes on: those of its checkpoint. `--iters` may ask for more of them; the learning
    /// rate then stays where it is.
    ///
    /// # Errors
    /// [`OdeError::Setting`] for a flag that contradicts the checkpoint.
    pub fn resumed(&self, saved: &Config) -> Result<Config> {
        let hint = "a resumed run keeps its settings (only --iters, --out and --cpu may change); leave the flag out";
        fn keep<T: PartialEq + ToString>(
            setting: &'static str,
            flag: Option<&T>,
            saved: Option<&T>,
            hint: &'static str,
        ) -> Result<()> {
            match flag {
                Some(flag) if Some(flag) != saved => Err(OdeError::Setting { setting, value: flag.to_string(), hint }),
                _ => Ok(()),
            }
        }
        keep("--data", self.data.first(), Some(&saved.data), hint)?;
        keep("--solver", self.solver.as_ref(), Some(&saved.solver), hint)?;
        keep("--steps", self.steps.as_ref(), Some(&saved.steps), hint)?;
        keep("--rtol", self.rtol.as_ref(), saved.tolerances.map(|(rtol, _)| rtol).as_ref(), hint)?;
        keep("--atol", self.atol.as_ref(), saved.tolerances.map(|(_, atol)| atol).as_ref(), hint)?;
        keep("--precision", self.precision.as_ref(), Some(&saved.precision), hint)?;
        keep("--adjoint", self.adjoint.as_ref(), Some(&saved.adjoint), hint)?;
        keep("--batch", self.batch.as_ref(), Some(&saved.batch), hint)?;
        keep("--lr", self.lr.as_ref(), Some(&saved.lr), hint)?;
        keep("--seed", self.seed.as_ref(), Some(&saved.seed), hint)?;
        keep("--trace", self.trace.as_ref(), saved.trace.as_ref(), hint)?;
        keep("--field", self.field.as_ref(), saved.field.as_ref(), hint)?;
        Ok(Config { iters: self.iters.unwrap_or(saved.iters), ..saved.clone() })
    }

    /// Where results go.
    pub fn out(&self) -> &Path {
        self.out.as_deref().or(self.resume.as_deref()).unwrap_or(Path::new("out/cnf"))
    }

    /// The runs to compare, each data set in each precision with each seed; none without `--compare`.
    pub fn compared(&self) -> Vec<Config> {
        let base = self.config();
        let all = if self.data.is_empty() { std::slice::from_ref(&base.data) } else { &self.data };
        let mut runs: Vec<Config> = Vec::new();
        for data in all {
            for &precision in self.compare.iter().flatten() {
                for offset in 0..u64::from(self.seeds.unwrap_or(1)) {
                    let seed = base.seed.wrapping_add(offset);
                    let run = Config { data: data.clone(), precision, seed, ..base.clone() };
                    if !runs.contains(&run) {
                        runs.push(run);
                    }
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &str) -> std::result::Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("cnf").chain(flags.split_whitespace()))
    }

    #[test]
    fn flags_are_checked() {
        assert_eq!(parse("").unwrap().config(), Config::default());
        for bad in [
            "--steps 0",
            "--steps 8 --rtol 1e-3",
            "--rtol 0",
            "--atol -1",
            "--iters 0",
            "--batch 0",
            "--lr 0",
            "--lr nan",
            "--lr -1",
            "--precision f64",
            "--seeds 3",
            "--compare f32,f8",
            "--precision f16 --compare f32",
            "--resume a --compare f32",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let config = parse("--data 2spirals --solver tsit5 --precision bf16 --iters 100 --lr 0.5").unwrap().config();
        assert_eq!((config.solver, config.precision, config.drop_after), (SolverName::Tsit5, PrecisionName::Bf16, 75));
        assert_eq!((config.learning_rate(75), config.learning_rate(76)), (0.5, 0.05));
        let adaptive = parse("--solver dopri5 --rtol 1e-4").unwrap();
        assert_eq!((adaptive.config().tolerances, config.tolerances), (Some((1e-4, 1e-5)), None));
        assert!(adaptive.check().is_ok() && parse("--atol 1e-4 --adjoint unrolled").unwrap().check().is_err());
    }

    #[test]
    fn comparison_is_precisions_times_seeds() {
        let runs = parse("--compare f32,f16,f32 --seeds 2 --seed 5").unwrap().compared();
        let runs: Vec<_> = runs.iter().map(|run| (run.precision, run.seed)).collect();
        let (f32, f16) = (PrecisionName::F32, PrecisionName::F16);
        assert_eq!(runs, [(f32, 5), (f32, 6), (f16, 5), (f16, 6)]);
        assert!(parse("").unwrap().compared().is_empty());
        let several = parse("--data rings --data moons --compare f32,f16").unwrap();
        several.check().unwrap();
        let runs: Vec<_> = several.compared().into_iter().map(|run| (run.data, run.precision)).collect();
        let named = |data: &str, precision| (data.to_owned(), precision);
        assert_eq!(runs, [named("rings", f32), named("rings", f16), named("moons", f32), named("moons", f16)]);
        let error = parse("--data rings --data moons").unwrap().check().unwrap_err().to_string();
        assert!(error.contains("rings and moons") && error.contains("--compare"), "{error}");
    }

    #[test]
    fn resumed_runs_keep_their_settings() -> Result<()> {
        let saved = parse("--data rings --iters 400").unwrap().config();
        let longer = parse("--resume d --data rings --iters 900").unwrap();
        assert_eq!(longer.resumed(&saved)?, Config { iters: 900, ..saved.clone() });
        assert_eq!(longer.out(), Path::new("d"));
        for changed in ["--lr 0.1", "--trace exact", "--field ffjord", "--batch 3", "--data moons"] {
            let error = parse(&format!("--resume d {changed}")).unwrap().resumed(&saved).unwrap_err().to_string();
            assert!(error.contains(changed.split(' ').next().unwrap()) && error.contains("resumed"), "{error}");
        }
        Ok(())
    }
}
