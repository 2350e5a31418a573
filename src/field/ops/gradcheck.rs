//! What the tests of the ops share: finite differences, dot products, half precision against F64.

use super::Activation;
use crate::Time;
use crate::field::Tangent;
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};

/// All of them, one with a negative parameter.
pub(super) const ACTIVATIONS: [Activation; 12] = [
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

pub(super) type Function<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Numbers in (−1, 1), the same for the same seed.
pub(super) fn noise(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let count = shape.iter().product::<usize>();
    let values: Vec<f64> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub(super) fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub(super) fn dot(a: &Tensor, b: &Tensor) -> f64 {
    values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum()
}

/// Largest difference over the largest value of `exact`.
pub(super) fn distance(got: &Tensor, exact: &Tensor) -> f64 {
    assert_eq!(got.dims(), exact.dims());
    let exact = values(exact);
    let size = exact.iter().fold(1e-30_f64, |m, v| m.max(v.abs()));
    let worst = |m: f64, (g, e): (f64, &f64)| if (g - e).is_nan() { f64::INFINITY } else { m.max((g - e).abs()) };
    values(got).into_iter().zip(&exact).fold(0.0, worst) / size
}

/// The gradients of Σ f(args) · w, w of the dtype of f, with respect to every argument.
pub(super) fn gradients(f: Function<'_>, args: &[Tensor], w: &Tensor) -> Vec<Tensor> {
    let vars: Vec<Var> = args.iter().map(|a| Var::from_tensor(a).unwrap()).collect();
    let leaves: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&leaves).unwrap();
    let wide = if y.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let loss = (y.to_dtype(wide).unwrap() * w.to_dtype(y.dtype()).unwrap().to_dtype(wide).unwrap()).unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    leaves.iter().map(|leaf| grads.get(leaf).cloned().unwrap_or_else(|| leaf.zeros_like().unwrap())).collect()
}

/// Compares the gradient of every argument with central differences in F64.
pub(super) fn check(f: Function<'_>, args: &[Tensor]) {
    let y = f(args).unwrap();
    let w = noise(y.dims(), 99);
    let exact = gradients(f, args, &w);
    let h = 1e-6;
    for (n, arg) in args.iter().enumerate() {
        assert_eq!(exact[n].dims(), arg.dims());
        let flat = values(arg);
        let at = |i: usize, delta: f64| {
            let mut moved = flat.clone();
            moved[i] += delta;
            let mut args = args.to_vec();
            args[n] = Tensor::from_vec(moved, arg.dims(), &Device::Cpu).unwrap();
            dot(&f(&args).unwrap(), &w)
        };
        let got = values(&exact[n]);
        let size = got.iter().fold(1.0_f64, |m, v| m.max(v.abs()));
        for i in (0..flat.len()).step_by((flat.len() / 40).max(1)) {
            let slope = (at(i, h) - at(i, -h)) / (2.0 * h);
            assert!(
                (slope - got[i]).abs() < 1e-7 * size,
                "argument {n}, element {i}: {} but differences say {slope}",
                got[i]
            );
        }
    }
}

/// Compares value and gradients in `dtype` with F64 at the same (rounded) arguments.
pub(super) fn check_half(f: Function<'_>, args: &[Tensor], dtype: DType, bound: f64) {
    let narrow: Vec<Tensor> = args.iter().map(|a| a.to_dtype(dtype).unwrap()).collect();
    let wide: Vec<Tensor> = narrow.iter().map(|a| a.to_dtype(DType::F64).unwrap()).collect();
    let (got, exact) = (f(&narrow).unwrap(), f(&wide).unwrap());
    assert_eq!(got.dtype(), dtype);
    assert!(distance(&got, &exact) < bound, "{dtype:?} value: {}", distance(&got, &exact));
    let w = noise(exact.dims(), 98).to_dtype(dtype).unwrap();
    let (got, exact) = (gradients(f, &narrow, &w), gradients(f, &wide, &w));
    for (n, (got, exact)) in got.iter().zip(&exact).enumerate() {
        assert_eq!(got.dtype(), dtype);
        assert!(distance(got, exact) < bound, "{dtype:?} gradient {n}: {}", distance(got, exact));
    }
}

/// ⟨J v, w⟩ = ⟨v, Jᵀ w⟩, and the value beside the tangent is the value.
pub(super) fn check_tangent(layer: &dyn Tangent, value: Function<'_>, y: &Tensor) {
    let t = Time::new(0.3, &Device::Cpu);
    let v = noise(y.dims(), 97);
    let (at, pushed) = layer.tangent(&t, y, &v).unwrap();
    let plain = value(std::slice::from_ref(y)).unwrap();
    assert!(distance(&at, &plain) < 1e-14);
    let w = noise(plain.dims(), 96);
    let pulled = gradients(value, std::slice::from_ref(y), &w).remove(0);
    let (left, right) = (dot(&pushed, &w), dot(&v, &pulled));
    assert!((left - right).abs() < 1e-11 * left.abs().max(1.0), "{left} and {right}");
}
