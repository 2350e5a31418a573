//! Training in one precision.

use super::digits::{Digit, Digits, tensors};
use super::network::Network;
use candle_core::{D, DType, Tensor};
use candle_nn::{Optimizer, loss::cross_entropy};
use candle_ode::Result;
use candle_ode::memory::TrackingAllocator;
use candle_ode::optim::{Adam, AdamConfig};
use candle_ode::prelude::*;
use cpu_time::ProcessTime;
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The learning rate at first; it falls to zero along a cosine.
const RATE: f64 = 3e-3;

/// Images that are looked at together when they are counted.
const AT_ONCE: usize = 256;

/// What all runs share.
pub struct Settings {
    pub epochs: u32,
    pub batch: usize,
    pub steps: usize,
    pub channels: usize,
    pub seed: u64,
}

/// What a run came to.
pub struct Outcome {
    pub name: String,
    /// Of the images held out, the part that is recognised.
    pub accuracy: f64,
    /// Their mean cross entropy in nats.
    pub loss: f64,
    /// CPU seconds of an epoch, of all threads.
    pub seconds: f64,
    /// Bytes of heap that a step of the optimiser took at most.
    pub peak: u64,
    /// Bytes that a solve kept for the backward pass.
    pub trajectory: usize,
}

/// Trains a network whose block evaluates its field in `precision`.
///
/// # Errors
/// Whatever a solve reports.
pub fn run(digits: &Digits, settings: &Settings, precision: Precision) -> Result<Outcome> {
    let name = format!("{:?}", precision.compute_dtype());
    let network = Network::new(settings.channels, settings.steps, precision, settings.seed)?;
    let mut optimizer = Adam::from_varmap(&network.vars, AdamConfig { lr: RATE, ..Default::default() })?;
    let mut order = ChaCha8Rng::seed_from_u64(settings.seed);
    let mut training = digits.training.clone();
    let steps = settings.epochs as usize * training.len().div_ceil(settings.batch);
    let bar = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix:>5} {bar:30} {pos}/{len} {msg} ({eta} left)") {
        bar.set_style(style);
    }
    bar.set_prefix(name.clone());
    let (mut peak, mut trajectory, start) = (u64::MAX, 0, ProcessTime::now());
    for _ in 0..settings.epochs {
        training.shuffle(&mut order);
        for batch in training.chunks(settings.batch) {
            let done = bar.position() as f64 / steps as f64;
            optimizer.set_learning_rate(RATE * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()));
            let (images, classes) = tensors(batch)?;
            let baseline = TrackingAllocator::live();
            TrackingAllocator::reset_peak();
            let (scores, kept) = network.forward(&images, true)?;
            let loss = cross_entropy(&scores, &classes)?;
            optimizer.step(&loss.backward()?)?;
            if batch.len() == settings.batch.min(training.len()) {
                // Buffers that are made once, by threads that join later, are not the step's.
                peak = peak.min(TrackingAllocator::peak().saturating_sub(baseline));
                trajectory = kept;
            }
            bar.set_message(format!("loss {:.3}", loss.to_scalar::<f32>()?));
            bar.inc(1);
        }
    }
    let seconds = start.elapsed().as_secs_f64() / f64::from(settings.epochs);
    bar.finish();
    let (accuracy, loss) = look(&network, &digits.held_out)?;
    Ok(Outcome { name, accuracy, loss, seconds, peak, trajectory })
}

/// The part of the images that is recognised, and the mean cross entropy.
fn look(network: &Network, digits: &[Digit]) -> Result<(f64, f64)> {
    let (mut right, mut loss) = (0.0, 0.0);
    for digits in digits.chunks(AT_ONCE) {
        let (images, classes) = tensors(digits)?;
        let (scores, _) = network.forward(&images, false)?;
        right += f64::from(sum(&scores.argmax(D::Minus1)?.eq(&classes)?)?);
        loss += f64::from(cross_entropy(&scores, &classes)?.to_scalar::<f32>()?) * digits.len() as f64;
    }
    let count = digits.len() as f64;
    Ok((right / count, loss / count))
}

fn sum(x: &Tensor) -> candle_core::Result<f32> {
    x.to_dtype(DType::F32)?.sum_all()?.to_scalar()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_learns_in_every_precision_and_keeps_half_as_much_in_half() -> Result<()> {
        let digits = Digits::read(0)?;
        let settings = Settings { epochs: 2, batch: 16, steps: 2, channels: 16, seed: 0 };
        // All states but the first, which the graph has, and the last, which the network has.
        let state = settings.batch * settings.channels * 64;
        for (precision, bytes) in [(Precision::F32, 4), (Precision::BF16, 2), (Precision::F16, 2)] {
            let outcome = run(&digits, &settings, precision)?;
            assert!(outcome.accuracy > 0.85, "{}: {}", outcome.name, outcome.accuracy);
            assert_eq!(outcome.trajectory, state * bytes, "{}", outcome.name);
        }
        Ok(())
    }
}
