//! The gradient of every solver is that of the steps taken.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::*;

fn gradients(ode: &Ode, y0: &Var, vars: &VarMap) -> Vec<(String, Tensor)> {
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let mut all = vec![("y0".to_owned(), grads.get(y0).unwrap().clone())];
    all.extend(sorted(vars).into_iter().map(|(name, var)| (name, grads.get(&var).unwrap().clone())));
    all
}

fn equals_unrolled(solver: impl Solver + Clone) {
    with_large_stack(move || {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, 3, 8);
        fill(&vars, 1, 1.0);
        let y0 = Var::from_tensor(&normal(9, &[5, 3], DType::F64)).unwrap();
        for memory in [StageMemory::All, StageMemory::One] {
            for (t0, t1, steps) in [(0.0, 1.0, 7), (1.0, -0.5, 4), (0.0, 0.3, 1)] {
                let ode = Ode::new(&field).solver(solver.clone()).span(t0, t1).steps(steps);
                let manual = gradients(&ode.clone().adjoint(Discrete::default().stage_memory(memory)), &y0, &vars);
                let oracle = gradients(&ode.adjoint(Unrolled), &y0, &vars);
                for ((name, a), (_, b)) in manual.iter().zip(&oracle) {
                    assert!(relative(a, b) < 1e-12, "{name}: {}", relative(a, b));
                }
            }
        }
    });
}

macro_rules! solvers {
    ($($test:ident: $solver:expr),* $(,)?) => {
        $(#[test] fn $test() { equals_unrolled($solver); })*
    };
}

mod gradient_equals_unrolled_in_f64 {
    use super::*;
    solvers! {
        euler: Euler, midpoint: Midpoint, heun: Heun, ralston: Ralston, rk3: Rk3, rk4: Rk4,
        three_eighths: ThreeEighths, bosh3: Bosh3, dopri5: Dopri5, tsit5: Tsit5,
        own_tableau: Tableau::new("Ralston 3", 3, &[&[0.5], &[0.0, 0.75]], &[2. / 9., 1. / 3., 4. / 9.]).unwrap(),
    }
}

#[test]
fn half_precision_gradients_are_within_their_bounds() {
    // M1 of NUMERICS: MLP 16-64-64-16 would do as well; here 16-64-16, T = 1, N = 32.
    let run = |precision: Precision| {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, 16, 64);
        fill(&vars, 3, 1.0);
        let y0 = Var::from_tensor(&normal(5, &[64, 16], DType::F64)).unwrap();
        gradients(&Ode::new(&field).span(0.0, 1.0).steps(32).precision(precision), &y0, &vars)
    };
    let exact = run(Precision::F64);
    for (precision, bound) in [(Precision::F32, 1e-5), (Precision::F16, 2e-3), (Precision::BF16, 2e-2)] {
        for ((name, a), (_, b)) in run(precision).iter().zip(&exact) {
            println!("{precision:?} {name}: {:e}", relative(a, b));
            assert!(relative(a, b) < bound, "{precision:?} {name}: {}", relative(a, b));
        }
    }
}
