//! An evaluation that is known already is not made again: the last stage of an accepted step is the first of the next,
//! the first stage of a rejected step is that of its repetition, and what the first step length needed serves the first
//! step.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor};
use candle_ode::prelude::*;
use common::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A field that is steep enough to reject steps, and how often it is evaluated.
fn counted() -> (FnField, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let field = FnField::new(move |t: &Time, y: &Tensor| {
        seen.fetch_add(1, Ordering::Relaxed);
        (y.sin()? * 3.0)? + (40.0 * t.value()).sin()
    });
    (field, count)
}

/// Counts an adaptive solve without the check of the first evaluation.
fn evaluations(solver: impl Solver, controller: Controller, no_grad: bool) -> (usize, Stats) {
    let (field, count) = counted();
    let y0 = variable(1, &[3], DType::F64);
    let ode = Ode::new(&field).solver(solver).span(0.0, 1.0).tolerances(1e-5, 1e-5).controller(controller);
    let ode = ode.check_determinism(false);
    let solution = if no_grad { ode.no_grad() } else { ode }.solve(y0.as_tensor()).unwrap();
    let stats = solution.stats();
    assert!(stats.accepted_steps > 4 && stats.rejected_steps > 0, "{stats:?}");
    assert_eq!(stats.evaluations, count.load(Ordering::Relaxed));
    (stats.evaluations, stats)
}

fn tries(stats: &Stats) -> usize {
    stats.accepted_steps + stats.rejected_steps
}

#[test]
fn a_first_same_as_last_method_costs_a_stage_less_a_try() {
    // One evaluation to start with, one more for the first length, and s − 1 for each step that is tried.
    for no_grad in [true, false] {
        let (n, stats) = evaluations(Bosh3, Controller::i(), no_grad);
        assert_eq!(n, 2 + 3 * tries(&stats));
        let (n, stats) = evaluations(Dopri5, Controller::i(), no_grad);
        assert_eq!(n, 2 + 6 * tries(&stats));
        let (n, stats) = evaluations(Tsit5, Controller::i(), no_grad);
        assert_eq!(n, 2 + 6 * tries(&stats));
    }
}

#[test]
fn a_given_first_length_costs_no_evaluation() {
    let (n, stats) = evaluations(Dopri5, Controller::i().first_step(0.5), true);
    assert_eq!(n, 1 + 6 * tries(&stats));
}

#[test]
fn another_method_costs_its_first_stage_once_a_step() {
    // Heun's last stage is no slope at the end: each accepted step evaluates f at its start, a repetition does not.
    let (n, stats) = evaluations(Heun, Controller::i(), true);
    assert_eq!(n, 1 + stats.accepted_steps + tries(&stats));
}

#[test]
fn a_jump_of_f_is_evaluated_on_both_sides() {
    let (field, count) = counted();
    let y0 = normal(1, &[3], DType::F64);
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).tolerances(1e-5, 1e-5).check_determinism(false);
    let stats = ode.discontinuities(&[0.25, 0.5]).solve(&y0).unwrap().stats();
    assert_eq!(stats.evaluations, 2 + 2 + 6 * tries(&stats));
    assert_eq!(stats.evaluations, count.load(Ordering::Relaxed));
}

#[test]
fn fixed_steps_never_evaluate_a_stage_that_does_not_matter() {
    // The last stage of Dopri5 serves the error alone: over a grid nothing asks for it.
    assert_eq!((Dopri5.nodes().len(), Bosh3.nodes().len()), (7, 4));
    let (field, count) = counted();
    let y0 = normal(1, &[3], DType::F64);
    let ode = Ode::new(&field).span(0.0, 1.0).steps(7).check_determinism(false);
    ode.clone().solver(Dopri5).solve(&y0).unwrap();
    assert_eq!(count.swap(0, Ordering::Relaxed), 7 * 6);
    ode.solver(Bosh3).solve(&y0).unwrap();
    assert_eq!(count.load(Ordering::Relaxed), 7 * 3);
}
