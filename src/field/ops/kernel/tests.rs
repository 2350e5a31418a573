//! Every path against sums in F64, for odd shapes, strides and edges; and how fast the best one is.

mod group_norm;
mod lanes;
mod windows;
mod winograd;

use super::machine::{Machine, Path, Work};
use super::multiply::multiply_on;
use super::outer::{add_column_sums_on, add_outer_on};
use super::scheme::Scheme;
use super::*;
use crate::field::ops::Activation;
use half::{bf16, f16};

/// Numbers in (−1, 1), always the same.
pub(super) fn noise(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b1) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A matrix of noise in rows that are further apart than they are long; NaN lies between them.
#[derive(Clone)]
struct Matrix<T> {
    values: Vec<T>,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<T: Held> Matrix<T> {
    fn noise(rows: usize, columns: usize, seed: u32) -> Self {
        let stride = columns + seed as usize % 4;
        let mut values = noise(rows * stride, seed);
        for row in values.chunks_mut(stride.max(1)) {
            row[columns..].fill(f32::NAN);
        }
        let values = values.into_iter().map(T::of).collect();
        Self { values, rows, columns, stride }
    }

    fn view(&self) -> View<'_, T> {
        View::new(&self.values, self.rows, self.columns, self.stride)
    }

    fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut::new(&mut self.values, self.rows, self.columns, self.stride)
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        f64::from(self.values[row * self.stride + column].wide())
    }

    /// Whether each element is within `bound` of `exact`, and nothing was written between the rows.
    fn check(&self, what: &str, bound: f64, exact: impl Fn(usize, usize) -> f64) {
        for row in 0..self.rows {
            for column in 0..self.columns {
                let (got, exact) = (self.at(row, column), exact(row, column));
                let error = (got - exact).abs() / exact.abs().max(1.0);
                assert!(error <= bound, "{what}: {got}, not {exact}, at ({row}, {column})");
            }
            let between = &self.values[row * self.stride + self.columns..(row + 1) * self.stride];
            assert!(between.iter().all(|value| value.wide().is_nan()), "{what}: wrote behind row {row}");
        }
    }
}

/// (rows, in, out): every one of them odd, empty, and from 1 to 70; several groups of panels, with and without a rest.
fn shapes() -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![(0, 3, 5), (3, 0, 5), (3, 5, 0), (1, 1, 1), (300, 7, 5), (2, 300, 3), (2, 3, 300)];
    shapes.extend([(5, 3000, 40), (5, 3000, 64), (3, 4, 512), (11, 48, 64), (130, 3, 4), (130, 12, 4), (515, 3, 2)]);
    for n in 1..=70 {
        shapes.push((n, 71 - n, 1 + n * 37 % 70));
    }
    shapes
}

fn sum(terms: impl Iterator<Item = f64>) -> f64 {
    terms.sum()
}

fn products_are_right<T: Held>(bound: f64, stored: f64) {
    for path in Path::all() {
        for (rows, input, output) in shapes() {
            let what = format!("{path:?} {rows} × {input} × {output}");
            let x = Matrix::<T>::noise(rows, input, 1);
            let weight = Matrix::<T>::noise(output, input, 2);
            let wide: Vec<f32> = weight.values.iter().map(|w| w.wide()).collect();
            let weights = View::new(&wide, output, input, weight.stride);
            let bias = noise(output, 3);
            let gate = noise(output, 8);
            // With a gap between the rows of the result, and without.
            for (gate, seed) in [(None, 5), (Some(&gate[..]), 5), (None, 4), (Some(&gate[..]), 4)] {
                let mut y = Matrix::<T>::noise(rows, output, seed);
                let epilogue = Epilogue { gate, bias: Some(&bias), then: Then::Activation(Activation::Tanh) };
                multiply_on(path, x.view(), &Packed::transposed(weights), &epilogue, y.view_mut());
                let product = |row, out| sum((0..input).map(|k| x.at(row, k) * weight.at(out, k)));
                let gate = |out: usize| gate.map_or(1.0, |gate| f64::from(gate[out]));
                let z = |row, out| product(row, out) * gate(out) + f64::from(bias[out]);
                y.check(&what, bound + stored, |row, out| z(row, out).tanh());
            }

            let g = Matrix::<T>::noise(rows, output, 4);
            for (seed, of_saved) in [(6, 7), (4, 7), (6, 8), (4, 8)] {
                let mut back = Matrix::<T>::noise(rows, input, seed);
                let saved = Matrix::<T>::noise(rows, input, of_saved);
                let then = Then::TimesSlope(Activation::Tanh, saved.view());
                let epilogue = Epilogue { then, ..Epilogue::default() };
                multiply_on(path, g.view(), &Packed::straight(weights), &epilogue, back.view_mut());
                back.check(&what, bound + stored, |row, k| {
                    sum((0..output).map(|out| g.at(row, out) * weight.at(out, k))) * (1.0 - saved.at(row, k).powi(2))
                });
            }

            let before = Matrix::<f32>::noise(output, input, 9);
            let mut dw = before.clone();
            add_outer_on(path, g.view(), x.view(), dw.view_mut(), &mut Scratch::default());
            dw.check(&what, bound, |out, k| {
                before.at(out, k) + sum((0..rows).map(|row| g.at(row, out) * x.at(row, k)))
            });

            let mut db = bias.clone();
            add_column_sums_on(path, g.view(), &mut db);
            for (out, (&db, &before)) in db.iter().zip(&bias).enumerate() {
                let exact = f64::from(before) + sum((0..rows).map(|row| g.at(row, out)));
                assert!((f64::from(db) - exact).abs() <= bound * exact.abs().max(1.0), "{what}: {db}, not {exact}");
            }
        }
    }
}

#[test]
fn products_in_f32_are_right_on_every_path() {
    products_are_right::<f32>(2e-5, 0.0);
}

#[test]
fn products_in_bf16_are_right_on_every_path() {
    products_are_right::<bf16>(2e-5, 4e-3);
}

/// A row's bits must not depend on how many rows there are, or on where it lies among them.
fn rows_do_not_know_each_other<T: Held>(output: usize) {
    let (rows, input) = (41, 37);
    let (x, weight) = (Matrix::<T>::noise(rows, input, 1), noise(output * input, 2));
    let b = Packed::<T>::transposed(View::new(&weight, output, input, input));
    let bias = noise(output, 3);
    let epilogue = Epilogue { bias: Some(&bias), then: Then::Activation(Activation::Tanh), ..Epilogue::default() };
    for path in Path::all() {
        let mut all = vec![T::default(); rows * output];
        multiply_on(path, x.view(), &b, &epilogue, ViewMut::new(&mut all, rows, output, output));
        for (first, count) in [(0, 1), (40, 1), (7, 2), (5, 13), (1, 40), (17, 24)] {
            let x = View::new(&x.values[first * x.stride..], count, input, x.stride);
            let mut some = vec![T::default(); count * output];
            multiply_on(path, x, &b, &epilogue, ViewMut::new(&mut some, count, output, output));
            let bits = |values: &[T]| values.iter().map(|v| v.wide().to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&some), bits(&all[first * output..][..count * output]), "{path:?} {first} {count}");
        }
    }
}

#[test]
fn rows_are_independent_to_the_bit() {
    for output in [64, 67] {
        rows_do_not_know_each_other::<f32>(output);
        rows_do_not_know_each_other::<bf16>(output);
    }
}

#[test]
fn vectors_of_any_width_give_the_same_bits_where_products_are_fused() {
    for (rows, input, output) in [(13, 50, 35), (13, 50, 48)] {
        let (x, weight) = (noise(rows * input, 1), noise(output * input, 2));
        let b = Packed::<f32>::transposed(View::new(&weight, output, input, input));
        let mut results = Path::all().into_iter().filter(|&path| path != Path::Portable).map(|path| {
            let mut y = vec![0.0; rows * output];
            let (x, out) = (View::new(&x, rows, input, input), ViewMut::new(&mut y, rows, output, output));
            multiply_on(path, x, &b, &Epilogue::default(), out);
            y
        });
        if let Some(first) = results.next() {
            assert!(results.all(|y| y == first));
        }
    }
}

#[test]
fn weights_in_half_precision_are_widened_exactly() {
    let weight = noise(7 * 9, 1);
    let (halves, brains): (Vec<f16>, Vec<bf16>) = weight.iter().map(|&w| (f16::from_f32(w), bf16::from_f32(w))).unzip();
    let wide_halves: Vec<f32> = halves.iter().map(|w| w.to_f32()).collect();
    let wide_brains: Vec<f32> = brains.iter().map(|w| w.to_f32()).collect();
    let x = noise(5 * 8, 2);
    let product = |b: &Packed<f32>| {
        let mut y = vec![0.0; 5 * 7];
        multiply(View::new(&x, 5, 8, 8), b, &Epilogue::default(), ViewMut::new(&mut y, 5, 7, 7));
        y
    };
    // Of nine columns the leading eight, as a layer that sees the time has them.
    let of_halves = product(&Packed::transposed(View::new(&halves, 7, 8, 9)));
    assert_eq!(of_halves, product(&Packed::transposed(View::new(&wide_halves, 7, 8, 9))));
    let of_brains = product(&Packed::transposed(View::new(&brains, 7, 8, 9)));
    assert_eq!(of_brains, product(&Packed::transposed(View::new(&wide_brains, 7, 8, 9))));
    assert!(Packed::<f32>::straight(View::new(&brains, 7, 8, 9)).bytes() >= 7 * 16 * 4);
}

#[test]
fn every_bf16_is_rounded_to() {
    for high in 0..=u16::MAX {
        // Halves of the last place, and what is next to them.
        for low in [0, 1, 0x7000, 0x7fff, 0x8000, 0x8001, 0xb000, 0xffff] {
            let x = f32::from_bits(u32::from(high) << 16 | low);
            let brain = <bf16 as Held>::of(x);
            assert_eq!(brain.to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
            assert_eq!(Held::wide(brain).to_bits(), brain.to_f32().to_bits());
        }
    }
}

#[test]
fn nan_and_infinity_pass() {
    let weight = [1.0_f32, 0.0, 2.0, 1.0];
    let b = Packed::<f32>::transposed(View::new(&weight, 2, 2, 2));
    for path in Path::all() {
        let mut y = [0.0; 4];
        let x = [f32::NAN, 1.0, f32::INFINITY, 1.0];
        multiply_on(path, View::new(&x, 2, 2, 2), &b, &Epilogue::default(), ViewMut::new(&mut y, 2, 2, 2));
        assert!(y[0].is_nan() && y[1].is_nan() && y[2] == f32::INFINITY && y[3] == f32::INFINITY, "{path:?}: {y:?}");
    }
}

#[test]
fn long_batches_are_summed_accurately() {
    let rows = 100_000;
    let g = vec![0.1_f32; rows];
    for path in Path::all() {
        let (mut dw, mut db) = ([0.0], [0.0]);
        let view = View::new(&g, rows, 1, 1);
        add_outer_on(path, view, view, ViewMut::new(&mut dw, 1, 1, 1), &mut Scratch::default());
        add_column_sums_on(path, view, &mut db);
        let exact = f64::from(0.1_f32);
        assert!((f64::from(dw[0]) / (exact * exact * 1e5) - 1.0).abs() < 5e-6, "{path:?}: {dw:?}");
        assert!((f64::from(db[0]) / (exact * 1e5) - 1.0).abs() < 5e-6, "{path:?}: {db:?}");
    }
}

#[test]
#[should_panic(expected = "2 rows of 3, 4 apart")]
fn views_lie_in_their_slices() {
    View::new(&[0.0; 6], 2, 3, 4);
}

/// Sums as BF16 elements.
struct Narrow<'a>(&'a [f32], &'a mut [bf16]);

impl Work for Narrow<'_> {
    type Output = ();

    unsafe fn run<M: Machine>(self) {
        // SAFETY: the CPU has the instructions, says the caller.
        unsafe { <bf16 as Held>::Scheme::<M>::narrow(self.0, self.1) };
    }
}

#[test]
fn sums_are_rounded_alike_on_every_path() {
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 3.0e38, 1e-37];
    // Halfway between two elements, the lower one even and odd, and beside that.
    let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f81_7fff, 0xbf81_8000_u32].map(f32::from_bits);
    let sums: Vec<f32> = noise(40, 1).into_iter().chain(special).chain(ties).collect();
    for path in Path::all() {
        for count in [0, 1, 15, 16, 17, sums.len()] {
            let sums = &sums[sums.len() - count..];
            let mut to = vec![bf16::from_f32(7.0); count + 16];
            path.run(Narrow(sums, &mut to[..count]));
            let exact = sums.iter().map(|&sum| bf16::from_f32(sum).to_bits());
            assert!(to.iter().map(|to| to.to_bits()).zip(exact).all(|(to, exact)| to == exact), "{path:?} {count}");
            assert!(to[count..].iter().all(|to| to.to_f32() == 7.0), "{path:?} {count}");
        }
    }
}
