//! The systems: initial states, and noisy measurements of their solutions.

use candle_core::{DType, Device, Tensor};
use candle_ode::Result;
use candle_ode::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal, Uniform};

/// What is to be learned: y(0), times and measured states.
pub struct Problem {
    /// In the table.
    pub name: &'static str,
    /// The ends of the span.
    pub span: (f64, f64),
    /// Steps of a solve.
    pub steps: usize,
    /// Standard deviation of the noise.
    pub noise: f64,
    /// Initial states, `(batch, dim)`.
    pub y0: Tensor,
    /// When it is measured.
    pub times: Vec<f64>,
    /// What is measured, `(times, batch, dim)`.
    pub measured: Tensor,
}

/// Chandrasekhar's equation of a white dwarf with C = 0.001: φ″ = −2 φ′/η − (φ² − C)^{3/2}, φ(0) = 1, φ′(0) = 0.
///
/// # Reference
/// S. Chandrasekhar, *An Introduction to the Study of Stellar Structure* (1939), ch. XI.
pub fn white_dwarf(seed: u64) -> Result<Problem> {
    let law = |eta: f64, y: &[f64]| vec![y[1], -2.0 * y[1] / eta - (y[0] * y[0] - 0.001).max(0.0).powf(1.5)];
    // Near the centre φ = 1 − η²/6 (1 − C)^{3/2}.
    let (eta, drop) = (0.05f64, 0.999f64.powf(1.5));
    let y0 = [1.0 - eta * eta / 6.0 * drop, -eta / 3.0 * drop];
    simulate("white dwarf", law, vec![y0.to_vec()], (eta, 5.0), 100, 20, 0.005, seed)
}

/// Two masses between walls on three springs: x₁″ = −k x₁ + κ (x₂ − x₁), x₂″ = −k x₂ − κ (x₂ − x₁), k = 1, κ = ½.
pub fn oscillators(seed: u64) -> Result<Problem> {
    let law = |_: f64, y: &[f64]| {
        let pull = 0.5 * (y[1] - y[0]);
        vec![y[2], y[3], -y[0] + pull, -y[1] - pull]
    };
    simulate("coupled oscillators", law, starts(seed, 16, [1.0; 4]), (0.0, 8.0), 64, 16, 0.01, seed)
}

/// Two equal rods and masses under gravity, g/l = 1: angles and their velocities.
///
/// # Reference
/// L. D. Landau, E. M. Lifshitz, *Mechanics*, §5, problem 1 (its Lagrangian).
pub fn double_pendulum(seed: u64) -> Result<Problem> {
    let law = |_: f64, y: &[f64]| {
        let (a, b, u, v) = (y[0], y[1], y[2], y[3]);
        let (sin, cos) = (a - b).sin_cos();
        let below = 2.0 - cos * cos;
        let of_a = -cos * sin * u * u - sin * v * v + cos * b.sin() - 2.0 * a.sin();
        let of_b = 2.0 * sin * u * u + cos * sin * v * v + 2.0 * cos * a.sin() - 2.0 * b.sin();
        vec![u, v, of_a / below, of_b / below]
    };
    simulate("double pendulum", law, starts(seed, 16, [0.8, 0.8, 0.3, 0.3]), (0.0, 5.0), 64, 16, 0.01, seed)
}

/// So many initial states, uniform up to `sizes` in each direction.
fn starts(seed: u64, batch: usize, sizes: [f64; 4]) -> Vec<Vec<f64>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // The bounds are constants, −1 below 1.
    let uniform = Uniform::new(-1.0, 1.0).unwrap_or_else(|error| unreachable!("{error}"));
    (0..batch).map(|_| sizes.iter().map(|size| size * uniform.sample(&mut rng)).collect()).collect()
}

/// Solves `law` in F64 by Dopri5 at a tenth of the steps, and measures with noise.
#[allow(clippy::too_many_arguments, reason = "a row of a table of problems")]
fn simulate(
    name: &'static str,
    law: impl Fn(f64, &[f64]) -> Vec<f64> + Send + Sync + 'static,
    y0: Vec<Vec<f64>>,
    span: (f64, f64),
    steps: usize,
    measurements: usize,
    noise: f64,
    seed: u64,
) -> Result<Problem> {
    let field = FnField::new(move |t: &Time, y: &Tensor| {
        let slopes: Vec<f64> = y.to_vec2::<f64>()?.iter().flat_map(|y| law(t.value(), y)).collect();
        Tensor::from_vec(slopes, y.shape(), y.device())
    });
    let every = steps / measurements;
    let grid = TimeGrid::uniform(span.0, span.1, steps)?;
    let times: Vec<f64> = grid.times().iter().copied().skip(every).step_by(every).collect();
    let y0 = Tensor::new(y0, &Device::Cpu)?;
    let fine = Ode::new(&field).solver(Dopri5).span(span.0, span.1).steps(10 * steps).save_at(&times).no_grad();
    let truth: Vec<Tensor> = fine.solve(&y0)?.states().iter().map(|y| y[0].clone()).collect();
    let truth = Tensor::stack(&truth, 0)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed + 1);
    let draws = (0..truth.elem_count()).map(|_| {
        let draw: f64 = StandardNormal.sample(&mut rng);
        noise * draw
    });
    let measured = (Tensor::from_iter(draws, &Device::Cpu)?.reshape(truth.shape())? + truth)?;
    let (y0, measured) = (y0.to_dtype(DType::F32)?, measured.to_dtype(DType::F32)?);
    Ok(Problem { name, span, steps, noise, y0, times, measured })
}
