//! Each kernel through the op that uses it, against the CPU.

use super::gpu;
use crate::common::*;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::Conv2dConfig;
use candle_ode::ops::combine::{self, Finite};
use candle_ode::ops::{self, Activation, Conv2d, GroupNorm, LayerNorm, Linear, Planar};
use candle_ode::{Codec, Increment, Increments4, Increments8, Increments16, State};

/// Dtypes with kernels, and how far half precision may be off.
const DTYPES: [(DType, f64); 3] = [(DType::F32, 3e-6), (DType::F16, 2e-3), (DType::BF16, 1.5e-2)];

const ACTIVATIONS: [Activation; 10] = [
    Activation::Tanh,
    Activation::Sigmoid,
    Activation::Softplus,
    Activation::Silu,
    Activation::Gelu,
    Activation::Relu,
    Activation::Elu(0.7),
    Activation::Sin,
    Activation::Cos,
    Activation::LogCosh,
];

/// f and the gradients of Σ f · w at arguments in `dtype`, on the GPU and in F64 on the CPU.
fn against_cpu(
    gpu: &Device,
    dtype: DType,
    bound: f64,
    f: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    args: &[Tensor],
    what: &str,
) {
    let run = |dtype: DType, device: &Device, args: &[Tensor]| -> Result<Vec<Tensor>> {
        let place = |x: &Tensor| Var::from_tensor(&x.to_dtype(dtype)?.to_device(device)?);
        let vars = args.iter().map(place).collect::<Result<Vec<_>>>()?;
        let leaves: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let y = f(&leaves)?;
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let w = normal(99, y.dims(), DType::F32).to_device(device)?.to_dtype(wide)?;
        let grads = (y.to_dtype(wide)? * w)?.sum_all()?.backward()?;
        let mut all = vec![y];
        all.extend(leaves.iter().map(|leaf| grads.get(leaf).unwrap().clone()));
        all.iter().map(|x| x.to_device(&Device::Cpu)).collect()
    };
    let rounded: Vec<Tensor> = args.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
    let (got, exact) = (run(dtype, gpu, &rounded).unwrap(), run(DType::F64, &Device::Cpu, &rounded).unwrap());
    for (n, (got, exact)) in got.iter().zip(&exact).enumerate() {
        let off = relative(got, exact);
        assert!(off < bound, "{what} in {dtype:?}: tensor {n} is off by {off}");
    }
}

#[test]
fn activations_and_their_derivatives() {
    let Some(gpu) = gpu() else { return };
    for (dtype, bound) in DTYPES {
        for activation in ACTIVATIONS {
            for shape in [&[1][..], &[257], &[33, 65], &[3, 5, 7, 11]] {
                let args = [normal(1, shape, DType::F32), normal(2, shape, DType::F32)];
                let what = format!("{activation:?} of {shape:?}");
                against_cpu(&gpu, dtype, bound, &|args| activation.forward(&args[0]), &args[..1], &what);
                against_cpu(&gpu, dtype, 4.0 * bound, &|args| activation.push(&args[0], &args[1]), &args, &what);
            }
        }
    }
}

#[test]
fn linear_layers() {
    let Some(gpu) = gpu() else { return };
    for (dtype, bound) in DTYPES {
        for (rows, inputs, outputs) in
            [(1, 1, 1), (1, 300, 5), (7, 3, 1), (1000, 1, 33), (5000, 65, 130), (4096, 2, 64)]
        {
            let weight = (normal(2, &[outputs, inputs], DType::F32) / (inputs as f64).sqrt()).unwrap();
            let args = [normal(1, &[rows, inputs], DType::F32), weight, normal(3, &[outputs], DType::F32)];
            let what = format!("linear {rows}×{inputs}→{outputs}");
            let layer = |args: &[Tensor]| Linear::new(args[1].clone(), Some(args[2].clone())).forward(&args[0]);
            against_cpu(&gpu, dtype, bound, &layer, &args, &what);
            against_cpu(&gpu, dtype, bound, &|args| ops::affine(&args[0], &args[1], None), &args[..2], &what);
        }
    }
}

#[test]
fn biases_and_their_sums() {
    let Some(gpu) = gpu() else { return };
    for (dtype, bound) in DTYPES {
        for (shape, dim) in
            [(&[70_000, 3][..], 1), (&[5, 300], 1), (&[4, 3, 33, 35], 1), (&[2, 7, 5], 1), (&[9, 4, 6], 2)]
        {
            let args = [normal(1, shape, DType::F32), normal(2, &[shape[dim]], DType::F32)];
            let add = |args: &[Tensor]| ops::add_bias(&args[0], &args[1], dim);
            against_cpu(&gpu, dtype, bound, &add, &args, &format!("bias along {dim} of {shape:?}"));
        }
    }
}

#[test]
fn convolutions() {
    let Some(gpu) = gpu() else { return };
    let configs = [(1, 1, 1, 1), (0, 1, 1, 1), (1, 2, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2), (0, 3, 1, 4)];
    for ((padding, stride, dilation, groups), (dtype, bound)) in configs.iter().flat_map(|c| DTYPES.map(|d| (*c, d))) {
        let config = Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
        for (images, height, width) in [(1, 5, 5), (3, 6, 7), (2, 5, 8), (40, 33, 31)] {
            let weight = (normal(2, &[8, 4 / groups, 3, 3], DType::F32) / 6.0).unwrap();
            let args = [normal(1, &[images, 4, height, width], DType::F32), weight, normal(3, &[8], DType::F32)];
            let layer = |args: &[Tensor]| Conv2d::new(args[1].clone(), Some(args[2].clone()), config).forward(&args[0]);
            against_cpu(&gpu, dtype, 2.0 * bound, &layer, &args, &format!("{config:?} of {images}×{height}×{width}"));
        }
    }
}

/// Up to eight dimensions by kernels of ours, above by other ops.
#[test]
fn planar_units() {
    let Some(gpu) = gpu() else { return };
    for (dtype, bound) in DTYPES {
        for (rows, count, dim) in [(1, 1, 1), (1000, 128, 2), (70_000, 33, 3), (513, 64, 8), (300, 40, 9)] {
            let args = [
                normal(1, &[rows, dim], DType::F32),
                normal(2, &[count, dim], DType::F32),
                normal(3, &[count], DType::F32),
                normal(4, &[count, dim], DType::F32),
            ];
            for activation in [Activation::Tanh, Activation::Gelu] {
                let both = |args: &[Tensor]| {
                    let units = Planar::new(&args[1], &args[2], &args[3], activation)?;
                    let (f, divergence) = units.with_divergence(&args[0].t()?.contiguous()?.t()?)?;
                    Tensor::cat(&[f, divergence.unsqueeze(1)?], 1)
                };
                let what = format!("{count} units with {activation:?} at {rows}×{dim}");
                against_cpu(&gpu, dtype, 2.0 * bound, &both, &args, &what);
            }
        }
    }
}

#[test]
fn layer_norms() {
    let Some(gpu) = gpu() else { return };
    for (dtype, bound) in DTYPES {
        for (rows, size) in [(1, 7), (70_000, 33), (513, 512), (40, 2000)] {
            let [weight, bias] = [2, 3].map(|seed| normal(seed, &[size], DType::F32));
            let args = [normal(1, &[rows, size], DType::F32), weight, bias];
            let layer = |args: &[Tensor]| LayerNorm::new(args[1].clone(), args[2].clone(), 1e-5).forward(&args[0]);
            let in_f32 = |args: &[Tensor]| {
                let wide = if args[0].dtype() == DType::F64 { DType::F64 } else { DType::F32 };
                LayerNorm::new(args[1].to_dtype(wide)?, args[2].to_dtype(wide)?, 1e-5).forward(&args[0])
            };
            let strided = |args: &[Tensor]| {
                LayerNorm::new_no_bias(args[1].clone(), 1e-5).forward(&args[0].t()?.contiguous()?.t()?)
            };
            let rms = |args: &[Tensor]| LayerNorm::rms_norm(args[1].clone(), 1e-5).forward(&args[0]);
            let what = |name: &str| format!("{name} of {rows}×{size}");
            against_cpu(&gpu, dtype, 2.0 * bound, &layer, &args, &what("layer norm"));
            against_cpu(&gpu, dtype, 2.0 * bound, &in_f32, &args, &what("layer norm with parameters in F32"));
            against_cpu(&gpu, dtype, 2.0 * bound, &strided, &args[..2], &what("layer norm without bias"));
            against_cpu(&gpu, dtype, 2.0 * bound, &rms, &args[..2], &what("root-mean-square norm"));
        }
    }
}

#[test]
fn group_norms() {
    let Some(gpu) = gpu() else { return };
    for (dtype, bound) in DTYPES {
        for (shape, groups) in [(&[5, 6, 7, 9][..], 2), (&[3, 8, 65], 8), (&[2, 4, 70, 70], 1), (&[300, 12], 3)] {
            let parameters = [2, 3].map(|seed| normal(seed, &shape[1..2], DType::F32));
            let args = [normal(1, shape, DType::F32), parameters[0].clone(), parameters[1].clone()];
            let with = |args: &[Tensor]| {
                GroupNorm::new(args[1].clone(), args[2].clone(), shape[1], groups, 1e-5)?.forward(&args[0])
            };
            let plain = |args: &[Tensor]| GroupNorm::plain(shape[1], groups, 1e-5)?.forward(&args[0]);
            let what = format!("{groups} groups of {shape:?}");
            against_cpu(&gpu, dtype, 2.0 * bound, &with, &args, &what);
            against_cpu(&gpu, dtype, 2.0 * bound, &plain, &args[..1], &format!("{what} without parameters"));
        }
    }
}

#[test]
fn a_large_mean_costs_no_digits_of_a_norm() {
    let Some(gpu) = gpu() else { return };
    for size in [64, 2000] {
        let x = (normal(1, &[40, size], DType::F32) + 1000.0).unwrap();
        let args = [x, normal(2, &[size], DType::F32)];
        let layer = |args: &[Tensor]| LayerNorm::new_no_bias(args[1].clone(), 1e-5).forward(&args[0]);
        against_cpu(&gpu, DType::F32, 3e-6, &layer, &args, &format!("layer norm of 40×{size} about 1000"));
    }
}

#[test]
fn sums_in_mixed_dtypes() {
    let Some(gpu) = gpu() else { return };
    for count in [1, 255, 100_003] {
        for (of_base, of_terms, to) in [
            (DType::F32, DType::F16, DType::F32),
            (DType::F32, DType::BF16, DType::F16),
            (DType::BF16, DType::F32, DType::BF16),
            (DType::F64, DType::F32, DType::F32),
        ] {
            for length in [0, 1, 7, 16, 20] {
                let base = normal(1, &[count], of_base);
                let terms: Vec<Tensor> = (0..length).map(|n| normal(n + 2, &[count], of_terms)).collect();
                let sum = |device: &Device| {
                    let base = base.to_device(device).unwrap();
                    let terms: Vec<Tensor> = terms.iter().map(|x| x.to_device(device).unwrap()).collect();
                    let terms: Vec<(f64, &Tensor)> =
                        terms.iter().enumerate().map(|(n, x)| (0.3 - 0.1 * n as f64, x)).collect();
                    combine::combine(Some(&base), &terms, to).unwrap().to_device(&Device::Cpu).unwrap()
                };
                let bound = if to == DType::F32 { 1e-6 } else { 4e-3 };
                assert!(relative(&sum(&gpu), &sum(&Device::Cpu)) < bound, "{of_base:?} {of_terms:?} {to:?} {length}");
            }
        }
    }
}

#[test]
fn sums_in_place_and_what_is_not_finite() {
    let Some(gpu) = gpu() else { return };
    for (dtype, _) in DTYPES {
        for bad in [None, Some(f32::NAN), Some(f32::INFINITY)] {
            let mut numbers = values(&normal(1, &[70_001], DType::F32));
            if let Some(bad) = bad {
                numbers[69_999] = f64::from(bad);
            }
            let x = Tensor::new(numbers, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
            let mut sum = Tensor::ones(70_001, DType::F32, &gpu).unwrap();
            let flags = [combine::accumulate(&mut sum, 0.5, &x).unwrap(), combine::finite(&x).unwrap()];
            assert_eq!(Finite::read(&flags).unwrap(), [bad.is_none(); 2], "{dtype:?} {bad:?}");
            let largest = combine::max_abs(&x).unwrap();
            if bad.is_none() {
                let x = x.to_device(&Device::Cpu).unwrap();
                let exact = ((x.to_dtype(DType::F32).unwrap() * 0.5).unwrap() + 1.0).unwrap();
                assert!(relative(&sum.to_device(&Device::Cpu).unwrap(), &exact) < 1e-6);
                assert_eq!(largest, combine::max_abs(&x).unwrap());
            } else {
                assert!(!largest.is_finite());
            }
        }
    }
    let (copy, finite) = combine::rounded(&Tensor::new(&[1.0_f32, 7e4], &gpu).unwrap(), DType::F16).unwrap();
    assert_eq!((copy.dtype(), Finite::read(&[finite]).unwrap()), (DType::F16, vec![false]));
}

/// Codes, where they lead and what they mean, to the bits of the CPU where kernels of ours make them.
#[test]
fn increments() {
    let Some(gpu) = gpu() else { return };
    let codecs: [&dyn Codec; 3] = [&Increments16, &Increments8, &Increments4];
    for shape in [&[1][..], &[100_003], &[70_000, 3], &[64, 65], &[5, 3, 40, 41]] {
        let [before, step, left] =
            [(1, 1.0), (2, 1e-2), (3, 1e-4)].map(|(seed, size)| (normal(seed, shape, DType::F32) * size).unwrap());
        let states = [&before, &(&before + &step).unwrap(), &left];
        for (codec, keeps) in codecs.iter().flat_map(|codec| [(codec, false), (codec, true)]) {
            let on = |device: &Device| {
                // Views, which begin somewhere in their memory.
                let [before, after, left] = states.map(|x| {
                    let x = x.to_device(device).unwrap();
                    let (twice, rows) = (Tensor::cat(&[&x, &x], 0).unwrap(), x.dims()[0]);
                    State::from(twice.narrow(0, rows, rows).unwrap())
                });
                let residual = keeps.then_some(&left);
                let step = Increment { before: &before, after: &after, residual, dtype: DType::F32 };
                let led = codec.follow(&step).unwrap();
                assert_eq!(Finite::read(&[led.finite]).unwrap(), [true]);
                let meant = codec.decode(&led.entry, DType::F32).unwrap();
                let (entry, _) = codec.encode(&left).unwrap();
                let states = [led.next, led.residual, meant].map(|state| state[0].clone());
                let all = states.into_iter().chain(led.entry.tensors).chain(entry.tensors);
                all.map(|x| x.to_device(&Device::Cpu).unwrap()).collect::<Vec<_>>()
            };
            for (n, (got, wanted)) in on(&gpu).iter().zip(&on(&Device::Cpu)).enumerate() {
                assert_eq!((got.dtype(), got.dims()), (wanted.dtype(), wanted.dims()));
                let what = format!("{} of {shape:?}: tensor {n}", codec.name());
                if ops::cuda_kernels() {
                    assert_eq!(values(got), values(wanted), "{what}");
                } else if n < 3 {
                    // Numbers halfway between two codes may go to the other one: a step of at most 5e-2, in 7 of them.
                    let far = values(got).iter().zip(values(wanted)).any(|(got, wanted)| (got - wanted).abs() > 1e-2);
                    assert!(!far, "{what}");
                }
            }
            for bad in [f64::INFINITY, f64::NAN, -f64::NAN] {
                let mut all = values(&left);
                *all.last_mut().unwrap() = bad;
                let all = Tensor::new(all, &gpu).unwrap().reshape(shape).unwrap().to_dtype(DType::F32).unwrap();
                let (_, finite) = codec.encode(&State::from(all)).unwrap();
                assert_eq!(Finite::read(&[finite]).unwrap(), [false], "{bad}");
            }
        }
    }
}
