//! The gradient is the derivative: Taylor's theorem over many radii, and ⟨Jv, w⟩ = ⟨v, Jᵀw⟩ for the whole solve.
#![allow(missing_docs)]

mod common;

use candle_core::{D, DType, Tensor, Var};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
use candle_ode::prelude::*;
use common::*;

/// ⟨a, b⟩ in F64.
fn dot(a: &Tensor, b: &Tensor) -> f64 {
    values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum()
}

#[test]
fn the_remainder_after_the_gradient_is_of_second_order() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F64, 3, 8);
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[5, 3], DType::F64);
    for (n, memory) in [StageMemory::All, StageMemory::One].into_iter().enumerate() {
        let adjoint = Discrete::default().stage_memory(memory);
        let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(5).adjoint(adjoint);
        let loss = || ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().mean_all().unwrap();
        let every: Vec<Var> = sorted(&vars).into_values().chain([y0.clone()]).collect();
        let start: Vec<Tensor> = every.iter().map(|x| x.as_tensor().copy().unwrap()).collect();
        let directions: Vec<Tensor> =
            every.iter().enumerate().map(|(k, x)| normal(90 + (10 * n + k) as u64, x.dims(), DType::F64)).collect();
        let (at, grads) = (loss(), loss().backward().unwrap());
        let slope: f64 = every.iter().zip(&directions).map(|(x, d)| dot(grads.get(x).unwrap(), d)).sum();
        let remainder = |radius: f64| {
            for ((x, start), d) in every.iter().zip(&start).zip(&directions) {
                x.set(&(start + (d * radius).unwrap()).unwrap()).unwrap();
            }
            (loss().to_scalar::<f64>().unwrap() - at.to_scalar::<f64>().unwrap() - radius * slope).abs()
        };
        let remainders: Vec<f64> = (5..13).map(|k| remainder(0.5f64.powi(k))).collect();
        for (x, start) in every.iter().zip(&start) {
            x.set(start).unwrap();
        }
        for pair in remainders.windows(2) {
            let order = (pair[0] / pair[1]).log2();
            assert!((order - 2.0).abs() < 0.1, "order {order} among the remainders {remainders:?}");
        }
    }
}

/// An MLP with its exact directional derivative, for a state of (y, v).
struct WithTangent(Linear, Linear);

impl WithTangent {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Self(linear(3, 8, vb.pp("in"))?, linear(8, 3, vb.pp("out"))?))
    }

    fn forward(&self, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        self.1.forward(&self.0.forward(y)?.broadcast_add(&t.like(y)?)?.tanh()?)
    }

    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        let bent = self.0.forward(y)?.broadcast_add(&t.like(y)?)?.tanh()?;
        let through = v.matmul(&self.0.weight().t()?)?;
        ((1.0 - bent.sqr()?)? * through)?.matmul(&self.1.weight().t()?)
    }
}

fn transposed_equals_forward(solver: impl Solver + Copy) {
    // A Runge–Kutta method applied to (y, Jv) gives the exact derivative of its own steps.
    let vars = VarMap::new();
    let plain = field64(&vars, WithTangent::new, |m, t, y, _| Ok(State::from(m.forward(t, y.single()?)?)));
    let both = field64(&vars, WithTangent::new, |m, t, state, _| {
        Ok(State::from([m.forward(t, &state[0])?, m.tangent(t, &state[0], &state[1])?]))
    });
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[5, 3], DType::F64);
    let (v, w) = (normal(3, &[5, 3], DType::F64), normal(4, &[5, 3], DType::F64));
    for times in [&[0.0, 0.1, 0.4, 0.7, 1.0][..], &[1.0, 0.8, 0.1]] {
        let start = State::from([y0.as_tensor().clone(), v.clone()]);
        let forward = Ode::new(&both).solver(solver).grid(times).no_grad().solve(start).unwrap();
        let back = Ode::new(&plain).solver(solver).grid(times).solve(y0.as_tensor()).unwrap();
        assert_eq!(bits(back.last()), bits(forward.last()));
        let seeded = (back.last() * &w).unwrap().sum(D::Minus1).unwrap().sum_all().unwrap();
        let transposed = seeded.backward().unwrap();
        let (left, right) = (dot(&forward.last_state()[1], &w), dot(&v, transposed.get(&y0).unwrap()));
        assert!((left - right).abs() < 1e-13 * left.abs().max(1.0), "{}: {left} {right}", solver.name());
    }
}

#[test]
fn the_transposed_derivative_of_a_solve_is_that_of_its_steps() {
    transposed_equals_forward(Euler);
    transposed_equals_forward(Ralston);
    transposed_equals_forward(Rk3);
    transposed_equals_forward(Rk4);
    transposed_equals_forward(ThreeEighths);
    transposed_equals_forward(Bosh3);
    transposed_equals_forward(Dopri5);
    transposed_equals_forward(Tsit5);
}
