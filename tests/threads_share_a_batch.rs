//! A batch that is not cut into tiles: its layers share their products among threads, and no bit changes.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::ops::{Activation, Mlp, conv2d, group_norm, seq};
use candle_ode::prelude::*;
use common::{bits, fill, sorted, variable};

/// The bits of y(T), dL/dy0 and each dL/dθ for L = Σ y(T)².
fn trained(ode: &Ode, vars: &VarMap, y0: &Var) -> Vec<Vec<u64>> {
    let solution = ode.solve(y0.as_tensor()).unwrap();
    assert_eq!(solution.tiles(), 1);
    let grads = solution.last().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let parameters: Vec<Tensor> = sorted(vars).values().map(|var| grads.get(var).unwrap().clone()).collect();
    let all = [solution.last(), grads.get(y0).unwrap()].into_iter().chain(&parameters);
    all.map(bits).collect()
}

/// With one thread, with several, and by default.
fn no_bit_changes(name: &str, field: &ModelField, vars: &VarMap, y0: &Var) {
    fill(vars, 1, 1.0);
    let check = |what: &str, ode: &Ode, threads: &[usize]| {
        let alone = trained(&ode.clone().threads(1), vars, y0);
        for threads in threads {
            assert!(alone == trained(&ode.clone().threads(*threads), vars, y0), "{name}, {what}, {threads} threads");
        }
        assert!(alone == trained(ode, vars, y0), "{name}, {what}, by default");
    };
    for precision in [Precision::F32, Precision::BF16, Precision::F16] {
        let what = format!("{:?}", precision.compute_dtype());
        check(&what, &Ode::new(field).solver(Midpoint).span(0.0, 1.0).steps(1).precision(precision), &[2, 5]);
    }
    check("adaptive", &Ode::new(field).solver(Bosh3).span(0.0, 0.1).tolerances(1e-1, 1e-1), &[3]);
}

fn mlp(sizes: &'static [usize], activation: Activation, rows: usize) {
    let vars = VarMap::new();
    let build = move |vb: VarBuilder<'static>| Mlp::new(sizes, activation, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y)).unwrap();
    no_bit_changes(&format!("{sizes:?}"), &field, &vars, &variable(9, &[rows, sizes[0]], DType::F32));
}

#[test]
fn layers_with_features_in_the_lanes() {
    mlp(&[64, 200, 64], Activation::Tanh, 1333);
    mlp(&[48, 257, 48], Activation::Gelu, 1301);
}

#[test]
fn layers_with_the_batch_in_the_lanes() {
    mlp(&[2, 130, 2], Activation::Tanh, 30_001);
    mlp(&[3, 64, 64, 3], Activation::Silu, 9000);
    mlp(&[4, 150, 4], Activation::Relu, 30_000);
}

fn convolutions(sizes: [usize; 3], images: &[usize]) {
    let vars = VarMap::new();
    let config = Conv2dConfig { padding: 1, ..Default::default() };
    let [first, hidden, last] = sizes;
    let build = move |vb: VarBuilder<'static>| {
        let first = conv2d(first, hidden, 3, config, vb.pp(0))?;
        Ok(seq().add(first).add(Activation::Tanh).add(conv2d(hidden, last, 3, config, vb.pp(1))?))
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, |m, _: &Time, y| m.forward(y)).unwrap();
    no_bit_changes(&format!("{sizes:?}"), &field, &vars, &variable(9, images, DType::F32));
}

/// Filtered in F32 and F16.
#[test]
fn convolutions_of_many_channels() {
    convolutions([32, 64, 32], &[7, 32, 30, 26]);
}

#[test]
fn convolutions_of_few_channels() {
    convolutions([8, 64, 8], &[13, 8, 35, 41]);
}

#[test]
fn norms_between_convolutions() {
    let vars = VarMap::new();
    let build = move |vb: VarBuilder<'static>| {
        let layers = seq().add(group_norm(4, 64, 1e-5, vb.pp(0))?);
        let layers = layers.add(conv2d(64, 64, 1, Conv2dConfig::default(), vb.pp(1))?);
        Ok(layers.add(group_norm(16, 64, 1e-5, vb.pp(2))?).add(Activation::Silu))
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, |m, _: &Time, y| m.forward(y)).unwrap();
    // Enough elements for three threads, which take 19, 20 and 20 images.
    no_bit_changes("norms", &field, &vars, &variable(9, &[59, 64, 28, 30], DType::F32));
}
