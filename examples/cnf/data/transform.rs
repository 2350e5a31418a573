//! From the data's own coordinates x to the model's z and back, with the log-determinant that makes densities in the
//! two comparable: log p(x) = log p(z) + log|det dz/dx|.
//!
//! Standardising is z = (x − mean)/deviation, per column. Bounded data (pixels in [0, range]) are squashed before:
//! s = α + (1 − 2α)·x/range, u = ln(s/(1 − s)).

use super::table::Matrix;

/// The way between the two coordinate systems; the identity by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transform {
    range: Option<f64>,
    /// Mean and deviation per column; none for the identity.
    columns: Vec<(f64, f64)>,
}

/// How far from 0 and 1 the squashed values stay.
const ALPHA: f64 = 0.05;

impl Transform {
    /// Standardises the columns of `rows`, after the logit if the values are bounded to [0, range].
    ///
    /// # Errors
    /// The index of a column whose values are all the same: it has no density.
    pub fn fit(rows: &Matrix, range: Option<f64>) -> Result<Self, usize> {
        let mut transform = Self { range, columns: Vec::new() };
        let count = rows.len() as f64;
        let mut sums = vec![(0.0, 0.0); rows.columns()];
        let squashed = || {
            rows.rows().map(|row| {
                let mut row = row.to_vec();
                transform.squash(&mut row);
                row
            })
        };
        for row in squashed() {
            row.iter().zip(&mut sums).for_each(|(v, (mean, _))| *mean += v / count);
        }
        for row in squashed() {
            row.iter().zip(&mut sums).for_each(|(v, (mean, square))| *square += (v - *mean).powi(2) / count);
        }
        if let Some(column) = sums.iter().position(|(mean, square)| square.sqrt() <= 1e-12 * mean.abs()) {
            return Err(column);
        }
        transform.columns = sums.into_iter().map(|(mean, square)| (mean, square.sqrt())).collect();
        Ok(transform)
    }

    /// x → z in place; returns log|det dz/dx|.
    pub fn apply(&self, row: &mut [f64]) -> f64 {
        let mut log_det = self.squash(row);
        for (value, (mean, deviation)) in row.iter_mut().zip(&self.columns) {
            *value = (*value - mean) / deviation;
            log_det -= deviation.ln();
        }
        log_det
    }

    /// z → x in place.
    pub fn invert(&self, row: &mut [f64]) {
        for (value, (mean, deviation)) in row.iter_mut().zip(&self.columns) {
            *value = *value * deviation + mean;
        }
        if let Some(range) = self.range {
            for value in row {
                let share = 1.0 / (1.0 + (-*value).exp());
                *value = (share - ALPHA) / (1.0 - 2.0 * ALPHA) * range;
            }
        }
    }

    fn squash(&self, row: &mut [f64]) -> f64 {
        let Some(range) = self.range else { return 0.0 };
        let slope = (1.0 - 2.0 * ALPHA) / range;
        row.iter_mut()
            .map(|value| {
                let share = ALPHA + slope * *value;
                *value = (share / (1.0 - share)).ln();
                (slope / (share * (1.0 - share))).ln()
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(range: Option<f64>) {
        let rows = Matrix::new(vec![1.0, 10.0, 3.0, 2.5, 8.0, 0.5, 16.5, 4.0], 2);
        let transform = Transform::fit(&rows, range).unwrap();
        let (mut sum, mut square) = ([0.0; 2], [0.0; 2]);
        for row in rows.rows() {
            let mut z = row.to_vec();
            let log_det = transform.apply(&mut z);
            let slope = |column: usize| {
                let at = |step: f64| {
                    let mut moved = row.to_vec();
                    moved[column] += step;
                    transform.apply(&mut moved);
                    moved[column]
                };
                (at(1e-6) - at(-1e-6)) / 2e-6
            };
            assert!((log_det - (slope(0) * slope(1)).ln()).abs() < 1e-7);
            for column in 0..2 {
                sum[column] += z[column];
                square[column] += z[column].powi(2);
            }
            transform.invert(&mut z);
            assert!(z.iter().zip(row).all(|(back, x)| (back - x).abs() < 1e-12));
        }
        for column in 0..2 {
            assert!(sum[column].abs() < 1e-12 && (square[column] - 4.0).abs() < 1e-12);
        }
    }

    #[test]
    fn standardised_rows_have_mean_zero_and_deviation_one_and_come_back() {
        check(None);
        check(Some(17.0));
    }

    #[test]
    fn constant_columns_are_refused() {
        let rows = Matrix::new(vec![1.0, 0.1, 2.0, 0.1, 3.0, 0.1], 2);
        assert_eq!(Transform::fit(&rows, None), Err(1));
    }
}
