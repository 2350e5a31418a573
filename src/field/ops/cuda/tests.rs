//! Every kernel, and what is launched for every op, on the host against the loops of the CPU.

use super::arguments::{Activate, AddRows, Arguments, Combine, Element, Launch, Look, PowerOfTwo, Term, Windows};
use super::convolution::Convolution;
use super::host::{Buffer, Host};
use super::layer::{Layer, Pull};
use super::machine::Machine;
use super::sums::{Sum, add_channels};
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::gradcheck::{distance, noise, values};
use crate::field::ops::{Activation, affine, combine};
use candle_core::{D, DType, Device, Module, Tensor, Var};
use candle_nn::Conv2dConfig;

const DTYPES: [(DType, f64); 3] = [(DType::F32, 2e-6), (DType::F16, 2e-3), (DType::BF16, 1.5e-2)];
const ACTIVATIONS: [Activation; 12] = [
    Activation::Tanh,
    Activation::Sigmoid,
    Activation::Softplus,
    Activation::Silu,
    Activation::Gelu,
    Activation::Relu,
    Activation::Elu(0.7),
    Activation::Elu(-0.3),
    Activation::Sin,
    Activation::Cos,
    Activation::LogCosh,
    Activation::Identity,
];

fn element(dtype: DType) -> Element {
    Element::of(dtype).unwrap()
}

fn run<A: Arguments>(host: &Host, launch: &Launch<A>) {
    // SAFETY: the tests hand over buffers of the shapes that they say.
    unsafe { host.launch(launch) }.unwrap();
}

fn cast(x: &Tensor, dtype: DType) -> Tensor {
    x.to_dtype(dtype).unwrap()
}

/// Every number of F16, every 7919th of F32, and back.
#[test]
fn numbers_are_rounded_as_everywhere() {
    let Some(host) = Host::new() else { return };
    let convert = |x: &Tensor, to: DType| {
        let (from, y) = (Buffer::of(x), Buffer::new(x.elem_count() * to.size_in_bytes()));
        let term = Term { x: from.at(), element: element(x.dtype()) as i32, c: 1.0 };
        run(&host, &combination(&[term], 0, y.at(), x.elem_count(), to).launch());
        y.tensor(to, &[x.elem_count()])
    };
    let bits = |x: &Tensor| Buffer::of(x).tensor(x.dtype(), &[x.elem_count()]).to_dtype(DType::F64).unwrap();
    let halves: Vec<half::f16> = (0..=u16::MAX).map(half::f16::from_bits).filter(|x| !x.is_nan()).collect();
    let halves = Tensor::new(halves, &Device::Cpu).unwrap();
    let singles: Vec<f32> = (0..=u32::MAX).step_by(7919).map(f32::from_bits).filter(|x| !x.is_nan()).collect();
    let singles = Tensor::new(singles, &Device::Cpu).unwrap();
    assert_eq!(values(&convert(&halves, DType::F32)), values(&bits(&halves)));
    for to in [DType::F16, DType::BF16] {
        assert_eq!(values(&convert(&singles, to)), values(&cast(&singles, to)), "{to:?}");
    }
    let wide = cast(&singles, DType::BF16);
    assert_eq!(values(&convert(&wide, DType::F32)), values(&wide));
    for dtype in [DType::F16, DType::BF16] {
        let nan = Tensor::new(f32::NAN, &Device::Cpu).unwrap().reshape(1).unwrap();
        assert!(values(&convert(&nan, dtype))[0].is_nan());
    }
}

/// y = f⁽ⁿ⁾(x) · v, against the loops of the CPU.
#[test]
fn activations_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    let mut points: Vec<f32> = values(&noise(&[700], 1)).iter().map(|x| 6.0 * *x as f32).collect();
    points.extend([0.0, -0.0, 1e-6, -1e-6, 30.0, -30.0, 90.0, -90.0, 300.0, -300.0, 2e4, -2e4]);
    points.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
    for (dtype, bound) in DTYPES {
        let x = cast(&Tensor::new(points.as_slice(), &Device::Cpu).unwrap(), dtype);
        let count = points.len();
        for (activation, order) in ACTIVATIONS.iter().flat_map(|f| (0..3).map(move |order| (*f, order))) {
            let (from, y) = (Buffer::of(&x), Buffer::new(count * 4));
            run(&host, &Activate::new((activation, order), from.at(), y.at(), count as u32).launch(element(dtype)));
            let got = values(&y.tensor(dtype, &[count]));
            let exact = derivative(activation, order, &cast(&x, DType::F64));
            for ((x, got), exact) in points.iter().zip(got).zip(values(&exact)) {
                let same = got == exact || got.is_nan() && exact.is_nan();
                // Near a zero of f the error is that of its terms.
                let close = (got - exact).abs() <= bound * exact.abs().max(0.02);
                assert!(same || close, "{activation:?} order {order} {dtype:?} at {x}: {got} and {exact}");
            }
        }
    }
}

/// f⁽ⁿ⁾(x) by the loops of the CPU.
fn derivative(activation: Activation, order: u32, x: &Tensor) -> Tensor {
    match order {
        0 => activation.forward(x).unwrap(),
        1 => activation.derivative(x).unwrap(),
        _ if activation == Activation::Identity => x.zeros_like().unwrap(),
        _ => {
            let x = Var::from_tensor(x).unwrap();
            let slope = activation.derivative(x.as_tensor()).unwrap();
            slope.backward().unwrap().get(&x).unwrap().clone()
        }
    }
}

#[test]
fn bias_time_and_factors_come_in_where_they_belong() {
    let Some(host) = Host::new() else { return };
    for (dtype, bound) in DTYPES {
        for (rows, channels, inner) in [(3, 5, 1), (2, 3, 7), (300, 1, 1), (1, 4, 1)] {
            let shape = [rows, channels, inner];
            let [x, v, w] = [1, 2, 3].map(|seed| cast(&noise(&shape, seed), dtype));
            let (bias, weight) = (noise(&[channels], 4), cast(&noise(&[channels, 3], 5), dtype));
            for bias in [cast(&bias, dtype), cast(&bias, DType::F32)] {
                let buffers = [&x, &v, &w, &bias, &weight].map(Buffer::of);
                let (z, y) = (Buffer::new(x.elem_count() * 4), Buffer::new(x.elem_count() * 4));
                let mut call = Activate::new((Activation::Silu, 0), buffers[0].at(), y.at(), x.elem_count() as u32);
                (call.channels, call.inner, call.z) = (channels as u32, inner as u32, z.at());
                (call.v, call.w, call.bias) = (buffers[1].at(), buffers[2].at(), buffers[3].at());
                call.bias_is_f32 = i32::from(bias.dtype() == DType::F32);
                (call.beyond, call.pitch, call.t) = (buffers[4].at() + 2 * dtype.size_in_bytes() as u64, 3, 0.3);
                run(&host, &call.launch(element(dtype)));
                let wide = |x: &Tensor| cast(x, DType::F64);
                let column = (wide(&weight.narrow(1, 2, 1).unwrap().flatten_all().unwrap()) * 0.3).unwrap();
                let shift = (wide(&bias) + column).unwrap().reshape((channels, 1)).unwrap();
                let exact_z = wide(&x).broadcast_add(&shift).unwrap();
                let exact = ((Activation::Silu.forward(&exact_z).unwrap() * wide(&v)).unwrap() * wide(&w)).unwrap();
                assert!(distance(&z.tensor(dtype, &shape), &exact_z) < bound);
                assert!(distance(&y.tensor(dtype, &shape), &exact) < 2.0 * bound, "{dtype:?} {shape:?}");
            }
        }
    }
}

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

/// `count` numbers in F32: those of `pattern`, again and again.
fn single(pattern: &[f64], count: usize) -> Tensor {
    let values: Vec<f32> = pattern.iter().cycle().take(count).map(|x| *x as f32).collect();
    Tensor::new(values, &Device::Cpu).unwrap()
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

#[test]
fn convolutions_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    let configs = [(1, 1, 1, 1), (0, 1, 1, 1), (1, 2, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2), (0, 3, 1, 4), (3, 2, 2, 2)];
    for ((padding, stride, dilation, groups), (dtype, bound)) in configs.iter().flat_map(|c| DTYPES.map(|d| (*c, d))) {
        for (height, width, kernel) in [(5, 5, (3, 3)), (6, 7, (3, 2)), (5, 8, (1, 3)), (9, 6, (3, 3))] {
            let (images, channels, outputs) = (5, 4, 8);
            let config = Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            let x = cast(&noise(&[images, channels, height, width], 1), dtype);
            let weight = cast(&noise(&[outputs, channels / groups, kernel.0, kernel.1], 2), dtype);
            let wide = |x: &Tensor| Var::from_tensor(&cast(x, DType::F64)).unwrap();
            let (exact_x, exact_weight) = (wide(&x), wide(&weight));
            let layer = crate::ops::Conv2d::new(exact_weight.as_tensor().clone(), None, config);
            let exact = layer.forward(&exact_x).unwrap();
            let (_, _, out_height, out_width) = exact.dims4().unwrap();
            let grad = cast(&noise(exact.dims(), 3), dtype);
            let convolution = Convolution {
                element: element(dtype),
                windows: Windows {
                    from: 0,
                    to: 0,
                    images: images as u32,
                    channels: channels as u32,
                    height: height as u32,
                    width: width as u32,
                    kernel_height: kernel.0 as u32,
                    kernel_width: kernel.1 as u32,
                    out_height: out_height as u32,
                    out_width: out_width as u32,
                    step: stride as u32,
                    padding: padding as u32,
                    dilation: dilation as u32,
                },
                outputs,
                groups,
            };
            let buffers = [&x, &weight, &grad].map(Buffer::of);
            let (y, for_x) = (Buffer::new(exact.elem_count() * 4), Buffer::new(x.elem_count() * 4));
            let for_weight = Buffer::of(&single(&[0.0], weight.elem_count()));
            // SAFETY: the buffers have the shapes that the convolution says.
            unsafe {
                convolution.value(&host, buffers[0].at(), buffers[1].at(), y.at()).unwrap();
                convolution.pull_input(&host, buffers[2].at(), buffers[1].at(), for_x.at()).unwrap();
                let sum = Sum::plain(for_weight.at());
                convolution.pull_weight(&host, buffers[0].at(), buffers[2].at(), sum).unwrap();
            }
            let grads = (&exact * cast(&grad, DType::F64)).unwrap().sum_all().unwrap().backward().unwrap();
            let label = format!("{config:?} {height}x{width} {kernel:?} {dtype:?}");
            let near = |got: Tensor, exact: &Tensor, bound: f64| assert!(distance(&got, exact) < bound, "{label}");
            near(y.tensor(dtype, exact.dims()), &exact, bound);
            near(for_x.tensor(dtype, x.dims()), grads.get(&exact_x).unwrap(), 2.0 * bound);
            near(for_weight.tensor(DType::F32, weight.dims()), grads.get(&exact_weight).unwrap(), 2e-6);
        }
    }
}

fn combination(terms: &[Term], base: u64, y: u64, count: usize, to: DType) -> Combine {
    let mut all = [Term { x: 0, element: 0, c: 0.0 }; Combine::TERMS];
    all[..terms.len()].copy_from_slice(terms);
    let (count, length, element) = (count as u32, terms.len() as i32, element(to) as i32);
    Combine { terms: all, base, by: 0, y, flag: 0, count, length, base_element: 0, element }
}

#[test]
fn combinations_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    let count = 1000;
    for (to, of_terms, length) in [
        (DType::F32, DType::F32, 1),
        (DType::F16, DType::F16, 4),
        (DType::BF16, DType::F16, 16),
        (DType::F32, DType::BF16, 7),
    ] {
        let base = cast(&noise(&[count], 1), DType::F32);
        let terms: Vec<(f64, Tensor)> =
            (0..length).map(|n| (0.1 * n as f64 - 0.35, cast(&noise(&[count], n as u64 + 2), of_terms))).collect();
        let borrowed: Vec<(f64, &Tensor)> = terms.iter().map(|(c, x)| (*c, x)).collect();
        let (from, base_at) = (terms.iter().map(|(_, x)| Buffer::of(x)).collect::<Vec<_>>(), Buffer::of(&base));
        let described = |(from, (c, x)): (&Buffer, &(f64, Tensor))| Term {
            x: from.at(),
            element: element(x.dtype()) as i32,
            c: *c as f32,
        };
        let described: Vec<Term> = from.iter().zip(&terms).map(described).collect();
        let (y, flag) = (Buffer::new(count * 4), Buffer::of(&single(&[0.0], 1)));
        let call = Combine { flag: flag.at(), ..combination(&described, base_at.at(), y.at(), count, to) };
        run(&host, &call.launch());
        let exact = combine::combine(Some(&base), &borrowed, to).unwrap();
        let got = y.tensor(to, &[count]);
        assert!(distance(&got, &exact) < 2e-7 || values(&got) == values(&exact), "{to:?}");
        assert_eq!(values(&flag.tensor(DType::F32, &[1])), [0.0]);

        let (factor, without) = (Buffer::of(&single(&[0.25], 1)), Buffer::new(count * 4));
        let call = Combine { by: factor.at(), ..combination(&described, 0, without.at(), count, DType::F32) };
        run(&host, &call.launch());
        let exact = (combine::combine(None, &borrowed, DType::F32).unwrap() * 0.25).unwrap();
        assert!(distance(&without.tensor(DType::F32, &[count]), &exact) < 1e-6);
    }
}

#[test]
fn what_is_not_finite_is_found_wherever_it_is() {
    let Some(host) = Host::new() else { return };
    for (dtype, _) in DTYPES {
        for (at, bad) in [(0, f32::NAN), (699, f32::INFINITY), (300, f32::NEG_INFINITY), (700, 0.0)] {
            let mut numbers: Vec<f32> = (0..700).map(|n| n as f32 - 690.0).collect();
            if let Some(number) = numbers.get_mut(at) {
                *number = bad;
            }
            let x = cast(&Tensor::new(numbers, &Device::Cpu).unwrap(), dtype);
            let [flag, largest, of_sum, of_copy] = [(); 4].map(|()| Buffer::of(&single(&[0.0], 1)));
            let (from, sum, copy) = (Buffer::of(&x), Buffer::of(&single(&[0.0], 700)), Buffer::new(2800));
            let look = Look { x: from.at(), result: flag.at(), count: 700, element: element(dtype) as i32 };
            run(&host, &look.find_non_finite());
            run(&host, &Look { result: largest.at(), ..look }.max_abs());
            let add = AddRows { flag: of_sum.at(), ..AddRows::new(from.at(), sum.at(), (1, 700)) };
            run(&host, &add.launch(element(dtype)));
            let term = Term { x: from.at(), element: element(dtype) as i32, c: 1.0 };
            let call = combination(&[term], 0, copy.at(), 700, dtype);
            run(&host, &Combine { flag: of_copy.at(), ..call }.launch());
            for flag in [flag, of_sum, of_copy] {
                assert_eq!(values(&flag.tensor(DType::F32, &[1]))[0].is_nan(), at < 700, "{dtype:?} {bad}");
            }
            let largest = values(&largest.tensor(DType::F32, &[1]))[0];
            match bad {
                0.0 => assert_eq!(largest, values(&x)[0].abs()),
                bad if bad.is_nan() => assert!(largest.is_nan()),
                _ => assert_eq!(largest, f64::INFINITY),
            }
        }
    }
    // What overflows when it is rounded is found too.
    let x = Buffer::of(&single(&[7e4], 1));
    let (flag, y) = (Buffer::of(&single(&[0.0], 1)), Buffer::new(2));
    let call = combination(&[Term { x: x.at(), element: 0, c: 1.0 }], 0, y.at(), 1, DType::F16);
    run(&host, &Combine { flag: flag.at(), ..call }.launch());
    assert!(values(&flag.tensor(DType::F32, &[1]))[0].is_nan());
}

#[test]
fn the_scale_is_the_one_on_the_cpu() {
    let Some(host) = Host::new() else { return };
    let sizes =
        [1e-38, 1e-30, 3.1e-9, 0.5, 0.500001, 0.75, 1.0, 1.0000001, 6e4, 3e20, f32::MAX, 0.0, f32::NAN, f32::INFINITY];
    for (m, headroom) in sizes.iter().flat_map(|m| [(*m, 0), (*m, 3)]) {
        let [largest, scale, inverse] = [f64::from(m), 0.0, 0.0].map(|x| Buffer::of(&single(&[x], 1)));
        let call = PowerOfTwo {
            largest: largest.at(),
            scale: scale.at(),
            inverse: inverse.at(),
            headroom,
            lowest: crate::scaling::LOWEST,
            highest: crate::scaling::HIGHEST,
        };
        run(&host, &call.launch());
        let exact = crate::scaling::power_below(f64::from(m), headroom) as f32;
        let [scale, inverse] = [scale, inverse].map(|x| values(&x.tensor(DType::F32, &[1]))[0] as f32);
        assert_eq!((scale, inverse), (exact, 1.0 / exact), "{m} {headroom}");
    }
}
