//! Inside a solve group norms between convolutions are part of their op: values and gradients are those of the same
//! layers one by one in F64, wherever the norms stand, whatever follows them, and in groups of every size.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::ops::{self, Activation, GroupNorm, Sequential, conv2d, conv2d_no_bias, group_norm, seq};
use candle_ode::prelude::*;
use common::against_f64::{self, *};
use common::*;

const EPS: f64 = 1e-5;

fn same() -> Conv2dConfig {
    Conv2dConfig { padding: 1, ..Default::default() }
}

/// Norm, activation, convolution, norm, activation, convolution, norm. A norm of single channels takes off what a bias
/// before it has added, whose gradient is zero: the convolutions have none.
fn block(
    vb: &VarBuilder,
    [outer, inner]: [usize; 2],
    groups: usize,
    then: Activation,
) -> candle_core::Result<Sequential> {
    let layers = seq().add(group_norm(1, outer, EPS, vb.pp("before"))?).add(then);
    let layers = layers.add(conv2d_no_bias(outer, inner, 3, same(), vb.pp("first"))?);
    let layers = layers.add(group_norm(groups, inner, EPS, vb.pp("between"))?).add(then);
    let layers = layers.add(conv2d_no_bias(inner, outer, 3, same(), vb.pp("second"))?);
    Ok(layers.add(group_norm(outer, outer, EPS, vb.pp("behind"))?))
}

/// A field of layers that grows slowly.
fn field<L: Module + 'static>(
    vars: &VarMap,
    build: impl Fn(VarBuilder<'static>) -> candle_core::Result<L> + Send + Sync + 'static,
) -> ModelField {
    let field = ModelField::new(vars, &Device::Cpu, build, |layers, _: &Time, y| layers.forward(y)).unwrap();
    fill(vars, 5, 0.5);
    field
}

/// What is normalised has no kinks, but slopes as steep as its spread is small.
const STEEP: f64 = 2.0;

#[test]
fn a_block_with_every_activation() {
    for then in ACTIVATIONS {
        let kinks = if matches!(then, Activation::Relu | Activation::Elu(-0.5)) { 30.0 } else { STEEP };
        for (channels, groups, size) in [([3, 6], 2, [5, 7]), ([16, 18], 3, [8, 6])] {
            let vars = VarMap::new();
            let field = field(&vars, move |vb| block(&vb, channels, groups, then));
            let y0 = start(2, &[3, channels[0], size[0], size[1]]);
            against_f64_within(kinks, &field, &vars, &y0, &format!("{then:?} {channels:?}"));
        }
    }
}

#[test]
fn groups_of_every_size() {
    for (channels, groups) in [(1, 1), (5, 1), (5, 5), (8, 4), (12, 2)] {
        let vars = VarMap::new();
        let field = field(&vars, move |vb| block(&vb, [3, channels], groups, Activation::Tanh));
        against_f64_within(STEEP, &field, &vars, &start(2, &[2, 3, 6, 7]), &format!("{groups} groups of {channels}"));
    }
}

/// Makes layers, one of them a norm that is given.
type Build = fn(VarBuilder<'static>, GroupNorm) -> candle_core::Result<Sequential>;

/// Layers in another order: norms before activations and behind them, twice, without parameters, on images that a
/// stride has made smaller.
#[test]
fn norms_anywhere() {
    let plain = || GroupNorm::plain(4, 2, EPS).unwrap();
    let cases: [(&str, Build); 5] = [
        ("without parameters", |vb, plain| {
            let layers = seq().add(conv2d(4, 4, 3, same(), vb.pp(0))?).add(plain).add(Activation::Silu);
            Ok(layers.add(conv2d(4, 4, 3, same(), vb.pp(1))?))
        }),
        ("twice", |vb, plain| {
            let layers = seq().add(conv2d(4, 4, 3, same(), vb.pp(0))?).add(plain);
            let layers = layers.add(group_norm(1, 4, EPS, vb.pp(1))?).add(Activation::Tanh);
            Ok(layers.add(group_norm(2, 4, EPS, vb.pp(2))?).add(Activation::Sin))
        }),
        ("behind activations", |vb, plain| {
            let layers = seq().add(conv2d(4, 4, 3, same(), vb.pp(0))?).add(Activation::Tanh).add(plain);
            let layers = layers.add(conv2d(4, 4, 3, same(), vb.pp(1))?).add(Activation::Gelu);
            Ok(layers.add(group_norm(2, 4, EPS, vb.pp(2))?).add(Activation::Softplus))
        }),
        ("of fewer pixels", |vb, plain| {
            let halved = Conv2dConfig { stride: 2, ..same() };
            let layers = seq().add(conv2d(4, 6, 3, halved, vb.pp(0))?).add(group_norm(3, 6, EPS, vb.pp(1))?);
            Ok(layers.add(Activation::Elu(1.0)).add(conv2d(6, 4, 3, same(), vb.pp(2))?).add(plain))
        }),
        ("without convolutions", |vb, plain| {
            Ok(seq().add(plain).add(Activation::Tanh).add(group_norm(1, 4, EPS, vb.pp(1))?).add(Activation::Silu))
        }),
    ];
    for (what, build) in cases {
        let vars = VarMap::new();
        // What is made of y is given to them, and something of what they make: Candle's graph leads through them.
        let eval = |layers: &Sequential, _: &Time, y: &Tensor| {
            let (z, (_, _, height, width)) = (layers.forward(&(y * 0.5)?)?, y.dims4()?);
            let (_, _, rows, columns) = z.dims4()?;
            z.pad_with_same(2, 0, height - rows)?.pad_with_same(3, 0, width - columns)? * 0.7
        };
        let field = ModelField::new(&vars, &Device::Cpu, move |vb| build(vb, plain()), eval).unwrap();
        fill(&vars, 5, 0.5);
        against_f64_within(STEEP, &field, &vars, &start(2, &[3, 4, 6, 5]), what);
    }
}

/// In a `Sequential` and called one by one: the same, but for rounding.
#[test]
fn one_op_is_layers_one_by_one() {
    let vars = VarMap::new();
    let together = field(&vars, |vb| block(&vb, [16, 18], 2, Activation::Silu));
    let build = |vb: VarBuilder<'static>| {
        let norms = [(1, 16, "before"), (2, 18, "between"), (16, 16, "behind")];
        let norms = norms.map(|(groups, channels, name)| group_norm(groups, channels, EPS, vb.pp(name)));
        let convolutions = [(16, 18, "first"), (18, 16, "second")];
        Ok((norms, convolutions.map(|(from, to, name)| conv2d_no_bias(from, to, 3, same(), vb.pp(name)))))
    };
    let eval =
        |(norms, convolutions): &([candle_core::Result<GroupNorm>; 3], [candle_core::Result<ops::Conv2d>; 2]),
         _: &Time,
         y: &Tensor| {
            let ([Ok(before), Ok(between), Ok(behind)], [Ok(first), Ok(second)]) = (norms, convolutions) else {
                candle_core::bail!("layers")
            };
            let y = first.forward(&Activation::Silu.forward(&before.forward(y)?)?)?;
            behind.forward(&second.forward(&Activation::Silu.forward(&between.forward(&y)?)?)?)
        };
    let apart = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    let y0 = start(2, &[3, 16, 8, 10]);
    for (precision, bound) in BOUNDS {
        let found = gradients(&ode(&together).precision(precision), &vars, &y0);
        compare(&found, &gradients(&ode(&apart).precision(precision), &vars, &y0), bound, &format!("{precision:?}"));
    }
}

#[test]
fn what_is_frozen_has_no_gradient_and_changes_no_other() {
    let vars = VarMap::new();
    let field = field(&vars, |vb| block(&vb, [3, 4], 2, Activation::Tanh));
    let y0 = start(2, &[2, 3, 6, 5]);
    frozen_changes_no_other(&field, &vars, &y0, &["before.weight", "between.bias", "behind.weight", "first.weight"]);
}

/// Norms whose weights stay in F32 while the field is in half precision.
#[test]
fn weights_in_f32() {
    let vars = VarMap::new();
    let field = field(&vars, |vb| block(&vb, [3, 6], 2, Activation::Silu));
    let field = field.keep_f32(|name| name.starts_with("be"));
    against_f64_within(STEEP, &field, &vars, &start(2, &[2, 3, 6, 5]), "weights in F32");
}

#[test]
fn scales_change_nothing() {
    let vars = VarMap::new();
    let field = field(&vars, |vb| block(&vb, [3, 4], 2, Activation::Silu));
    let y0 = start(2, &[2, 3, 6, 5]);
    against_f64::scales_change_nothing(&field, &vars, &y0);
}

/// A tile of images gives the bits that the whole batch gives.
#[test]
fn images_do_not_see_each_other() {
    for (channels, size) in [(3, [6, 5]), (16, [8, 10])] {
        let vars = VarMap::new();
        let field = field(&vars, move |vb| block(&vb, [channels, 16], 4, Activation::Gelu));
        samples_do_not_see_each_other(&field, &normal(2, &[3, channels, size[0], size[1]], DType::F32));
    }
}

/// NaN in a pixel reaches its group and, through a convolution, all that look at it; no other image.
#[test]
fn nan_passes() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'static>| {
            let convolution = conv2d(4, 4, 1, Conv2dConfig::default(), vb.pp(0))?;
            Ok(seq().add(group_norm(2, 4, EPS, vb.pp(1))?).add(Activation::Tanh).add(convolution))
        };
        let mut pixels = vec![0.0_f32; 2 * 4 * 3 * 3];
        pixels[12] = f32::NAN;
        let pixels = Tensor::from_vec(pixels, (2, 4, 3, 3), &Device::Cpu).unwrap();
        // A solve takes no NaN; the field says where they are.
        let eval = move |layers: &Sequential, _: &Time, y: &Tensor| {
            let z = layers.forward(&(y + pixels.to_dtype(y.dtype())?)?)?;
            z.ne(&z)?.to_dtype(y.dtype())
        };
        let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
        let y0 = normal(2, &[2, 4, 3, 3], DType::F32);
        let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(1).precision(Precision::new().compute(dtype));
        let change = (ode.solve(&y0).unwrap().last() - &y0).unwrap().round().unwrap();
        let of_image = |n: usize| values(&change.narrow(0, n, 1).unwrap());
        assert_eq!((of_image(0), of_image(1)), (vec![1.0; 36], vec![0.0; 36]), "{dtype:?}");
    }
}

/// Groups or channels that do not fit are what they are elsewhere: an error that tells the shapes.
#[test]
fn channels_must_fit() {
    let build = |vb: VarBuilder<'static>| {
        Ok(seq().add(conv2d(4, 4, 3, same(), vb.pp(0))?).add(group_norm(2, 6, EPS, vb.pp(1))?))
    };
    let field = field(&VarMap::new(), build);
    let error = ode(&field).solve(normal(2, &[2, 4, 5, 5], DType::F32)).unwrap_err();
    assert!(matches!(error, OdeError::Field { .. }) && format!("{error:?}").contains("[2, 4, 5, 5]"), "{error:?}");
}
