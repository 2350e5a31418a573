//! The divergence of a field is the trace of its Jacobian, exactly or on average, and can be differentiated in θ.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::OdeError;
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::field::draw::Stream;
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use common::*;

fn mlp(vars: &VarMap) -> Mlp {
    Mlp::new(&[3, 8, 3], Activation::Tanh, VarBuilder::from_varmap(vars, DType::F64, &Device::Cpu)).unwrap()
}

/// The trace by central differences of f along each unit vector.
fn trace_by_differences(model: &Mlp, z: &Tensor) -> Vec<f64> {
    let (rows, dim) = z.dims2().unwrap();
    let mut trace = vec![0.0; rows];
    for n in 0..dim {
        let step = |by: f64| {
            let unit: Vec<f64> = (0..dim).map(|m| if m == n { by } else { 0.0 }).collect();
            let moved = z.broadcast_add(&Tensor::new(unit, &Device::Cpu).unwrap()).unwrap();
            candle_nn::Module::forward(model, &moved).unwrap().to_vec2::<f64>().unwrap()
        };
        let (up, down) = (step(1e-5), step(-1e-5));
        (0..rows).for_each(|row| trace[row] += (up[row][n] - down[row][n]) / 2e-5);
    }
    trace
}

#[test]
fn the_exact_trace_is_that_of_the_jacobian() {
    let vars = VarMap::new();
    let flow = LogDensity::new(mlp(&vars), Trace::Exact);
    fill(&vars, 3, 1.0);
    let z = normal(4, &[5, 3], DType::F64);
    let (_, trace) = flow.divergence(&Time::new(0.0, &Device::Cpu), &z).unwrap();
    for (found, expected) in values(&trace).iter().zip(trace_by_differences(&mlp(&vars), &z)) {
        assert!((found - expected).abs() < 1e-8, "{found} {expected}");
    }
}

#[test]
fn hutchinson_estimates_it_without_bias_and_keeps_its_epsilon() {
    let vars = VarMap::new();
    mlp(&vars);
    fill(&vars, 3, 1.0);
    let t = Time::new(0.0, &Device::Cpu);
    let z = normal(4, &[1, 3], DType::F64).broadcast_as((20_000, 3)).unwrap().contiguous().unwrap();
    let exact = trace_by_differences(&mlp(&vars), &z.narrow(0, 0, 1).unwrap())[0];
    for trace in [Trace::Rademacher, Trace::Gaussian] {
        let flow = LogDensity::new(mlp(&vars), trace);
        let estimates = values(&flow.divergence(&t, &z).unwrap().1);
        let mean = estimates.iter().sum::<f64>() / estimates.len() as f64;
        let variance = estimates.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / estimates.len() as f64;
        let error = (variance / estimates.len() as f64).sqrt();
        assert!((mean - exact).abs() < 4.0 * error, "{trace:?}: {mean} ± {error}, exact {exact}");
        assert_eq!(estimates, values(&flow.divergence(&t, &z).unwrap().1));
    }
    assert_ne!(Stream::next(), Stream::next());
}

#[test]
fn a_field_without_a_tangent_says_so() {
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
    let layers = candle_ode::ops::seq().add(candle_ode::ops::linear(3, 3, vb).unwrap()).add_fn(|x| x.tanh());
    let flow = LogDensity::new(layers, Trace::Exact);
    let error = flow.divergence(&Time::new(0.0, &Device::Cpu), &normal(1, &[2, 3], DType::F64)).unwrap_err();
    assert!(matches!(OdeError::from(error), OdeError::NoTangent { .. }));
}
