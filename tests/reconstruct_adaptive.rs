//! A reversible solver with steps chosen by a controller: the accepted times are replayed, so that `Reconstruct` gives
//! the gradient of `Discrete`, and that is Candle's own through the same steps, to 1e-12 in F64.
#![allow(missing_docs)]

mod common;

use candle_core::DType;
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::gradcheck::Case;
use common::*;

fn of(solver: impl Solver + Clone) {
    with_large_stack(move || {
        for (t0, t1) in [(0.0, 2.0), (1.0, -1.0)] {
            let vars = VarMap::new();
            let field = mlp_field(&vars, DType::F64, 3, 8);
            fill(&vars, 3, 2.5);
            let y0 = variable(4, &[4, 3], DType::F64);
            let ode = Ode::new(&field).solver(solver.clone()).span(t0, t1).save_at(&[0.5 * (t0 + t1) + 0.1, t1]);
            let ode = ode.tolerances(1e-4, 1e-5).controller(Controller::i().first_step(2.0));
            let solved = ode.solve(y0.as_tensor()).unwrap();
            assert!(solved.stats().rejected_steps > 0 && solved.stats().accepted_steps > 3, "{:?}", solved.stats());
            let vars = sorted(&vars).into_iter().chain([("y0".to_owned(), y0.clone())]);
            let case = Case::new(vars, move |adjoint| {
                let solution = ode.clone().adjoint(adjoint).solve(y0.as_tensor())?;
                let both = solution.states().iter().map(|y| y[0].sqr()?.sum_all()).collect::<Result<Vec<_>, _>>()?;
                Ok((&both[0] + (&both[1] * 2.0)?)?)
            });
            case.equals_unrolled();
            let discrete = case.gradients(Discrete::default());
            for adjoint in [Reconstruct::default(), Reconstruct::default().anchor_every(3)] {
                let found = case.gradients(adjoint);
                for (name, var) in &case.vars {
                    let error = relative(found.get(var).unwrap(), discrete.get(var).unwrap());
                    assert!(error < 1e-12, "{name} with {adjoint:?}: {error:e}");
                }
            }
        }
    });
}

#[test]
fn equals_discrete_and_unrolled_with_heun() {
    of(Reversible::new(Heun));
}

#[test]
fn equals_discrete_and_unrolled_with_dopri5() {
    of(Reversible::new(Dopri5));
}

#[test]
fn tighter_tolerances_give_smaller_errors_and_flat_bytes() {
    let field = FnField::new(|t: &Time, y: &candle_core::Tensor| y * (2.0 * t.value()).cos());
    let y0 = variable(1, &[3], DType::F64);
    let exact = (y0.as_tensor() * (2.0f64.sin() / 2.0).exp()).unwrap();
    let errors: Vec<f64> = [1e-3, 1e-5, 1e-7]
        .into_iter()
        .map(|tolerance| {
            let ode = Ode::new(&field).solver(Reversible::new(Dopri5)).span(0.0, 1.0).tolerances(tolerance, tolerance);
            let solution = ode.adjoint(Reconstruct::default()).solve(y0.as_tensor()).unwrap();
            assert_eq!(solution.trajectory_bytes(), 2 * 3 * 8);
            relative(solution.last(), &exact)
        })
        .collect();
    assert!(errors[0] < 1e-3 && errors[1] < errors[0] / 10.0 && errors[2] < errors[1] / 10.0, "{errors:?}");
}

#[test]
fn a_base_method_without_an_estimate_is_refused() {
    let field = FnField::new(|_: &Time, y: &candle_core::Tensor| y.neg());
    let ode = Ode::new(&field).solver(Reversible::new(Rk4)).span(0.0, 1.0).tolerances(1e-3, 1e-3);
    match ode.solve(variable(1, &[3], DType::F64).as_tensor()).unwrap_err() {
        OdeError::NoErrorEstimate { solver } => assert!(solver.contains("Rk4"), "{solver}"),
        other => panic!("{other}"),
    }
}
