//! Dense output: y(t + θh) = y + h Σ bᵢ(θ) kᵢ for 0 ≤ θ ≤ 1, with polynomials bᵢ in place of the weights.
//!
//! A method's own interpolant serves where it has one; else Hermite's cubic through y, y⁺ and the slopes at both ends,
//! for which f(t + h, y⁺) is one more stage. So the solution inside a step is one step of another explicit method.

use super::tableau::Tableau;
use crate::error::Result;

impl Tableau {
    /// The same method with an interpolant of its own: by stage, the coefficients of θ, θ², … in bᵢ(θ).
    ///
    /// # Errors
    /// If there is not one polynomial a stage, bᵢ(1) ≠ bᵢ, or Σ bᵢ(θ) ≠ θ.
    pub fn with_interpolant(mut self, polynomials: &[&[f64]]) -> Result<Self> {
        if polynomials.len() != self.stages() {
            let reason = format!("{} interpolating polynomials for {} stages", polynomials.len(), self.stages());
            return Err(self.wrong(reason));
        }
        let polynomials: Vec<Vec<f64>> = polynomials.iter().map(|row| row.to_vec()).collect();
        for (i, polynomial) in polynomials.iter().enumerate() {
            let (end, b) = (evaluate(polynomial, 1.0), self.weights()[i]);
            if (end - b).abs() > INTERPOLATED {
                return Err(self.wrong(format!("the polynomial of stage {i} is {end} at the end of a step, not {b}")));
            }
        }
        for theta in [0.25, 0.5, 0.75] {
            let sum: f64 = polynomials.iter().map(|polynomial| evaluate(polynomial, theta)).sum();
            if (sum - theta).abs() > INTERPOLATED {
                return Err(self.wrong(format!("the interpolating polynomials sum to {sum} at θ = {theta}")));
            }
        }
        self.interpolant = Some(polynomials);
        Ok(self)
    }

    /// The method whose step from y gives the solution at t + θh of a step of this one: the same stages, and where the
    /// interpolant is Hermite's and the last stage is not at y⁺, that one more.
    pub fn interpolated(&self, theta: f64) -> Self {
        let (a, c) = self.with_end();
        let b = match &self.interpolant {
            Some(polynomials) => polynomials.iter().map(|polynomial| evaluate(polynomial, theta)).collect(),
            None => hermite(self.weights(), a.len(), theta),
        };
        Self::unchecked(format!("{} at θ = {theta}", self.name()), self.order(), (a, b, c))
    }

    /// The rows and nodes of the stages, the last of which is at y⁺ if the interpolant is Hermite's.
    fn with_end(&self) -> (Vec<Vec<f64>>, Vec<f64>) {
        let mut rows: Vec<Vec<f64>> = (0..self.stages()).map(|i| (0..i).map(|j| self.a(i, j)).collect()).collect();
        let mut nodes = self.nodes().to_vec();
        if self.interpolant.is_none() && !self.is_fsal() {
            rows.push(self.weights().to_vec());
            nodes.push(1.0);
        }
        (rows, nodes)
    }
}

/// How far an interpolant that is given in decimals may be off.
const INTERPOLATED: f64 = 1e-11;

/// Σ coefficientsₙ θⁿ⁺¹.
fn evaluate(coefficients: &[f64], theta: f64) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, coefficient| (sum + coefficient) * theta)
}

/// bᵢ (3θ² − 2θ³), and θ(1 − θ)² for the first of `stages`, −θ²(1 − θ) for the last.
fn hermite(weights: &[f64], stages: usize, theta: f64) -> Vec<f64> {
    let mut b: Vec<f64> = weights.iter().map(|b| b * theta * theta * (3.0 - 2.0 * theta)).collect();
    b.resize(stages, 0.0);
    b[0] += theta * (1.0 - theta) * (1.0 - theta);
    b[stages - 1] -= theta * theta * (1.0 - theta);
    b
}

/// Hermite's cubic plus dᵢ θ²(1 − θ)², in powers of θ, for a method whose last stage is at y⁺.
pub(super) fn quartic(b: &[f64], d: &[f64]) -> Vec<[f64; 4]> {
    let last = b.len() - 1;
    let of_stage = |(i, (b, d)): (usize, (&f64, &f64))| {
        let (first, end) = (f64::from(u8::from(i == 0)), f64::from(u8::from(i == last)));
        [first, 3.0 * b - 2.0 * first - end + d, first + end - 2.0 * b - 2.0 * d, *d]
    };
    b.iter().zip(d).enumerate().map(of_stage).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::{Bosh3, Dopri5, ExplicitRungeKutta, Heun, Rk4, Tsit5};

    /// Σ bᵢ(θ) cᵢ^(q−1) − θ^q/q for q = 1 … `order`.
    fn quadrature(tableau: &Tableau, order: i32) {
        for theta in [0.1, 0.3, 0.5, 0.77, 1.0] {
            let at = tableau.interpolated(theta);
            for q in 1..=order {
                let sum: f64 = at.weights().iter().zip(at.nodes()).map(|(b, c)| b * c.powi(q - 1)).sum();
                let expected = theta.powi(q) / f64::from(q);
                assert!((sum - expected).abs() < 1e-13, "{}: order {q}, {sum} for {expected}", at.name());
            }
        }
    }

    #[test]
    fn interpolants_integrate_polynomials() {
        quadrature(ExplicitRungeKutta::tableau(&Heun), 2);
        quadrature(ExplicitRungeKutta::tableau(&Bosh3), 3);
        quadrature(ExplicitRungeKutta::tableau(&Rk4), 3);
        quadrature(ExplicitRungeKutta::tableau(&Dopri5), 4);
        quadrature(ExplicitRungeKutta::tableau(&Tsit5), 4);
    }

    #[test]
    fn an_interpolant_that_contradicts_its_method_is_refused() {
        let heun = || Tableau::new("mine", 2, &[&[1.0]], &[0.5, 0.5]).unwrap();
        assert!(heun().with_interpolant(&[&[1.0, -0.5], &[0.0, 0.5]]).is_ok());
        for wrong in [&[&[1.0, -0.5][..]][..], &[&[1.0, -0.4], &[0.0, 0.4]], &[&[0.9, -0.4], &[0.0, 0.5]]] {
            assert!(heun().with_interpolant(wrong).is_err());
        }
    }
}
