//! Errors of mixed precision do not grow with the number of steps: y is summed in F32, and only f is rounded.
//!
//! On the reference flow, y(T), dL/dy0 and each dL/dθ in F16 and BF16 against F64 at the same N. The control sums y in
//! the low precision, and does grow.
#![allow(missing_docs, unreachable_pub)]

mod common;
#[allow(dead_code)]
#[path = "../examples/cnf/flow.rs"]
mod flow;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::prelude::*;
use common::*;
use std::collections::BTreeMap;

const BATCH: usize = 64;
/// That of the reference runs.
const FULL_BATCH: usize = 1024;

struct Flow {
    vars: VarMap,
    field: ModelField,
    z: Var,
    log_p: Var,
}

impl Flow {
    fn new(batch: usize) -> Self {
        let vars = VarMap::new();
        let field = ModelField::with_state(
            &vars,
            &Device::Cpu,
            |vb| Ok(LogDensity::new(flow::HyperFlow::new(2, 128, vb)?, Trace::Exact)),
            |flow, t, state| flow.eval(t, state),
        )
        .unwrap();
        fill(&vars, 7, 2.0);
        let z = Var::from_tensor(&(normal(70, &[batch, 2], DType::F32) * 1.5).unwrap()).unwrap();
        let log_p = Var::zeros(batch, DType::F32, &Device::Cpu).unwrap();
        Self { vars, field, z, log_p }
    }

    /// y(T), dL/dy0 and dL/dθ, by name, for L the negative log-likelihood of the flow.
    fn run(&self, solver: impl Solver, steps: usize, precision: Precision) -> (BTreeMap<String, Tensor>, Stats) {
        let ode = Ode::new(&self.field).solver(solver).span(1.0, 0.0).steps(steps).precision(precision);
        let start = State::from([self.z.as_tensor().clone(), self.log_p.as_tensor().clone()]);
        let solution = ode.solve(start).unwrap();
        let [z, change] = solution.last_state().tensors() else { panic!() };
        let loss = (flow::base_nll(z).unwrap() + change).unwrap().mean_all().unwrap();
        let grads = loss.backward().unwrap();
        let mut all = BTreeMap::from([("y(T)".to_owned(), z.clone()), ("log p".to_owned(), change.clone())]);
        all.insert("dL/dy0".into(), grads.get(&self.z).unwrap().clone());
        for (name, var) in sorted(&self.vars) {
            all.insert(format!("dL/d({name})"), grads.get(&var).unwrap().clone());
        }
        (all, solution.stats())
    }
}

/// Relative errors against F64 at the same N, by name; and passes done again.
fn errors(
    flow: &Flow,
    solver: impl Solver + Clone,
    steps: usize,
    precision: Precision,
) -> (BTreeMap<String, f64>, usize) {
    let (exact, _) = flow.run(solver.clone(), steps, Precision::F64);
    let (rounded, stats) = flow.run(solver, steps, precision);
    let errors = rounded.iter().map(|(name, a)| (name.clone(), relative(a, &exact[name]))).collect();
    (errors, stats.redone_passes)
}

fn errors_are_flat(solver: impl Solver + Clone, counts: &[usize]) {
    let flow = Flow::new(BATCH);
    for precision in [Precision::F16, Precision::BF16] {
        let (first, mut redone) = errors(&flow, solver.clone(), 16, precision);
        for &steps in counts {
            let (now, again) = errors(&flow, solver.clone(), steps, precision);
            redone += again;
            for (name, error) in now {
                println!(
                    "{solver:?} {:?} N = {steps} {name}: {error:.2e} ({:.2e} at 16)",
                    precision.compute_dtype(),
                    first[&name]
                );
                assert!(error <= 1.5 * first[&name], "{name} at N = {steps}: {error:e} after {:e}", first[&name]);
            }
        }
        assert_eq!(redone, 0, "no pass overflows here");
    }
}

#[test]
fn errors_of_euler_do_not_grow() {
    errors_are_flat(Euler, &[64, 256, 1024]);
}

#[test]
fn errors_of_rk4_do_not_grow() {
    // Unoptimised, the longest solve takes minutes; the optimised run is the one that counts.
    errors_are_flat(Rk4, if cfg!(debug_assertions) { &[64, 256] } else { &[64, 1024] });
}

/// At the batch, the solver and the number of steps of the reference runs, and over many points, weights and losses of
/// shorter ones.
#[test]
fn under_one_percent_of_passes_are_redone() {
    let mut flow = Flow::new(FULL_BATCH);
    let (_, stats) = flow.run(Rk4, if cfg!(debug_assertions) { 8 } else { 127 }, Precision::F16);
    assert_eq!((stats.redone_passes, stats.redone_steps), (0, 0));
    let passes = if cfg!(debug_assertions) { 5 } else { 100 };
    let mut redone = 0;
    for seed in 0..passes {
        // From nearly linear fields to saturated ones.
        fill(&flow.vars, seed, 0.5 + seed as f64 * 0.05);
        let z = normal(1000 + seed, &[FULL_BATCH, 2], DType::F32);
        flow.z = Var::from_tensor(&(z * 1.5).unwrap()).unwrap();
        redone += flow.run(Rk4, 2, Precision::F16).1.redone_passes;
    }
    println!("{redone} of {passes} passes redone");
    assert!(100 * redone < passes as usize, "{redone} of {passes}");
}

#[test]
fn summing_y_in_the_low_precision_would_grow() {
    let flow = Flow::new(BATCH);
    // Euler by hand, y rounded to F16 after each step: what this crate does not do.
    let control = |steps: usize| {
        let ode = |y: &Tensor, n: usize| {
            let h = -1.0 / steps as f64;
            let (t0, t1) = (1.0 + h * n as f64, 1.0 + h * (n + 1) as f64);
            let start = State::from([y.clone(), Tensor::zeros(BATCH, DType::F16, &Device::Cpu).unwrap()]);
            let ode = Ode::new(&flow.field).solver(Euler).grid(&[t0, t1]).precision(Precision::F16).no_grad();
            ode.check_determinism(false).solve(start).unwrap().last().to_dtype(DType::F16).unwrap()
        };
        let end = (0..steps).fold(flow.z.to_dtype(DType::F16).unwrap().detach(), |y, n| ode(&y, n));
        relative(&end, &flow.run(Euler, steps, Precision::F64).0["y(T)"])
    };
    let (few, many) = (control(16), control(1024));
    println!("F16 sums: {few:.2e} at N = 16, {many:.2e} at N = 1024");
    assert!(many > 5.0 * few, "{few:e}, {many:e}");
}
