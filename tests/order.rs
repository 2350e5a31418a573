//! Every solver converges at its order: within 0.1 over four halvings of the step, forwards, backwards and on a given
//! non-uniform grid, in F64.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_ode::prelude::*;
use common::values;

/// A nonlinear non-autonomous equation with a known solution.
#[derive(Clone, Copy, Debug)]
enum Problem {
    /// y′ = −2 t y² and z′ = z² cos t, solved by 1/(1 + t²) and 1/(2 − sin t).
    Rational,
    /// y′ = 0.8 (1 + y²) cos t, solved by tan(0.8 sin t): curved enough for order 5 to show above the rounding.
    Tangent,
}

impl Problem {
    fn field(self) -> FnField {
        let factors = move |t: f64| match self {
            Self::Rational => vec![-2.0 * t, t.cos()],
            Self::Tangent => vec![0.8 * t.cos()],
        };
        FnField::new(move |t: &Time, y: &Tensor| {
            let square = match self {
                Self::Rational => y.sqr()?,
                Self::Tangent => (y.sqr()? + 1.0)?,
            };
            square * Tensor::new(factors(t.value()), y.device())?
        })
    }

    fn exact(self, t: f64) -> Vec<f64> {
        match self {
            Self::Rational => vec![1.0 / (1.0 + t * t), 1.0 / (2.0 - t.sin())],
            Self::Tangent => vec![(0.8 * t.sin()).tan()],
        }
    }

    fn error(self, solver: &(impl Solver + Clone), times: &[f64]) -> f64 {
        let y0 = Tensor::new(self.exact(times[0]), &Device::Cpu).unwrap();
        let ode = Ode::new(&self.field()).solver(solver.clone()).grid(times).check_determinism(false);
        let solution = ode.solve(y0).unwrap();
        assert_eq!(solution.last().dtype(), DType::F64);
        let end = self.exact(solution.end());
        values(solution.last()).iter().zip(end).map(|(y, e)| (y - e).powi(2)).sum::<f64>().sqrt()
    }
}

#[derive(Clone, Copy, Debug)]
enum Grid {
    Uniform,
    /// Steps between 0.4 and 1.6 times their mean.
    Warped,
}

impl Grid {
    fn times(self, t0: f64, t1: f64, steps: usize) -> Vec<f64> {
        let warp = |s: f64| match self {
            Self::Uniform => s,
            Self::Warped => s + 0.1 * (std::f64::consts::TAU * s).sin(),
        };
        (0..=steps).map(|n| t0 + (t1 - t0) * warp(n as f64 / steps as f64)).collect()
    }
}

type Case = (Problem, f64, f64, Grid, usize);

fn has_its_order(solver: impl Solver + Clone, cases: [Case; 3]) {
    for (problem, t0, t1, grid, steps) in cases {
        let errors: Vec<f64> = (0..=4).map(|k| problem.error(&solver, &grid.times(t0, t1, steps << k))).collect();
        let order = (errors[0] / errors[4]).log2() / 4.0;
        let says = format!("{} on {problem:?} from {t0} to {t1}, {grid:?}: order {order}, {errors:?}", solver.name());
        assert!((order - solver.order() as f64).abs() < 0.1, "{says}");
        assert!(errors.windows(2).all(|pair| pair[1] < pair[0]) && errors[4] > 1e-15, "{says}");
    }
}

/// Forwards, backwards, and over a given grid backwards, with the numbers of steps to start from.
const fn cases(problem: Problem, end: f64, steps: [usize; 3]) -> [Case; 3] {
    [
        (problem, 0.0, end, Grid::Uniform, steps[0]),
        (problem, end, 0.0, Grid::Uniform, steps[1]),
        (problem, end, 0.0, Grid::Warped, steps[2]),
    ]
}

const LOW: [Case; 3] = cases(Problem::Rational, 2.0, [64; 3]);
const MIDDLE: [Case; 3] = cases(Problem::Rational, 2.0, [32; 3]);

macro_rules! orders {
    ($($test:ident: $solver:expr, $cases:expr),* $(,)?) => {
        $(#[test] fn $test() { has_its_order($solver, $cases); })*
    };
}

/// The coupling settles over 1/(1 − c) steps, before which the order does not show: 5 here.
fn coupled<M: candle_ode::ExplicitRungeKutta>(base: M) -> Reversible<M> {
    Reversible::new(base).coupling(0.8).unwrap()
}

orders! {
    euler_has_order_1: Euler, LOW,
    midpoint_has_order_2: Midpoint, LOW,
    heun_has_order_2: Heun, LOW,
    ralston_has_order_2: Ralston, LOW,
    rk3_has_order_3: Rk3, MIDDLE,
    bosh3_has_order_3: Bosh3, MIDDLE,
    rk4_has_order_4: Rk4, MIDDLE,
    reversible_euler_has_order_1: coupled(Euler), cases(Problem::Rational, 2.0, [384; 3]),
    reversible_midpoint_has_order_2: coupled(Midpoint), LOW,
    reversible_rk3_has_order_3: coupled(Rk3), cases(Problem::Rational, 2.0, [128; 3]),
    reversible_rk4_has_order_4: coupled(Rk4), MIDDLE,
    reversible_heun_has_order_2: ReversibleHeun, LOW,
    the_three_eighths_rule_has_order_4: ThreeEighths, MIDDLE,
    dopri5_has_order_5: Dopri5, cases(Problem::Tangent, 3.0, [12, 12, 32]),
    tsit5_has_order_5: Tsit5, [
        (Problem::Tangent, 0.0, 3.0, Grid::Uniform, 16),
        (Problem::Rational, 2.0, 0.0, Grid::Uniform, 8),
        (Problem::Tangent, 3.0, 0.0, Grid::Warped, 20),
    ],
}
