//! How fast the kernels are on one core: `cargo test --release --lib rates -- --ignored --nocapture`.

use super::{Path, add_outer_on, multiply_on, noise};
use crate::field::ops::Activation;
use crate::field::ops::kernel::*;
use half::bf16;
use std::time::Instant;

/// Seconds of the fastest of many runs.
fn seconds(mut run: impl FnMut()) -> f64 {
    let once = || {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    std::iter::repeat_with(once).take(1000).fold(f64::INFINITY, f64::min)
}

fn products<T: Held>(what: &str, (rows, input, output): (usize, usize, usize)) {
    let held = |len, seed| noise(len, seed).into_iter().map(T::of).collect::<Vec<_>>();
    let (x, g, mut y) = (held(rows * input, 1), held(rows * output, 2), held(rows * output, 3));
    let (weight, bias) = (noise(output * input, 4), noise(output, 5));
    let b = Packed::<T>::transposed(View::new(&weight, output, input, input));
    let (x, g) = (View::new(&x, rows, input, input), View::new(&g, rows, output, output));
    let rate = |seconds: f64| 2e-9 * (rows * input * output) as f64 / seconds;
    let mut product = |epilogue: Epilogue<'_, T>| {
        rate(seconds(|| multiply(x, &b, &epilogue, ViewMut::new(&mut y, rows, output, output))))
    };
    let plain = product(Epilogue::default());
    let tanh = product(Epilogue { bias: Some(&bias), then: Then::Activation(Activation::Tanh) });
    let slope = product(Epilogue { then: Then::TimesSlope(Activation::Tanh, g), ..Epilogue::default() });
    let (mut dw, mut db, mut scratch) = (weight.clone(), bias.clone(), Scratch::default());
    let outer = rate(seconds(|| add_outer(g, x, ViewMut::new(&mut dw, output, input, input), &mut scratch)));
    let sums = 1e9 * seconds(|| add_column_sums(g, &mut db)) / (rows * output) as f64;
    println!(
        "{what} {rows} × {input} × {output}: {plain:.0} GFLOP/s, bias and tanh {tanh:.0}, slope {slope:.0}, \
         dW {outer:.0}, db {sums:.3} ns"
    );
}

/// The same product on every path.
fn paths<T: Held>(what: &str, (rows, input, output): (usize, usize, usize)) {
    let held = |len, seed| noise(len, seed).into_iter().map(T::of).collect::<Vec<_>>();
    let (x, g, mut y) = (held(rows * input, 1), held(rows * output, 2), held(rows * output, 3));
    let mut dw = noise(output * input, 4);
    let b = Packed::<T>::transposed(View::new(&dw, output, input, input));
    let (x, g) = (View::new(&x, rows, input, input), View::new(&g, rows, output, output));
    let rate = |seconds: f64| 2e-9 * (rows * input * output) as f64 / seconds;
    for path in Path::all() {
        let (plain, mut scratch) = (Epilogue::default(), Scratch::default());
        let product = rate(seconds(|| multiply_on(path, x, &b, &plain, ViewMut::new(&mut y, rows, output, output))));
        let outer =
            rate(seconds(|| add_outer_on(path, g, x, ViewMut::new(&mut dw, output, input, input), &mut scratch)));
        println!("{what} on {path:?}: {product:.0} GFLOP/s, dW {outer:.0}");
    }
}

/// A layer of the batch in the lanes, and the same row by row: nanoseconds a row of the batch.
fn tiny((rows, input, output): (usize, usize, usize)) {
    let (x, g, mut y) = (noise(rows * input, 1), noise(rows * output, 2), noise(rows * output, 3));
    let (weight, bias) = (noise(output * input, 4), noise(output, 5));
    let b = Packed::transposed(View::new(&weight, output, input, input));
    let epilogue = Epilogue { bias: Some(&bias), then: Then::Activation(Activation::Tanh) };
    let (mut dw, mut db) = (weight.clone(), bias.clone());
    let each = |seconds: f64| 1e9 * seconds / rows as f64;
    let lanes = (View::new(&x, input, rows, rows), View::new(&g, output, rows, rows));
    let layer = each(seconds(|| multiply_lanes(lanes.0, &b, &epilogue, ViewMut::new(&mut y, output, rows, rows))));
    let outer = each(seconds(|| add_outer_lanes(lanes.1, lanes.0, ViewMut::new(&mut dw, output, input, input))));
    let sums = each(seconds(|| add_column_sums_lanes(lanes.1, &mut db)));
    let turn =
        each(seconds(|| transpose(View::new(&g, rows, output, output), ViewMut::new(&mut y, output, rows, rows))));
    let by_row = (View::new(&x, rows, input, input), View::new(&g, rows, output, output));
    let out = (rows, output, output);
    let row_layer = each(seconds(|| multiply(by_row.0, &b, &epilogue, ViewMut::new(&mut y, out.0, out.1, out.2))));
    let mut scratch = Scratch::default();
    let dw = &mut dw;
    let row_outer =
        each(seconds(|| add_outer(by_row.1, by_row.0, ViewMut::new(dw, output, input, input), &mut scratch)));
    println!(
        "lanes {rows} × {input} × {output}: layer {layer:.2} ns (row-major {row_layer:.2}), dW {outer:.2} ns \
         ({row_outer:.2}), db {sums:.2} ns, transposing g {turn:.2} ns"
    );
}

#[test]
#[ignore = "prints rates"]
fn rates() {
    for shape in [(128, 256, 256), (128, 64, 256), (128, 256, 64), (128, 64, 64), (1024, 256, 256), (128, 1024, 1024)] {
        products::<f32>("F32", shape);
        products::<bf16>("BF16", shape);
    }
    paths::<f32>("F32", (128, 256, 256));
    paths::<bf16>("BF16", (128, 256, 256));
    for shape in [(256, 2, 64), (256, 64, 2), (256, 64, 64), (256, 16, 16), (64, 2, 64)] {
        tiny(shape);
    }
    let x = noise(4096, 1);
    let mut y = x.clone();
    for activation in [
        Activation::Tanh,
        Activation::Sigmoid,
        Activation::Softplus,
        Activation::Silu,
        Activation::Gelu,
        Activation::Relu,
        Activation::Elu(1.0),
        Activation::Sin,
        Activation::Cos,
        Activation::LogCosh,
    ] {
        let mut nanoseconds = |run: &dyn Fn(&mut [f32])| {
            let seconds = seconds(|| {
                y.copy_from_slice(&x);
                run(&mut y);
            });
            1e9 * seconds / x.len() as f64
        };
        let value = nanoseconds(&|y| activation.value_in_place(y));
        let slope = nanoseconds(&|y| activation.slope_in_place(y));
        println!("{activation:?}: {value:.3} ns an element, slope {slope:.3} ns");
    }
}
