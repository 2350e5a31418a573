//! Densities in the plane that are easy to look at and hard to fit: those of FFJORD's toy data.
//!
//! # Reference
//! Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD", arXiv 1810.01367, and its `lib/toy_data.py`.

use rand::Rng;
use rand_distr::StandardNormal;
use std::f64::consts::{FRAC_1_SQRT_2, PI, TAU};

/// A density in the plane; all of them live in about [-4, 4]².
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toy {
    /// Uniform on 8 squares of area 4.
    Checkerboard,
    /// Eight round Gaussians on a circle.
    EightGaussians,
    /// Two spirals that wind into each other.
    TwoSpirals,
    /// Five bent blades.
    Pinwheel,
    /// Two half circles.
    Moons,
    /// Two circles.
    Circles,
    /// One spiral.
    SwissRoll,
    /// Four circles.
    Rings,
}

impl Toy {
    /// All of them, in the order messages list them.
    pub const ALL: [Self; 8] = [
        Self::Checkerboard,
        Self::EightGaussians,
        Self::TwoSpirals,
        Self::Pinwheel,
        Self::Moons,
        Self::Circles,
        Self::SwissRoll,
        Self::Rings,
    ];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Checkerboard => "checkerboard",
            Self::EightGaussians => "8gaussians",
            Self::TwoSpirals => "2spirals",
            Self::Pinwheel => "pinwheel",
            Self::Moons => "moons",
            Self::Circles => "circles",
            Self::SwissRoll => "swissroll",
            Self::Rings => "rings",
        }
    }

    /// The density of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|toy| toy.name() == name)
    }

    /// Its entropy in nats, which no model's NLL can beat, where it has a closed form.
    pub fn entropy(self) -> Option<f64> {
        (self == Self::Checkerboard).then(|| 32f64.ln())
    }

    /// Draws one point.
    pub fn point(self, rng: &mut impl Rng) -> [f64; 2] {
        match self {
            Self::Checkerboard => {
                let x = uniform(rng, -2.0, 2.0);
                let y = rng.random::<f64>() - 2.0 * f64::from(rng.random_range(0..2u8)) + x.floor().rem_euclid(2.0);
                [2.0 * x, 2.0 * y]
            }
            Self::EightGaussians => {
                let angle = f64::from(rng.random_range(0..8u8)) * TAU / 8.0;
                noisy(rng, [4.0 * angle.cos(), 4.0 * angle.sin()], 0.5).map(|v| v * FRAC_1_SQRT_2)
            }
            Self::TwoSpirals => {
                let turn = rng.random::<f64>().sqrt() * 3.0 * PI;
                let x = -turn.cos() * turn + 0.5 * rng.random::<f64>();
                let y = turn.sin() * turn + 0.5 * rng.random::<f64>();
                let side = if rng.random() { 1.0 } else { -1.0 };
                noisy(rng, [side * x / 3.0, side * y / 3.0], 0.1)
            }
            Self::Pinwheel => {
                let (radial, tangential) = (1.0 + 0.3 * normal(rng), 0.1 * normal(rng));
                let angle = f64::from(rng.random_range(0..5u8)) * TAU / 5.0 + 0.25 * radial.exp();
                let (sin, cos) = angle.sin_cos();
                [2.0 * (radial * cos + tangential * sin), 2.0 * (tangential * cos - radial * sin)]
            }
            Self::Moons => {
                let (sin, cos) = uniform(rng, 0.0, PI).sin_cos();
                let centre = if rng.random() { [cos, sin] } else { [1.0 - cos, 0.5 - sin] };
                let [x, y] = noisy(rng, centre, 0.1);
                [2.0 * x - 1.0, 2.0 * y - 0.2]
            }
            Self::Circles => {
                let radius = if rng.random() { 1.0 } else { 0.5 };
                on_circle(rng, radius, 0.08).map(|v| 3.0 * v)
            }
            Self::SwissRoll => {
                let turn = 1.5 * PI * (1.0 + 2.0 * rng.random::<f64>());
                noisy(rng, [turn * turn.cos(), turn * turn.sin()], 1.0).map(|v| v / 5.0)
            }
            Self::Rings => {
                let radius = 0.25 * f64::from(rng.random_range(1..=4u8));
                on_circle(rng, 3.0 * radius, 0.08)
            }
        }
    }
}

fn on_circle(rng: &mut impl Rng, radius: f64, noise: f64) -> [f64; 2] {
    let (sin, cos) = uniform(rng, 0.0, TAU).sin_cos();
    noisy(rng, [radius * cos, radius * sin], noise)
}

fn noisy(rng: &mut impl Rng, [x, y]: [f64; 2], noise: f64) -> [f64; 2] {
    [x + noise * normal(rng), y + noise * normal(rng)]
}

fn normal(rng: &mut impl Rng) -> f64 {
    rng.sample(StandardNormal)
}

fn uniform(rng: &mut impl Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * rng.random::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draws::{Purpose, draws};

    #[test]
    fn checkerboard_is_uniform_on_eight_squares_of_area_four() {
        let mut rng = draws(0, Purpose::Batch, 0);
        let mut counts = [[0u32; 4]; 4];
        for _ in 0..80_000 {
            let [x, y] = Toy::Checkerboard.point(&mut rng);
            assert!((-4.0..4.0).contains(&x) && (-4.0..4.0).contains(&y));
            counts[((x + 4.0) / 2.0) as usize][((y + 4.0) / 2.0) as usize] += 1;
        }
        for (i, row) in counts.iter().enumerate() {
            for (j, &count) in row.iter().enumerate() {
                // Standard deviation of a square's count: 94.
                let wanted = if (i + j) % 2 == 0 { 10_000 } else { 0 };
                assert!(count.abs_diff(wanted) < 500, "square {i}, {j}: {count}");
            }
        }
    }

    #[test]
    fn every_density_fits_the_window() {
        for toy in Toy::ALL {
            let mut rng = draws(1, Purpose::Batch, 0);
            let points: Vec<_> = (0..20_000).map(|_| toy.point(&mut rng)).collect();
            let inside = points.iter().filter(|point| point.iter().all(|v| v.abs() < 4.5)).count();
            assert!(inside >= 19_900, "{}: {inside} of 20000 inside", toy.name());
            for axis in 0..2 {
                let mean = points.iter().map(|point| point[axis]).sum::<f64>() / 20_000.0;
                assert!(mean.abs() < 0.45, "{}: mean of axis {axis} is {mean}", toy.name());
            }
        }
    }

    #[test]
    fn gaussians_have_the_variance_of_their_formula() {
        let mut rng = draws(2, Purpose::Batch, 0);
        let square = (0..50_000).map(|_| Toy::EightGaussians.point(&mut rng)).map(|[x, y]| x * x + y * y).sum::<f64>();
        // (4² + 2 · 0.5²) / 2
        assert!((square / 50_000.0 - 8.25).abs() < 0.05, "{}", square / 50_000.0);
    }
}
