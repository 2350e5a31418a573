//! With the batch in the lanes.

use super::super::batch_lanes::{
    add_column_sums_lanes_on, add_outer_lanes_on, multiply_lanes_on, of_outer, of_product,
};
use super::super::pulled::{Pullback, pull_lanes, pull_lanes_on};
use super::super::shares::shares;
use super::*;
use crate::workers::sharing;

fn transposed(matrix: &Matrix<f32>, seed: u32) -> Matrix<f32> {
    let mut turned = Matrix::noise(matrix.columns, matrix.rows, seed);
    transpose(matrix.view(), turned.view_mut());
    turned
}

fn assert_same_bits(what: &str, turned: &Matrix<f32>, rows: &Matrix<f32>) {
    for row in 0..rows.rows {
        for column in 0..rows.columns {
            let (got, expected) = (turned.at(column, row), rows.at(row, column));
            assert_eq!(got.to_bits(), expected.to_bits(), "{what} at ({row}, {column}): {got}, not {expected}");
        }
    }
    turned.check(what, f64::INFINITY, |_, _| 0.0);
}

#[test]
fn products_have_the_bits_of_the_row_major_ones() {
    for path in Path::all() {
        for (rows, input, output) in shapes() {
            let what = format!("{path:?} {rows} × {input} × {output}");
            let (x, g) = (Matrix::<f32>::noise(rows, input, 1), Matrix::<f32>::noise(rows, output, 4));
            let (weight, bias) = (Matrix::<f32>::noise(output, input, 2), noise(output, 3));
            let kept = Matrix::<f32>::noise(rows, input, 7);
            let (turned_x, turned_g, turned_kept) = (transposed(&x, 2), transposed(&g, 3), transposed(&kept, 1));

            let forward = Packed::transposed(weight.view());
            let (then, gate) = (Then::Activation(Activation::Tanh), noise(output, 8));
            for gate in [None, Some(&gate[..])] {
                let epilogue = Epilogue { gate, bias: Some(&bias), then };
                let (mut y, mut turned_y) = (Matrix::noise(rows, output, 5), Matrix::noise(output, rows, 6));
                multiply_on(path, x.view(), &forward, &epilogue, y.view_mut());
                multiply_lanes_on(path, turned_x.view(), &forward, &epilogue, turned_y.view_mut());
                assert_same_bits(&what, &turned_y, &y);
            }

            let pullback = Packed::straight(weight.view());
            let (mut back, mut turned_back) = (Matrix::noise(rows, input, 5), Matrix::noise(input, rows, 6));
            let then = Then::TimesSlope(Activation::Tanh, kept.view());
            let epilogue = Epilogue { then, ..Epilogue::default() };
            multiply_on(path, g.view(), &pullback, &epilogue, back.view_mut());
            let then = Then::TimesSlope(Activation::Tanh, turned_kept.view());
            let epilogue = Epilogue { then, ..Epilogue::default() };
            multiply_lanes_on(path, turned_g.view(), &pullback, &epilogue, turned_back.view_mut());
            assert_same_bits(&what, &turned_back, &back);
        }
    }
}

/// What lies beyond the noise: tails, infinities, zeros of both signs, numbers below the normal ones, NaN.
const SPECIAL: [f32; 13] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    0.0,
    -0.0,
    1e-40,
    -1e-45,
    -1e-30,
    8.999_999,
    9.0,
    -9.000_001,
    f32::MAX,
    -f32::MIN_POSITIVE,
];

/// Rows of the batch: blocks of vectors side by side, vectors by themselves, some lanes of one, whatever their width.
const BATCH: usize = 2 * 256 + 247;

/// A product of so many terms, of which the first alone is not zero: `x`, added to `bias`.
fn first_of(depth: usize, path: Path, x: &[f32], bias: Option<f32>, then: Then<'_, f32>) -> Vec<f32> {
    let mut terms = x.to_vec();
    terms.resize(depth * BATCH, 0.5);
    // A zero that changes no sum, of either sign.
    let one = Packed::pack(depth, 1, |k, _| if k == 0 { 1.0 } else { -0.0 });
    let bias = bias.map(|bias| [bias]);
    let epilogue = Epilogue { bias: bias.as_ref().map(|bias| &bias[..]), then, ..Epilogue::default() };
    let mut out = vec![0.0; BATCH];
    multiply_lanes_on(
        path,
        View::new(&terms, depth, BATCH, BATCH),
        &one,
        &epilogue,
        ViewMut::new(&mut out, 1, BATCH, BATCH),
    );
    out
}

fn is_same(found: f32, expected: f32) -> bool {
    found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan()
}

#[test]
fn the_tanh_of_shallow_products_is_that_of_numbers() {
    // What is special lies in every lane, among numbers that are not.
    let number = |n: usize| match n % 3 {
        1 => SPECIAL[n / 3 % SPECIAL.len()],
        _ => (n as f32 - BATCH as f32 / 2.0) / 18.0,
    };
    let x: Vec<f32> = (0..BATCH).map(number).collect();
    for path in Path::all() {
        for depth in 1..=4 {
            // Sums begin with 0, which is what −0 becomes, or with −0, which changes nothing.
            for bias in [None, Some(-0.0)] {
                let mut expected: Vec<f32> = x.iter().map(|x| bias.unwrap_or(0.0) + x).collect();
                Activation::Tanh.value_in_place(&mut expected);
                let found = first_of(depth, path, &x, bias, Then::Activation(Activation::Tanh));
                for (n, (x, (y, expected))) in x.iter().zip(found.into_iter().zip(expected)).enumerate() {
                    assert!(is_same(y, expected), "{path:?} of {depth}: tanh {x:e} = {y:e}, not {expected:e}, at {n}");
                }
            }
        }
    }
}

#[test]
fn the_slope_of_tanh_after_shallow_products_is_that_of_numbers() {
    // Every cotangent meets every kept value; each lies in every lane.
    const KEPT: [f32; 9] = [0.3, 1.0, -1.0, 0.0, -0.0, 1e-40, f32::NAN, -0.999_999_9, f32::INFINITY];
    let g: Vec<f32> = (0..BATCH).map(|n| SPECIAL.get(n % 17).copied().unwrap_or(-0.7)).collect();
    let kept: Vec<f32> = (0..BATCH).map(|n| KEPT[n % KEPT.len()]).collect();
    let slope = Then::TimesSlope(Activation::Tanh, View::new(&kept, 1, BATCH, BATCH));
    for path in Path::all() {
        for depth in 1..=4 {
            for bias in [None, Some(-0.0)] {
                let found = first_of(depth, path, &g, bias, slope);
                for (n, (found, (g, y))) in found.into_iter().zip(g.iter().zip(&kept)).enumerate() {
                    let expected = (bias.unwrap_or(0.0) + g) * ((1.0 - y) * (1.0 + y));
                    let what = format!("{path:?} of {depth}: {g:e} by the slope at {y:e}");
                    assert!(is_same(found, expected), "{what} = {found:e}, not {expected:e}, at {n}");
                }
            }
        }
    }
}

#[test]
fn sums_over_the_batch_are_right() {
    for path in Path::all() {
        for (rows, input, output) in shapes() {
            let what = format!("{path:?} {rows} × {input} × {output}");
            let (x, g) = (Matrix::<f32>::noise(input, rows, 1), Matrix::<f32>::noise(output, rows, 2));
            let before = Matrix::<f32>::noise(output, input, 3);
            let mut dw = before.clone();
            add_outer_lanes_on(path, g.view(), x.view(), dw.view_mut());
            dw.check(&what, 2e-5, |out, k| before.at(out, k) + sum((0..rows).map(|row| g.at(out, row) * x.at(k, row))));
            let bias = noise(output, 4);
            let mut db = bias.clone();
            add_column_sums_lanes_on(path, g.view(), &mut db);
            for (out, (&db, &before)) in db.iter().zip(&bias).enumerate() {
                let exact = f64::from(before) + sum((0..rows).map(|row| g.at(out, row)));
                assert!((f64::from(db) - exact).abs() <= 2e-5 * exact.abs().max(1.0), "{what}: {db}, not {exact}");
            }
        }
    }
}

/// Few outputs, few inputs, both and neither; whole blocks of vectors, single ones and parts of them.
#[test]
fn a_pullback_in_one_has_the_bits_of_kernels_one_by_one() {
    let shapes = [1, 3, 4, 5, 40].into_iter().flat_map(|output| [1, 2, 3, 4, 5, 33].map(|input| (output, input)));
    let cases = shapes.flat_map(|(output, input)| [1, 15, 16, 40, 64, 131, 300].map(|rows| (output, input, rows)));
    for (path, (output, input, rows)) in Path::all().into_iter().flat_map(|path| cases.clone().map(move |n| (path, n)))
    {
        let g = Matrix::<f32>::noise(output, rows, 1);
        let (x, others) = (Matrix::<f32>::noise(input, rows, 2), Matrix::<f32>::noise(input, rows, 3));
        let b = Packed::straight(Matrix::<f32>::noise(output, input, 4).view());
        let thens = [
            Then::Nothing,
            Then::TimesSlope(Activation::Tanh, x.view()),
            Then::TimesSlope(Activation::Tanh, others.view()),
            Then::TimesSlope(Activation::Relu, x.view()),
        ];
        for then in thens {
            let made = [false, true].map(|in_one| {
                let mut db = noise(output, 5);
                let (mut dw, mut out) = (Matrix::<f32>::noise(output, input, 6), Matrix::noise(input, rows, 7));
                if in_one {
                    let (g, x, dw, out) = (g.view(), x.view(), dw.view_mut(), out.view_mut());
                    pull_lanes_on(path, Pullback { g, x, b: &b, then, db: &mut db, dw, out });
                } else {
                    add_column_sums_lanes_on(path, g.view(), &mut db);
                    add_outer_lanes_on(path, g.view(), x.view(), dw.view_mut());
                    multiply_lanes_on(path, g.view(), &b, &Epilogue { then, ..Epilogue::default() }, out.view_mut());
                }
                // What lies between the rows is checked, too.
                let all = db.into_iter().chain(dw.values).chain(out.values);
                all.map(f32::to_bits).collect::<Vec<_>>()
            });
            assert!(made[0] == made[1], "{path:?} {output} × {input}, {rows} rows, {then:?}");
        }
    }
}

/// Threads share what is made of many rows, one kernel after another.
#[test]
fn a_pullback_that_threads_share_has_the_bits_of_one_thread() {
    const ROWS: usize = 1 << 13;
    for (output, input) in [(4, 256), (1025, 4), (4100, 1)] {
        let (g, x) = (Matrix::<f32>::noise(output, ROWS, 1), Matrix::<f32>::noise(input, ROWS, 2));
        let b = Packed::straight(Matrix::<f32>::noise(output, input, 3).view());
        let then = if output > input { Then::Nothing } else { Then::TimesSlope(Activation::Tanh, x.view()) };
        let made = [1, 2].map(|threads| {
            let (mut db, mut dw) = (noise(output, 4), Matrix::<f32>::noise(output, input, 5));
            let mut out = Matrix::noise(input, ROWS, 6);
            let (g, x) = (g.view(), x.view());
            sharing(Some(threads), || {
                let of_out = shares(input, of_product(ROWS, &b, &Epilogue { then, ..Epilogue::default() }));
                assert_eq!(of_out.or(shares(output, of_outer(&g, &x))).is_some(), threads == 2, "{output} × {input}");
                pull_lanes(Pullback { g, x, b: &b, then, db: &mut db, dw: dw.view_mut(), out: out.view_mut() });
            });
            db.into_iter().chain(dw.values).chain(out.values).map(f32::to_bits).collect::<Vec<_>>()
        });
        assert!(made[0] == made[1], "{output} × {input}");
    }
}
