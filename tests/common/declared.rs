//! Layers declared to be all there is to a field, beside a closure that calls them: what they give, and where steps ran.
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
use std::sync::{Arc, Mutex, PoisonError};
use tracing::field::{Field, Visit};
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
    OnBuffers,
    /// On tensors, as those of any field.
    OnTensors,
    /// Some of them so, others so.
    OnBoth,
}

use Ran::{OnBoth, OnBuffers, OnTensors};

/// Forwards and back.
pub(crate) type Way = [Ran; 2];

pub(crate) const BUFFERS: Way = [OnBuffers; 2];
pub(crate) const TENSORS: Way = [OnTensors; 2];

/// Where fixed steps of explicit methods run.
pub(crate) fn way_in(precision: Precision) -> Way {
    if precision.accumulate_dtype() == DType::F32 { BUFFERS } else { TENSORS }
}

/// What the declared field gives, found to be what the closure gives, and to be made where it is `expected`: the bits of all
/// outputs, dL/dy0 and each dL/dθ for L = Σ y² over the outputs; what was counted.
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
    let forwards = ran(declared.forwards, called.forwards, 0);
    let back = ran(declared.back, called.back, 2 * called.stats.pullbacks * called.tiles);
    assert_eq!([forwards, back], expected.map(Some), "{what}: {declared:?} and {called:?}");
}

/// What was found of a solve and its backward pass.
struct Trained {
    found: Vec<Vec<u64>>,
    /// Of a tile.
    stats: Stats,
    tiles: usize,
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
    Trained { found, stats: solution.stats(), tiles: solution.tiles(), forwards, back }
}

/// Where the declared field ran, by what it made and what the closure made; the closure's pullbacks have made so many
/// cotangents. `None` if neither explains it.
pub(crate) fn ran(declared: Made, called: Made, cotangents: usize) -> Option<Ran> {
    let [on_buffers, on_tensors] = [Made { stages: 0, cotangents: called.cotangents.checked_sub(cotangents)? }, called];
    let is_between = |least: usize, found: usize, most: usize| (least..=most).contains(&found);
    match declared {
        made if made == on_tensors => Some(OnTensors),
        made if made == on_buffers => Some(OnBuffers),
        made if is_between(on_buffers.stages, made.stages, on_tensors.stages)
            && is_between(on_buffers.cotangents, made.cotangents, on_tensors.cotangents) =>
        {
            Some(OnBoth)
        }
        _ => None,
    }
}

/// How many tensors of ours were made for what belongs to the stages of steps, and for cotangents: κ and μ of each, and λ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) stages: usize,
    pub(crate) cotangents: usize,
}

/// Runs something and says what it has made, on threads of its own, too.
pub(crate) fn made_by<T>(run: impl FnOnce() -> T) -> (T, Made) {
    // While another thread makes a dispatcher, `tracing` may pass over an event.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let births = Births::default();
    let done = tracing::subscriber::with_default(tracing_subscriber::registry().with(births.clone()), run);
    let [stages, cotangents] = [&births.stages, &births.cotangents].map(|births| births.load(Relaxed));
    (done, Made { stages, cotangents })
}

/// Counts what is announced.
#[derive(Clone, Default)]
struct Births {
    stages: Arc<AtomicUsize>,
    cotangents: Arc<AtomicUsize>,
}

impl<S: Subscriber> Layer<S> for Births {
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

/// What both fields give to the same question, which must be the same; an error by what it says.
pub(crate) fn answers<T: PartialEq + Debug>(
    what: &str,
    fields: &[ModelField; 2],
    ask: impl Fn(&ModelField) -> Result<T>,
) -> std::result::Result<T, String> {
    let [declared, called] = fields.each_ref().map(|field| ask(field).map_err(|error| error.to_string()));
    assert!(declared == called, "{what}: {declared:?}, not {called:?}");
    declared
}
