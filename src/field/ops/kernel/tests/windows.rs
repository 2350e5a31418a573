//! Convolutions and transposes on every path.

use super::super::outer::add_outer_windows_on;
use super::super::transpose::transpose_on;
use super::*;

fn looks() -> Vec<Looks> {
    let mut looks = vec![];
    for (channels, kernel, stride) in [(2, [1, 1], 1), (6, [3, 3], 1), (32, [3, 3], 1), (4, [5, 2], 2), (38, [3, 3], 2)]
    {
        for windows in [[1, 1], [3, 5], [4, 16], [17, 19]] {
            let size = std::array::from_fn(|n| (windows[n] - 1) * stride + kernel[n] + n);
            looks.push(Looks { images: 2, size, channels, kernel, stride, windows });
        }
    }
    looks
}

fn convolutions_are_right<T: Held>(bound: f64, stored: f64) {
    for path in Path::all() {
        for looks in looks() {
            let Looks { images, size, channels, kernel, stride, windows } = looks;
            let (what, outputs) = (format!("{path:?} {looks:?}"), 1 + channels * 7 % 40);
            let x = noise(images * size[0] * size[1] * channels, 1).into_iter().map(T::of).collect::<Vec<_>>();
            let depth = kernel[0] * kernel[1] * channels;
            // Element k of window (image, y, x).
            let at = |[image, row, column]: [usize; 3], k: usize| {
                let (tap, channel) = (k / channels, k % channels);
                let (y, column) = (row * stride + tap / kernel[1], column * stride + tap % kernel[1]);
                f64::from(x[((image * size[0] + y) * size[1] + column) * channels + channel].wide())
            };
            let (weight, bias) = (Matrix::<T>::noise(depth, outputs, 2), noise(outputs, 3));
            let packed = Packed::pack(depth, outputs, |k, n| weight.at(k, n) as f32);
            let mut y = Matrix::<T>::noise(images * windows[0] * windows[1], outputs, 5);
            let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
            multiply_on(path, Windows::new(&x, looks), &packed, &epilogue, y.view_mut());
            let place = |row: usize, filled: usize| {
                let line = row / filled;
                [line / windows[0], line % windows[0], row % filled]
            };
            y.check(&what, bound + stored, |row, n| {
                let place = place(row, windows[1]);
                f64::from(bias[n]) + sum((0..depth).map(|k| at(place, k) * weight.at(k, n)))
            });

            let filled = windows[1].next_multiple_of(T::DEPTH);
            let mut g = Matrix::<T>::noise(images * windows[0] * filled, outputs, 4);
            for row in (0..g.rows).filter(|row| row % filled >= windows[1]) {
                g.view_mut().row(row).fill(T::default());
            }
            let before = Matrix::<f32>::noise(outputs, depth, 9);
            let mut dw = before.clone();
            let (windowed, scratch) = (Windows::new(&x, looks), &mut Scratch::default());
            add_outer_windows_on(path, g.view(), windowed, dw.view_mut(), scratch);
            dw.check(&what, bound, |n, k| {
                let real = (0..g.rows).filter(|row| row % filled < windows[1]);
                before.at(n, k) + sum(real.map(|row| g.at(row, n) * at(place(row, filled), k)))
            });
        }
    }
}

#[test]
fn convolutions_in_f32_are_right_on_every_path() {
    convolutions_are_right::<f32>(2e-5, 0.0);
}

#[test]
fn convolutions_in_bf16_are_right_on_every_path() {
    convolutions_are_right::<bf16>(2e-5, 4e-3);
}

#[test]
fn transposes_are_exact_on_every_path() {
    for path in Path::all() {
        for (rows, columns) in [(0, 3), (1, 1), (16, 16), (4, 32), (33, 17), (50, 7)] {
            let from = Matrix::<f32>::noise(rows, columns, 1);
            let mut to = Matrix::<f32>::noise(columns, rows, 2);
            transpose_on(path, from.view(), to.view_mut());
            to.check(&format!("{path:?} {rows} × {columns}"), 0.0, |row, column| from.at(column, row));
        }
    }
}

#[test]
#[should_panic(expected = "Looks")]
fn windows_lie_in_their_images() {
    let looks = Looks { images: 1, size: [3, 3], channels: 2, kernel: [3, 3], stride: 1, windows: [1, 2] };
    Windows::new(&[0.0_f32; 18], looks);
}
