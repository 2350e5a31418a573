//! A report of 100 000 spans of training is a file of about a megabyte, and is itself again when it is read. Alone in
//! its process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device};
use candle_nn::VarMap;
use candle_ode::memory::{MemoryProfiler, MemoryReport, TrackingAllocator};
use candle_ode::prelude::*;
use common::{fill, mlp_field, variable};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const SPANS: usize = 100_000;

#[test]
fn a_hundred_thousand_spans_take_a_megabyte() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 4, 8);
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[8, 4], DType::F32);
    let ode = Ode::new(&field).span(0.0, 1.0).steps(50).precision(Precision::F16);
    let recording = MemoryProfiler::new(&Device::Cpu).span_limit(SPANS).install().unwrap();
    for _ in 0..100 {
        let loss = ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().mean_all().unwrap();
        loss.backward().unwrap();
    }
    let report = recording.finish().unwrap();
    assert_eq!(report.spans.len(), SPANS);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory.json");
    report.save(&path).unwrap();
    let bytes = std::fs::metadata(&path).unwrap().len();
    println!("{bytes} bytes, {:.1} a span", bytes as f64 / SPANS as f64);
    assert!(bytes < 1_250_000, "{bytes} bytes");
    assert!(MemoryReport::load(&path).unwrap() == report);
}
