//! Whatever is kept, and however: outputs on the way count, and what is computed again has the bits it had at first.
//! That gradients are right is in `matrix`.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::InputOnly;
use candle_ode::prelude::*;
use common::problem::*;
use common::*;

const STEPS: usize = 7;
const SPAN: f64 = 0.9;

fn mlp(masters: DType) -> Problem {
    Problem::mlp(masters, 4, 3, 6)
}

fn over(problem: &Problem, solver: impl Solver, precision: Precision) -> Ode {
    Ode::new(&problem.field).solver(solver).span(START, START + SPAN).steps(STEPS).precision(precision)
}

fn schedules() -> Vec<(&'static str, Discrete)> {
    let mut all = vec![("all", Discrete::default()), ("input", Discrete::default().schedule(InputOnly))];
    all.extend([0, 1, 3, 9].map(|slots| ("checkpoints", Discrete::default().checkpoints(slots))));
    all
}

#[test]
fn outputs_on_the_way_count_whatever_is_kept() {
    with_large_stack(|| {
        let problem = mlp(DType::F64);
        let ode = over(&problem, Heun, Precision::F64);
        let times: Vec<f64> = (0..=STEPS).map(|n| START + SPAN * n as f64 / STEPS as f64).collect();
        // The last of them need not be in the loss.
        for outputs in [vec![0, 3, STEPS], vec![2, 3, 4], vec![1], vec![0]] {
            let wanted: Vec<f64> = outputs.iter().map(|&n| times[n]).collect();
            let gradients = |adjoint: Adjoint| {
                let solution = ode.clone().save_at(&wanted).adjoint(adjoint).solve(problem.y0.as_tensor()).unwrap();
                let parts = solution.states().iter().enumerate();
                let parts = parts.map(|(n, y)| (y[0].sqr().unwrap().mean_all().unwrap() * (n + 1) as f64).unwrap());
                let loss = parts.reduce(|a, b| (a + b).unwrap()).unwrap();
                let grads = loss.backward().unwrap();
                let all = sorted(&problem.vars).into_values().chain([problem.y0.clone()]);
                let found = all.map(|var| grads.get(&var).cloned().unwrap_or_else(|| var.zeros_like().unwrap()));
                (found.collect::<Vec<_>>(), solution.stats())
            };
            let (oracle, _) = gradients(Unrolled.into());
            for (name, discrete) in schedules() {
                let (found, stats) = gradients(discrete.into());
                for (found, oracle) in found.iter().zip(&oracle) {
                    let same = values(oracle).iter().all(|x| *x == 0.0) && values(found).iter().all(|x| *x == 0.0);
                    assert!(same || relative(found, oracle) < 1e-12, "{name} with outputs {outputs:?}");
                }
                let last = outputs.iter().max().unwrap();
                assert_eq!(stats.pullbacks, last * 2, "{name}: steps behind the last output cost nothing");
            }
        }
    });
}

#[test]
fn what_is_computed_again_has_the_same_bits_in_every_precision() {
    let half = |dtype| Precision::new().compute(dtype);
    for precision in [Precision::F32, half(DType::F16), half(DType::BF16), Precision::F16.storage(DType::F32)] {
        let problem = mlp(DType::F32);
        let ode = over(&problem, Rk4, precision);
        let all = problem.gradients(&ode, Discrete::default()).unwrap();
        for (name, discrete) in schedules() {
            let found = problem.gradients(&ode, discrete).unwrap();
            assert!(equal_bits(&all.gradients, &found.gradients), "{name} in {precision:?}");
        }
    }
    // Steps that were done again in F32 are computed again in F32: here f overflows in F16 half way.
    let vars = VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'static>| vb.get(1, "gain");
    let eval = |gain: &Tensor, _: &Time, y: &Tensor| (y.broadcast_mul(gain)?.sqr()? * 1e-3)? * 1e-3;
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    sorted(&vars)["gain"].set(&Tensor::new(&[200f32], &Device::Cpu).unwrap()).unwrap();
    let problem = Problem { name: "squares", vars, y0: Var::new(&[1.2f32, 0.5], &Device::Cpu).unwrap(), field };
    let ode =
        Ode::new(&problem.field).solver(Heun).span(0.0, 2.0).steps(STEPS).precision(Precision::F16.storage(DType::F32));
    let ode = ode.on_overflow(OnOverflow::Retry);
    let all = problem.gradients(&ode, Discrete::default()).unwrap();
    assert!(all.solution.stats().redone_steps > 0);
    for (name, discrete) in schedules() {
        let found = problem.gradients(&ode, discrete).unwrap();
        assert!(equal_bits(&all.gradients, &found.gradients), "{name} after an overflow");
    }
}
