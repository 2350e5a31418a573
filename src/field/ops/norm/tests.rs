use super::super::gradcheck::{check, check_half, check_tangent, distance, gradients, noise, values};
use super::*;
use crate::field::gradients::Gradients;
use crate::field::sink;
use candle_core::{DType, Device, Var};

type Build = fn(&[Tensor]) -> Box<dyn NormLayer>;

trait NormLayer: Module + Tangent {}
impl<L: Module + Tangent> NormLayer for L {}

const EPS: f64 = 1e-5;

/// (name, shapes of x, number of parameters, shape of each, constructor)
fn all() -> Vec<(&'static str, Vec<Vec<usize>>, usize, Build)> {
    let (rows, images) = (
        vec![vec![6], vec![1, 6], vec![5, 6], vec![2, 3, 6], vec![2, 2, 2, 6]],
        vec![vec![3, 6, 4], vec![2, 6, 3, 2], vec![1, 6, 2, 2]],
    );
    vec![
        ("layer", rows.clone(), 2, |p| Box::new(LayerNorm::new(p[0].clone(), p[1].clone(), EPS))),
        ("layer without bias", rows.clone(), 1, |p| Box::new(LayerNorm::new_no_bias(p[0].clone(), EPS))),
        ("rms", rows, 1, |p| Box::new(LayerNorm::rms_norm(p[0].clone(), EPS))),
        ("group", images.clone(), 2, |p| Box::new(GroupNorm::new(p[0].clone(), p[1].clone(), 6, 2, EPS).unwrap())),
        ("instance", images.clone(), 2, |p| Box::new(GroupNorm::new(p[0].clone(), p[1].clone(), 6, 6, EPS).unwrap())),
        ("plain", images, 0, |_| Box::new(GroupNorm::plain(6, 3, EPS).unwrap())),
    ]
}

fn parameters(count: usize) -> Vec<Tensor> {
    (0..count).map(|n| (noise(&[6], 10 + n as u64) + 1.5).unwrap()).collect()
}

#[test]
fn gradients_match_finite_differences() {
    for (name, shapes, count, build) in all() {
        for shape in shapes {
            println!("{name} {shape:?}");
            let mut args = vec![noise(&shape, 1)];
            args.extend(parameters(count));
            check(&|args| build(&args[1..]).forward(&args[0]), &args);
        }
    }
    check(
        &|args| LayerNorm::new(args[1].clone(), args[2].clone(), EPS).forward(&args[0].t()?),
        &[noise(&[6, 5], 1), noise(&[6], 2), noise(&[6], 3)],
    );
}

#[test]
fn tangents_match_pullbacks_and_are_differentiable() {
    let t = Time::new(0.0, &Device::Cpu);
    for (_, shapes, count, build) in all() {
        for shape in shapes {
            let layer = build(&parameters(count));
            check_tangent(layer.as_ref(), &|args| layer.forward(&args[0]), &noise(&shape, 1));
            let mut args = vec![noise(&shape, 1), noise(&shape, 2)];
            args.extend(parameters(count.min(1)));
            let pushed = |args: &[Tensor]| {
                let bias = args.last().unwrap().clone();
                let layer = build(&[args[2..].to_vec(), vec![bias]].concat());
                Ok(layer.tangent(&t, &args[0], &args[1])?.1)
            };
            check(&pushed, &args);
        }
    }
}

#[test]
fn half_precision_is_right() {
    for (_, shapes, count, build) in all() {
        let mut args = vec![noise(shapes.last().unwrap(), 1)];
        args.extend(parameters(count));
        for (dtype, bound) in [(DType::F16, 2e-3), (DType::BF16, 1.2e-2)] {
            check_half(&|args| build(&args[1..]).forward(&args[0]), &args, dtype, bound);
        }
    }
}

#[test]
fn weights_may_be_f32_on_half_precision_input() {
    for dtype in [DType::F16, DType::BF16] {
        let x = noise(&[7, 6], 1).to_dtype(dtype).unwrap();
        let w = Var::from_tensor(&parameters(1)[0].to_dtype(DType::F32).unwrap()).unwrap();
        let norm = LayerNorm::new(w.as_tensor().clone(), w.zeros_like().unwrap(), EPS);
        let y = norm.forward(&x).unwrap();
        assert_eq!(y.dtype(), dtype);
        let grads = y.to_dtype(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&w).unwrap().dtype(), DType::F32);
        let exact = LayerNorm::new_no_bias(w.to_dtype(DType::F64).unwrap(), EPS);
        let exact = exact.forward(&x.to_dtype(DType::F64).unwrap()).unwrap();
        assert!(distance(&y, &exact) < if dtype == DType::F16 { 1e-3 } else { 8e-3 });
        let (_, pushed) = norm.tangent(&Time::new(0.0, &Device::Cpu), &x, &x).unwrap();
        assert_eq!(pushed.dtype(), dtype);
    }
}

#[test]
fn values_are_those_of_candle() {
    let (x, p) = (noise(&[5, 6], 1), parameters(2));
    let theirs = candle_nn::LayerNorm::new(p[0].clone(), p[1].clone(), EPS)
        .forward(&x.t().unwrap().contiguous().unwrap().t().unwrap());
    assert!(distance(&LayerNorm::new(p[0].clone(), p[1].clone(), EPS).forward(&x).unwrap(), &theirs.unwrap()) < 1e-14);
    let x = noise(&[2, 6, 3, 2], 1);
    let theirs = candle_nn::GroupNorm::new(p[0].clone(), p[1].clone(), 6, 2, EPS).unwrap().forward(&x).unwrap();
    let ours = GroupNorm::new(p[0].clone(), p[1].clone(), 6, 2, EPS).unwrap().forward(&x).unwrap();
    assert!(distance(&ours, &theirs) < 1e-14);
}

#[test]
fn statistics_survive_large_means_and_large_batches() {
    let x = ((noise(&[3, 512], 1) * 8.0).unwrap() + 1000.0).unwrap();
    let narrow = x.to_dtype(DType::F16).unwrap();
    let ones = Tensor::ones(512, DType::F16, &Device::Cpu).unwrap();
    let norm = LayerNorm::new(ones.clone(), ones.zeros_like().unwrap(), EPS);
    let y = norm.forward(&narrow).unwrap();
    let wide = LayerNorm::new_no_bias(ones.to_dtype(DType::F64).unwrap(), EPS);
    let exact = wide.forward(&narrow.to_dtype(DType::F64).unwrap()).unwrap();
    assert!(distance(&y, &exact) < 1e-3);
    let big = Tensor::full(half::f16::from_f32(60_000.0), (2, 512), &Device::Cpu).unwrap();
    assert!(values(&norm.forward(&big).unwrap()).iter().all(|v| v.abs() < 1e-2));

    let x = (noise(&[40, 512], 2) + 1000.0).unwrap();
    let [w, b] = [3, 4].map(|seed| noise(&[512], seed));
    let norm = |a: &[Tensor]| LayerNorm::new(a[1].clone(), a[2].clone(), EPS).forward(&a[0]);
    let single = [&x, &w, &b].map(|x| x.to_dtype(DType::F32).unwrap());
    let exact = [&single[0], &single[1], &single[2]].map(|x| x.to_dtype(DType::F64).unwrap());
    assert!(distance(&norm(&single).unwrap(), &norm(&exact).unwrap()) < 1e-6);
    let g = noise(&[40, 512], 5);
    let (got, exact) = (gradients(&norm, &single, &g.to_dtype(DType::F32).unwrap()), gradients(&norm, &exact, &g));
    assert!(got.iter().zip(&exact).all(|(got, exact)| distance(got, exact) < 2e-6));
    let pushed = |a: &[Tensor], v: &Tensor| {
        let norm = LayerNorm::new(a[1].clone(), a[2].clone(), EPS);
        norm.tangent(&Time::new(0.0, &Device::Cpu), &a[0], &v.to_dtype(a[0].dtype()).unwrap()).unwrap().1
    };
    let wide = single.clone().map(|x| x.to_dtype(DType::F64).unwrap());
    assert!(distance(&pushed(&single, &g), &pushed(&wide, &g)) < 2e-6);

    let rows = 50_000;
    let x =
        Tensor::new(&[1.0_f32, -1.0], &Device::Cpu).unwrap().repeat((rows, 1)).unwrap().to_dtype(DType::F16).unwrap();
    let w = Tensor::ones(2, DType::F16, &Device::Cpu).unwrap();
    let g = x.ones_like().unwrap();
    let f = |a: &[Tensor]| LayerNorm::new(a[1].clone(), a[2].clone(), 0.0).forward(&a[0]);
    let got = gradients(&f, &[x, w.clone(), w], &g);
    assert_eq!(values(&got[1]), [50_000.0, -50_000.0].map(|v: f64| half::f16::from_f64(v).to_f64()));
    assert_eq!(values(&got[2]), [half::f16::from_f64(50_000.0).to_f64(); 2]);
}

#[test]
fn an_open_sink_receives_f32_sums_and_candle_nothing() {
    let leaf = |x: Tensor| Var::from_tensor(&x.to_dtype(DType::F16).unwrap()).unwrap().as_tensor().clone();
    let [w, b] = [0, 1].map(|n| leaf(parameters(2).remove(n)));
    let x = leaf(noise(&[300, 6], 1));
    let y = LayerNorm::new(w.clone(), b.clone(), EPS).forward(&x).unwrap();
    let mut open = Gradients::new(2, DType::F32);
    open.bind(&[w.clone(), b.clone()]);
    let (grads, sums) = sink::open(open, || y.backward().unwrap());
    assert!(grads.get(&w).is_none() && grads.get(&b).is_none() && grads.get(&x).is_some());
    let sums = sums.into_sums();
    assert!(sums.iter().flatten().all(|sum| sum.dtype() == DType::F32 && sum.dims() == [6]));
    assert_eq!(values(sums[1].as_ref().unwrap()), [300.0; 6]);
}

#[test]
fn compositions_for_other_devices_agree() {
    let p = parameters(2);
    let x = noise(&[3, 6, 2, 2], 1);
    let g = noise(&[3, 6, 2, 2], 2);
    for groups in [1, 2, 6] {
        let layer = GroupNorm::new(p[0].clone(), p[1].clone(), 6, groups, EPS).unwrap();
        let norm = layer.op(&x).unwrap();
        let composed = composed::value(norm, &x, Some(&p[0]), Some(&p[1])).unwrap();
        assert!(distance(&composed, &layer.forward(&x).unwrap()) < 1e-14);
        let (for_x, sums) = kernel::pull_on_cpu(norm, &x, Some(&p[0]), &g).unwrap();
        let (for_x_too, sums_too) = composed::pull(norm, &x, Some(&p[0]), &g).unwrap();
        assert!(distance(&for_x_too, &for_x) < 1e-13 && distance(&sums_too, &sums) < 1e-13);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let p = parameters(2);
    assert!(LayerNorm::new_no_bias(p[0].clone(), EPS).forward(&noise(&[5, 7], 1)).is_err());
    assert!(GroupNorm::plain(6, 4, EPS).is_err() && GroupNorm::plain(6, 0, EPS).is_err());
    let group = GroupNorm::new(p[0].clone(), noise(&[5], 1), 6, 2, EPS).unwrap();
    assert!(group.forward(&noise(&[2, 6, 3], 1)).is_err());
    assert!(group.forward(&noise(&[6], 1)).is_err());
    let half = LayerNorm::new_no_bias(p[0].to_dtype(DType::F16).unwrap(), EPS);
    let error = OdeError::from(half.forward(&noise(&[5, 6], 1)).unwrap_err());
    assert!(matches!(error, OdeError::UnsupportedDType { dtype: DType::F16, .. }), "{error}");
}
