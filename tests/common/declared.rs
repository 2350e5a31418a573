//! Layers declared to be all there is to a field, beside a closure that calls them: what they give, and where steps
//! ran.
#![allow(dead_code, missing_docs, reason = "not every file needs all of it")]

use super::common::{bits, fill, sorted};
use candle_core::{DType, Device, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::account::{Category, TARGET};
use candle_ode::ops::Layers;
use candle_ode::prelude::*;
use candle_ode::{Result, Stats};
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// The same layers declared, and called by a closure, over the same parameters.
pub(crate) fn both<L: Layers>(
    vars: &VarMap,
    build: impl Fn(VarBuilder<'static>) -> candle_core::Result<L> + Send + Sync + Clone + 'static,
) -> [ModelField; 2] {
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    let declared = ModelField::of_layers(vb, build.clone()).unwrap();
    let called = ModelField::new(vars, &Device::Cpu, build, |layers: &L, t: &Time, y| layers.forward_at(t, y)).unwrap();
    fill(vars, 1, 1.0);
    [declared, called]
}

/// Where the steps of a pass ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// On buffers, without a tensor for what belongs to a stage.
    Buffers,
    /// On tensors, as those of any field.
    Tensors,
    /// Some of them so, others so.
    Both,
}

use Ran::{Both, Buffers, Tensors};

/// Forwards and back.
pub(crate) type Way = [Ran; 2];

pub(crate) const BUFFERS: Way = [Buffers; 2];
pub(crate) const TENSORS: Way = [Tensors; 2];

/// Where fixed steps of explicit methods run.
pub(crate) fn way_in(precision: Precision) -> Way {
    if precision.accumulate_dtype() == DType::F32 { BUFFERS } else { TENSORS }
}

/// What the declared field gives, found to be what the closure gives, and to be made where it is `expected`: the bits
/// of all outputs, dL/dy0 and each dL/dθ for L = Σ y² over the outputs; what was counted.
pub(crate) fn are_the_same(
    what: &str,
    fields: &[ModelField; 2],
    vars: &VarMap,
    y0: &Var,
    expected: Way,
    settings: impl Fn(Ode) -> Ode,
) {
    let [declared, called] = fields.each_ref().map(|field| trained(&settings(Ode::new(field)), vars, y0));
    assert!(declared.found.len() > 2 && declared.found == called.found, "{what}");
    assert_eq!(declared.stats, called.stats, "{what}");
    let found = [ran(declared.forwards, called.forwards), ran(declared.back, called.back)];
    assert_eq!(found, expected.map(Some), "{what}: {declared:?} and {called:?}");
}

/// What was found of a solve and its backward pass.
struct Trained {
    found: Vec<Vec<u64>>,
    stats: Stats,
    forwards: Made,
    back: Made,
}

impl Debug for Trained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "forwards {:?}, back {:?}", self.forwards, self.back)
    }
}

fn trained(ode: &Ode, vars: &VarMap, y0: &Var) -> Trained {
    let (solution, forwards) = made_by(|| ode.solve(y0.as_tensor()).unwrap());
    let all = solution.states().iter().map(|y| y[0].sqr().unwrap().sum_all().unwrap());
    let loss = all.reduce(|a, b| (a + b).unwrap()).unwrap();
    let (grads, back) = made_by(|| loss.backward().unwrap());
    let parameters = sorted(vars).into_values().filter_map(|var| grads.get(&var).cloned());
    let outputs = solution.states().iter().map(|y| y[0].clone());
    let found = outputs.chain(grads.get(y0).cloned()).chain(parameters).map(|x| bits(&x)).collect();
    Trained { found, stats: solution.stats(), forwards, back }
}

/// Where the declared field ran, by what it made and what the closure made on tensors; `None` if nothing explains it.
pub(crate) fn ran(declared: Made, called: Made) -> Option<Ran> {
    let on_buffers = Made { stages: 0, cotangents: called.cotangents.checked_sub(2 * called.pullbacks)?, ..called };
    let is_between = |least: usize, found: usize, most: usize| (least..=most).contains(&found);
    match declared {
        made if made == called => Some(Tensors),
        made if made == on_buffers => Some(Buffers),
        made if made.pullbacks == called.pullbacks
            && is_between(on_buffers.stages, made.stages, called.stages)
            && is_between(on_buffers.cotangents, made.cotangents, called.cotangents) =>
        {
            Some(Both)
        }
        _ => None,
    }
}

/// How many tensors of ours were made for what belongs to the stages of steps, and for cotangents: λ of each step, and
/// κ and μ of each pullback that is made on tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    stages: usize,
    cotangents: usize,
    pullbacks: usize,
}

/// Held by each test that solves: while another thread makes a dispatcher, `tracing` may pass over an event.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs something and says what it has made, on threads of its own, too.
pub(crate) fn made_by<T>(run: impl FnOnce() -> T) -> (T, Made) {
    let births = Births::default();
    let done = tracing::subscriber::with_default(tracing_subscriber::registry().with(births.clone()), run);
    let counts = [&births.stages, &births.cotangents, &births.pullbacks];
    let [stages, cotangents, pullbacks] = counts.map(|births| births.load(Relaxed));
    (done, Made { stages, cotangents, pullbacks })
}

/// Counts what is announced, and pullbacks.
#[derive(Clone, Default)]
struct Births {
    stages: Arc<AtomicUsize>,
    cotangents: Arc<AtomicUsize>,
    pullbacks: Arc<AtomicUsize>,
}

impl<S: Subscriber> Layer<S> for Births {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let span = attributes.metadata();
        let is_pullback = span.target() == TARGET && span.name() == "pullback";
        self.pullbacks.fetch_add(usize::from(is_pullback), Relaxed);
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() != TARGET || event.metadata().name() != "bytes" {
            return;
        }
        let mut bytes = Bytes::default();
        event.record(&mut bytes);
        match bytes {
            Bytes { category: Some(Category::Stages), delta: 1.. } => drop(self.stages.fetch_add(1, Relaxed)),
            Bytes { category: Some(Category::Cotangents), delta: 1.. } => drop(self.cotangents.fetch_add(1, Relaxed)),
            _ => {}
        }
    }
}

#[derive(Default)]
struct Bytes {
    category: Option<Category>,
    delta: i64,
}

impl Visit for Bytes {
    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "category" {
            self.category = Category::from_name(value);
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "delta" {
            self.delta = value;
        }
    }
}

/// What both fields give to the same question, which must be the same; an error by what it says, less the way it went.
pub(crate) fn answers<T: PartialEq + Debug>(
    what: &str,
    fields: &[ModelField; 2],
    ask: impl Fn(&ModelField) -> Result<T>,
) -> std::result::Result<T, String> {
    let [declared, called] = fields.each_ref().map(|field| ask(field).map_err(|error| said(&error)));
    assert!(declared == called, "{what}: {declared:?}, not {called:?}");
    declared
}

fn said(error: &OdeError) -> String {
    let mut said = error.to_string();
    said.truncate(said.find("\n   0: ").unwrap_or(said.len()));
    said
}
