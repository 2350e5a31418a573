//! On y′ = αy a reversible solver is stable on the negative real axis up to the point where a root of its step matrix
//! leaves the unit disc, which lies near |αh| = 1 − c for every base method.
//!
//! With p = R(αh) − 1 and q = R(−αh) − 1, R the stability function of the base method, one step multiplies (y, z) by
//! ((c, 1 − c + p), (−qc, 1 − q(1 − c + p))), whose determinant is c: both roots lie in the disc while |trace| < 1 + c.
#![allow(missing_docs)]

mod common;

use candle_core::{Device, Tensor};
use candle_ode::ExplicitRungeKutta;
use candle_ode::prelude::*;
use common::values;

/// R(x) of a method with as many stages as its order, up to 4: the exponential series cut off after xˢ.
fn growth(order: usize, x: f64) -> f64 {
    let terms = [x, x * x / 2.0, x.powi(3) / 6.0, x.powi(4) / 24.0];
    1.0 + terms[..order].iter().sum::<f64>()
}

/// The |αh| at which the larger root of the step matrix reaches 1, by bisection.
fn limit_by_roots(order: usize, c: f64) -> f64 {
    let is_stable = |r: f64| {
        let (p, q) = (growth(order, -r) - 1.0, growth(order, r) - 1.0);
        (1.0 + c - q * (1.0 - c + p)).abs() < 1.0 + c
    };
    let (mut stable, mut unstable) = (0.5 * (1.0 - c), 2.0 * (1.0 - c));
    assert!(is_stable(stable) && !is_stable(unstable));
    for _ in 0..60 {
        let middle = (stable + unstable) / 2.0;
        if is_stable(middle) { stable = middle } else { unstable = middle }
    }
    stable
}

/// The |αh| between which solutions stop to decay, of many that are solved at once.
fn limit_by_solving(solver: impl Solver, near: f64, c: f64) -> (f64, f64) {
    let sizes: Vec<f64> = (0..120).map(|n| near * (0.97025 + 0.0005 * f64::from(n))).collect();
    let alpha = Tensor::new(sizes.iter().map(|r| -r).collect::<Vec<_>>(), &Device::Cpu).unwrap();
    // A push at the start alone, since (1, 1) is almost the vector of the root c.
    let push = |t: f64| if t < 0.25 { 1.0 } else { 0.0 };
    let field = FnField::new(move |t: &Time, y: &Tensor| (y * &alpha)? + push(t.value()));
    let y0 = Tensor::ones(sizes.len(), candle_core::DType::F64, &Device::Cpu).unwrap();
    // Steps of length 1, until the root that is about c has died out, and as many again. y has little of the other root
    // near the limit (its vector is (0, 1) there), so that takes long.
    let steps = (40.0 / (1.0 - c)).ceil() as usize;
    let (half, end) = (steps as f64, 2.0 * steps as f64);
    let ode = Ode::new(&field).solver(solver).span(0.0, end).steps(2 * steps).save_at(&[half, end]);
    let solution = ode.solve(&y0).unwrap();
    let [half, end] = [0, 1].map(|n| values(&solution.states()[n][0]));
    let grows: Vec<bool> = half.iter().zip(&end).map(|(half, end)| end.abs() > half.abs()).collect();
    let first = grows.iter().position(|grows| *grows).expect("nothing grows");
    assert!(first > 0 && grows[first..].iter().all(|grows| *grows), "{grows:?}");
    (sizes[first - 1], sizes[first])
}

fn ends_at_the_roots(base: impl ExplicitRungeKutta + Clone, order: usize) {
    for c in [0.8, 0.95, 0.999] {
        let roots = limit_by_roots(order, c);
        let solver = Reversible::new(base.clone()).coupling(c).unwrap();
        let (stable, unstable) = limit_by_solving(solver, roots, c);
        let off = ((stable + unstable) / 2.0 / roots - 1.0).abs();
        println!(
            "order {order}, c = {c}: {stable:.6} to {unstable:.6}, roots {roots:.6}, 1 − c times {:.4}",
            roots / (1.0 - c)
        );
        assert!(off < 1e-3, "order {order}, c = {c}: {stable} to {unstable}, roots {roots}");
        assert!(c < 0.95 || (roots / (1.0 - c) - 1.0).abs() < 0.05, "order {order}, c = {c}: {roots}");
    }
}

#[test]
fn of_euler_ends_at_the_roots() {
    ends_at_the_roots(Euler, 1);
}

#[test]
fn of_midpoint_ends_at_the_roots() {
    ends_at_the_roots(Midpoint, 2);
}

#[test]
fn of_rk3_ends_at_the_roots() {
    ends_at_the_roots(Rk3, 3);
}

#[test]
fn of_rk4_ends_at_the_roots() {
    ends_at_the_roots(Rk4, 4);
}
