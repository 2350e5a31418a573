//! Sums in mixed dtypes, flags and scales.

use super::{DTYPES, cast, element, run, single};
use crate::field::ops::combine;
use crate::field::ops::cuda::arguments::{AddRows, Combine, Look, PowerOfTwo, Term};
use crate::field::ops::cuda::host::{Buffer, Host};
use crate::field::ops::gradcheck::{distance, noise, values};
use candle_core::{DType, Device, Tensor};

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
