//! Candle's switch for second order, `CANDLE_GRAD_DO_NOT_DETACH`, changes no gradient.
//!
//! Alone in its process: Candle reads the variable once per thread.
#![allow(missing_docs)]

mod common;

use candle_core::DType;
use candle_nn::VarMap;
use candle_ode::prelude::*;
use common::gradcheck::Case;
use common::*;

#[test]
fn gradients_do_not_depend_on_whether_candle_detaches_them() {
    // SAFETY: the only test of this process, before any other thread is started.
    unsafe { std::env::set_var("CANDLE_GRAD_DO_NOT_DETACH", "1") };
    with_large_stack(|| {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, 3, 5);
        fill(&vars, 1, 1.0);
        let y0 = variable(2, &[4, 3], DType::F64);
        // The switch is on: Candle's own gradients drag their graph along.
        let own = y0.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(own.get(&y0).unwrap().track_op());
        for times in [&[0.0, 0.2, 0.5, 1.0][..], &[0.5, 0.0]] {
            let ode = Ode::new(&field).solver(Rk4).grid(times).save_at(times);
            let names: Vec<_> = sorted(&vars).into_iter().chain([("y0".to_owned(), y0.clone())]).collect();
            let y0 = y0.clone();
            Case::new(names, move |adjoint| {
                let solution = ode.clone().adjoint(adjoint).solve(y0.as_tensor())?;
                let mut loss = solution.last().sqr()?.sum_all()?;
                for state in solution.states() {
                    loss = (loss + state[0].sin()?.sum_all()?)?;
                }
                Ok(loss)
            })
            .check();
        }
    });
}
