use super::super::gradcheck::{ACTIVATIONS, check, check_half, check_tangent, distance, noise, values};
use super::in_place::Keeps;
use super::*;
use candle_core::{DType, Device, Var};
use proptest::prelude::*;

fn spread(shape: &[usize]) -> Tensor {
    (noise(shape, 1) * 4.0).unwrap()
}

/// From libm, and from formulas that lose nothing where they are used.
fn exact(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid if x < 0.0 => x.exp() / (1.0 + x.exp()),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        Activation::Silu => x * exact(Activation::Sigmoid, x),
        Activation::Gelu => 0.5 * x * candle_core::cpu::erf::erfc_f64(-x / std::f64::consts::SQRT_2),
        Activation::Relu => x.max(0.0),
        Activation::Elu(alpha) if x < 0.0 => alpha * x.exp_m1(),
        Activation::Sin => x.sin(),
        Activation::Cos => x.cos(),
        Activation::LogCosh if x.abs() < 1.0 => (2.0 * (0.5 * x).sinh().powi(2)).ln_1p(),
        Activation::LogCosh => x.abs() + (-2.0 * x.abs()).exp().ln_1p() - std::f64::consts::LN_2,
        _ => x,
    }
}

fn worst_ulp(activation: Activation, xs: Vec<f32>) -> (f64, f32) {
    let x = Tensor::new(xs.as_slice(), &Device::Cpu).unwrap();
    let got = activation.forward(&x).unwrap().to_vec1::<f32>().unwrap();
    let mut worst = (0.0, 0.0);
    for (&x, got) in xs.iter().zip(got) {
        let exact = exact(activation, f64::from(x));
        let near = (exact as f32).abs().max(f32::MIN_POSITIVE);
        let ulp = f64::from(near.next_up()) - f64::from(near);
        let error = (f64::from(got) - exact).abs() / ulp;
        if error > worst.0 {
            worst = (error, x);
        }
    }
    worst
}

#[test]
fn f32_values_are_within_five_ulp() {
    for activation in ACTIVATIONS {
        let even = (-1_000_000..=1_000_000).map(|n| n as f32 * 2e-5);
        // Every exponent, both signs: 2^-149 to 2^7 in steps of 1/64 of an octave.
        let octaves = (-149 * 64..7 * 64).flat_map(|n| [1.0, -1.0].map(|sign| sign * (n as f32 / 64.0).exp2()));
        let (error, x) = worst_ulp(activation, even.chain(octaves).collect());
        println!("{activation:?}: {error:.2} ulp at {x:e}");
        assert!(error <= 5.0, "{activation:?}: {error} ulp at {x:e}");
    }
}

#[test]
fn f64_values_have_the_digits_of_f64_at_zero_too() {
    let xs = [0.0, -0.0, 1e-12, -1e-12, 0.3, -2.5, 4.0];
    let x = Tensor::new(&xs, &Device::Cpu).unwrap();
    for activation in ACTIVATIONS {
        for (x, got) in xs.iter().zip(values(&activation.forward(&x).unwrap())) {
            let exact = exact(activation, *x);
            assert!((got - exact).abs() < 1e-14, "{activation:?}({x}) = {got}, not {exact}");
        }
    }
    let slope = |activation: Activation| values(&activation.derivative(&x).unwrap())[0];
    assert_eq!((slope(Activation::Sin), slope(Activation::Cos)), (1.0, -0.0));
}

#[test]
fn in_place_gives_the_values_of_the_ops_and_the_derivatives_of_what_is_kept() {
    let xs: Vec<f32> = (-3000..=3000).map(|n| n as f32 * 4e-3).chain([0.0, -0.0, 1e-40, 1e30, -1e30, 2e6]).collect();
    let x = Tensor::new(xs.as_slice(), &Device::Cpu).unwrap();
    for activation in ACTIVATIONS.into_iter().chain([Activation::Elu(0.0)]) {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let mut y = xs.clone();
        activation.value_in_place(&mut y);
        assert_eq!(bits(&y), bits(&activation.forward(&x).unwrap().to_vec1::<f32>().unwrap()), "{activation:?}");
        let mut slopes = match activation.keeps() {
            Keeps::Nothing | Keeps::Value => y,
            Keeps::Input => xs.clone(),
        };
        let mut curvatures = slopes.clone();
        activation.slope_in_place(&mut slopes);
        let exact = activation.derivative(&x).unwrap().to_vec1::<f32>().unwrap();
        for ((x, slope), exact) in xs.iter().zip(slopes).zip(exact) {
            assert!((slope - exact).abs() <= 3e-7, "{activation:?}′({x}) = {slope}, not {exact}");
        }
        if activation.keeps() != Keeps::Nothing {
            activation.curvature_in_place(&mut curvatures);
            let exact = super::scaled(activation, 2, &x, &[]).unwrap().to_vec1::<f32>().unwrap();
            for ((x, curvature), exact) in xs.iter().zip(curvatures).zip(exact) {
                assert!((curvature - exact).abs() <= 6e-7, "{activation:?}″({x}) = {curvature}, not {exact}");
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for activation in ACTIVATIONS {
        for shape in [&[7][..], &[3, 5], &[2, 3, 4], &[2, 2, 3, 2]] {
            check(&|args| activation.forward(&args[0]), &[spread(shape)]);
        }
    }
}

#[test]
fn tangents_match_pullbacks() {
    for activation in ACTIVATIONS {
        check_tangent(&activation, &|args| activation.forward(&args[0]), &spread(&[5, 3]));
    }
}

#[test]
fn tangents_and_derivatives_are_differentiable() {
    for activation in ACTIVATIONS {
        check(&|args| activation.push(&args[0], &args[1]), &[spread(&[4, 3]), noise(&[4, 3], 2)]);
        check(&|args| activation.derivative(&args[0]) + &args[0], &[spread(&[4, 3])]);
    }
}

#[test]
fn half_precision_is_right_to_its_last_place() {
    for activation in ACTIVATIONS {
        for (dtype, bound) in [(DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            check_half(&|args| activation.forward(&args[0]), &[spread(&[33, 17])], dtype, bound);
            check_half(&|a| activation.push(&a[0], &a[1]), &[spread(&[9, 7]), noise(&[9, 7], 3)], dtype, bound);
        }
    }
}

#[test]
fn every_f16_is_rounded_once() {
    let all: Vec<half::f16> = (0..=u16::MAX).map(half::f16::from_bits).filter(|x| x.is_finite()).collect();
    let x = Tensor::new(all.as_slice(), &Device::Cpu).unwrap();
    for activation in [Activation::Tanh, Activation::Softplus, Activation::Silu, Activation::Gelu, Activation::LogCosh]
    {
        let got = activation.forward(&x).unwrap().to_vec1::<half::f16>().unwrap();
        for (x, got) in all.iter().zip(got) {
            let exact = exact(activation, x.to_f64());
            let (below, above) = (f64::from(exact as f32).next_down(), f64::from(exact as f32).next_up());
            let near = [below, exact, above].map(|v| half::f16::from_f64(v).to_f64());
            // Half a unit of the last place, of a subnormal too, and what F32 adds to it.
            let half_unit = (exact.abs() * 2.0_f64.powi(-11)).max(2.0_f64.powi(-25)) * 1.001;
            assert!(
                near.contains(&got.to_f64()) || (got.to_f64() - exact).abs() <= half_unit,
                "{activation:?}({x}) = {got}, not {exact}"
            );
        }
    }
}

#[test]
fn extremes_stay_finite() {
    let ends = [0.0, -0.0, 1e-40, 1.0, 50.0, 88.0, 104.0, 1e4, 1e10, 1e30, 3e38];
    let xs: Vec<f32> = ends.iter().flat_map(|&x| [x, -x]).collect();
    for dtype in [DType::F32, DType::F64] {
        let x = Var::from_tensor(&Tensor::new(xs.as_slice(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()).unwrap();
        for activation in ACTIVATIONS {
            let y = activation.forward(&x).unwrap();
            let slope = activation.derivative(&x).unwrap();
            let grad = (y.clone() + slope.clone()).unwrap().backward().unwrap().get(&x).unwrap().clone();
            for result in [y, slope, grad] {
                assert!(
                    values(&result).iter().all(|v| v.is_finite()),
                    "{activation:?} {dtype:?}: {:?}",
                    values(&result)
                );
            }
        }
    }
    let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
    for activation in ACTIVATIONS {
        assert!(values(&activation.forward(&nan).unwrap())[0].is_nan(), "{activation:?}");
    }
}

#[test]
fn infinities_become_the_limits_and_zeros_keep_their_sign() {
    let infinity = f32::INFINITY;
    for (activation, below, above) in [
        (Activation::Tanh, -1.0, 1.0),
        (Activation::Sigmoid, 0.0, 1.0),
        (Activation::Softplus, 0.0, infinity),
        (Activation::Silu, -0.0, infinity),
        (Activation::Gelu, -0.0, infinity),
        (Activation::Relu, 0.0, infinity),
        (Activation::Elu(0.7), -0.7, infinity),
        (Activation::LogCosh, infinity, infinity),
    ] {
        let mut ends = [-infinity, infinity];
        activation.value_in_place(&mut ends);
        assert_eq!(ends, [below, above], "{activation:?}");
    }
    for activation in [Activation::Tanh, Activation::Silu, Activation::Gelu, Activation::Sin, Activation::Identity] {
        let mut zeros = [-0.0, 0.0];
        activation.value_in_place(&mut zeros);
        assert_eq!(zeros.map(f32::to_bits), [-0.0_f32, 0.0].map(f32::to_bits), "{activation:?}");
    }
}

#[test]
fn compositions_for_other_devices_agree() {
    for dtype in [DType::F32, DType::F64] {
        let x =
            Tensor::cat(&[spread(&[500]), (noise(&[100], 5) * 1e-3).unwrap(), (noise(&[100], 6) * 90.0).unwrap()], 0);
        let x = x.unwrap().to_dtype(dtype).unwrap();
        let v = noise(&[700], 7).to_dtype(dtype).unwrap();
        let bound = if dtype == DType::F32 { 2e-6 } else { 1e-13 };
        for activation in ACTIVATIONS {
            for order in 0..3 {
                let fused = scaled(activation, order, &x, &[&v]).unwrap();
                let composed = composed::scaled(activation, order, &x, &[&v]).unwrap();
                assert!(distance(&composed, &fused) < bound, "{activation:?} {order}: {}", distance(&composed, &fused));
            }
        }
    }
}

#[test]
fn strides_do_not_matter() {
    let x = spread(&[6, 5, 4]);
    let strided = x.transpose(0, 2).unwrap().narrow(1, 1, 3).unwrap();
    let dense = strided.contiguous().unwrap();
    for activation in ACTIVATIONS {
        let (a, b) = (activation.forward(&strided).unwrap(), activation.forward(&dense).unwrap());
        assert_eq!(values(&a), values(&b));
        check(&|args| activation.forward(&args[0].t()?), &[spread(&[3, 4])]);
    }
}

#[test]
fn integers_are_refused_by_name() {
    let x = Tensor::new(&[1_u32], &Device::Cpu).unwrap();
    let error = tanh(&x).unwrap_err().to_string();
    assert!(error.contains("tanh") && error.contains("U32"), "{error}");
}

proptest! {
    /// An element's value does not depend on its neighbours or its place, so tiles cannot change results.
    #[test]
    fn place_does_not_matter(x in proptest::collection::vec(-2e6_f32..2e6, 1..600), at in 0_usize..600) {
        let at = at % x.len();
        let tensor = Tensor::new(x.as_slice(), &Device::Cpu).unwrap();
        for activation in ACTIVATIONS {
            let all = activation.forward(&tensor).unwrap().to_vec1::<f32>().unwrap();
            let one = activation.forward(&tensor.narrow(0, at, 1).unwrap()).unwrap().to_vec1::<f32>().unwrap();
            prop_assert_eq!(all[at].to_bits(), one[0].to_bits());
        }
    }
}
