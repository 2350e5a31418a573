//! Same seed, same bits: for the whole training of a field with a random layer. Another seed, other draws.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module, Optimizer, SGD, VarBuilder, VarMap, linear};
use candle_ode::field::draw::Stream;
use candle_ode::prelude::*;
use common::*;
use std::collections::BTreeMap;

/// A linear layer, dropout with a mask that is fixed for a solve, and another linear layer.
struct Noisy(Linear, Stream, Stream, Linear);

impl Noisy {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        let (first, last) = (linear(3, 8, vb.pp("in"))?, linear(8, 3, vb.pp("out"))?);
        Ok(Self(first, Stream::next(), Stream::next(), last))
    }

    fn forward(&self, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        let hidden = self.0.forward(y)?.broadcast_add(&t.like(y)?)?.tanh()?;
        let mask = self.1.bernoulli(0.8, hidden.shape(), hidden.dtype(), hidden.device())?;
        let signs = self.2.rademacher(hidden.shape(), hidden.dtype(), hidden.device())?;
        self.3.forward(&((hidden * mask)? + (signs * 0.1)?)?)
    }
}

fn noisy() -> (VarMap, ModelField) {
    let vars = VarMap::new();
    let field = ModelField::new(&vars, &Device::Cpu, Noisy::new, Noisy::forward).unwrap();
    fill(&vars, 1, 1.0);
    (vars, field)
}

/// The weights after twelve steps, and every loss on the way.
fn train(precision: Precision, scaling: AdjointScaling, seed: u64) -> (BTreeMap<String, Vec<u64>>, Vec<u64>) {
    let (vars, field) = noisy();
    let mut optimizer = SGD::new(vars.all_vars(), 0.05).unwrap();
    let ode = Ode::new(&field).solver(Bosh3).span(0.0, 1.0).steps(5).precision(precision).scaling(scaling);
    let mut losses = vec![];
    for step in 0..12 {
        let (y0, target) = (normal(step, &[33, 3], DType::F32), normal(100 + step, &[33, 3], DType::F32));
        let solution = ode.clone().seed(1000 * seed + step).solve(&y0).unwrap();
        let target = target.to_dtype(solution.last().dtype()).unwrap();
        let loss = (solution.last() - target).unwrap().sqr().unwrap().mean_all().unwrap();
        losses.extend(bits(&loss));
        optimizer.step(&loss.backward().unwrap()).unwrap();
    }
    (snapshot(&vars), losses)
}

#[test]
fn the_same_seed_trains_to_the_same_bits() {
    for precision in [Precision::F64, Precision::F32, Precision::F16, Precision::BF16] {
        let once = train(precision, AdjointScaling::default_for(precision.compute_dtype()), 1);
        let twice = train(precision, AdjointScaling::default_for(precision.compute_dtype()), 1);
        assert_eq!(once, twice, "{precision:?}");
    }
    assert_eq!(
        train(Precision::F16, AdjointScaling::dynamic(), 1),
        train(Precision::F16, AdjointScaling::dynamic(), 1)
    );
}

#[test]
fn the_same_seed_trains_to_the_same_bits_on_another_thread() {
    let run = || train(Precision::F16, AdjointScaling::per_step(), 3);
    let threads = [std::thread::spawn(run), std::thread::spawn(run)].map(|thread| thread.join().unwrap());
    assert_eq!(threads[0], run());
    assert_eq!(threads[1], run());
}

#[test]
fn another_seed_draws_other_numbers() {
    let (a, b) = (train(Precision::F32, AdjointScaling::none(), 1), train(Precision::F32, AdjointScaling::none(), 2));
    assert_ne!(a.0, b.0);
    assert!(a.1.iter().zip(&b.1).all(|(a, b)| a != b));
    let (_, field) = noisy();
    let end = |seed: u64| {
        bits(Ode::new(&field).span(0.0, 1.0).steps(3).seed(seed).solve(normal(1, &[4, 3], DType::F32)).unwrap().last())
    };
    assert_eq!(end(7), end(7));
    assert_ne!(end(7), end(8));
}

#[test]
fn the_backward_pass_sees_the_draws_of_the_forward_pass() {
    // With other draws the gradient would not be that of the unrolled graph.
    with_large_stack(|| {
        let (vars, field) = noisy();
        let y0 = variable(5, &[4, 3], DType::F64);
        let names: Vec<_> = sorted(&vars).into_iter().chain([("y0".to_owned(), y0.clone())]).collect();
        let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(4).precision(Precision::F64).seed(11);
        let gradients = |adjoint: Adjoint| {
            let solution = ode.clone().adjoint(adjoint).solve(y0.as_tensor()).unwrap();
            let grads = solution.last().sqr().unwrap().sum_all().unwrap().backward().unwrap();
            names.iter().map(|(_, var)| grads.get(var).unwrap().clone()).collect::<Vec<_>>()
        };
        for (manual, oracle) in gradients(Discrete::default().into()).iter().zip(gradients(Unrolled.into())) {
            // θ is in F32, and so are its gradients.
            assert!(relative(manual, &oracle) < if oracle.dtype() == DType::F64 { 1e-12 } else { 1e-6 });
        }
    });
}
