//! In F64 `Reconstruct` gives the gradient of `Discrete` over the same reversible solver, and that is Candle's own
//! unrolled one: to 1e-12, for every base method.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::ops;
use candle_ode::prelude::*;
use common::gradcheck::Case;
use common::*;

fn half_square(state: &State) -> candle_core::Result<Tensor> {
    let parts = state.tensors().iter().map(|y| y.sqr()?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
    Tensor::stack(&parts, 0)?.sum_all()? * 0.5
}

/// A loss over the outputs, each with a weight of its own.
fn case(ode: Ode, vars: &VarMap, start: Vec<Var>) -> Case {
    let of_start = start.iter().enumerate().map(|(n, y)| (format!("y0 {n}"), y.clone()));
    let named: Vec<_> = sorted(vars).into_iter().chain(of_start).collect();
    Case::new(named, move |adjoint| {
        let y0: Vec<Tensor> = start.iter().map(|y| y.as_tensor().clone()).collect();
        let solution = ode.clone().adjoint(adjoint).solve(y0)?;
        let parts = solution.states().iter().enumerate();
        let parts = parts.map(|(n, y)| half_square(y)? * (n as f64 + 1.0)).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::stack(&parts, 0)?.sum_all()?)
    })
}

/// Discrete == Unrolled, Reconstruct == Discrete, in all their settings.
fn check(case: &Case) {
    case.equals_unrolled();
    let discrete = case.gradients(Discrete::default());
    for adjoint in [
        Reconstruct::default(),
        Reconstruct::default().stage_memory(StageMemory::One),
        Reconstruct::default().anchor_every(1),
        Reconstruct::default().anchor_every(3),
    ] {
        let reconstructed = case.gradients(adjoint);
        for (name, var) in &case.vars {
            // What no output depends on may be missing.
            let found = [&reconstructed, &discrete].map(|gradients| gradients.get(var));
            let error = match found {
                [Some(reconstructed), Some(discrete)] => relative(reconstructed, discrete),
                [one, other] => one.or(other).map_or(0.0, |x| values(x).iter().map(|g| g.abs()).sum()),
            };
            assert!(error < 1e-12, "{name} with {adjoint:?}: {error:e}");
        }
    }
}

fn of_an_mlp(solver: impl Solver + Clone) {
    with_large_stack(move || {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, 3, 5);
        fill(&vars, 1, 1.0);
        for (t0, t1, steps) in [(0.0, 1.0, 7), (1.0, -0.5, 4), (0.2, 0.5, 1)] {
            let ode = Ode::new(&field).solver(solver.clone()).span(t0, t1).steps(steps);
            check(&case(ode, &vars, vec![variable(9, &[4, 3], DType::F64)]));
        }
    });
}

macro_rules! solvers {
    ($($test:ident: $solver:expr),* $(,)?) => {
        $(#[test] fn $test() { of_an_mlp($solver); })*
    };
}

mod of_every_solver {
    use super::*;
    solvers! {
        euler: Reversible::new(Euler),
        midpoint: Reversible::new(Midpoint),
        heun: Reversible::new(Heun),
        ralston: Reversible::new(Ralston),
        rk3: Reversible::new(Rk3),
        rk4: Reversible::new(Rk4),
        three_eighths: Reversible::new(ThreeEighths),
        bosh3: Reversible::new(Bosh3),
        dopri5: Reversible::new(Dopri5),
        tsit5: Reversible::new(Tsit5),
        loosely_coupled: Reversible::new(Rk4).coupling(0.9).unwrap(),
        own_tableau: Reversible::new(Tableau::new("Ralston 3", 3, &[&[0.5], &[0.0, 0.75]], &[2. / 9., 1. / 3., 4. / 9.]).unwrap()),
        reversible_heun: ReversibleHeun,
    }
}

#[test]
fn of_a_convolution() {
    with_large_stack(|| {
        let vars = VarMap::new();
        let config = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
        let build = move |vb: candle_nn::VarBuilder<'static>| ops::conv2d(2, 2, 3, config, vb);
        let field = field64(&vars, build, |conv, t, y, _| {
            let y = y.single()?;
            Ok(State::from(candle_nn::Module::forward(conv, y)?.broadcast_add(&t.like(y)?)?.tanh()?))
        });
        fill(&vars, 3, 1.0);
        for solver in [Reversible::new(Rk4), Reversible::new(Rk4).coupling(0.95).unwrap()] {
            let ode = Ode::new(&field).solver(solver).span(0.0, 1.0).steps(5);
            check(&case(ode, &vars, vec![variable(4, &[2, 2, 4, 4], DType::F64)]));
        }
    });
}

#[test]
fn of_several_outputs_of_a_state_of_two_tensors() {
    with_large_stack(|| {
        let vars = VarMap::new();
        let field = field64(
            &vars,
            |vb| Mlp::new(3, 5, vb),
            |m, t, state, _| {
                let (z, log_p) = (&state[0], &state[1]);
                let f = m.forward(t, z)?.broadcast_mul(&log_p.cos()?.unsqueeze(1)?)?;
                Ok(State::from([f.clone(), (f.sum(1)? * 0.1)?.sub(log_p)?]))
            },
        );
        fill(&vars, 4, 1.0);
        let start = || vec![variable(5, &[4, 3], DType::F64), variable(6, &[4], DType::F64)];
        for wanted in [&[0.0, 0.3, 1.0][..], &[0.3], &[0.0], &[0.1, 0.9]] {
            let ode = Ode::new(&field).grid(&[0.0, 0.1, 0.3, 0.5, 0.9, 1.0]).save_at(wanted);
            check(&case(ode.clone().solver(Reversible::new(Bosh3)), &vars, start()));
            check(&case(ode.solver(ReversibleHeun), &vars, start()));
        }
    });
}

#[test]
fn of_a_solve_that_an_observer_stops() {
    with_large_stack(|| {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, 3, 5);
        fill(&vars, 1, 1.0);
        let stop = |step: candle_ode::StepInfo<'_>| {
            assert_eq!(step.y[0].dims(), [4, 3]);
            if step.index == 2 { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
        };
        let ode = Ode::new(&field).solver(Reversible::new(Heun)).span(0.0, 1.0).steps(6).on_step(stop);
        check(&case(ode, &vars, vec![variable(9, &[4, 3], DType::F64)]));
    });
}
