//! Convolutions by minimal filtering on every path.

use super::super::winograd::{
    POINTS, add_outer_in_tiles_on, convolve_in_tiles_on, fits, of_kernel, space, space_of_sums,
};
use super::*;

#[test]
fn filtered_convolutions_are_right_on_every_path() {
    for path in Path::all() {
        let path = f32::path(path);
        for (channels, outputs) in [(1, 1), (5, 19), (16, 8), (33, 40)] {
            for windows in [[2, 2], [4, 6], [10, 2], [12, 14]] {
                let images = 2;
                let size = [windows[0] + 2, windows[1] + 3];
                let looks = Looks { images, size, channels, kernel: [3, 3], stride: 1, windows };
                assert!(fits(&looks));
                let what = format!("{path:?} {looks:?} {outputs}");
                let x = noise(images * size[0] * size[1] * channels, 1);
                let place = |row: usize| {
                    let line = row / windows[1];
                    [line / windows[0], line % windows[0], row % windows[1]]
                };
                let at = |[image, row, column]: [usize; 3], tap: usize, channel: usize| {
                    let (row, column) = (row + tap / 3, column + tap % 3);
                    f64::from(x[((image * size[0] + row) * size[1] + column) * channels + channel])
                };
                let (weight, bias) = (Matrix::<f32>::noise(outputs, 9 * channels, 2), noise(outputs, 3));
                let w = |n: usize, channel: usize, tap: usize| weight.at(n, 9 * channel + tap);
                let packed = Packed::pack(POINTS * channels, outputs, |k, n| {
                    of_kernel(k / channels, |tap| w(n, k % channels, tap) as f32)
                });
                let mut room = vec![f32::NAN; space(channels, outputs) + 64];
                let mut y = Matrix::<f32>::noise(images * windows[0] * windows[1], outputs, 5);
                let windowed = Windows::new(&x, looks);
                let bias = if channels == 5 { None } else { Some(bias.as_slice()) };
                let then = if outputs == 19 { Activation::Tanh } else { Activation::Identity };
                convolve_in_tiles_on(path, windowed, &packed, (bias, then), y.view_mut(), &mut room);
                assert!(room[space(channels, outputs)..].iter().all(|x| x.is_nan()), "{what}");
                let taps = || (0..9 * channels).map(|k| (k % 9, k / 9));
                y.check(&what, 2e-5, |row, n| {
                    let bias = bias.map_or(0.0, |bias| f64::from(bias[n]));
                    let z = bias + sum(taps().map(|(tap, c)| at(place(row), tap, c) * w(n, c, tap)));
                    if then == Activation::Tanh { z.tanh() } else { z }
                });

                let g = Matrix::<f32>::noise(y.rows, outputs, 4);
                let before = Matrix::<f32>::noise(outputs, 9 * channels, 6);
                let mut dw = before.clone();
                let mut room = vec![f32::NAN; space_of_sums(channels, outputs) + 64];
                add_outer_in_tiles_on(path, g.view(), windowed, dw.view_mut(), &mut room);
                assert!(room[space_of_sums(channels, outputs)..].iter().all(|x| x.is_nan()), "{what}");
                dw.check(&what, 2e-5, |n, k| {
                    let (tap, channel) = (k / channels, k % channels);
                    before.at(n, k) + sum((0..g.rows).map(|row| g.at(row, n) * at(place(row), tap, channel)))
                });
            }
        }
    }
}
