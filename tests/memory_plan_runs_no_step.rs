//! A plan opens no `step`, probes the field once per shape, and without a counted heap says nothing of the peak; the bytes
//! it does tell are exact.
#![allow(missing_docs)]

mod common;
#[path = "common/counted.rs"]
mod counted;

use candle_core::{DType, Device};
use candle_nn::VarMap;
use candle_ode::account::Category;
use candle_ode::memory::{MemoryProfiler, MemoryReport};
use candle_ode::prelude::*;
use common::{fill, mlp_field, variable};
use counted::{Counted, alone};

fn recorded(run: impl FnOnce()) -> MemoryReport {
    let profiler = MemoryProfiler::new(&Device::Cpu).meter(Counted::default());
    let (recording, _guard) = profiler.install_scoped().unwrap();
    run();
    recording.finish().unwrap()
}

fn count(report: &MemoryReport, name: &str) -> usize {
    report.spans.iter().filter(|span| span.name == name).count()
}

fn ode() -> (Ode, VarMap) {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 4, 8);
    fill(&vars, 1, 1.0);
    (Ode::new(&field).span(0.0, 1.0).solver(Rk4).steps(10).precision(Precision::F16), vars)
}

#[test]
fn a_plan_makes_no_step_and_probes_once() {
    let _turn = alone();
    let (ode, _vars) = ode();
    for batch in [3, 5, 7] {
        let y0 = variable(2, &[batch, 4], DType::F32);
        let first = recorded(|| _ = ode.plan(y0.as_tensor()).unwrap());
        assert_eq!((count(&first, "step"), count(&first, "linearise")), (0, 1), "batch {batch}");
        let again = recorded(|| _ = ode.clone().steps(20).solver(Heun).plan(y0.as_tensor()).unwrap());
        assert_eq!((count(&again, "step"), count(&again, "linearise"), count(&again, "field")), (0, 0, 0));
    }
}

#[test]
fn owned_bytes_are_exact_without_a_counted_heap() {
    let _turn = alone();
    let (ode, _vars) = ode();
    let y0 = variable(2, &[6, 4], DType::F32);
    let plan = ode.plan(y0.as_tensor()).unwrap();
    assert_eq!(plan.peak, None);
    assert_eq!(plan.trajectory, 9 * 24 * 2);
    let train = || {
        let loss = ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap();
        loss.backward().unwrap();
    };
    // The first solve in the life of a field is made beside checks of it.
    train();
    let report = recorded(train);
    for category in Category::ALL {
        assert_eq!(report.owned(category).unwrap().peak, plan.owned(category), "{category}");
    }
    assert_eq!(report.totals.owned_peak, plan.owned_peak);
    assert!(plan.to_string().contains("the heap is not counted"));
}

#[test]
fn what_cannot_be_planned_is_an_error() {
    let _turn = alone();
    let (ode, _vars) = ode();
    let y0 = variable(2, &[6, 4], DType::F32);
    let message = ode.adjoint(Unrolled).plan(y0.as_tensor()).unwrap_err().to_string();
    assert!(message.contains("Unrolled") && message.contains("MemoryProfiler"), "{message}");
}
