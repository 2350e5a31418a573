//! `Reconstruct` with f in F32, F16 or BF16 and y and z in F32: gradients within their bounds against F64, a drift that
//! is reported, and anchors that bound it.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Linear, VarBuilder, VarMap, linear};
use candle_ode::prelude::*;
use common::*;
use std::collections::BTreeMap;

/// M1: an MLP 16-64-64-16 on a batch of 64.
struct M1 {
    vars: VarMap,
    field: ModelField,
    y0: Var,
}

impl M1 {
    fn new(scale: f64) -> Self {
        let vars = VarMap::new();
        let build = |vb: VarBuilder| {
            Ok((linear(16, 64, vb.pp("1"))?, linear(64, 64, vb.pp("2"))?, linear(64, 16, vb.pp("3"))?))
        };
        let eval = |(first, second, third): &(Linear, Linear, Linear), _: &Time, y: &Tensor| {
            third.forward(&second.forward(&first.forward(y)?.tanh()?)?.tanh()?)
        };
        let field = ModelField::new_in(DType::F64, &vars, &Device::Cpu, build, eval).unwrap();
        fill(&vars, 3, scale);
        Self { vars, field, y0: variable(5, &[64, 16], DType::F64) }
    }

    fn gradients(&self, ode: Ode) -> (BTreeMap<String, Tensor>, Stats) {
        let solution = ode.solve(self.y0.as_tensor()).unwrap();
        let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        let named = sorted(&self.vars).into_iter().chain([("y0".to_owned(), self.y0.clone())]);
        (named.map(|(name, var)| (name, grads.get(&var).unwrap().clone())).collect(), solution.stats())
    }

    fn ode(&self, solver: impl Solver, end: f64, steps: usize, precision: Precision) -> Ode {
        Ode::new(&self.field).solver(solver).span(0.0, end).steps(steps).precision(precision)
    }
}

fn worst(found: &BTreeMap<String, Tensor>, exact: &BTreeMap<String, Tensor>) -> f64 {
    exact.iter().map(|(name, exact)| relative(&found[name], exact)).fold(0.0, f64::max)
}

const BOUNDS: [(Precision, f64); 3] = [(Precision::F32, 1e-5), (Precision::F16, 2e-3), (Precision::BF16, 2e-2)];

fn is_within_its_bounds(solver: impl Solver + Clone) {
    let problem = M1::new(1.0);
    let ode = |precision| problem.ode(solver.clone(), 1.0, 32, precision).adjoint(Reconstruct::default());
    let (exact, stats) = problem.gradients(ode(Precision::F64));
    assert!(stats.drift.unwrap() < 1e-13, "{stats:?}");
    for (precision, bound) in BOUNDS {
        let mut scalings = vec![AdjointScaling::default_for(precision.compute_dtype())];
        if precision != Precision::F32 {
            scalings.extend([AdjointScaling::dynamic(), AdjointScaling::fixed(1024.0).unwrap()]);
        }
        for scaling in scalings {
            let name = scaling.name();
            let (found, stats) = problem.gradients(ode(precision).scaling(scaling));
            let (error, drift) = (worst(&found, &exact), stats.drift.unwrap());
            println!("{precision:?} {name}: error {error:e}, drift {drift:e}");
            assert!(error < bound, "{precision:?} {name}: {error:e}");
            assert!(drift < bound && stats.redone_passes == 0, "{precision:?} {name}: {stats:?}");
        }
    }
}

#[test]
fn rk4_is_within_its_bounds() {
    is_within_its_bounds(Reversible::new(Rk4));
}

#[test]
fn midpoint_is_within_its_bounds() {
    is_within_its_bounds(Reversible::new(Midpoint));
}

#[test]
fn reversible_heun_is_within_its_bounds() {
    is_within_its_bounds(ReversibleHeun);
}

/// c⁻³²⁰ = 640: without anchors rounding grows so, and the gradient in F32 shows it.
#[test]
fn anchors_come_where_the_coupling_needs_them() {
    let problem = M1::new(1.5);
    let ode = |precision| {
        let solver = Reversible::new(Midpoint).coupling(0.98).unwrap();
        problem.ode(solver, 4.0, 320, precision).check_determinism(false)
    };
    let (exact, _) = problem.gradients(ode(Precision::F64));
    for (precision, bound) in [(Precision::F32, 2e-5), (Precision::F16, 2e-2)] {
        let run = |adjoint: Reconstruct| problem.gradients(ode(precision).adjoint(adjoint));
        let (anchored, stats) = run(Reconstruct::default());
        let (error, drift) = (worst(&anchored, &exact), stats.drift.unwrap());
        println!("{precision:?}: error {error:e}, drift {drift:e}");
        assert!(error < bound && drift < bound, "{precision:?}: {error:e} {drift:e}");
        let (bare, stats) = run(Reconstruct::default().anchor_every(usize::MAX));
        let (error, drift) = (worst(&bare, &exact) / error, stats.drift.unwrap() / drift);
        println!("{precision:?}: without anchors error {error} times, drift {drift} times");
        assert!(drift > 10.0 && (error > 10.0 || precision == Precision::F16), "{precision:?}: {error} {drift}");
    }
}
