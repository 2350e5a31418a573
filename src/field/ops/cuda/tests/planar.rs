//! Planar units with their divergence, and their pullback.

use super::{DTYPES, cast, element, run};
use crate::field::ops::cuda::arguments::PlanarUnits;
use crate::field::ops::cuda::host::{Buffer, Host};
use crate::field::ops::gradcheck::{distance, noise};
use crate::field::ops::{Activation, Planar};
use candle_core::{DType, Tensor, Var};

#[test]
fn planar_units_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    let activations = [Activation::Tanh, Activation::Silu, Activation::Cos].into_iter().cycle();
    // Every number of dimensions; units and rows that fill blocks, and some that do not; several chunks of rows.
    let sizes = (1..=PlanarUnits::MOST).zip([(5, 3), (40, 32), (75, 33), (1, 70)].into_iter().cycle());
    for ((dim, (rows, count)), activation) in sizes.zip(activations) {
        for (dtype, bound) in DTYPES {
            let shapes = [&[rows, dim][..], &[count, dim], &[count], &[count, dim], &[rows * dim + rows]];
            let mut seed = 0;
            let [z, w, b, u, grad] = shapes.map(|shape| {
                seed += 1;
                cast(&noise(shape, seed), dtype)
            });
            let units = Tensor::cat(&[&w, &b.unsqueeze(1).unwrap(), &u], 1).unwrap();
            let buffers = [&z, &units, &grad].map(Buffer::of);
            let size = dtype.size_in_bytes();
            let (both, of_z) = (Buffer::new((rows * dim + rows) * size), Buffer::new(rows * dim * size));
            // What was in the sums stays in them.
            let before = noise(&[count, 2 * dim + 1], 9);
            let of_units = Buffer::of(&cast(&before, DType::F32));
            let call = PlanarUnits {
                z: buffers[0].at(),
                units: buffers[1].at(),
                grad: buffers[2].at(),
                both: both.at(),
                of_z: of_z.at(),
                ..PlanarUnits::new((rows as u32, dim as u32, count as u32), activation)
            };
            run(&host, &call.value(element(dtype)));
            // SAFETY: the buffers have these sizes.
            unsafe { call.pull(&host, element(dtype), Some(of_units.at())) }.unwrap();

            let [z, w, b, u] = [z, w, b, u].map(|x| Var::from_tensor(&cast(&x, DType::F64)).unwrap());
            let (f, trace) = Planar::new(&w, &b, &u, activation).unwrap().with_divergence(&z).unwrap();
            let exact = Tensor::cat(&[f.flatten_all().unwrap(), trace], 0).unwrap();
            let grads = (&exact * cast(&grad, DType::F64)).unwrap().sum_all().unwrap().backward().unwrap();
            let of = |x: &Var| grads.get(x).unwrap().clone();
            let exact_units = Tensor::cat(&[of(&w), of(&b).unsqueeze(1).unwrap(), of(&u)], 1).unwrap();
            let exact_units = (exact_units + before).unwrap();
            let what = format!("{activation:?} {dtype:?}: {rows} rows, {count} units of {dim} dimensions");
            let close = |got: &Tensor, exact: &Tensor, bound: f64| {
                assert!(distance(got, exact) < bound, "{what}: {:e}", distance(got, exact));
            };
            close(&both.tensor(dtype, exact.dims()), &exact, bound);
            close(&of_z.tensor(dtype, &[rows, dim]), &of(&z), bound);
            close(&of_units.tensor(DType::F32, units.dims()), &exact_units, 2e-6);
        }
    }
}
