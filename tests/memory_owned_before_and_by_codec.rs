//! Masters are announced once, for as long as a field holds them, whenever the recording begins; the trajectory is told
//! by codec; and what is uploaded of times is told, too.
#![allow(missing_docs)]

mod common;
#[path = "common/counted.rs"]
mod counted;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::account::Category;
use candle_ode::memory::{MemoryProfiler, MemoryReport, Part, Recording};
use candle_ode::prelude::*;
use candle_ode::{Increments8, States};
use common::{fill, variable};
use counted::{Counted, alone};
use tracing::subscriber::DefaultGuard;

fn recording() -> (Recording, DefaultGuard) {
    MemoryProfiler::new(&Device::Cpu).meter(Counted::default()).install_scoped().unwrap()
}

/// y′ = tanh(W y) + t, with W of 4 × 4.
fn field(vars: &VarMap) -> ModelField {
    let build = |vb: VarBuilder<'_>| vb.get((4, 4), "weight");
    let field = ModelField::new(vars, &Device::Cpu, build, |weight: &Tensor, t: &Time, y| {
        y.matmul(weight)?.tanh()?.broadcast_add(&t.like(y)?)
    });
    fill(vars, 1, 1.0);
    field.unwrap()
}

fn start() -> Var {
    variable(2, &[3, 4], DType::F32)
}

/// One training step, recorded.
fn report(ode: &Ode) -> MemoryReport {
    let (recording, _guard) = recording();
    let y0 = start();
    ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap();
    recording.ledger().check().unwrap();
    recording.finish().unwrap()
}

#[test]
fn masters_are_announced_once_however_many_fields_and_solves_hold_them() {
    let _turn = alone();
    let vars = VarMap::new();
    let before = field(&vars);
    let (recording, _guard) = recording();
    let live = || recording.ledger().live(Category::Parameters);
    assert_eq!(live(), 64, "it was there before the recording");
    let again = field(&vars);
    let clone = before.clone();
    assert_eq!(live(), 64, "the same masters");
    let others = field(&VarMap::new());
    assert_eq!(live(), 128);
    let y0 = start();
    let solutions =
        [&before, &again].map(|field| Ode::new(field).span(0.0, 1.0).steps(2).solve(y0.as_tensor()).unwrap());
    assert_eq!(live(), 128);
    drop((before, others, solutions));
    assert_eq!(live(), 64, "a clone and another field hold them");
    drop((again, clone));
    assert_eq!(live(), 0);
    recording.ledger().check().unwrap();
    assert_eq!(recording.finish().unwrap().owned(Category::Parameters).unwrap().peak, 128);
}

#[test]
fn the_trajectory_is_told_by_codec_and_sums_up() {
    let _turn = alone();
    let vars = VarMap::new();
    let ode = Ode::new(&field(&vars)).solver(Euler).span(0.0, 1.0).steps(8);
    let adjoint = |discrete: Discrete| ode.clone().adjoint(discrete);
    let reversible = ode.clone().solver(Reversible::new(Euler)).adjoint(Reconstruct::default());
    // 12 elements a state; increments have 4 bytes a row more.
    let cases = [
        ("f32", ode.clone(), vec![("f32", 7 * 48)]),
        ("f16", adjoint(Discrete::default().codec(States(DType::F16))), vec![("f16", 7 * 24)]),
        // The latest state is whole, and while it is replaced there are two.
        ("increments8", adjoint(Discrete::default().codec(Increments8)), vec![("f32", 48), ("increments8", 6 * 24)]),
        ("reconstruct", reversible, vec![("f32", 2 * 48)]),
    ];
    for (name, ode, expected) in cases {
        let report = report(&ode);
        let found: Vec<_> = report.trajectory.iter().map(|codec| (codec.codec.as_str(), codec.peak)).collect();
        assert_eq!(found, expected, "{name}");
        let sum: i64 = report.trajectory.iter().map(|codec| codec.at_peak).sum();
        assert_eq!(sum, report.at_peak.bytes.of(Part::Owned(Category::Trajectory)), "{name}");
        for (n, moment) in report.timeline.0.iter().enumerate() {
            let sum: i64 = report.trajectory.iter().map(|codec| codec.over_time[n]).sum();
            assert_eq!(sum, moment.bytes.of(Part::Owned(Category::Trajectory)), "{name}");
        }
    }
}

#[test]
fn times_on_the_device_are_scratch_if_the_field_asks_for_them() {
    let _turn = alone();
    let vars = VarMap::new();
    for (precision, bytes) in [(Precision::F32, 4), (Precision::BF16, 2)] {
        let ode = Ode::new(&field(&vars)).solver(Rk4).span(0.0, 1.0).steps(8).precision(precision);
        report(&ode);
        // Four stages and the end of each step.
        assert_eq!(report(&ode).owned(Category::Scratch).unwrap().peak, 8 * 5 * bytes);
    }
    let blind = FnField::new(|_: &Time, y: &Tensor| y.neg());
    let ode = Ode::new(&blind).solver(Rk4).span(0.0, 1.0).steps(8);
    report(&ode);
    assert_eq!(report(&ode).owned(Category::Scratch).unwrap().peak, 0);
}
