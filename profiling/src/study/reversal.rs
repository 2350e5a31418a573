//! ANODE's three demonstrations: equations whose solution cannot be found backwards from its end. The continuous
//! adjoint needs it, and its gradient is as wrong as the states it finds; the gradient of the steps taken is right.
//!
//! Metrics over the number of RK4 steps: ‖y0 reconstructed − y0‖/‖y0‖, and the relative 2-norm of the error of dL/dy0
//! and dL/dθ for L = ½ ‖y(T)‖²/‖y_N‖² against the gradient of the same steps by Candle's own graph in F64.
//!
//! Reference: Gholami, Keutzer, Biros, arXiv 1902.10298, §3.

use super::plot::{Series, log_log};
use super::publish;
use crate::failure::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_ode::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::path::Path;

/// f(t, y; θ) with the values of y0 and θ, in F64.
struct Demonstration {
    name: &'static str,
    field: FnField,
    y0: Tensor,
    theta: Tensor,
    end: f64,
    steps: &'static [usize],
}

fn demonstrations() -> Result<[Demonstration; 3]> {
    let cpu = &Device::Cpu;
    let y = |y: &State| y.single().cloned();
    Ok([
        Demonstration {
            name: "y' = -100 y",
            field: FnField::with_inputs(move |_, state, theta| Ok(State::from(y(state)?.broadcast_mul(&theta[0])?))),
            y0: Tensor::new(&[1.0], cpu)?,
            theta: Tensor::new(&[-100.0], cpu)?,
            // At t = 1 it would leave the range of F32.
            end: 0.5,
            steps: &[20, 32, 48, 64, 96, 128, 256],
        },
        Demonstration {
            name: "y' = ReLU(W y)",
            field: FnField::with_inputs(move |_, state, theta| {
                Ok(State::from(y(state)?.matmul(&theta[0].t()?)?.relu()?))
            }),
            y0: normal(1, &[1, 100])?,
            theta: normal(2, &[100, 100])?,
            end: 1.0,
            steps: &[16, 32, 64, 128, 256, 512],
        },
        Demonstration {
            name: "residual block, 3x3 convolution",
            field: FnField::with_inputs(move |_, state, theta| {
                Ok(State::from(y(state)?.conv2d(&theta[0], 1, 1, 1, 1)?.relu()?))
            }),
            y0: image()?,
            theta: normal(3, &[CHANNELS, CHANNELS, 3, 3])?,
            // In F32 the way back is lost whatever the steps.
            end: 2.0,
            steps: &[32, 64, 128, 256, 512],
        },
    ])
}

const CHANNELS: usize = 16;

/// A ring on a slope, with its mirror images as further channels.
fn image() -> Result<Tensor> {
    const SIDE: usize = 16;
    let pixel = |c: usize, row: usize, column: usize| {
        let (row, column) =
            (if c & 1 == 0 { row } else { SIDE - row }, if c & 2 == 0 { column } else { SIDE - column });
        let [x, y] = [row, column].map(|n| n as f64 / SIDE as f64 - 0.4);
        0.5 * x + (-((x.hypot(y) - 0.25) / 0.08).powi(2)).exp()
    };
    let rows = (0..CHANNELS * SIDE * SIDE).map(|n| pixel(n / (SIDE * SIDE), n / SIDE % SIDE, n % SIDE));
    Ok(Tensor::from_iter(rows, &Device::Cpu)?.reshape((1, CHANNELS, SIDE, SIDE))?)
}

fn normal(seed: u64, shape: &[usize]) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let draws: Vec<f64> = (0..shape.iter().product()).map(|_| StandardNormal.sample(&mut rng)).collect();
    Ok(Tensor::from_vec(draws, shape, &Device::Cpu)?)
}

/// dL/dy0 and dL/dθ in a row, in F64, and the drift.
fn gradient(
    of: &Demonstration,
    steps: usize,
    dtype: DType,
    adjoint: Adjoint,
) -> candle_ode::Result<(Vec<f64>, Option<f64>)> {
    let [y0, theta] = [&of.y0, &of.theta].map(|x| x.to_dtype(dtype).and_then(|x| Var::from_tensor(&x)));
    let (y0, theta) = (y0?, theta?);
    let precision = if dtype == DType::F64 { Precision::F64 } else { Precision::F32 };
    let ode = Ode::new(&of.field).span(0.0, of.end).steps(steps).precision(precision).adjoint(adjoint);
    let solution = ode.inputs(&[theta.as_tensor().clone()]).solve(y0.as_tensor())?;
    let end = solution.last();
    // The scale is a constant: L = ½ y(T)² itself would not fit F32 where y(T) = e⁻⁵⁰.
    let size = end.detach().to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt();
    let loss = (end * (1.0 / size))?.sqr()?.sum_all()?;
    let grads = loss.backward()?;
    let mut row = vec![];
    for var in [&y0, &theta] {
        if let Some(gradient) = grads.get(var) {
            row.extend(gradient.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?);
        }
    }
    Ok((row, solution.stats().drift))
}

fn relative(found: &[f64], exact: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(exact).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied())
}

/// Prints, `reversal.csv` and `reversal.svg`.
pub(super) fn run(out: &Path) -> Result<()> {
    let head = ["problem", "adjoint", "dtype", "steps", "drift of y0", "error of the gradient"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut series = vec![];
    for problem in demonstrations()? {
        for dtype in [DType::F32, DType::F64] {
            for (name, adjoint) in [("Backsolve", Backsolve::default().into()), ("Discrete", Adjoint::default())] {
                let mut points = vec![];
                for &steps in problem.steps {
                    let (exact, _) = gradient(&problem, steps, DType::F64, Unrolled.into())?;
                    // States that are not finite are an error of Backsolve's, and an answer here.
                    let (drift, error) = match gradient(&problem, steps, dtype, adjoint.clone()) {
                        Ok((found, drift)) => (drift, relative(&found, &exact)),
                        Err(OdeError::Reconstruction { .. } | OdeError::Overflow { .. }) => {
                            (Some(f64::INFINITY), f64::INFINITY)
                        }
                        Err(other) => return Err(other.into()),
                    };
                    if error.is_finite() {
                        points.push((steps as f64, error.max(1e-17)));
                    }
                    let drift = drift.map_or_else(String::new, |drift| format!("{drift:.2e}"));
                    let cells = [problem.name.into(), name.into(), format!("{dtype:?}"), steps.to_string(), drift];
                    rows.push(cells.into_iter().chain([format!("{error:.2e}")]).collect());
                }
                let name = format!("{name}, {dtype:?}: {}", problem.name);
                series.push(Series { name, points, dashed: dtype == DType::F64 });
            }
        }
    }
    publish(&rows, &out.join("reversal.csv"))?;
    let axes = ["steps of RK4", "relative error of the gradient"];
    log_log(&out.join("reversal.svg"), "Solving backwards what cannot be", axes, &series)
}
