//! Buffers of ours that live for a while: y0 in the accumulate dtype, operands of weight gradients in BF16, F32 sums on
//! their way into sums in F64. The ledger tells each to the byte, and the plan knows them.
#![allow(missing_docs)]

mod common;
#[path = "common/counted.rs"]
mod counted;

use candle_core::{DType, Device, Module, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::account::Category;
use candle_ode::memory::{MemoryProfiler, Recording};
use candle_ode::ops::{Activation, Mlp, linear};
use candle_ode::prelude::*;
use common::{fill, normal, variable};
use counted::{Counted, alone};

/// Runs something, and hands out what was recorded of it.
fn recorded<T>(run: impl FnOnce(&Recording) -> T) -> (T, u64) {
    let profiler = MemoryProfiler::new(&Device::Cpu).meter(Counted::default());
    let (recording, _guard) = profiler.install_scoped().unwrap();
    let done = run(&recording);
    let highest = recording.ledger().highest(Category::Scratch);
    (done, highest)
}

fn train(ode: &Ode, y0: &Var) {
    ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap();
}

/// The most scratch of a warm training step, which must be what the plan says.
fn scratch(ode: &Ode, y0: &Var) -> u64 {
    train(ode, y0);
    let ((), highest) = recorded(|_| train(ode, y0));
    assert_eq!(ode.plan(y0.as_tensor()).unwrap().owned(Category::Scratch), highest);
    highest
}

#[test]
fn a_copy_of_y0_in_the_accumulate_dtype() {
    let _turn = alone();
    let field = FnField::new(|_: &Time, y: &candle_core::Tensor| y.tanh());
    let ode = Ode::new(&field).span(0.0, 1.0).steps(3).precision(Precision::F16);
    for (dtype, copy) in [(DType::F16, 7 * 5 * 4), (DType::F32, 0)] {
        let y0 = Var::from_tensor(&normal(1, &[7, 5], dtype)).unwrap();
        assert_eq!(scratch(&ode, &y0), copy, "{dtype:?}");
        recorded(|recording| {
            let live = || recording.ledger().live(Category::Scratch);
            let solution = ode.solve(y0.as_tensor()).unwrap();
            assert_eq!(live(), copy, "the graph holds it");
            drop(solution);
            assert_eq!(live(), 0);
        });
        recorded(|recording| {
            let solution = ode.clone().no_grad().solve(y0.as_tensor()).unwrap();
            assert_eq!((recording.ledger().live(Category::Scratch), solution.tiles()), (0, 1), "nobody needs it");
        });
    }
}

#[test]
fn operands_of_weight_gradients_in_bf16() {
    let _turn = alone();
    const ROWS: usize = 9;
    const WIDTH: usize = 32;
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| linear(WIDTH, WIDTH, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m, _: &Time, y| m.forward(y)).unwrap();
    fill(&vars, 1, 0.1);
    let y0 = variable(2, &[ROWS, WIDTH], DType::F32);
    let most = |field: &ModelField, precision: Precision| {
        scratch(&Ode::new(field).span(0.0, 1.0).steps(4).precision(precision), &y0)
    };
    // Without gradients of weights there is nothing to multiply; those of biases need the rest.
    let frozen = field.clone().freeze(|name| name.ends_with("weight"));
    // Both operands in pairs of rows, of which the last is filled up.
    let operands = 2 * (ROWS.div_ceil(2) * 2 * WIDTH * 2) as u64;
    assert_eq!(most(&field, Precision::BF16) - most(&frozen, Precision::BF16), operands);
    assert_eq!(most(&field, Precision::F32), most(&frozen, Precision::F32), "F32 needs none");
}

#[test]
fn sums_on_their_way_into_wider_ones() {
    let _turn = alone();
    let vars = VarMap::new();
    let build = |vb| Mlp::new(&[16, 40, 16], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y)).unwrap();
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[6, 16], DType::F32);
    let most = |accumulate| {
        let precision = Precision::new().compute(DType::F32).accumulate(accumulate);
        scratch(&Ode::new(&field).span(0.0, 1.0).steps(4).precision(precision), &y0)
    };
    // The largest weight, and y0 in F64.
    assert_eq!(most(DType::F64) - most(DType::F32), 16 * 40 * 4 + 6 * 16 * 8);
}
