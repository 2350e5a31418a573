//! The memory layer works beside `fmt` and a layer of the user's own, whichever comes first: each sees what its own
//! filter lets through, and the user's spans are measured with ours inside.
#![allow(missing_docs)]

mod common;
#[path = "common/counted.rs"]
mod counted;

use candle_core::{DType, Device, Tensor};
use candle_ode::memory::{MemoryProfiler, MemoryReport};
use candle_ode::prelude::*;
use common::variable;
use counted::{Counted, alone};
use std::io::Write;
use std::sync::{Arc, Mutex};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id};
use tracing::{Dispatch, Event, Subscriber};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// What `fmt` has written.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A layer of the user's own: names of spans and events, in order.
#[derive(Clone, Default)]
struct Own(Arc<Mutex<Vec<&'static str>>>);

impl<S: Subscriber> Layer<S> for Own {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        self.0.lock().unwrap().push(attributes.metadata().name());
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        self.0.lock().unwrap().push(event.metadata().name());
    }
}

/// An epoch of a user's loop with one solve in it; the meter moves by hand.
fn epoch(memory: &Counted) {
    let _epoch = tracing::info_span!("epoch", index = 7u64).entered();
    memory.add(1000);
    tracing::info_span!("data").in_scope(|| {
        memory.add(500);
        memory.add(-500);
    });
    tracing::info!(loss = 0.25, "one batch");
    let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    let y0 = variable(1, &[2, 3], DType::F32);
    let solution = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(4).solve(y0.as_tensor()).unwrap();
    solution.last().sum_all().unwrap().backward().unwrap();
    memory.add(-1000);
}

/// `fmt`, asked for INFO.
fn text<S: Subscriber + for<'a> LookupSpan<'a>>(lines: &Lines) -> impl Layer<S> + use<S> {
    let lines = lines.clone();
    fmt::layer().with_writer(move || lines.clone()).without_time().with_ansi(false).with_filter(LevelFilter::INFO)
}

/// Report, lines of `fmt`, and what the own layer saw.
fn recorded(memory_first: bool) -> (MemoryReport, String, Vec<&'static str>) {
    let (memory, lines, own) = (Counted::default(), Lines::default(), Own::default());
    let profiler = MemoryProfiler::new(&Device::Cpu).meter(memory.clone());
    let (dispatch, recording) = if memory_first {
        let (layer, recording) = profiler.layer().unwrap();
        let subscriber = tracing_subscriber::registry().with(layer);
        (Dispatch::new(subscriber.with(text(&lines)).with(own.clone())), recording)
    } else {
        let subscriber = tracing_subscriber::registry().with(own.clone()).with(text(&lines));
        let (layer, recording) = profiler.layer().unwrap();
        (Dispatch::new(subscriber.with(layer)), recording)
    };
    tracing::dispatcher::with_default(&dispatch, || epoch(&memory));
    let report = recording.finish().unwrap();
    let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let seen = own.0.lock().unwrap().clone();
    (report, lines, seen)
}

#[test]
fn each_layer_sees_its_own_and_the_users_spans_are_measured() {
    let _turn = alone();
    for memory_first in [true, false] {
        let (report, lines, seen) = recorded(memory_first);
        let span = |name: &str| report.spans.iter().find(|span| *span.name == *name).unwrap();
        let (epoch, data, solve) = (span("epoch"), span("data"), span("solve"));
        assert_eq!((epoch.peak, epoch.live_after, epoch.index), (1500, 0, Some(7)));
        assert_eq!((data.peak, data.live_before, data.parent), (1500, 1000, Some(epoch.id)));
        assert_eq!((solve.peak, solve.parent, &*solve.target), (1000, Some(epoch.id), "candle_ode"));
        assert_eq!(report.passes.iter().map(|pass| pass.steps.len()).collect::<Vec<_>>(), [4, 4]);

        // `fmt` was asked for INFO: not one of our spans or events is in its lines.
        assert_eq!(lines.lines().count(), 1, "{lines}");
        assert!(lines.contains("epoch{index=7}") && lines.contains("one batch loss=0.25"), "{lines}");

        // The other layer has no filter, and ours takes nothing from it.
        let count = |name: &str| seen.iter().filter(|seen| **seen == name).count();
        assert_eq!((count("epoch"), count("data"), count("solve"), count("step")), (1, 1, 1, 8));
        assert_eq!(
            count("field") + count("linearise"),
            report.spans.iter().filter(|s| matches!(&*s.name, "field" | "linearise")).count()
        );
        assert!(count("bytes") > 0);
    }
}
