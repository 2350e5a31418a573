//! Normalisations and their pullback.

use super::{DTYPES, cast, element, run};
use crate::field::ops::cuda::arguments::NormGroups;
use crate::field::ops::cuda::host::{Buffer, Host};
use crate::field::ops::gradcheck::{distance, noise};
use crate::field::ops::norm::{Groups, Norm};
use candle_core::{DType, Tensor, Var};

/// Whether the mean is removed.
const CENTRED: bool = true;
const RMS: bool = false;

/// (samples, groups of each, channels of a group, elements of a channel)
type Sizes = (usize, usize, usize, usize);

/// w and b of `per_sample · channels` elements, either of which may be missing.
type Parameters = [Option<Tensor>; 2];

fn norm(remove_mean: bool, (_, per_sample, channels, inner): Sizes) -> Norm {
    Norm { name: "norm", groups: Groups { per_sample, channels, inner }, remove_mean, eps: 1e-2 }
}

fn parameters(given: [bool; 2], (_, per_sample, channels, _): Sizes, dtype: DType) -> Parameters {
    let of = |shift: f64, seed| cast(&(noise(&[per_sample * channels], seed) + shift).unwrap(), dtype);
    [given[0].then(|| of(1.5, 2)), given[1].then(|| of(0.0, 3))]
}

/// Compares value and pullback with those of the CPU in F64, for values that may be off by `bound`.
fn compare(host: &Host, norm: Norm, x: &Tensor, parameters: &Parameters, bound: f64) {
    let (dtype, size) = (x.dtype(), x.elem_count() * x.dtype().size_in_bytes());
    let count = norm.groups.per_sample * norm.groups.channels;
    let grad = cast(&noise(x.dims(), 4), dtype);
    let [x_at, grad_at] = [x, &grad].map(Buffer::of);
    let [weight, bias] = parameters.each_ref().map(|parameter| parameter.as_ref().map(Buffer::of));
    let (y, of_x) = (Buffer::new(size), Buffer::new(size));
    // What was in the sums stays in them.
    let before = noise(&[2, count], 5);
    let sums = Buffer::of(&cast(&before, DType::F32));
    let at = |buffer: &Option<Buffer>| buffer.as_ref().map_or(0, Buffer::at);
    let is_f32 = |n: usize| i32::from(parameters[n].as_ref().is_some_and(|of| of.dtype() == DType::F32));
    let call = NormGroups {
        x: x_at.at(),
        weight: at(&weight),
        bias: at(&bias),
        grad: grad_at.at(),
        y: y.at(),
        of_x: of_x.at(),
        weight_is_f32: is_f32(0),
        bias_is_f32: is_f32(1),
        ..NormGroups::new(&norm, x.elem_count())
    };
    run(host, &call.value(element(dtype)));
    let wanted = parameters.iter().any(Option::is_some);
    // SAFETY: the buffers have these sizes.
    unsafe { call.pull(host, element(dtype), wanted.then(|| sums.at())) }.unwrap();

    let wide = |x: &Tensor| Var::from_tensor(&cast(x, DType::F64)).unwrap();
    let full = |n: usize, plain: f64| match &parameters[n] {
        Some(parameter) => wide(parameter),
        None => wide(&Tensor::full(plain, count, x.device()).unwrap()),
    };
    let (exact_x, weight, bias) = (wide(x), full(0, 1.0), full(1, 0.0));
    let exact = norm.forward(&exact_x, Some(&weight), Some(&bias)).unwrap();
    let grads = (&exact * cast(&grad, DType::F64)).unwrap().sum_all().unwrap().backward().unwrap();
    let [for_x, for_weight, for_bias] = [&exact_x, &weight, &bias].map(|of| grads.get(of).unwrap().clone());
    let close = |what: &str, got: &Tensor, exact: &Tensor, bound: f64| {
        let off = distance(got, exact);
        assert!(off < bound, "{what} of {norm:?} of {:?} in {dtype:?} is off by {off:e}", x.dims());
    };
    close("the value", &y.tensor(dtype, x.dims()), &exact, bound);
    close("the gradient", &of_x.tensor(dtype, x.dims()), &for_x, bound);
    let added = Tensor::stack(&[for_weight, for_bias], 0).unwrap();
    let exact = if wanted { (before + added).unwrap() } else { before };
    close("the sum for a parameter", &sums.tensor(DType::F32, &[2, count]), &exact, 2e-6);
}

#[test]
fn norms_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    let (both, weight, none) = ([true, true], [true, false], [false, false]);
    // Groups of one element, that share a block or fill several times a block of their own; samples of several chunks.
    let cases: [(bool, Sizes, [bool; 2]); 17] = [
        (CENTRED, (1, 1, 1, 1), both),
        (CENTRED, (300, 1, 33, 1), both),
        (CENTRED, (70, 1, 512, 1), weight),
        (CENTRED, (5, 1, 513, 1), both),
        (CENTRED, (1, 1, 3000, 1), none),
        (RMS, (9, 1, 32, 1), weight),
        (RMS, (33, 1, 1, 1), weight),
        (CENTRED, (7, 3, 1, 1), weight),
        (RMS, (3, 1, 1500, 1), weight),
        (CENTRED, (40, 4, 3, 1), both),
        (CENTRED, (5, 2, 3, 7), both),
        (CENTRED, (2, 3, 4, 1), none),
        (CENTRED, (20, 2, 5, 150), both),
        (CENTRED, (4, 3, 2, 16), weight),
        (CENTRED, (3, 7, 1, 9), both),
        (CENTRED, (9, 2, 1, 1000), both),
        (CENTRED, (2, 5, 1, 64), none),
    ];
    for (remove_mean, sizes, given) in cases {
        for (dtype, bound) in DTYPES {
            let (samples, per_sample, channels, inner) = sizes;
            let x = cast(&noise(&[samples, per_sample, channels, inner], 1), dtype);
            compare(&host, norm(remove_mean, sizes), &x, &parameters(given, sizes, dtype), bound);
        }
    }
}

#[test]
fn parameters_may_be_f32_on_half_precision_input() {
    let Some(host) = Host::new() else { return };
    for (dtype, bound) in DTYPES {
        for sizes in [(30, 1, 40, 1), (3, 2, 3, 10)] {
            let x = cast(&noise(&[sizes.0, sizes.1, sizes.2, sizes.3], 1), dtype);
            let [weight, bias] = parameters([true, true], sizes, DType::F32);
            let narrow = |of: &Option<Tensor>| of.as_ref().map(|of| cast(of, dtype));
            for parameters in [[weight.clone(), narrow(&bias)], [narrow(&weight), bias.clone()], [weight, bias]] {
                compare(&host, norm(CENTRED, sizes), &x, &parameters, bound);
            }
        }
    }
}

#[test]
fn a_large_mean_costs_no_digits() {
    let Some(host) = Host::new() else { return };
    for sizes in [(8, 1, 64, 1), (3, 1, 2000, 1), (4, 2, 3, 50)] {
        let deviation = 3_f64.sqrt();
        let x = (noise(&[sizes.0, sizes.1, sizes.2, sizes.3], 1) * deviation).unwrap();
        let x = cast(&(x + 1000.0).unwrap(), DType::F32);
        compare(&host, norm(CENTRED, sizes), &x, &parameters([true, true], sizes, DType::F32), 2e-6);
    }
}
