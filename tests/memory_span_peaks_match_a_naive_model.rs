//! Peaks of nested and concurrent spans equal those of a model that remembers every change of the live bytes.
//!
//! A random but ordered schedule of 10 000 trees of spans and allocations over four threads: each turn one thread opens
//! a span, closes its innermost, or allocates, and the next turn waits for it. Alone in its process: while another
//! thread makes a dispatcher, `tracing` may pass over a span.

#[path = "common/counted.rs"]
mod counted;

use candle_ode::memory::{MemoryProfiler, MemoryReport};
use counted::Counted;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Scope;
use tracing::Dispatch;
use tracing::dispatcher::set_default;
use tracing_subscriber::layer::SubscriberExt;

const THREADS: usize = 4;
/// Schedules, and trees in each.
const RUNS: u64 = 20;
const TREES: usize = 500;
/// Spans that may be open on a thread.
const DEEPEST: usize = 8;

enum Turn {
    Open(u64),
    Close,
    Allocate(i64),
}

/// Live bytes after every change, and for each span the place in it where it was opened and closed.
#[derive(Default)]
struct Model {
    live: Vec<u64>,
    spans: Vec<(usize, Option<usize>)>,
}

impl Model {
    fn now(&self) -> usize {
        self.live.len() - 1
    }

    fn peak(&self, span: usize) -> u64 {
        let (opened, closed) = self.spans[span];
        *self.live[opened..=closed.unwrap_or(self.now())].iter().max().unwrap()
    }
}

fn worker<'a>(scope: &'a Scope<'a, '_>, dispatch: Dispatch, memory: Counted) -> (Sender<Turn>, Receiver<()>) {
    let (send, turns) = channel();
    let (done, acknowledged) = channel();
    scope.spawn(move || {
        let _guard = set_default(&dispatch);
        let mut open = Vec::new();
        for turn in turns {
            match turn {
                Turn::Open(index) => open.push(tracing::debug_span!("work", index).entered()),
                Turn::Close => drop(open.pop()),
                Turn::Allocate(delta) => memory.add(delta),
            }
            done.send(()).unwrap();
        }
        while open.pop().is_some() {}
    });
    (send, acknowledged)
}

/// Runs a schedule of `trees` trees on the layer and on the model; those that are under way at its end stay open.
fn run(seed: u64, trees: usize) -> (Model, MemoryReport) {
    let memory = Counted::default();
    let profiler = MemoryProfiler::new(&candle_core::Device::Cpu).meter(memory.clone()).span_limit(100 * trees);
    let (layer, recording) = profiler.layer().unwrap();
    let dispatch = Dispatch::new(tracing_subscriber::registry().with(layer));
    let mut model = Model { live: vec![0], spans: Vec::new() };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let report = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS).map(|_| worker(scope, dispatch.clone(), memory.clone())).collect();
        let mut open = vec![Vec::new(); THREADS];
        let mut planted = 0;
        while planted < trees {
            let at = random.random_range(0..THREADS);
            let turn = match random.random_range(0..4) {
                0 if open[at].len() < DEEPEST => {
                    planted += usize::from(open[at].is_empty());
                    open[at].push(model.spans.len());
                    model.spans.push((model.now(), None));
                    Turn::Open(model.spans.len() as u64 - 1)
                }
                1 if !open[at].is_empty() => {
                    let span: usize = open[at].pop().unwrap();
                    model.spans[span].1 = Some(model.now());
                    Turn::Close
                }
                _ => {
                    let live = model.live[model.now()];
                    let change = random.random_range(-(live.min(2000) as i64)..=2000);
                    model.live.push(live.checked_add_signed(change).unwrap());
                    Turn::Allocate(change)
                }
            };
            workers[at].0.send(turn).unwrap();
            workers[at].1.recv().unwrap();
        }
        recording.finish().unwrap()
    });
    (model, report)
}

#[test]
fn peaks_of_random_schedules() {
    for seed in 0..RUNS {
        let (model, report) = run(seed, TREES);
        assert_eq!(report.spans.len(), model.spans.len());
        assert_eq!(report.spans.iter().filter(|span| span.parent.is_none()).count(), TREES, "seed {seed}");
        assert!(model.spans.len() > 2 * TREES);
        for span in &report.spans {
            let number = span.index.unwrap() as usize;
            let (opened, closed) = model.spans[number];
            assert_eq!(span.peak, model.peak(number), "seed {seed}, span {number}");
            assert_eq!(span.live_before, model.live[opened], "seed {seed}, span {number}");
            assert_eq!(span.live_after, model.live[closed.unwrap_or(model.now())], "seed {seed}, span {number}");
            assert_eq!(span.open, closed.is_none());
        }
        assert_eq!(report.peak(), *model.live.iter().max().unwrap());
    }
}
