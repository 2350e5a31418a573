//! Where the memory of a training loop goes: a plain Candle network with one ODE block, profiled as a whole.
//!
//! `cargo run --release --example profile_your_model` trains a small convolutional network to tell horizontal from
//! vertical stripes, prints what its peak was made of, and writes `out/profile/report.html` and the other formats (into
//! another folder if one is named). What to copy into a program of your own is marked (1) to (4).

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{AdamW, Conv2d, Conv2dConfig, Linear, Optimizer, VarBuilder, VarMap, conv2d, linear, loss, ops};
use candle_ode::memory::{MemoryProfiler, MemoryReport, TrackingAllocator};
use candle_ode::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::PoisonError;

/// (1) Counts the heap.
#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const SIDE: usize = 16;
const CHANNELS: usize = 8;
const BATCH: usize = 64;
const STEPS: usize = 8;

/// f of the ODE block: two 3 × 3 convolutions with tanh between them, y `(batch, 8, 8, 8)`.
struct Block(Conv2d, Conv2d);

impl Block {
    fn new(vb: VarBuilder<'_>) -> Result<Self> {
        let same = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
        let layer = |name| conv2d(CHANNELS, CHANNELS, 3, same, vb.pp(name));
        Ok(Self(layer("first")?, layer("second")?))
    }
}

impl Module for Block {
    fn forward(&self, y: &Tensor) -> Result<Tensor> {
        self.1.forward(&self.0.forward(y)?.tanh()?)
    }
}

/// Convolution, pooling, the ODE block, mean over the pixels, linear.
struct Network {
    stem: Conv2d,
    block: Ode,
    head: Linear,
}

impl Network {
    fn new(vars: &VarMap, device: &Device) -> candle_ode::Result<Self> {
        let vb = VarBuilder::from_varmap(vars, DType::F32, device);
        let field =
            ModelField::new(vars, device, |vb| Block::new(vb.pp("block")), |block, _: &Time, y| block.forward(y))?;
        let same = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
        Ok(Self {
            stem: conv2d(1, CHANNELS, 3, same, vb.pp("stem"))?,
            block: Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(STEPS),
            head: linear(CHANNELS, 2, vb.pp("head"))?,
        })
    }

    /// Scores `(batch, 2)` of images `(batch, 1, 16, 16)`.
    fn forward(&self, images: &Tensor) -> candle_ode::Result<Tensor> {
        // (3) Spans of your own: the report puts ours inside them.
        let features = tracing::info_span!("stem").in_scope(|| self.stem.forward(images)?.relu()?.avg_pool2d(2))?;
        let solution = tracing::info_span!("ode block").in_scope(|| self.block.solve(&features))?;
        let _span = tracing::info_span!("head").entered();
        Ok(self.head.forward(&solution.last().flatten_from(2)?.mean(D::Minus1)?)?)
    }
}

/// Stripes with noise, `(batch, 1, 16, 16)`, and whether they are vertical.
fn stripes(rng: &mut ChaCha8Rng, device: &Device) -> Result<(Tensor, Tensor)> {
    let vertical: Vec<u32> = (0..BATCH).map(|_| rng.random_range(0..2)).collect();
    let mut pixels = Vec::with_capacity(BATCH * SIDE * SIDE);
    for &vertical in &vertical {
        let shift = rng.random_range(0..4);
        for pixel in 0..SIDE * SIDE {
            let along = if vertical == 1 { pixel % SIDE } else { pixel / SIDE };
            let stripe = if (along + shift) / 2 % 2 == 0 { 1.0 } else { 0.0 };
            pixels.push(stripe + rng.random_range(-0.3..0.3f32));
        }
    }
    Ok((Tensor::from_vec(pixels, (BATCH, 1, SIDE, SIDE), device)?, Tensor::from_vec(vertical, BATCH, device)?))
}

/// Parameters drawn from `rng`: weights of variance 2/fan-in, as layers before a ReLU like them, biases of zero.
fn draw(vars: &VarMap, rng: &mut ChaCha8Rng) -> Result<()> {
    let named = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    // By name: a map has an order of its own in every process.
    for var in named.iter().collect::<BTreeMap<_, _>>().into_values() {
        let fan_in: usize = var.dims().iter().skip(1).product();
        let bound = if var.rank() == 1 { 0.0 } else { (6.0 / fan_in as f32).sqrt() };
        let values: Vec<f32> = (0..var.elem_count()).map(|_| rng.random_range(-bound..=bound)).collect();
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
    }
    Ok(())
}

/// Trains, and says where the memory went and how large the last loss was.
fn profile(iterations: u64) -> candle_ode::Result<(MemoryReport, f32)> {
    let device = Device::Cpu;
    // (2) Before the model is made, so that its parameters are seen.
    let recording =
        MemoryProfiler::new(&device).set("solver", "heun").set("steps", STEPS).set("batch", BATCH).install()?;
    let vars = VarMap::new();
    let network = Network::new(&vars, &device)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    draw(&vars, &mut rng)?;
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-2)?;
    let mut last = f32::NAN;
    for index in 0..iterations {
        let _iteration = tracing::info_span!("iteration", index).entered();
        let (images, labels) = tracing::info_span!("data").in_scope(|| stripes(&mut rng, &device))?;
        let scores = tracing::info_span!("forward pass").in_scope(|| network.forward(&images))?;
        let loss = loss::nll(&ops::log_softmax(&scores, D::Minus1)?, &labels)?;
        let gradients = tracing::info_span!("backward pass").in_scope(|| loss.backward())?;
        tracing::info_span!("optimizer").in_scope(|| optimizer.step(&gradients))?;
        last = loss.to_scalar()?;
    }
    // (4) The report.
    Ok((recording.finish()?, last))
}

fn main() -> candle_ode::Result<()> {
    let (report, loss) = profile(20)?;
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("out/profile"), PathBuf::from);
    report.save_all(&folder)?;
    let kibibytes = |bytes: i64| format!("{:9.1} KiB", bytes as f64 / 1024.0);
    println!("Loss after 20 iterations: {loss:.3}");
    println!("Peak above the baseline: {}", kibibytes(report.peak() as i64 - report.baseline() as i64));
    for (part, bytes) in report.at_peak.bytes.iter().filter(|(_, bytes)| *bytes != 0) {
        println!("  {:<12}{}", part.name(), kibibytes(bytes));
    }
    println!("Highest peak above the baseline inside");
    for name in &report.names {
        println!(
            "  {:<40}{}",
            format!("{}::{}", name.target, name.name),
            kibibytes(name.peak as i64 - report.baseline() as i64)
        );
    }
    println!("More in {}", folder.join("report.html").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_ode::account::Category;
    use std::collections::HashMap;

    #[test]
    fn their_spans_hold_ours_and_the_ledger_is_sane() -> candle_ode::Result<()> {
        let (report, loss) = profile(12)?;
        assert!(loss < 0.6, "it learns: {loss}");
        let spans: HashMap<u64, _> = report.spans.iter().map(|span| (span.id, span)).collect();
        let around = |span: &candle_ode::memory::SpanReport| spans[&span.parent.unwrap()].name.clone();
        let named = |name: &'static str| report.spans.iter().filter(move |span| *span.name == *name);
        assert_eq!(named("iteration").count(), 12);
        assert!(named("solve").count() == 12 && named("solve").all(|span| *around(span) == *"ode block"));
        assert!(named("ode block").all(|span| *around(span) == *"forward pass"));
        assert!(named("backward").count() == 12 && named("backward").all(|span| *around(span) == *"backward pass"));
        // Inside a span no more is live than inside the one around it.
        assert!(
            report
                .spans
                .iter()
                .filter_map(|span| Some((span, spans.get(&span.parent?)?)))
                .all(|(in_, out)| in_.peak <= out.peak)
        );

        // All states but the first, which the graph has, and the last, which the user has.
        let state = BATCH * CHANNELS * (SIDE / 2) * (SIDE / 2) * 4;
        assert_eq!(report.owned(Category::Trajectory).unwrap().peak, ((STEPS - 1) * state) as u64);
        assert_eq!(report.owned(Category::Trajectory).unwrap().live, 0);
        assert_eq!(report.at_peak.bytes.total(), report.peak() as i64);
        assert!(report.at_peak.bytes.iter().all(|(_, bytes)| bytes >= 0), "{:?}", report.at_peak);
        Ok(())
    }
}
