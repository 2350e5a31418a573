//! What layers of this crate work in is reused across stages, steps and passes: in a step nothing as large as a page is
//! allocated but the tensors that the model and the solver hand each other; of these a field that is layers and nothing
//! else needs the state that the step leads to, and backwards λ. Alone in its process: the counter is process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device};
use candle_nn::{Conv2dConfig, Module, VarBuilder, VarMap};
use candle_ode::ops::{Activation, Mlp, concat_conv2d, conv2d, group_norm, seq};
use candle_ode::prelude::*;
use common::{fill, variable};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

const PAGE: usize = 4096;

/// Counts allocations of a page and more.
struct Counting;

static LARGE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, and a counter.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGE.fetch_add(usize::from(layout.size() >= PAGE), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

/// How many large allocations each further step of a pass makes.
fn in_a_step(field: &ModelField, precision: Precision, pass: &dyn Fn(&Ode)) -> usize {
    let large = |steps: usize| {
        let ode = Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(steps).precision(precision);
        pass(&ode);
        let before = LARGE.load(Relaxed);
        pass(&ode);
        LARGE.load(Relaxed) - before
    };
    let (few, many) = (large(8), large(40));
    assert_eq!((many - few) % 32, 0, "{few} and {many}");
    (many - few) / 32
}

#[test]
fn a_step_allocates_nothing_large_but_its_states() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| Mlp::new(&[64, 128, 128, 64], Activation::Tanh, vb);
    let called = ModelField::new(&vars, &Device::Cpu, build, |mlp: &Mlp, _: &Time, y| mlp.forward(y)).unwrap();
    fill(&vars, 1, 1.0);
    let y0 = variable(9, &[128, 64], DType::F32);
    let forward = |ode: &Ode| drop(ode.clone().no_grad().solve(y0.as_tensor()).unwrap());
    let trained = |ode: &Ode| drop(ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap());
    // RK4: three stage states (the first is y), four slopes and y⁺.
    assert_eq!(in_a_step(&called, Precision::F32, &forward), 3 + 4 + 1);
    // Backwards those but y⁺ again, and for each stage its cotangent and what the pullback makes of it; at last λ.
    assert_eq!(in_a_step(&called, Precision::F32, &trained), (3 + 4 + 1) + (3 + 4) + (4 + 4) + 1);
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let declared = ModelField::of_layers(vb.pp("declared"), build).unwrap();
    let in_time = |vb: VarBuilder<'static>| Mlp::builder(&[64, 128, 64], Activation::Tanh).in_time().build(vb);
    let in_time = ModelField::of_layers(vb.pp("in time"), in_time).unwrap();
    assert_eq!(in_a_step(&in_time, Precision::F32, &forward), 1);
    assert_eq!(in_a_step(&in_time, Precision::F32, &trained), 1 + 1);
    assert_eq!(in_a_step(&declared, Precision::F32, &forward), 1);
    assert_eq!(in_a_step(&declared, Precision::F32, &trained), 1 + 1);
    for precision in [Precision::F16, Precision::BF16] {
        assert_eq!(in_a_step(&declared, precision, &forward), 1);
        // What is kept of y⁺, in half precision, and read again.
        assert_eq!(in_a_step(&declared, precision, &trained), (1 + 1) + (1 + 1));
    }
    let same = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
    let images = move |vb: VarBuilder<'static>| {
        let layers = seq().add(conv2d(16, 20, 3, same, vb.pp(0))?).add(Activation::Silu);
        Ok(layers.add(conv2d(20, 16, 3, same, vb.pp(1))?))
    };
    let block = move |vb: VarBuilder<'static>| {
        let layers = seq().add(group_norm(4, 16, 1e-5, vb.pp(0))?).add_timed(concat_conv2d(16, 20, 3, same, vb.pp(1))?);
        let layers = layers.add(group_norm(5, 20, 1e-5, vb.pp(2))?).add(Activation::Silu);
        let layers = layers.add(conv2d(20, 16, 3, same, vb.pp(3))?);
        Ok(layers.add(group_norm(2, 16, 1e-5, vb.pp(4))?).add(Activation::Gelu))
    };
    let images = ModelField::of_layers(vb.pp("images"), images).unwrap();
    let block = ModelField::of_layers(vb.pp("block"), block).unwrap();
    let y0 = variable(9, &[4, 16, 10, 12], DType::F32);
    let forward = |ode: &Ode| drop(ode.clone().no_grad().solve(y0.as_tensor()).unwrap());
    let trained = |ode: &Ode| drop(ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap());
    for (precision, kept) in [(Precision::F32, 0), (Precision::F16, 1 + 1), (Precision::BF16, 1 + 1)] {
        for field in [&images, &block] {
            assert_eq!(in_a_step(field, precision, &forward), 1);
            assert_eq!(in_a_step(field, precision, &trained), (1 + 1) + kept);
        }
    }
}
