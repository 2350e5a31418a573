//! Linear layers against differences, wide arithmetic and Candle's own.

use super::super::gradcheck::{check, check_half, check_tangent, distance, gradients, noise, values};
use super::*;
use crate::field::gradients::Gradients;
use crate::field::sink;
use candle_core::{Device, Var};
use proptest::prelude::*;

fn with_bias(args: &[Tensor]) -> Result<Tensor> {
    affine(&args[0], &args[1], Some(&args[2]))
}

#[test]
fn gradients_match_finite_differences() {
    for shape in [&[3][..], &[1, 3], &[5, 3], &[2, 5, 3], &[2, 2, 2, 3]] {
        check(&with_bias, &[noise(shape, 1), noise(&[4, 3], 2), noise(&[4], 3)]);
        check(&|args| affine(&args[0], &args[1], None), &[noise(shape, 1), noise(&[4, 3], 2)]);
    }
    check(&with_bias, &[noise(&[6, 1], 1), noise(&[1, 1], 2), noise(&[1], 3)]);
}

#[test]
fn strides_do_not_matter() {
    let args = [noise(&[3, 5], 1), noise(&[3, 4], 2), noise(&[4], 3)];
    check(&|args| affine(&args[0].t()?, &args[1].t()?, Some(&args[2])), &args);
    let x = noise(&[2, 7, 3], 1).narrow(1, 2, 4).unwrap().transpose(0, 1).unwrap();
    let (w, b) = (noise(&[4, 3], 2), noise(&[4], 3));
    let got = affine(&x, &w, Some(&b)).unwrap();
    assert_eq!(values(&got), values(&affine(&x.contiguous().unwrap(), &w, Some(&b)).unwrap()));
}

#[test]
fn tangents_match_pullbacks_and_are_differentiable() {
    let layer = Linear::new(noise(&[4, 3], 2), Some(noise(&[4], 3)));
    check_tangent(&layer, &|args| layer.forward(&args[0]), &noise(&[5, 3], 1));
    let t = Time::new(0.0, &Device::Cpu);
    let pushed = |args: &[Tensor]| Ok(Linear::new(args[0].clone(), None).tangent(&t, &args[1], &args[1])?.1);
    check(&pushed, &[noise(&[4, 3], 2), noise(&[5, 3], 1)]);
}

/// One row, one column or one input: where Candle accumulates in F16 and loses 42 % at k = 16384.
#[test]
fn half_precision_is_right_for_thin_products() {
    for (dtype, bound) in [(DType::F16, 1.5e-3), (DType::BF16, 1.2e-2)] {
        for (rows, inputs, outputs) in [(1, 16384, 1), (1, 16384, 5), (7, 16384, 1), (16384, 1, 1), (9, 1, 4096)] {
            let args = [noise(&[rows, inputs], 1), noise(&[outputs, inputs], 2), noise(&[outputs], 3)];
            let positive: Vec<Tensor> = args.iter().map(|a| (a * 0.01).unwrap().abs().unwrap()).collect();
            check_half(&with_bias, &positive, dtype, bound);
            check_half(&with_bias, &args, dtype, 4.0 * bound);
        }
        let args = [noise(&[33, 65], 1), noise(&[17, 65], 2), noise(&[17], 3)];
        check_half(&with_bias, &args, dtype, bound);
    }
}

#[test]
fn sums_over_the_batch_do_not_stop_at_2048() {
    for dtype in [DType::F16, DType::BF16] {
        let rows = 60_000;
        let x = Tensor::ones((rows, 2), dtype, &Device::Cpu).unwrap();
        let w = Tensor::ones((3, 2), dtype, &Device::Cpu).unwrap();
        let b = Tensor::ones(3, dtype, &Device::Cpu).unwrap();
        let g = Tensor::ones((rows, 3), dtype, &Device::Cpu).unwrap();
        let got = gradients(&with_bias, &[x, w, b], &g);
        for sums in &got[1..] {
            assert!(values(sums).iter().all(|v| (v - 60_000.0).abs() <= 60_000.0 / 256.0), "{dtype:?} {sums}");
        }
    }
}

#[test]
fn an_open_sink_receives_f32_sums_and_candle_nothing() {
    let leaf = |x: Tensor| Var::from_tensor(&x.to_dtype(DType::F16).unwrap()).unwrap().as_tensor().clone();
    let (w, b) = (leaf(noise(&[3, 2], 1)), leaf(noise(&[3], 2)));
    let x = leaf(Tensor::ones((70_000, 2), DType::F32, &Device::Cpu).unwrap());
    let y = affine(&x, &w, Some(&b)).unwrap();
    let mut open = Gradients::new(2, DType::F32);
    open.bind(&[w.clone(), b.clone()]);
    let (grads, sums) = sink::open(open, || y.backward().unwrap());
    assert!(grads.get(&w).is_none() && grads.get(&b).is_none() && grads.get(&x).is_some());
    for (leaf, sum) in [&w, &b].into_iter().zip(sums.into_sums()) {
        let sum = sum.unwrap();
        assert_eq!((sum.dtype(), sum.dims()), (DType::F32, leaf.dims()));
        assert!(values(&sum).iter().all(|&v| v == 70_000.0), "{sum}");
    }
}

#[test]
fn compositions_for_other_devices_agree() {
    for (dtype, bound) in [(DType::F64, 1e-15), (DType::F32, 1e-6), (DType::F16, 1e-3)] {
        let [x, w, b] = [noise(&[2, 5, 3], 1), noise(&[4, 3], 2), noise(&[4], 3)].map(|a| a.to_dtype(dtype).unwrap());
        let fused = affine(&x, &w, Some(&b)).unwrap();
        assert!(distance(&composed(&x, &w, Some(&b), 3).unwrap(), &fused) <= bound);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (x, w, b) = (noise(&[5, 3], 1), noise(&[4, 3], 2), noise(&[4], 3));
    assert!(affine(&noise(&[5, 2], 1), &w, None).is_err());
    assert!(affine(&x, &w, Some(&noise(&[5], 1))).is_err());
    assert!(affine(&noise(&[], 1), &w, None).is_err());
    let f32 = |a: &Tensor| a.to_dtype(DType::F32).unwrap();
    let error = OdeError::from(affine(&x, &f32(&w), None).unwrap_err());
    assert!(matches!(error, OdeError::UnsupportedDType { dtype: DType::F32, .. }), "{error}");
    assert!(affine(&x, &w, Some(&f32(&b))).is_err());
    let f16 = |a: &Tensor| a.to_dtype(DType::F16).unwrap();
    assert_eq!(affine(&f16(&x), &f16(&w), Some(&f32(&b))).unwrap().dtype(), DType::F16);
}

proptest! {
    #[test]
    fn it_equals_the_definition(rows in 1_usize..9, inputs in 1_usize..9, outputs in 1_usize..9, seed in 0_u64..1000) {
        let (x, w, b) = (noise(&[rows, inputs], seed), noise(&[outputs, inputs], seed + 1), noise(&[outputs], seed + 2));
        let got = values(&affine(&x, &w, Some(&b)).unwrap());
        let (x, w, b) = (values(&x), values(&w), values(&b));
        for r in 0..rows {
            for o in 0..outputs {
                let exact = b[o] + (0..inputs).map(|i| x[r * inputs + i] * w[o * inputs + i]).sum::<f64>();
                prop_assert!((got[r * outputs + o] - exact).abs() < 1e-13);
            }
        }
    }
}
