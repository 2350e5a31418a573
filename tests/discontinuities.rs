//! The steps before and after a jump of f see each their own side of it on the way back too: in F64 the gradient across
//! it is that of Candle's own graph through the same steps, whatever is kept or undone.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor, Var};
use candle_ode::InputOnly;
use candle_ode::prelude::*;
use common::*;

/// f jumps at t = ½, where it is as after: sin(w y), and then 3 cos(w y).
fn jumping() -> FnField {
    FnField::with_inputs(|t: &Time, y: &State, inputs: &[Tensor]| {
        let y = y[0].broadcast_mul(&inputs[0])?;
        Ok(State::from(if t.value() < 0.5 { y.sin()? } else { (y.cos()? * 3.0)? }))
    })
}

/// dL/dy0 and dL/dw for L = Σ y(T)² + Σ y(½).
fn gradients(ode: &Ode, adjoint: Adjoint, [y0, w]: [&Var; 2]) -> [Tensor; 2] {
    let solution = ode.clone().adjoint(adjoint).inputs(&[w.as_tensor().clone()]).solve(y0.as_tensor()).unwrap();
    let (end, middle) = (solution.last().sqr().unwrap(), &solution.states()[0][0]);
    let grads = (end.sum_all().unwrap() + middle.sum_all().unwrap()).unwrap().backward().unwrap();
    [y0, w].map(|var| grads.get(var).unwrap().clone())
}

fn of(solver: impl Solver + Clone, adjoints: &[Adjoint]) {
    let (y0, w) = (variable(1, &[2, 2], DType::F64), variable(2, &[2], DType::F64));
    for (from, to) in [(0.0, 1.0), (1.0, 0.0)] {
        let ode =
            Ode::new(&jumping()).solver(solver.clone()).span(from, to).discontinuities(&[0.5]).save_at(&[0.5, to]);
        for (steps, ode) in [("given", ode.clone().steps(4)), ("chosen", ode.tolerances(1e-4, 1e-4))] {
            let expected = gradients(&ode, Unrolled.into(), [&y0, &w]);
            for adjoint in adjoints {
                let found = gradients(&ode, adjoint.clone(), [&y0, &w]);
                for (found, expected) in found.iter().zip(&expected) {
                    let error = relative(found, expected);
                    assert!(error < 1e-12, "{steps} steps from {from} to {to}, {adjoint:?}: {error:e}");
                }
            }
        }
    }
}

fn discrete() -> Vec<Adjoint> {
    let ways = [
        Discrete::default(),
        Discrete::default().stage_memory(StageMemory::One),
        Discrete::default().checkpoints(1),
        Discrete::default().schedule(InputOnly),
    ];
    ways.map(Adjoint::from).into()
}

#[test]
fn of_steps_that_are_kept_or_computed_again() {
    with_large_stack(|| {
        of(Dopri5, &discrete());
        of(Bosh3, &discrete());
    });
}

#[test]
fn of_steps_that_are_undone() {
    with_large_stack(|| {
        let all =
            [discrete(), vec![Reconstruct::default().into(), Reconstruct::default().anchor_every(2).into()]].concat();
        of(Reversible::new(Dopri5), &all);
    });
}
