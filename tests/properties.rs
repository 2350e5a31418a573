//! Whatever is put together, a solve does not panic, and its gradient stays near that of F64.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::prelude::*;
use candle_ode::schedule::{Schedule, Slot};
use candle_ode::{Checkpoints, Increments4, Increments8, Increments16, InputOnly, States};
use common::*;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};
use proptest::{prop_assert, prop_assert_eq, proptest};

const SOLVERS: usize = 13;
/// Those from here on are reversible.
const REVERSIBLE: usize = 10;

fn with_solver(ode: Ode, which: usize) -> Ode {
    match which {
        0 => ode.solver(Euler),
        1 => ode.solver(Midpoint),
        2 => ode.solver(Heun),
        3 => ode.solver(Ralston),
        4 => ode.solver(Rk3),
        5 => ode.solver(Rk4),
        6 => ode.solver(ThreeEighths),
        7 => ode.solver(Bosh3),
        8 => ode.solver(Dopri5),
        9 => ode.solver(Tsit5),
        10 => ode.solver(Reversible::new(Midpoint)),
        11 => ode.solver(Reversible::new(Rk4)),
        _ => ode.solver(ReversibleHeun),
    }
}

/// A precision with the relative error that its gradients may have.
fn precisions() -> impl Strategy<Value = (Precision, f64)> {
    let half = |dtype, bound: f64| (Precision::new().compute(dtype), bound);
    let stored = |dtype, bound: f64| (Precision::new().storage(dtype), bound);
    prop_oneof![
        Just((Precision::F64, 1e-12)),
        Just((Precision::F32, 1e-4)),
        Just((Precision::F16, 2e-2)),
        Just((Precision::BF16, 1e-1)),
        Just(half(DType::F16, 2e-2)),
        Just(half(DType::BF16, 1e-1)),
        Just(stored(DType::F16, 1e-2)),
        Just((Precision::F16.accumulate(DType::F64), 2e-2)),
    ]
}

/// An adjoint, with the relative error that its codec may add, and whether it keeps linearisations.
fn adjoints() -> impl Strategy<Value = (Discrete, f64, bool)> {
    let codec = prop_oneof![
        3 => Just((Discrete::default(), 0.0)),
        1 => Just((Discrete::default().codec(States(DType::F32)), 1e-4)),
        1 => Just((Discrete::default().codec(States(DType::F16)), 1e-2)),
        1 => Just((Discrete::default().codec(States(DType::BF16)), 1e-1)),
        // Coarse steps make large increments.
        1 => Just((Discrete::default().codec(Increments16), 1e-2)),
        1 => Just((Discrete::default().codec(Increments8), 1e-1)),
        1 => Just((Discrete::default().codec(Increments4), 1.0)),
    ];
    let slots = || prop_oneof![4 => 0..9_usize, 1 => Just(usize::MAX)];
    let schedule = prop_oneof![
        Just(None),
        Just(Some(None)),
        slots().prop_map(|slots| Some(Some(Checkpoints::new(slots)))),
        slots().prop_map(|slots| Some(Some(Checkpoints::new(slots).with_stages()))),
    ];
    (codec, schedule, any::<bool>(), any::<bool>()).prop_map(|((adjoint, error), schedule, one, consume)| {
        let with_stages = schedule.flatten().is_some_and(|checkpoints| checkpoints.slot() == Slot::Stages);
        let adjoint = match schedule {
            Some(Some(checkpoints)) => adjoint.schedule(checkpoints),
            Some(None) => adjoint.schedule(InputOnly),
            None => adjoint,
        };
        let adjoint = if consume { adjoint.consume() } else { adjoint };
        (adjoint.stage_memory(if one { StageMemory::One } else { StageMemory::All }), error, with_stages)
    })
}

/// dL/dy0, dL/dθ and y(T) for L = the mean of (y(T) + 1)².
fn gradients(ode: &Ode, y0: &Var, vars: &VarMap) -> Result<Vec<Tensor>, OdeError> {
    let solution = ode.solve(y0.as_tensor())?;
    let grads = (solution.last() + 1.0)?.sqr()?.mean_all()?.backward()?;
    let all = sorted(vars).into_values().chain([y0.clone()]);
    Ok(all.map(|var| grads.get(&var).unwrap().clone()).chain([solution.last().clone()]).collect())
}

/// ‖a − b‖ / ‖b‖ over all tensors as one: a single small one cannot be wrong only because it is small.
fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
    let flat = |all: &[Tensor]| all.iter().flat_map(values).collect::<Vec<f64>>();
    let (a, b) = (flat(a), flat(b));
    let norm = |x: Vec<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    norm(a.iter().zip(&b).map(|(a, b)| a - b).collect()) / norm(b)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gradients_stay_near_those_of_f64(
        solver in 0..SOLVERS,
        steps in 1..12_usize,
        batch in 1..6_usize,
        dim in 1..5_usize,
        hidden in 1..7_usize,
        end in prop_oneof![-1.5..-0.1_f64, 0.1..1.5_f64],
        (precision, bound) in precisions(),
        (adjoint, rounding, with_stages) in adjoints(),
        reconstructs in any::<bool>(),
        scaled in 0..3_usize,
        seed in any::<u32>(),
    ) {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, dim, hidden);
        fill(&vars, u64::from(seed), 1.0);
        let y0 = variable(u64::from(seed) + 99, &[batch, dim], DType::F64);
        let ode = with_solver(Ode::new(&field), solver).span(0.2, 0.2 + end).steps(steps);
        let exact = gradients(&ode.clone().precision(Precision::F64), &y0, &vars).unwrap();
        let is_reversible = solver >= REVERSIBLE;
        let ode = ode.precision(precision);
        let ode = if reconstructs && is_reversible { ode.adjoint(Reconstruct::default()) } else { ode.adjoint(adjoint) };
        let ode = match scaled {
            0 => ode,
            1 => ode.scaling(AdjointScaling::per_step()),
            _ => ode.scaling(AdjointScaling::dynamic()),
        };
        if is_reversible && with_stages && !reconstructs {
            let refused = gradients(&ode, &y0, &vars).unwrap_err();
            prop_assert!(matches!(refused, OdeError::Unsupported { .. }), "{refused}");
            return Ok(());
        }
        let found = gradients(&ode, &y0, &vars).unwrap();
        let error = distance(&found, &exact);
        prop_assert!(error < bound + rounding, "{error:e}");
        let again = gradients(&ode, &y0, &vars).unwrap();
        prop_assert!(found.iter().zip(&again).all(|(a, b)| bits(a) == bits(b)));
    }

    #[test]
    fn any_numbers_give_a_result_or_an_error(
        start in proptest::collection::vec(any::<f32>(), 0..5),
        times in proptest::collection::vec(prop_oneof![any::<f64>(), -1.0..1.0_f64], 0..5),
        solver in 0..SOLVERS,
        (precision, _) in precisions(),
        (adjoint, ..) in adjoints(),
        retry in any::<bool>(),
        factor in any::<f32>(),
    ) {
        let y0 = Var::from_tensor(&Tensor::new(start, &candle_core::Device::Cpu).unwrap()).unwrap();
        let field = FnField::new(move |t: &Time, y: &Tensor| (y.sqr()? * f64::from(factor))?.broadcast_sub(&t.like(y)?));
        let overflow = if retry { OnOverflow::Retry } else { OnOverflow::Error };
        let ode = with_solver(Ode::new(&field), solver).grid(&times).precision(precision).on_overflow(overflow).adjoint(adjoint);
        if let Ok(solution) = ode.solve(y0.as_tensor()) {
            prop_assert!(values(solution.last()).iter().all(|y| y.is_finite()));
            prop_assert_eq!(solution.end(), *times.last().unwrap());
            if let Ok(grads) = solution.last().sum_all().unwrap().backward() {
                prop_assert!(values(grads.get(&y0).unwrap()).iter().all(|g| g.is_finite()));
            }
        }
    }
}
