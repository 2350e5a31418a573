//! Group norms of pixels on every path.

use super::super::group_norm::{Affine, Grouped, Moments, Normalise, Place, Pull, space};
use super::*;

const EPS: f64 = 1e-3;

/// Images and what is exactly true of them.
struct Case<T> {
    sizes: Grouped,
    images: usize,
    x: Vec<T>,
    weight: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

impl<T: Held> Case<T> {
    /// Noise around numbers that differ from group to group, so large that they must be taken off first.
    fn new(sizes: Grouped, has_parameters: bool, around: f32) -> Self {
        let (images, channels) = (3, sizes.channels);
        let x = noise(images * sizes.height * sizes.width * channels, 1).into_iter().enumerate();
        let x = x.map(|(n, x)| T::of(x + around * (n % channels / (channels / sizes.groups)) as f32)).collect();
        let parameters = |seed| has_parameters.then(|| noise(channels, seed));
        Self { sizes, images, x, weight: parameters(2), bias: parameters(3) }
    }

    fn at(&self, n: usize) -> f64 {
        f64::from(self.x[n].wide())
    }

    fn image(&self) -> usize {
        self.x.len() / self.images
    }

    /// Image and group of an element, as one number.
    fn group(&self, n: usize) -> usize {
        let Grouped { channels, groups, .. } = self.sizes;
        n / self.image() * groups + n % channels / (channels / groups)
    }

    /// The mean over its group of a function of each element, at the elements of all.
    fn means(&self, of: impl Fn(usize) -> f64) -> Vec<f64> {
        let mut sums = vec![0.0; self.images * self.sizes.groups];
        (0..self.x.len()).for_each(|n| sums[self.group(n)] += of(n));
        let count = (self.image() / self.sizes.groups) as f64;
        (0..self.x.len()).map(|n| sums[self.group(n)] / count).collect()
    }

    /// x̂ and s.
    fn standard(&self) -> (Vec<f64>, Vec<f64>) {
        let mean = self.means(|n| self.at(n));
        let variance = self.means(|n| (self.at(n) - mean[n]).powi(2));
        let scale: Vec<f64> = variance.iter().map(|variance| 1.0 / (variance + EPS).sqrt()).collect();
        ((0..self.x.len()).map(|n| scale[n] * (self.at(n) - mean[n])).collect(), scale)
    }

    fn by(&self, n: usize) -> f64 {
        self.weight.as_ref().map_or(1.0, |weight| f64::from(weight[n % self.sizes.channels]))
    }

    fn plus(&self, n: usize) -> f64 {
        self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[n % self.sizes.channels]))
    }

    fn check(&self, path: Path, bound: f64, stored: f64) {
        let what = format!("{path:?} {:?} {}", self.sizes, self.weight.is_some());
        let Self { sizes, images, x, .. } = self;
        let (sizes, images, channels) = (*sizes, *images, self.sizes.channels);
        let (standard, scale) = self.standard();
        let mut space = vec![f32::NAN; space(&sizes)];
        let mut moments = vec![f32::NAN; images * sizes.moments()];
        path.run(Moments { sizes, eps: EPS as f32, x, to: &mut moments, space: &mut space });

        // In a frame: two pixels, and lines, around, and one channel more in each pixel.
        let pixel = channels + 1;
        let line = (sizes.width + 3) * pixel;
        let place = Place { first: line + 2 * pixel, pixel, line, image: (sizes.height + 2) * line };
        for (then, place) in [(Activation::Cos, place), (Activation::Identity, self.dense())] {
            let mut y = vec![T::of(7.0); images * place.image];
            let parameters = Affine { weight: self.weight.as_deref(), bias: self.bias.as_deref() };
            let behind = (parameters, then);
            path.run(Normalise { sizes, x, moments: &moments, behind, to: &mut y, place, space: &mut space });
            for (n, standard) in standard.iter().enumerate() {
                let (at, c) = (n / channels, n % channels);
                let (image, at) = (at / (sizes.height * sizes.width), at % (sizes.height * sizes.width));
                let (row, column) = (at / sizes.width, at % sizes.width);
                let to = image * place.image + place.first + row * place.line + column * place.pixel + c;
                let normal = standard * self.by(n) + self.plus(n);
                let (exact, error) = match then {
                    Activation::Identity => (normal, stored * normal.abs()),
                    _ => (normal.cos(), stored * normal.cos().abs()),
                };
                let y = std::mem::replace(&mut y[to], T::of(7.0)).wide();
                assert!((f64::from(y) - exact).abs() <= bound + error, "{what} {then:?} at {n}: {y} for {exact}");
            }
            assert!(y.iter().all(|y| y.wide() == 7.0), "{what}: something is written between the pixels");
        }

        let g: Vec<T> = noise(x.len(), 4).into_iter().map(T::of).collect();
        let cotangent: Vec<f64> = g.iter().map(|g| f64::from(g.wide())).collect();
        let (mut dx, mut sums) = (g, vec![f32::NAN; images * 2 * channels]);
        let weight = self.weight.as_deref();
        path.run(Pull { sizes, x, moments: &moments, weight, g: &mut dx, sums: &mut sums, space: &mut space });
        let mean = self.means(|n| self.by(n) * cotangent[n]);
        let along = self.means(|n| self.by(n) * cotangent[n] * standard[n]);
        let mut exact = vec![0.0; sums.len()];
        for n in 0..x.len() {
            let of_x = scale[n] * (self.by(n) * cotangent[n] - mean[n] - standard[n] * along[n]);
            let error = bound * scale[n] + stored * of_x.abs();
            assert!((f64::from(dx[n].wide()) - of_x).abs() <= error, "{what}: {:?} for {of_x}", dx[n]);
            let first = n / self.image() * 2 * channels + n % channels;
            exact[first] += cotangent[n] * standard[n];
            exact[first + channels] += cotangent[n];
        }
        for (sum, exact) in sums.iter().zip(exact) {
            let error = bound * (sizes.height * sizes.width) as f64;
            assert!((f64::from(*sum) - exact).abs() <= error, "{what}: {sum} for {exact}");
        }
    }

    fn dense(&self) -> Place {
        let Grouped { width, channels, .. } = self.sizes;
        Place { first: 0, pixel: channels, line: width * channels, image: self.image() }
    }
}

fn norms_are_right<T: Held>(around: f32, bound: f64, stored: f64) {
    for path in Path::all() {
        let path = T::path(path);
        for (channels, groups) in [(1, 1), (6, 3), (16, 16), (40, 4), (65, 5)] {
            for (height, width) in [(1, 1), (2, 5), (9, 8)] {
                for has_parameters in [true, false] {
                    let sizes = Grouped { height, width, channels, groups };
                    Case::<T>::new(sizes, has_parameters, around).check(path, bound, stored);
                }
            }
        }
    }
}

#[test]
fn norms_in_f32_are_right_on_every_path() {
    norms_are_right::<f32>(0.0, 3e-6, 0.0);
    norms_are_right::<f32>(1e4, 3e-6, 0.0);
}

#[test]
fn norms_in_bf16_are_right_on_every_path() {
    norms_are_right::<bf16>(2.0, 3e-6, 4e-3);
}
