//! A step of `Reconstruct` costs 2s linearisations and 2s pullbacks, and what is kept is exact to the byte.
#![allow(missing_docs)]

mod common;

use candle_core::DType;
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::*;

const STEPS: usize = 10;
const NUMEL: usize = 4 * 3;

fn solved(solver: impl Solver, precision: Precision, adjoint: impl Into<Adjoint>) -> Solution {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 3, 5);
    fill(&vars, 1, 1.0);
    let y0 = variable(9, &[4, 3], DType::F32);
    let ode = Ode::new(&field).solver(solver).span(0.0, 1.0).steps(STEPS).precision(precision).adjoint(adjoint);
    let solution = ode.check_determinism(false).solve(y0.as_tensor()).unwrap();
    solution.last().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    solution
}

fn counts(solver: impl Solver, used: usize, stage_memory: StageMemory) {
    let adjoint = Reconstruct::default().stage_memory(stage_memory);
    let stats = solved(solver, Precision::F32, adjoint).stats();
    // One evaluation is that of the probe for writes to parameters.
    let back = if stage_memory == StageMemory::One { 2 * used * STEPS } else { 0 };
    assert_eq!(stats.evaluations, 1 + 2 * used * STEPS + back);
    assert_eq!((stats.linearizations, stats.pullbacks), (2 * used * STEPS, 2 * used * STEPS));
    assert_eq!((stats.accepted_steps, stats.recomputed_steps, stats.redone_passes), (STEPS, 0, 0));
}

#[test]
fn a_step_costs_2s_linearizations_and_2s_pullbacks() {
    counts(Reversible::new(Euler), 1, StageMemory::All);
    counts(Reversible::new(Midpoint), 2, StageMemory::All);
    counts(Reversible::new(Rk4), 4, StageMemory::All);
    counts(Reversible::new(Rk4), 4, StageMemory::One);
    counts(Reversible::new(Dopri5), 6, StageMemory::All);
    counts(ReversibleHeun, 1, StageMemory::All);
}

#[test]
fn the_end_and_the_anchors_are_kept_in_the_accumulate_dtype() {
    let pair = 2 * NUMEL * 4;
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let bytes = |adjoint: Reconstruct| solved(Reversible::new(Rk4), precision, adjoint).trajectory_bytes();
        assert_eq!(bytes(Reconstruct::default()), pair);
        assert_eq!(bytes(Reconstruct::default().anchor_every(3)), 4 * pair, "after 3, 6, 9 and 10 steps");
        assert_eq!(bytes(Reconstruct::default().anchor_every(5)), 2 * pair, "after 5 and 10 steps");
        assert_eq!(bytes(Reconstruct::default().anchor_every(100)), pair);
    }
    // Discrete keeps the pairs between the steps, in the storage dtype.
    let discrete = solved(Reversible::new(Rk4), Precision::F16, Discrete::default());
    assert_eq!(discrete.trajectory_bytes(), (STEPS - 1) * 2 * NUMEL * 2);
}

#[test]
fn anchors_are_automatic_where_the_coupling_needs_them() {
    let bytes = |c: f64, precision| {
        let solver = Reversible::new(Euler).coupling(c).unwrap();
        solved(solver, precision, Reconstruct::default()).trajectory_bytes() / (2 * NUMEL * 4)
    };
    // Rounding may grow by 16: 0.75⁻⁹ = 13.3, 0.75⁻¹⁰ = 17.8; 0.6⁻⁵ = 12.9, 0.6⁻⁶ = 21.4.
    for precision in [Precision::F32, Precision::F16] {
        assert_eq!([0.8, 0.75, 0.6, 1e-6].map(|c| bytes(c, precision)), [1, 2, 2, 10]);
    }
}
