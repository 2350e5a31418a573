//! What spans and `bytes` events cost, with nobody listening and with a recording under way: `cargo bench --bench
//! recording`. The last lines put them in proportion to a training step of M1 and M2.

use candle_core::{Device, Module, Result, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::account::{Category, Owned};
use candle_ode::memory::{MemoryProfiler, TrackingAllocator};
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// A field over `sizes`, its state, and how many steps of RK4.
struct Problem {
    name: &'static str,
    sizes: &'static [usize],
    batch: usize,
    steps: usize,
}

const PROBLEMS: [Problem; 2] = [
    Problem { name: "M1", sizes: &[16, 64, 64, 16], batch: 64, steps: 32 },
    Problem { name: "M2", sizes: &[64, 64, 64], batch: 512, steps: 64 },
];

/// Pairs of steps, one recorded and one not, whose medians are compared.
const PAIRS: usize = 15;

impl Problem {
    fn ode(&self) -> Result<(Ode, Var)> {
        let (vars, sizes) = (VarMap::new(), self.sizes);
        let build = move |vb| Mlp::new(sizes, Activation::Tanh, vb);
        let field = ModelField::new(&vars, &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y))?;
        let y0 = Var::from_tensor(&Tensor::randn(0f32, 1.0, (self.batch, sizes[0]), &Device::Cpu)?)?;
        Ok((Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(self.steps), y0))
    }
}

fn train(ode: &Ode, y0: &Var) -> Result<()> {
    let loss = ode.solve(y0.as_tensor())?.last().sqr()?.mean_all()?;
    black_box(loss.backward()?);
    Ok(())
}

fn timed(ode: &Ode, y0: &Var) -> Result<Duration> {
    let start = Instant::now();
    train(ode, y0)?;
    Ok(start.elapsed())
}

fn a_span() {
    drop(black_box(tracing::trace_span!(target: "candle_ode", "stage", index = black_box(1u64)).entered()));
}

fn an_owned() {
    drop(black_box(Owned::new(Category::Scratch, black_box(64))));
}

/// Nanoseconds of one call, the least of a few rounds.
fn nanoseconds(call: fn()) -> f64 {
    const CALLS: u32 = 100_000;
    let round = |_| {
        let start = Instant::now();
        (0..CALLS).for_each(|_| call());
        start.elapsed().as_nanos() as f64 / f64::from(CALLS)
    };
    (0..10).map(round).fold(f64::INFINITY, f64::min)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64
}

/// Counts what a training step tells.
#[derive(Clone, Default)]
struct Count(Arc<[AtomicU64; 2]>);

impl<S: tracing::Subscriber> Layer<S> for Count {
    fn on_new_span(&self, _: &tracing::span::Attributes<'_>, _: &tracing::span::Id, _: Context<'_, S>) {
        self.0[0].fetch_add(1, Relaxed);
    }

    fn on_event(&self, _: &tracing::Event<'_>, _: Context<'_, S>) {
        self.0[1].fetch_add(1, Relaxed);
    }
}

/// Spans and events of a training step.
fn counted(ode: &Ode, y0: &Var) -> Result<(u64, u64)> {
    let count = Count::default();
    let subscriber = tracing_subscriber::registry().with(count.clone());
    tracing::subscriber::with_default(subscriber, || train(ode, y0))?;
    Ok((count.0[0].load(Relaxed), count.0[1].load(Relaxed)))
}

fn proportions() -> Result<()> {
    let (span, owned) = (nanoseconds(a_span), nanoseconds(an_owned));
    println!("\nnobody listens: {span:.1} ns a span, {owned:.1} ns a buffer announced and given back");
    for problem in &PROBLEMS {
        let (ode, y0) = problem.ode()?;
        train(&ode, &y0)?;
        let (spans, events) = counted(&ode, &y0)?;
        let (mut plain, mut recorded) = (vec![], vec![]);
        for _ in 0..PAIRS {
            plain.push(timed(&ode, &y0)?);
            let (recording, guard) = MemoryProfiler::new(&Device::Cpu).install_scoped()?;
            recorded.push(timed(&ode, &y0)?);
            drop(guard);
            drop(recording);
        }
        let (plain, recorded) = (median(plain), median(recorded));
        let disabled = span * spans as f64 + owned / 2.0 * events as f64;
        println!(
            "{}: {:.2} ms a training step, {spans} spans, {events} events; disabled {:.3} %, recorded {:+.2} % ({:.2} µs a span)",
            problem.name,
            plain / 1e6,
            100.0 * disabled / plain,
            100.0 * (recorded / plain - 1.0),
            (recorded - plain) / 1e3 / spans as f64,
        );
    }
    Ok(())
}

fn costs(criterion: &mut Criterion) {
    criterion.bench_function("a span, nobody listens", |bencher| bencher.iter(a_span));
    criterion.bench_function("a buffer announced and given back, nobody listens", |bencher| bencher.iter(an_owned));
    {
        let recording = MemoryProfiler::new(&Device::Cpu).install_scoped();
        let (_recording, _guard) = recording.unwrap_or_else(|error| panic!("{error}"));
        criterion.bench_function("a span, recorded", |bencher| bencher.iter(a_span));
        criterion.bench_function("a buffer announced and given back, recorded", |bencher| bencher.iter(an_owned));
    }
    proportions().unwrap_or_else(|error| panic!("{error}"));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2));
    targets = costs
}
criterion_main!(benches);
