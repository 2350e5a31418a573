//! Inside a solve convolutions have kernels of their own: the values and gradients are those of the same convolutions
//! made of Candle's, in every dtype, for all sizes, strides and paddings, without bias, or with parts frozen.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use candle_ode::ops::{self, Activation, Conv2d, Timed};
use candle_ode::prelude::*;
use common::against_f64::{self, *};
use common::*;

fn config(stride: usize, padding: usize) -> Conv2dConfig {
    Conv2dConfig { stride, padding, ..Default::default() }
}

/// y ↦ Σ over the pixels of conv(y), spread over y again: a convolution of any stride in a field.
fn field(vars: &VarMap, [inputs, outputs, kernel]: [usize; 3], has_bias: bool, config: Conv2dConfig) -> ModelField {
    let build = move |vb: VarBuilder<'static>| {
        let weight = vb.get((outputs, inputs, kernel, kernel), "weight")?;
        let bias = if has_bias { Some(vb.get(outputs, "bias")?) } else { None };
        let back = vb.get((inputs, outputs, 1, 1), "back")?;
        Ok((Conv2d::new(weight, bias, config), Conv2d::new(back, None, Conv2dConfig::default())))
    };
    let scale = 1.0 / ((inputs * kernel * kernel) as f64).sqrt();
    let eval = move |(conv, back): &(Conv2d, Conv2d), _: &Time, y: &Tensor| {
        let (_, _, height, width) = y.dims4()?;
        let z = back.forward(&Activation::Tanh.forward(&(conv.forward(y)? * scale)?)?)?;
        let (_, _, rows, columns) = z.dims4()?;
        // As many pixels as y has, whatever the stride and the padding have made of them.
        let z = if rows < height { z.pad_with_same(2, 0, height - rows)? } else { z.narrow(2, 0, height)? };
        if columns < width { z.pad_with_same(3, 0, width - columns) } else { z.narrow(3, 0, width) }
    };
    let field = ModelField::new(vars, &Device::Cpu, build, eval).unwrap();
    fill(vars, 5, 0.5);
    field
}

#[test]
fn every_stride_padding_and_kernel() {
    for stride in [1, 2] {
        for padding in 0..=2 {
            for kernel in [1, 3, 5] {
                for size in [[5, 5], [6, 9], [7, 16]] {
                    let vars = VarMap::new();
                    let field = field(&vars, [3, 5, kernel], true, config(stride, padding));
                    let y0 = start(2, &[2, 3, size[0], size[1]]);
                    let what = format!("stride {stride}, padding {padding}, kernel {kernel}, {size:?}");
                    against_f64(&field, &vars, &y0, &what);
                }
            }
        }
    }
}

#[test]
fn every_number_of_channels_with_and_without_bias() {
    for (inputs, outputs) in [(1, 1), (1, 40), (40, 1), (2, 7), (16, 17), (32, 32), (33, 40)] {
        for has_bias in [true, false] {
            for stride in [1, 2] {
                let vars = VarMap::new();
                let field = field(&vars, [inputs, outputs, 3], has_bias, config(stride, 1));
                let what = format!("{inputs} to {outputs} channels, bias {has_bias}, stride {stride}");
                // The one sum of a single channel cancels for the most part.
                let cancels = if outputs == 1 { 5.0 } else { 1.0 };
                against_f64_within(cancels, &field, &vars, &start(2, &[3, inputs, 16, 17]), &what);
            }
        }
    }
}

/// Kernels of 3 × 3 over images of even sides, with enough channels to fill vectors, have an algorithm of their own.
#[test]
fn even_images_of_many_channels() {
    for (inputs, outputs) in [(16, 15), (16, 16), (17, 40), (32, 19)] {
        for padding in 0..=2 {
            for size in [[8, 8], [6, 18], [12, 10]] {
                let vars = VarMap::new();
                let field = field(&vars, [inputs, outputs, 3], padding != 1, config(1, padding));
                let what = format!("{inputs} to {outputs} channels, padding {padding}, {size:?}");
                against_f64(&field, &vars, &start(2, &[3, inputs, size[0], size[1]]), &what);
            }
        }
    }
}

/// One kernel over images of even and of odd sides.
#[test]
fn a_kernel_that_is_summed_in_two_ways() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| Ok(Conv2d::new(vb.get((16, 16, 3, 3), "weight")?, None, config(1, 1)));
    let eval = |conv: &Conv2d, _: &Time, y: &Tensor| {
        let odd = conv.forward(&y.narrow(3, 0, 9)?)?.pad_with_zeros(3, 0, 1)?;
        ((conv.forward(y)? + odd)? * 0.1)?.tanh()
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    fill(&vars, 5, 0.5);
    against_f64(&field, &vars, &start(2, &[2, 16, 8, 10]), "two ways");
}

/// A `Sequential` of them is one op, whatever the activations, with channels and widths that are odd or even.
#[test]
fn convolutions_one_after_another() {
    let activations = [Activation::Tanh, Activation::Silu, Activation::Sin, Activation::Elu(1.0), Activation::Identity];
    for (n, last) in activations.into_iter().enumerate() {
        for (stride, channels, size) in [(1, [3, 5], [5, 7]), (2, [4, 3], [7, 9]), (1, [16, 18], [8, 8])] {
            let inner = activations[(n + 1) % activations.len()];
            let build = move |vb: VarBuilder<'static>| {
                let layers = ops::seq().add(ops::conv2d(channels[0], channels[1], 3, config(stride, 1), vb.pp(0))?);
                let layers =
                    layers.add(inner).add(ops::conv2d_no_bias(channels[1], channels[0], 3, config(1, 1), vb.pp(1))?);
                Ok(layers.add(last))
            };
            // What is made of y is given to them, and something of what they make: Candle's graph leads through them.
            let eval = |layers: &ops::Sequential, _: &Time, y: &Tensor| {
                let (z, (_, _, height, width)) = (layers.forward(&(y * 0.5)?)?, y.dims4()?);
                let (_, _, rows, columns) = z.dims4()?;
                let z = z.pad_with_same(2, 0, height - rows)?.pad_with_same(3, 0, width - columns)?;
                z * 0.7
            };
            let vars = VarMap::new();
            let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
            fill(&vars, 5, 0.4);
            let what = format!("{inner:?}, {last:?}, stride {stride}, {channels:?}");
            against_f64(&field, &vars, &start(2, &[3, channels[0], size[0], size[1]]), &what);
        }
    }
}

/// The time is one more channel, in frames whose pixels have room for it and in others, and is zero in the padding.
#[test]
fn convolutions_of_the_time() {
    for (channels, size) in [([3, 4], [5, 7]), ([4, 3], [6, 6]), ([15, 16], [8, 6]), ([16, 18], [8, 8])] {
        for (stride, padding) in [(1, 1), (2, 1), (1, 0), (1, 2)] {
            let build = move |vb: VarBuilder<'static>| {
                let first = ops::concat_conv2d(channels[0], channels[1], 3, config(stride, padding), vb.pp(0))?;
                let layers = ops::seq().add_timed(first).add(Activation::Tanh);
                let second = ops::concat_conv2d(channels[1], channels[0], 3, config(1, 1), vb.pp(1))?;
                Ok(layers.add_timed(second).add(Activation::Silu))
            };
            let eval = |layers: &ops::Sequential, t: &Time, y: &Tensor| {
                let (z, (_, _, height, width)) = (layers.forward_at(t, y)?, y.dims4()?);
                let (_, _, rows, columns) = z.dims4()?;
                let z = if rows < height { z.pad_with_same(2, 0, height - rows)? } else { z.narrow(2, 0, height)? };
                if columns < width { z.pad_with_same(3, 0, width - columns) } else { z.narrow(3, 0, width) }
            };
            let vars = VarMap::new();
            let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
            fill(&vars, 5, 0.4);
            let what = format!("stride {stride}, padding {padding}, {channels:?}");
            against_f64(&field, &vars, &start(2, &[3, channels[0], size[0], size[1]]), &what);
        }
    }
}

/// Convolutions of images that nothing tracks have gradients of their parameters all the same.
#[test]
fn convolutions_of_what_is_given() {
    let build = |vb: VarBuilder<'static>| {
        let layers = ops::seq().add(ops::conv2d(3, 4, 3, config(1, 1), vb.pp(0))?).add(Activation::Tanh);
        Ok(layers.add(ops::conv2d(4, 3, 3, config(1, 1), vb.pp(1))?))
    };
    let given = normal(4, &[2, 3, 6, 5], DType::F64);
    let eval = move |layers: &ops::Sequential, _: &Time, y: &Tensor| {
        layers.forward(&given.to_dtype(y.dtype())?)?.mul(y)?.tanh()
    };
    let vars = VarMap::new();
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    fill(&vars, 5, 0.5);
    against_f64(&field, &vars, &start(2, &[2, 3, 6, 5]), "given images");
}

#[test]
fn settings_without_kernels_are_right_too() {
    for config in [
        Conv2dConfig { dilation: 2, padding: 2, ..Default::default() },
        Conv2dConfig { stride: 3, ..Default::default() },
    ] {
        let vars = VarMap::new();
        let field = field(&vars, [3, 4, 3], true, config);
        against_f64(&field, &vars, &start(2, &[2, 3, 8, 7]), &format!("{config:?}"));
    }
}

#[test]
fn oblong_kernels_and_turned_images() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| Ok(Conv2d::new(vb.get((3, 3, 1, 3), "weight")?, None, config(1, 1)));
    let eval =
        |conv: &Conv2d, _: &Time, y: &Tensor| conv.forward(&y.transpose(2, 3)?)?.narrow(2, 1, 6)?.transpose(2, 3);
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    fill(&vars, 5, 0.5);
    against_f64(&field, &vars, &start(2, &[2, 3, 7, 6]), "a kernel of one row");
}

#[test]
fn what_is_frozen_has_no_gradient_and_changes_no_other() {
    let vars = VarMap::new();
    let field = field(&vars, [3, 4, 3], true, config(1, 1));
    let y0 = start(2, &[2, 3, 6, 5]);
    frozen_changes_no_other(&field, &vars, &y0, &["weight", "bias", "back"]);
}

#[test]
fn scales_change_nothing() {
    let vars = VarMap::new();
    let field = field(&vars, [3, 4, 3], true, config(2, 1));
    let y0 = start(2, &[2, 3, 6, 5]);
    against_f64::scales_change_nothing(&field, &vars, &y0);
}

/// A tile of images gives the bits that the whole batch gives.
#[test]
fn images_do_not_see_each_other() {
    for (channels, size) in [(3, [6, 5]), (16, [8, 10])] {
        let vars = VarMap::new();
        let field = field(&vars, [channels, 16, 3], true, config(1, 1));
        samples_do_not_see_each_other(&field, &normal(2, &[3, channels, size[0], size[1]], DType::F32));
    }
}

/// NaN in a pixel reaches the pixels around it, in its image, and no others.
#[test]
fn nan_passes() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'static>| ops::conv2d(2, 2, 3, config(1, 1), vb);
        let mut pixels = vec![0.0_f32; 2 * 2 * 5 * 5];
        pixels[12] = f32::NAN;
        let pixels = Tensor::from_vec(pixels, (2, 2, 5, 5), &Device::Cpu).unwrap();
        // A solve takes no NaN; the field says where they are.
        let eval = move |conv: &Conv2d, _: &Time, y: &Tensor| {
            let z = conv.forward(&(y + pixels.to_dtype(y.dtype())?)?)?;
            z.ne(&z)?.to_dtype(y.dtype())
        };
        let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
        let y0 = Tensor::zeros((2, 2, 5, 5), DType::F32, &Device::Cpu).unwrap();
        let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(1).precision(Precision::new().compute(dtype));
        let solution = ode.solve(&y0).unwrap();
        let nan: Vec<usize> = (0..100).filter(|&n| values(solution.last())[n] == 1.0).collect();
        let around: Vec<usize> =
            [0, 25].iter().flat_map(|c| [6, 7, 8, 11, 12, 13, 16, 17, 18].map(|n| c + n)).collect();
        assert_eq!(nan, around, "{dtype:?}");
    }
}

/// A kernel made by another layer is reached through Candle's graph.
#[test]
fn kernels_from_elsewhere_keep_their_gradients() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| ops::linear(1, 36, vb.pp("hyper"));
    let eval = |hyper: &ops::Linear, t: &Time, y: &Tensor| {
        let kernel = hyper.forward(&t.like(y)?.reshape((1, 1))?)?.reshape((2, 2, 3, 3))?;
        Conv2d::new(kernel, None, config(1, 1)).forward(y)
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    fill(&vars, 5, 0.2);
    against_f64(&field, &vars, &start(2, &[2, 2, 5, 4]), "a hypernetwork");
}
