//! A plan opens no `step`, probes the field once per shape, and without a counted heap says nothing of the peak; the
//! bytes it does tell are exact.
#![allow(missing_docs)]

mod common;
#[path = "common/counted.rs"]
mod counted;

use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::account::Category;
use candle_ode::memory::{MemoryProfiler, MemoryReport};
use candle_ode::ops::{Activation, Mlp};
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
    report.spans.iter().filter(|span| *span.name == *name).count()
}

fn ode() -> (Ode, VarMap) {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 4, 8);
    (ten_steps(&field, &vars), vars)
}

/// Whose steps run on buffers.
fn ode_of_layers() -> (Ode, VarMap) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let field = ModelField::of_layers(vb, |vb| Mlp::new(&[4, 8, 4], Activation::Tanh, vb)).unwrap();
    (ten_steps(&field, &vars), vars)
}

fn ten_steps(field: &ModelField, vars: &VarMap) -> Ode {
    fill(vars, 1, 1.0);
    Ode::new(field).span(0.0, 1.0).solver(Rk4).steps(10).precision(Precision::F16)
}

/// A plan for a method, and for others, of a field whose steps run on buffers: the buffers are seen to by stages of the
/// method, which are no step of the solve, once per method.
#[test]
fn a_plan_for_layers_makes_no_step_and_probes_once_per_method() {
    let _turn = alone();
    let (ode, _vars) = ode_of_layers();
    let y0 = variable(2, &[5, 4], DType::F32);
    let spans = |ode: &Ode| {
        let report = recorded(|| _ = ode.plan(y0.as_tensor()).unwrap());
        ["step", "linearise", "stage"].map(|name| count(&report, name))
    };
    let (first, again, heun) = (spans(&ode), spans(&ode.clone().steps(20)), spans(&ode.clone().solver(Heun)));
    assert!(first[0] == 0 && first[1] > 0 && first[2] > 0, "{first:?}");
    assert_eq!(again, [0, 0, 0]);
    assert!(heun[0] == 0 && heun[2] > 0, "{heun:?}");
    assert_eq!(spans(&ode.solver(Heun).steps(7)), [0, 0, 0]);
}

#[test]
fn a_plan_makes_no_step_and_probes_once() {
    let _turn = alone();
    let (ode, _vars) = ode();
    for batch in [3, 5, 7] {
        let y0 = variable(2, &[batch, 4], DType::F32);
        let first = recorded(|| _ = ode.plan(y0.as_tensor()).unwrap());
        // One to warm up, one beside it, and one to measure.
        assert_eq!((count(&first, "step"), count(&first, "linearise")), (0, 3), "batch {batch}");
        let again = recorded(|| _ = ode.clone().steps(20).solver(Heun).plan(y0.as_tensor()).unwrap());
        assert_eq!((count(&again, "step"), count(&again, "linearise"), count(&again, "field")), (0, 0, 0));
    }
}

#[test]
fn owned_bytes_are_exact_without_a_counted_heap() {
    let _turn = alone();
    for make in [ode, ode_of_layers] {
        let (ode, _vars) = make();
        owned_bytes_are_exact(&ode);
    }
}

fn owned_bytes_are_exact(ode: &Ode) {
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
fn owned_bytes_of_adjoints_that_keep_nothing_are_exact() {
    let _turn = alone();
    let (ode, _vars) = ode();
    let y0 = variable(2, &[6, 4], DType::F32);
    let reversible = ode.clone().solver(Reversible::new(Heun));
    let cases: [(Ode, Adjoint, u64); 4] = [
        (reversible.clone(), Reconstruct::default().into(), 2 * 96),
        (reversible.clone(), Reconstruct::default().anchor_every(4).stage_memory(StageMemory::One).into(), 3 * 2 * 96),
        (ode.clone(), Backsolve::default().into(), 96),
        (reversible, Backsolve::default().solver(Dopri5).substeps(3).into(), 2 * 96),
    ];
    for (ode, adjoint, trajectory) in cases {
        let name = format!("{adjoint:?}");
        let ode = ode.adjoint(adjoint).save_at(&[0.3, 1.0]);
        let plan = ode.plan(y0.as_tensor()).unwrap();
        assert_eq!((plan.peak, plan.trajectory), (None, trajectory), "{name}");
        let train = || {
            let solution = ode.solve(y0.as_tensor()).unwrap();
            let loss =
                solution.states().iter().map(|state| state[0].sum_all().unwrap()).reduce(|a, b| (a + b).unwrap());
            loss.unwrap().backward().unwrap();
            solution.stats()
        };
        train();
        let mut stats = None;
        let report = recorded(|| stats = Some(train()));
        for category in Category::ALL {
            assert_eq!(report.owned(category).unwrap().peak, plan.owned(category), "{name}: {category}");
        }
        assert_eq!(report.totals.owned_peak, plan.owned_peak, "{name}");
        let stats = stats.unwrap();
        assert_eq!(
            (stats.evaluations, stats.linearizations, stats.pullbacks, stats.recomputed_steps),
            (plan.evaluations, plan.linearizations, plan.pullbacks, plan.recomputed_steps),
            "{name}"
        );
    }
}

#[test]
fn what_cannot_be_planned_is_an_error() {
    let _turn = alone();
    let (ode, _vars) = ode();
    let y0 = variable(2, &[6, 4], DType::F32);
    let (reversible, adaptive) =
        (ode.clone().solver(Reversible::new(Heun)), ode.clone().steps(0).tolerances(1e-3, 1e-6));
    let cases = [
        (ode.clone().adjoint(Unrolled), "Unrolled"),
        (adaptive.solver(Dopri5), "adaptive steps"),
        (ode.clone().dense(), "dense output"),
        (ode.clone().solver(Dopri5).adjoint(Backsolve::default().tolerances(1e-3, 1e-3)), "Backsolve by tolerances"),
        (reversible, "Reversible(Heun)"),
        (ode.clone().solver(ReversibleHeun).adjoint(Reconstruct::default()), "ReversibleHeun"),
    ];
    for (ode, named) in cases {
        let message = ode.plan(y0.as_tensor()).unwrap_err().to_string();
        assert!(message.contains(named) && message.contains("MemoryProfiler"), "{message}");
    }
    let message = ode.adjoint(Reconstruct::default()).plan(y0.as_tensor()).unwrap_err().to_string();
    assert!(message.contains("cannot be undone") && message.contains("Reversible::new"), "{message}");
}
