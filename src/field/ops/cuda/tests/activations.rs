//! Activations, with what comes in before and after them.

use super::{DTYPES, cast, element, run};
use crate::field::ops::Activation;
use crate::field::ops::cuda::arguments::Activate;
use crate::field::ops::cuda::host::{Buffer, Host};
use crate::field::ops::gradcheck::{ACTIVATIONS, distance, noise, values};
use candle_core::{DType, Device, Module, Tensor, Var};

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
                // The loops of the CPU have no limit at infinity for some derivatives.
                let same = got == exact || exact.is_nan() && (got.is_nan() || x.is_infinite());
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
