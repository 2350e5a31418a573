//! What each codec of the trajectory costs in bytes and in accuracy: relative errors of dL/dθ against F64.
//!
//! The problem is an MLP 16-64-64-16 with tanh, batch 64, RK4 with N steps over [0, T]; L = mean y(T)²; y0 ~ N(0, 1),
//! weights of standard deviation s / √fan-in with s = 1 for T = 1 and 1.5 beyond, biases of 0.1, none in the last
//! layer. Sums are made in F32. Two codecs are here for comparison only: increments without error feedback, and states
//! in eight bits.

use super::plot::{Series, log_log};
use candle_core::{DType, Device, Module, Shape, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::field::ops::combine::{Finite, all_finite};
use candle_ode::ops::{Linear, linear, linear_no_bias};
use candle_ode::prelude::*;
use candle_ode::{Codec, Entry, Increments4, Increments8, Increments16, Result, States};
use clap::Args;
use rand::{Rng, SeedableRng};
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Gradient errors of the trajectory's codecs.
#[derive(Args)]
pub(crate) struct Codecs {
    /// Draws of weights and data over which the geometric mean is taken.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// A folder that gets codecs.csv and codecs.svg too; it is made if need be.
    #[arg(long)]
    out: Option<PathBuf>,
}

const ROWS: usize = 64;
const WIDTHS: [usize; 4] = [16, 64, 64, 16];

/// Of each setting: T, N, the dtype of f, and the N at which states in eight bits are measured.
const SETTINGS: [(f64, usize, DType, usize); 7] = [
    (1.0, 32, DType::F32, 64),
    (1.0, 128, DType::F32, 256),
    (4.0, 32, DType::F32, 64),
    (4.0, 128, DType::F32, 256),
    (1.0, 128, DType::F16, 256),
    (4.0, 128, DType::F16, 256),
    (10.0, 128, DType::F16, 256),
];

/// The codec that is measured at the greater N.
const AT_LONGER: &str = "8-bit states";

type Named = (&'static str, fn() -> Discrete);

const CODECS: [Named; 7] = [
    ("F32 states", || Discrete::default().codec(States(DType::F32))),
    ("F16 states", || Discrete::default().codec(States(DType::F16))),
    ("16-bit increments", || Discrete::default().codec(Increments16)),
    ("8-bit increments", || Discrete::default().codec(Increments8)),
    ("4-bit increments", || Discrete::default().codec(Increments4)),
    ("8-bit increments without feedback", || Discrete::default().codec(WithoutFeedback::default())),
    (AT_LONGER, || Discrete::default().codec(Eighth)),
];

/// What is drawn: T, N and the dtype of f.
const DRAWN: [(f64, usize, DType); 3] = [(1.0, 32, DType::F32), (4.0, 128, DType::F32), (4.0, 128, DType::F16)];
/// The codecs on a line, by rising bytes.
const LINES: [(&str, &[&str]); 2] = [
    ("increments", &["4-bit increments", "8-bit increments", "16-bit increments", "F32 states"]),
    ("states", &["8-bit states", "F16 states", "F32 states"]),
];

/// What one codec costs in one setting.
struct Cost {
    t: f64,
    steps: usize,
    f: DType,
    codec: &'static str,
    bytes: f64,
    error: f64,
}

impl Codecs {
    /// Prints the table as CSV, and leaves it in a folder with a plot if one is named.
    pub(super) fn run(&self) -> crate::failure::Result<()> {
        if let Some(out) = &self.out {
            std::fs::create_dir_all(out).map_err(|error| format!("{}: {error}", out.display()))?;
        }
        let costs = self.costs()?;
        let mut csv = "T,N,f,codec,bytes per element and step,relative error\n".to_owned();
        for Cost { t, steps, f, codec, bytes, error } in &costs {
            // Writing to a string cannot fail.
            let _ = writeln!(csv, "{t},{steps},{},{codec},{bytes:.3},{error:.2e}", f.as_str());
        }
        crate::print(csv.as_bytes())?;
        let Some(out) = &self.out else { return Ok(()) };
        candle_ode::file::write_bytes_atomically(&out.join("codecs.csv"), csv.as_bytes())?;
        let axes = ["bytes kept per element and step", "relative error of the gradient"];
        log_log(&out.join("codecs.svg"), "What a kept byte buys", axes, &drawn(&costs))
    }

    fn costs(&self) -> Result<Vec<Cost>> {
        let mut costs = vec![];
        for (t, steps, f, longer) in SETTINGS {
            let (mut logarithms, mut bytes) = ([0.0; CODECS.len()], [0.0; CODECS.len()]);
            for seed in 0..self.seeds.max(1) {
                let problem = Problem::draw(seed, if t == 1.0 { 1.0 } else { 1.5 })?;
                let exact = |steps| problem.gradient(t, steps, Precision::F64, Discrete::default());
                let ((short, _), (long, _)) = (exact(steps)?, exact(longer)?);
                for (n, (name, adjoint)) in CODECS.iter().enumerate() {
                    let (steps, exact) = if *name == AT_LONGER { (longer, &long) } else { (steps, &short) };
                    let (found, size) = problem.gradient(t, steps, Precision::new().compute(f), adjoint())?;
                    logarithms[n] += distance(&found, exact).ln();
                    bytes[n] = size;
                }
            }
            for (n, (codec, _)) in CODECS.iter().enumerate() {
                let steps = if *codec == AT_LONGER { longer } else { steps };
                let error = (logarithms[n] / self.seeds.max(1) as f64).exp();
                costs.push(Cost { t, steps, f, codec, bytes: bytes[n], error });
            }
        }
        Ok(costs)
    }
}

/// Increments and states of some settings.
fn drawn(costs: &[Cost]) -> Vec<Series> {
    let mut all = vec![];
    for (t, steps, f) in DRAWN {
        for (line, codecs) in LINES {
            let is_drawn = |cost: &&Cost, codec: &str| {
                let longer = if codec == AT_LONGER { 2 * steps } else { steps };
                cost.codec == codec && (cost.t, cost.steps, cost.f) == (t, longer, f)
            };
            let found = codecs.iter().filter_map(|codec| costs.iter().find(|cost| is_drawn(cost, codec)));
            let name = format!("{line}, T = {t}, N = {steps}, f in {f:?}");
            let points = found.map(|cost| (cost.bytes, cost.error)).collect();
            all.push(Series { name, points, dashed: line == "states" });
        }
    }
    all
}

/// One draw.
struct Problem {
    weights: Vec<(String, Tensor)>,
    y0: Tensor,
}

impl Problem {
    fn draw(seed: u64, scale: f64) -> Result<Self> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let mut normal = |shape: &[usize], deviation: f64| {
            let count: usize = shape.iter().product();
            let draws = (0..count).map(|_| {
                let (u, v): (f64, f64) = (rng.random(), rng.random());
                deviation * (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
            });
            // Numbers that F32 can hold, so that all precisions see the same ones.
            Tensor::from_iter(draws, &Device::Cpu)?.reshape(shape)?.to_dtype(DType::F32)?.to_dtype(DType::F64)
        };
        let mut weights = vec![];
        for (n, pair) in WIDTHS.windows(2).enumerate() {
            let weight = normal(&[pair[1], pair[0]], scale / (pair[0] as f64).sqrt())?;
            weights.push((format!("{n}.weight"), weight));
            if n + 2 < WIDTHS.len() {
                weights.push((format!("{n}.bias"), normal(&[pair[1]], 0.1)?));
            }
        }
        Ok(Self { weights, y0: normal(&[ROWS, WIDTHS[0]], 1.0)? })
    }

    /// dL/dθ in the order of the weights, and bytes kept per element and step.
    fn gradient(&self, t: f64, steps: usize, precision: Precision, adjoint: Discrete) -> Result<(Vec<Tensor>, f64)> {
        let accumulate = precision.accumulate_dtype();
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'static>| {
            Ok((
                linear(WIDTHS[0], WIDTHS[1], vb.pp("0"))?,
                linear(WIDTHS[1], WIDTHS[2], vb.pp("1"))?,
                linear_no_bias(WIDTHS[2], WIDTHS[3], vb.pp("2"))?,
            ))
        };
        let eval = |(a, b, c): &(Linear, Linear, Linear), _: &Time, y: &Tensor| {
            let hidden = candle_ode::ops::tanh(&a.forward(y)?)?;
            c.forward(&candle_ode::ops::tanh(&b.forward(&hidden)?)?)
        };
        let field = ModelField::new_in(accumulate, &vars, &Device::Cpu, build, eval)?;
        let named = vars.data().lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (name, weight) in &self.weights {
            if let Some(var) = named.get(name) {
                var.set(&weight.to_dtype(accumulate)?)?;
            }
        }
        let y0 = Var::from_tensor(&self.y0.to_dtype(accumulate)?)?;
        let ode = Ode::new(&field).solver(Rk4).span(0.0, t).steps(steps).precision(precision).adjoint(adjoint);
        let solution = ode.solve(y0.as_tensor())?;
        let grads = solution.last().sqr()?.mean_all()?.backward()?;
        let gradients = self.weights.iter().filter_map(|(name, _)| named.get(name).and_then(|var| grads.get(var)));
        let bytes = solution.trajectory_bytes() as f64 / (y0.elem_count() * (steps - 1)) as f64;
        Ok((gradients.cloned().collect(), bytes))
    }
}

/// ‖a − b‖ / ‖b‖ over all tensors as one.
fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
    let values = |all: &[Tensor]| -> Vec<f64> {
        let flat = all.iter().map(|x| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1());
        flat.filter_map(candle_core::Result::ok).flatten().collect()
    };
    let (a, b) = (values(a), values(b));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
}

/// What [`Increments8`] would be if each increment were rounded by itself: the backward pass sums up the roundings.
///
/// States come in order and are asked for in the opposite one, so the codec may remember the last of each.
#[derive(Debug, Default)]
struct WithoutFeedback {
    encoded: Mutex<Option<State>>,
    decoded: Mutex<Option<(State, Entry)>>,
}

impl Codec for WithoutFeedback {
    fn encode(&self, state: &State) -> Result<(Entry, Finite)> {
        let mut last = self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        // The step from the state before to this one.
        let increment = match last.as_ref() {
            None => state.detach(),
            Some(before) => State::from((&state[0] - &before[0])?),
        };
        *last = Some(state.detach());
        let (mut entry, finite) = Increments8.encode(&increment)?;
        entry.shapes = state.tensors().iter().map(|x| x.shape().clone()).collect();
        Ok((entry, finite))
    }

    fn decode(&self, entry: &Entry, dtype: DType) -> Result<State> {
        let mut above = self.decoded.lock().unwrap_or_else(PoisonError::into_inner);
        let state = match (above.as_ref(), self.encoded.lock().unwrap_or_else(PoisonError::into_inner).as_ref()) {
            (None, Some(last)) => last.clone(),
            (Some((state, entry)), _) => State::from((&state[0] - &Increments8.decode(entry, dtype)?[0])?),
            (None, None) => Increments8.decode(entry, dtype)?,
        };
        *above = Some((state.clone(), entry.clone()));
        Ok(state)
    }

    fn bytes(&self, shapes: &[Shape]) -> usize {
        Increments8.bytes(shapes)
    }

    fn dtype(&self) -> DType {
        Increments8.dtype()
    }
}

/// States in F8 E4M3.
#[derive(Debug)]
struct Eighth;

impl Codec for Eighth {
    fn encode(&self, state: &State) -> Result<(Entry, Finite)> {
        let kept = state.detach().try_map(|x| x.to_dtype(DType::F8E4M3))?;
        let finite = all_finite(
            kept.tensors().iter().map(|x| x.to_dtype(DType::F32)).collect::<candle_core::Result<Vec<_>>>()?.as_slice(),
        )?;
        Ok((Entry::new(kept.into_tensors(), state), finite))
    }

    fn decode(&self, entry: &Entry, dtype: DType) -> Result<State> {
        Ok(State::from(entry.tensors.clone()).try_map(|x| x.to_dtype(dtype))?)
    }

    fn bytes(&self, shapes: &[Shape]) -> usize {
        shapes.iter().map(Shape::elem_count).sum()
    }

    fn dtype(&self) -> DType {
        DType::F8E4M3
    }
}
