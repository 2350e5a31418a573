//! With the batch in the lanes.

use super::super::batch_lanes::{add_column_sums_lanes_on, add_outer_lanes_on, multiply_lanes_on};
use super::*;

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
