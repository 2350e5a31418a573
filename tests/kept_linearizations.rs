//! Slots that hold a state and the linearised stages of the step that led to it: the gradient of every other schedule,
//! as few steps computed again as the simulator says, and no evaluation in the pullback of a step.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use candle_ode::{Checkpoints, Increments8};
use common::*;

fn problem(dtype: DType) -> (VarMap, ModelField, Var) {
    let vars = VarMap::new();
    let field = mlp_field(&vars, dtype, 3, 8);
    fill(&vars, 1, 1.0);
    (vars, field, variable(9, &[5, 3], dtype))
}

/// dL/dθ and dL/dy0 of a loss over the states at `outputs`.
fn gradients(ode: &Ode, vars: &VarMap, y0: &Var) -> (Vec<Tensor>, Stats, Solution) {
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let loss = loss(&solution);
    let grads = loss.backward().unwrap();
    let named = sorted(vars).into_values().chain([y0.clone()]);
    let found = named.map(|var| grads.get(&var).unwrap().clone()).collect();
    (found, solution.stats(), solution)
}

fn loss(solution: &Solution) -> Tensor {
    let parts = solution.states().iter().map(|state| state[0].sqr().unwrap().sum_all().unwrap());
    parts.reduce(|a, b| (a + b).unwrap()).unwrap()
}

fn equal(a: &[Tensor], b: &[Tensor], bound: f64, what: &str) {
    for (n, (a, b)) in a.iter().zip(b).enumerate() {
        let error = relative(a, b);
        assert!(error <= bound, "{what}, gradient {n}: {error:e}");
    }
}

fn slots(slots: usize) -> Discrete {
    Discrete::default().schedule(Checkpoints::new(slots).with_stages())
}

#[test]
fn gradients_are_those_of_kept_states_and_counts_those_of_the_simulator() {
    let (vars, field, y0) = problem(DType::F64);
    for steps in [1, 2, 3, 7, 20] {
        let base = Ode::new(&field).span(0.0, 1.0).steps(steps).check_determinism(false);
        for (stages, ode) in [(1, base.clone().solver(Euler)), (4, base.clone().solver(Rk4)), (6, base.solver(Dopri5))]
        {
            let (expected, ..) = gradients(&ode, &vars, &y0);
            for count in [0, 1, 3, 5, usize::MAX] {
                let name = format!("{stages} stages, {steps} steps, {count} slots");
                let (found, stats, _) = gradients(&ode.clone().adjoint(slots(count)), &vars, &y0);
                equal(&found, &expected, 1e-13, &name);
                let recomputed = Checkpoints::new(count).with_stages().recomputed(steps);
                assert_eq!((stats.recomputed_steps, stats.pullbacks), (recomputed, stages * steps), "{name}");
                // Every step that is computed is either evaluated or linearised, and each is linearised once.
                assert_eq!(stats.linearizations, stages * steps, "{name}");
                assert_eq!(stats.evaluations, stages * recomputed, "{name}");
            }
        }
    }
}

#[test]
fn nothing_is_computed_again_where_every_linearisation_is_kept() {
    let (vars, field, y0) = problem(DType::F32);
    let ode = Ode::new(&field).span(0.0, 1.0).steps(10).check_determinism(false);
    let (expected, ..) = gradients(&ode, &vars, &y0);
    for adjoint in [Discrete::default().keep_linearizations(), Discrete::default().keep_linearizations().consume()] {
        let (found, stats, _) = gradients(&ode.clone().adjoint(adjoint), &vars, &y0);
        equal(&found, &expected, 1e-6, "F32");
        assert_eq!((stats.evaluations, stats.linearizations, stats.recomputed_steps), (0, 40, 0));
    }
}

/// Losses on some outputs, the last of which is not the end.
#[test]
fn outputs_along_the_way() {
    let (vars, field, y0) = problem(DType::F64);
    let ode = Ode::new(&field).span(0.0, 1.0).steps(8);
    for outputs in [&[0.25, 0.5][..], &[0.0, 0.125], &[0.5, 1.0]] {
        let ode = ode.clone().save_at(outputs);
        let (expected, ..) = gradients(&ode, &vars, &y0);
        for count in [0, 2, usize::MAX] {
            let (found, ..) = gradients(&ode.clone().adjoint(slots(count)), &vars, &y0);
            equal(&found, &expected, 1e-13, &format!("{outputs:?} with {count} slots"));
        }
    }
}

#[test]
fn a_second_backward_gives_the_same_bits_and_codecs_do_not_matter_to_what_is_kept() {
    let (vars, field, y0) = problem(DType::F32);
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let ode = Ode::new(&field).span(0.0, 1.0).steps(9).precision(precision);
        for adjoint in [slots(2), slots(2).codec(Increments8), Discrete::default().keep_linearizations()] {
            let (first, _, solution) = gradients(&ode.clone().adjoint(adjoint), &vars, &y0);
            let again = loss(&solution).backward().unwrap();
            let named = sorted(&vars).into_values().chain([y0.clone()]);
            for (var, first) in named.zip(&first) {
                assert_eq!(bits(again.get(&var).unwrap()), bits(first));
            }
        }
        let (kept, ..) = gradients(&ode.clone().adjoint(Discrete::default().keep_linearizations()), &vars, &y0);
        let (coded, ..) =
            gradients(&ode.clone().adjoint(Discrete::default().codec(Increments8).keep_linearizations()), &vars, &y0);
        let (states, ..) = gradients(&ode, &vars, &y0);
        let is_single = precision == Precision::F32;
        equal(&kept, &states, if is_single { 1e-6 } else { 3e-2 }, "kept against computed again");
        // The steps themselves go on from what is decoded.
        equal(&coded, &states, if is_single { 1e-4 } else { 3e-2 }, "increments");
    }
}

/// A pass that overflows in F16 is done again in F32 where it did, from linearisations made anew.
#[test]
fn overflows_on_the_way_back_are_mended() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 4, 8);
    fill(&vars, 1, 60.0);
    let y0 = variable(9, &[6, 4], DType::F32);
    let ode = Ode::new(&field).solver(Euler).span(0.0, 0.02).steps(6).precision(Precision::F16);
    let ode = ode.scaling(AdjointScaling::fixed(f64::from(1 << 20)).unwrap()).on_overflow(OnOverflow::Retry);
    let wide = Ode::new(&field).solver(Euler).span(0.0, 0.02).steps(6);
    let (exact, ..) = gradients(&wide, &vars, &y0);
    for count in [1, 3, usize::MAX] {
        let (found, stats, _) = gradients(&ode.clone().adjoint(slots(count)), &vars, &y0);
        assert!(stats.redone_passes > 0, "{stats:?}");
        equal(&found, &exact, 3e-2, "redone");
    }
}

#[test]
fn what_cannot_keep_linearisations_says_so() {
    let (_vars, field, y0) = problem(DType::F64);
    let kept = || Discrete::default().keep_linearizations();
    let ode = Ode::new(&field).solver(Dopri5).adjoint(kept());
    let time = Var::new(1f64, y0.device()).unwrap();
    let start = Tensor::zeros((), DType::F64, y0.device()).unwrap();
    for refused in [
        ode.clone().span(0.0, 1.0).tolerances(1e-3, 1e-3),
        ode.clone().span_tensors(&start, &time).steps(4),
        ode.clone().span(0.0, 1.0).steps(4).solver(Reversible::new(Rk4)),
    ] {
        let error = refused.solve(y0.as_tensor()).unwrap_err();
        assert!(matches!(error, OdeError::Unsupported { .. }), "{error}");
    }
}
