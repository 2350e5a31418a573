//! Linear layers with their pullbacks, and sums over a batch.

use super::{DTYPES, cast, element, single};
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::cuda::host::{Buffer, Host};
use crate::field::ops::cuda::layer::{Layer, Pull};
use crate::field::ops::cuda::sums::{Sum, add_channels};
use crate::field::ops::gradcheck::{distance, noise, values};
use crate::field::ops::{Activation, affine};
use candle_core::{D, DType, Device, Module, Tensor, Var};

/// A layer's value and pullback, with and without a scale that is known on the device alone.
#[test]
fn layers_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    let sizes = [(5, 3, 4), (1, 7, 1), (37, 1, 33), (600, 4, 2), (65, 2, 70)];
    for ((rows, inputs, outputs), (dtype, bound)) in sizes.iter().flat_map(|s| DTYPES.map(|d| (*s, d))) {
        for (activation, time, by) in
            [(Activation::Tanh, None, false), (Activation::Gelu, Some(0.7), true), (Activation::Identity, None, true)]
        {
            let pitch = inputs + usize::from(time.is_some());
            let scale = if by { 8.0 } else { 1.0 };
            let x = cast(&noise(&[rows, inputs], 1), dtype);
            let weight = cast(&(noise(&[outputs, pitch], 2) / (inputs as f64).sqrt()).unwrap(), dtype);
            let (bias, grad) = (cast(&noise(&[outputs], 3), dtype), cast(&noise(&[rows, outputs], 4), dtype));
            let buffers = [&x, &weight, &bias, &grad].map(Buffer::of);
            let out = || Buffer::new(rows * outputs * dtype.size_in_bytes());
            let (z, y, for_x) = (out(), out(), Buffer::new(rows * inputs * dtype.size_in_bytes()));
            let layer = Layer {
                element: element(dtype),
                rows,
                inputs,
                outputs,
                weight: buffers[1].at(),
                pitch,
                bias: (buffers[2].at(), dtype == DType::F32),
                time,
                then: activation,
            };
            // What was in the sums stays in them.
            let before = noise(&[outputs, pitch], 5);
            let (for_weight, for_bias) =
                (Buffer::of(&cast(&before, DType::F32)), Buffer::of(&single(&[0.5; 1], outputs)));
            let (inverse, flag) = (Buffer::of(&single(&[1.0 / scale], 1)), Buffer::of(&single(&[0.0], 1)));
            let sum =
                |at: &Buffer| Sum { at: at.at(), factor: 1.0, by: if by { inverse.at() } else { 0 }, flag: flag.at() };
            // SAFETY: the buffers have the shapes that the layer says.
            unsafe { layer.value(&host, buffers[0].at(), z.at(), y.at()) }.unwrap();
            let pull = Pull {
                x: buffers[0].at(),
                grad: buffers[3].at(),
                kept: if activation.keeps() == Keeps::Input { z.at() } else { y.at() },
                for_x: for_x.at(),
                for_weight: Some(sum(&for_weight)),
                for_bias: Some(sum(&for_bias)),
            };
            // SAFETY: as above.
            unsafe { layer.pull(&host, &pull) }.unwrap();

            let wide = |x: &Tensor| Var::from_tensor(&cast(x, DType::F64)).unwrap();
            let (x, weight, bias) = (wide(&x), wide(&weight), wide(&bias));
            let input = match time {
                Some(t) => {
                    let t = Tensor::full(f64::from(t), (rows, 1), &Device::Cpu).unwrap();
                    Tensor::cat(&[x.as_tensor(), &t], D::Minus1).unwrap()
                }
                None => x.as_tensor().clone(),
            };
            let exact = activation.forward(&affine(&input, &weight, Some(bias.as_tensor())).unwrap()).unwrap();
            let label = format!("{dtype:?} {activation:?} {rows}x{inputs}x{outputs}");
            assert!(distance(&y.tensor(dtype, &[rows, outputs]), &exact) < bound, "{label}");
            let grads = (&exact * cast(&grad, DType::F64)).unwrap().sum_all().unwrap().backward().unwrap();
            assert!(distance(&for_x.tensor(dtype, &[rows, inputs]), grads.get(&x).unwrap()) < 4.0 * bound, "{label}");
            let of_weight =
                (for_weight.tensor(DType::F32, &[outputs, pitch]).to_dtype(DType::F64).unwrap() - before).unwrap();
            let exact = (grads.get(&weight).unwrap() / scale).unwrap();
            assert!(distance(&of_weight, &exact) < 6.0 * bound, "{label}: {}", distance(&of_weight, &exact));
            let of_bias = (for_bias.tensor(DType::F32, &[outputs]) - 0.5).unwrap();
            let exact = (grads.get(&bias).unwrap() / scale).unwrap();
            assert!(distance(&of_bias, &exact) < 6.0 * bound, "{label}: {}", distance(&of_bias, &exact));
            assert_eq!(values(&flag.tensor(DType::F32, &[1])), [0.0]);
        }
    }
}

#[test]
fn sums_over_channels_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    for (dtype, _) in DTYPES {
        for (rows, channels, inner) in [(1, 1, 1), (5000, 1, 1), (70, 300, 1), (33, 3, 7), (5, 2, 400), (9, 1, 3000)] {
            let x = cast(&noise(&[rows, channels, inner], 1), dtype);
            let exact = cast(&x, DType::F64).sum((0, 2)).unwrap();
            let (from, sum) = (Buffer::of(&x), Buffer::of(&single(&[0.0], channels)));
            let sizes = (rows as u32, channels as u32, inner as u32);
            // SAFETY: the buffers have these shapes.
            unsafe { add_channels(&host, element(dtype), from.at(), sizes, Sum::plain(sum.at())) }.unwrap();
            let got = sum.tensor(DType::F32, &[channels]);
            assert!(distance(&got, &exact) < 1e-5, "{dtype:?} {rows} {channels} {inner}");
        }
    }
}
