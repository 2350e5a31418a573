//! Rows in few bits, and the increments that are kept so, to the bits of the CPU.

use super::{cast, run};
use crate::field::ops::combine::Finite;
use crate::field::ops::cuda::arguments::CodedRows;
use crate::field::ops::cuda::host::{Buffer, Host};
use crate::field::ops::gradcheck::noise;
use crate::field::ops::rows::{Code, rows};
use candle_core::{DType, Device, Shape, Tensor};

const CODES: [Code; 3] = [Code::Half, Code::Byte, Code::Nibble];

/// Rows that share a block, that fill one, that take several, one alone, and ends of every kind.
const SHAPES: [&[usize]; 10] =
    [&[], &[1], &[33], &[5, 1], &[20, 7], &[9, 64], &[4, 512], &[3, 513], &[2, 3, 2001], &[10_001]];

/// What a call has written.
struct Written {
    codes: Buffer,
    scales: Buffer,
    next: Buffer,
    left_over: Buffer,
    flag: Buffer,
}

impl Written {
    /// By the kernels that sum and encode what `call` makes of the places of `next` and `left_over`.
    fn by(host: &Host, code: Code, shape: &Shape, call: impl FnOnce([u64; 2]) -> CodedRows) -> Self {
        let (rows, width) = rows(shape);
        let zeros = |count: usize| Buffer::of(&Tensor::zeros(count, DType::F32, &Device::Cpu).unwrap());
        let largest = zeros(rows);
        let written = Self {
            codes: Buffer::new(rows * code.columns(width) * code.dtype().size_in_bytes()),
            scales: Buffer::new(4 * rows),
            next: Buffer::new(4 * rows * width),
            left_over: Buffer::new(4 * rows * width),
            flag: zeros(1),
        };
        let (codes, scales, flag) = (written.codes.at(), written.scales.at(), written.flag.at());
        let call = call([written.next.at(), written.left_over.at()]);
        let call = CodedRows { codes, scales, flag, largest: largest.at(), ..call };
        // SAFETY: the buffers have these sizes.
        unsafe { call.encode_sum(host) }.unwrap();
        written
    }

    fn codes(&self, code: Code, like: &Tensor) -> Tensor {
        self.codes.tensor(code.dtype(), like.dims())
    }

    fn is_finite(&self) -> bool {
        self.flag.tensor(DType::F32, &[1]).to_vec1::<f32>().unwrap() == [0.0]
    }
}

fn same(what: &str, got: &Tensor, wanted: &Tensor) {
    let bits = |x: &Tensor| -> Vec<u64> {
        let values = cast(x, DType::F64).flatten_all().unwrap().to_vec1::<f64>().unwrap();
        values.into_iter().map(f64::to_bits).collect()
    };
    assert_eq!((got.dtype(), bits(got)), (wanted.dtype(), bits(wanted)), "{what}");
}

fn states(shape: &[usize], size: f64) -> [Tensor; 3] {
    let of = |size: f64, seed| (noise(shape, seed) * size).unwrap();
    let (before, step) = (of(1.0, 1), of(size, 2));
    [cast(&before, DType::F32), cast(&(&before + &step).unwrap(), DType::F32), cast(&of(size / 100.0, 3), DType::F32)]
}

#[test]
fn increments_lead_where_they_lead_on_the_cpu() {
    let Some(host) = Host::new() else { return };
    for (code, shape, size) in CODES
        .iter()
        .flat_map(|code| SHAPES.map(|shape| (*code, shape)))
        .flat_map(|(code, shape)| [1e-2, 0.0, 1e30].map(|size| (code, shape, size)))
    {
        let [before, after, left] = states(shape, size);
        for left in [None, Some(&left)] {
            let what = format!("{code:?} {shape:?} {size:e} {}", left.is_some());
            let wanted = code.follow(&before, &after, left).unwrap().unwrap();
            let at = [&before, &after].map(Buffer::of);
            let left = left.map(Buffer::of);
            let (left, from) = (left.as_ref().map(Buffer::at), at.each_ref().map(Buffer::at));
            let of_rows = CodedRows::new(code, before.shape());
            let got = Written::by(&host, code, before.shape(), |to| of_rows.following(from, left, to));
            same(&what, &got.codes(code, &wanted.codes), &wanted.codes);
            same(&what, &got.scales.tensor(DType::F32, wanted.scales.dims()), &wanted.scales);
            same(&what, &got.next.tensor(DType::F32, shape), &wanted.next);
            same(&what, &got.left_over.tensor(DType::F32, shape), &wanted.residual);
            assert!(got.is_finite(), "{what}");

            let back = Buffer::new(4 * before.elem_count());
            let decode = CodedRows { codes: got.codes.at(), scales: got.scales.at(), next: back.at(), ..of_rows };
            run(&host, &decode.decode());
            let wanted = code.decode(&wanted.codes, &wanted.scales, before.shape(), DType::F32).unwrap();
            same(&what, &back.tensor(DType::F32, shape), &wanted);
        }
    }
}

#[test]
fn rows_alone_are_encoded_as_on_the_cpu() {
    let Some(host) = Host::new() else { return };
    let tiny = Tensor::new(&[[1e-45f32, -3e-44, 0.0], [0.0, 0.0, 0.0], [2e-45, 0.0, 1e-38]], &Device::Cpu).unwrap();
    // Quanta of 1, for integers, and numbers halfway between two.
    let halfway = |most: f32| Tensor::new(&[[most, 0.5, 1.5, -2.5, -0.5, -1.5]], &Device::Cpu).unwrap();
    let special = [tiny, halfway(127.0), halfway(7.0)];
    for code in CODES {
        for x in SHAPES.iter().map(|shape| cast(&noise(shape, 1), DType::F32)).chain(special.clone()) {
            let (what, from) = (format!("{code:?} {:?}", x.dims()), Buffer::of(&x));
            let got = Written::by(&host, code, x.shape(), |_| CodedRows::new(code, x.shape()).of(from.at()));
            let (codes, scales, _) = code.encode(&x).unwrap();
            same(&what, &got.codes(code, &codes), &codes);
            same(&what, &got.scales.tensor(DType::F32, scales.dims()), &scales);
            assert!(got.is_finite(), "{what}");
        }
    }
}

#[test]
fn what_is_not_finite_is_told_wherever_it_is() {
    let Some(host) = Host::new() else { return };
    for (code, shape) in CODES.iter().flat_map(|code| [[3, 40], [3, 9000]].map(|shape| (*code, shape))) {
        let count = shape[0] * shape[1];
        for (at, bad) in [(0, f32::NAN), (count / 2, f32::INFINITY), (count - 1, f32::NEG_INFINITY)] {
            let mut values = vec![0.5; count];
            values[at] = bad;
            let x = Tensor::new(values, &Device::Cpu).unwrap().reshape(&shape).unwrap();
            let from = Buffer::of(&x);
            let got = Written::by(&host, code, x.shape(), |_| CodedRows::new(code, x.shape()).of(from.at()));
            let (.., finite) = code.encode(&x).unwrap();
            assert_eq!((got.is_finite(), Finite::read(&[finite]).unwrap()), (false, vec![false]), "{code:?} {bad}");
        }
    }
}
