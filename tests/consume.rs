//! A trajectory that is consumed is freed while the backward pass walks over it, and gone afterwards.
#![allow(missing_docs)]

mod common;
#[path = "common/counted.rs"]
mod counted;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use candle_ode::account::Category;
use candle_ode::memory::MemoryProfiler;
use candle_ode::prelude::*;
use candle_ode::{Codec, Increments8, States};
use common::*;
use counted::{Counted, alone};
use std::sync::{Arc, Mutex};
use tracing_subscriber::layer::SubscriberExt;

const STEPS: usize = 12;

/// Live bytes of the trajectory at each evaluation of the backward pass, of a solve that keeps `adjoint`.
fn walked(adjoint: Discrete, precision: Precision) -> (Vec<u64>, usize, std::result::Result<(), OdeError>, u64) {
    let _turn = alone();
    let memory = Counted::default();
    memory.add(1);
    let (layer, recording) = MemoryProfiler::new(&Device::Cpu).meter(memory).layer().unwrap();
    let recording = Arc::new(recording);
    let seen = Arc::new(Mutex::new(vec![]));
    let (watch, noted) = (recording.clone(), seen.clone());
    let dispatch = tracing::Dispatch::new(tracing_subscriber::registry().with(layer));
    tracing::dispatcher::with_default(&dispatch, || {
        let field = FnField::new(move |_: &Time, y: &Tensor| {
            noted.lock().unwrap().push(watch.ledger().live(Category::Trajectory));
            y.neg()?.tanh()
        });
        let y0 = variable(1, &[4, 10], DType::F32);
        let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(STEPS).precision(precision);
        let solution = ode.adjoint(adjoint).solve(y0.as_tensor()).unwrap();
        let loss = solution.last().sqr().unwrap().mean_all().unwrap();
        seen.lock().unwrap().clear();
        loss.backward().unwrap();
        // The first backward pass in the life of a field looks at it before it walks.
        let mut seen = seen.lock().unwrap().clone();
        let walked = seen.len() - STEPS;
        seen.drain(..walked);
        let left = recording.ledger().live(Category::Trajectory);
        (seen, solution.trajectory_bytes(), loss.backward().map(|_| ()).map_err(OdeError::from), left)
    })
}

#[test]
fn live_bytes_fall_with_every_step_and_a_second_backward_is_refused() {
    for (precision, size) in [(Precision::F32, 4), (Precision::F32.storage(DType::F16), 2)] {
        let (seen, bytes, again, left) = walked(Discrete::default().consume(), precision);
        assert_eq!(bytes, (STEPS - 1) * 40 * size);
        // One evaluation a step, while its start is still held.
        let expected: Vec<u64> = (0..STEPS).rev().map(|n| (n * 40 * size) as u64).collect();
        assert_eq!((seen, left), (expected, 0));
        match again.unwrap_err() {
            OdeError::Consumed { steps } => assert_eq!(steps, STEPS),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn increments_are_freed_as_well() {
    let (seen, bytes, again, left) = walked(Discrete::default().codec(Increments8).consume(), Precision::F32);
    assert_eq!(bytes, (STEPS - 2) * (40 + 4 * 4) + 160);
    // A state that was decoded from an increment is not held by it.
    let expected: Vec<u64> = (0..STEPS as u64).rev().map(|n| n.saturating_sub(1) * (40 + 4 * 4)).collect();
    assert_eq!((seen, left), (expected, 0));
    assert!(matches!(again.unwrap_err(), OdeError::Consumed { .. }));
}

#[test]
fn without_it_nothing_is_freed_and_the_second_backward_is_the_same() {
    let (seen, bytes, again, left) = walked(Discrete::default(), Precision::F32);
    assert!(seen.iter().all(|live| *live == bytes as u64) && left == bytes as u64, "{seen:?}");
    again.unwrap();
    // What is computed again is freed in any case.
    let (_, bytes, again, left) = walked(Discrete::default().checkpoints(2), Precision::F32);
    assert_eq!((bytes, left), (3 * 160, 3 * 160));
    again.unwrap();
}

#[test]
fn a_pass_that_overflows_after_it_has_freed_steps_is_done_again() {
    let _turn = alone();
    // The cotangent grows by 200 a step: in F16 and without scaling it overflows on the way.
    let vars = VarMap::new();
    let field =
        field64(&vars, |vb| vb.get(1, "gain"), |gain, _, y, _| Ok(State::from(y.single()?.broadcast_mul(gain)?)));
    sorted(&vars)["gain"].set(&Tensor::new(&[-199f64], &Device::Cpu).unwrap()).unwrap();
    let y0 = variable(1, &[2, 3], DType::F32);
    let gradients = |adjoint: Discrete| {
        let ode = Ode::new(&field).solver(Euler).span(0.0, 3.0).steps(3).precision(Precision::F16.storage(DType::F32));
        let ode = ode.scaling(AdjointScaling::none()).adjoint(adjoint).on_overflow(OnOverflow::Retry);
        let solution = ode.solve((y0.as_tensor() * 1e-6).unwrap()).unwrap();
        let loss = (solution.last().sum_all().unwrap() * 1e4).unwrap();
        let grads = loss.backward().unwrap();
        let stats = solution.stats();
        ([bits(grads.get(&y0).unwrap()), bits(grads.get(&sorted(&vars)["gain"]).unwrap())], stats)
    };
    let (kept, stats) = gradients(Discrete::default());
    assert!(stats.redone_passes > 0 && stats.recomputed_steps == 0);
    let (consumed, stats) = gradients(Discrete::default().consume());
    assert!(stats.redone_passes > 0 && stats.recomputed_steps > 0);
    assert_eq!(kept, consumed);
}

#[test]
fn codecs_say_what_an_entry_costs() {
    let shapes = [candle_core::Shape::from((4, 10)), candle_core::Shape::from(7)];
    assert_eq!(States(DType::BF16).bytes(&shapes), 47 * 2);
    assert_eq!(Increments8.bytes(&shapes), 40 + 4 * 4 + 7 + 4);
}
