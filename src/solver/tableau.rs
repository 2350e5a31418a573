//! Butcher tableaus of explicit Runge–Kutta methods, which check themselves.

use crate::error::{OdeError, Result};

/// The coefficients of an explicit Runge–Kutta method: Yᵢ = y + h Σ_{j<i} aᵢⱼ kⱼ, kᵢ = f(t + cᵢh, Yᵢ),
/// y⁺ = y + h Σ bᵢ kᵢ, and optionally the weights b̂ of an embedded solution of another order.
///
/// ```
/// use candle_ode::Tableau;
///
/// let ralston3 = Tableau::new("Ralston 3", 3, &[&[0.5], &[0.0, 0.75]], &[2. / 9., 1. / 3., 4. / 9.])?;
/// assert_eq!(ralston3.nodes(), [0.0, 0.5, 0.75]);
/// assert!(Tableau::new("wrong", 2, &[&[0.5]], &[0.5, 0.6]).is_err());      // Σ b ≠ 1
/// # Ok::<(), candle_ode::OdeError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Tableau {
    name: String,
    order: usize,
    a: Vec<Vec<f64>>,
    b: Vec<f64>,
    c: Vec<f64>,
    embedded: Option<Vec<f64>>,
    /// By stage, the coefficients of θ, θ², … in the weights of dense output.
    pub(super) interpolant: Option<Vec<Vec<f64>>>,
}

/// How far a sum of coefficients may be off.
const TOLERANCE: f64 = 1e-13;

impl Tableau {
    /// A method from the rows of its strictly lower triangular matrix (the empty first row left out) and its weights.
    /// The nodes c are the row sums.
    ///
    /// # Errors
    /// [`OdeError::Tableau`] if the sizes do not fit, a coefficient is not finite, Σ b ≠ 1, or an order condition up to
    /// order 4 (or `order`, if that is less) does not hold.
    pub fn new(name: &str, order: usize, rows: &[&[f64]], b: &[f64]) -> Result<Self> {
        let mut a = vec![vec![]];
        a.extend(rows.iter().map(|row| row.to_vec()));
        // A stage at the end of the step is there to the bit, whatever rounding made of its row.
        let snap = |c: f64| if (c - 1.0).abs() < TOLERANCE { 1.0 } else { c };
        let c = a.iter().map(|row| snap(row.iter().sum())).collect();
        let tableau = Self { name: name.to_owned(), order, a, b: b.to_vec(), c, embedded: None, interpolant: None };
        tableau.check()?;
        Ok(tableau)
    }

    /// Coefficients (a, b, c) of another kind, b not summing to 1, which come from a tableau that has been checked.
    pub(super) fn unchecked(name: String, order: usize, (a, b, c): (Vec<Vec<f64>>, Vec<f64>, Vec<f64>)) -> Self {
        Self { name, order, a, b, c, embedded: None, interpolant: None }
    }

    /// The same method with the weights of an embedded solution.
    ///
    /// # Errors
    /// If there is not one weight per stage, or Σ b̂ ≠ 1.
    pub fn with_embedded(mut self, weights: &[f64]) -> Result<Self> {
        if weights.len() != self.stages() {
            return Err(self.wrong(format!("{} embedded weights for {} stages", weights.len(), self.stages())));
        }
        let sum: f64 = weights.iter().sum();
        if (sum - 1.0).abs() > TOLERANCE {
            return Err(self.wrong(format!("the embedded weights sum to {sum}, not 1")));
        }
        self.embedded = Some(weights.to_vec());
        Ok(self)
    }

    /// The name of the method.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its order.
    pub fn order(&self) -> usize {
        self.order
    }

    /// Its number of stages.
    pub fn stages(&self) -> usize {
        self.b.len()
    }

    /// aᵢⱼ, with 0 ≤ j < i.
    pub fn a(&self, i: usize, j: usize) -> f64 {
        self.a[i][j]
    }

    /// The weights b.
    pub fn weights(&self) -> &[f64] {
        &self.b
    }

    /// The nodes c.
    pub fn nodes(&self) -> &[f64] {
        &self.c
    }

    /// The embedded weights b̂.
    pub fn embedded(&self) -> Option<&[f64]> {
        self.embedded.as_deref()
    }

    /// The order of the embedded solution, as far as its weights show: from order 4 on, one less than that of the
    /// method (but at least 4).
    pub fn embedded_order(&self) -> Option<usize> {
        let embedded = self.embedded.as_ref()?;
        let broken = |(order, _, value, expected): &(usize, &str, f64, f64)| {
            ((value - expected).abs() > TOLERANCE).then_some(*order)
        };
        match self.order_conditions(embedded).iter().filter_map(broken).min() {
            Some(order) => Some(order - 1),
            None => Some((self.order - 1).max(4)),
        }
    }

    /// First same as last: the last stage is the first of the next step.
    pub fn is_fsal(&self) -> bool {
        let last = self.stages() - 1;
        last > 0 && self.b[last] == 0.0 && self.a[last] == self.b[..last]
    }

    /// Whether stage i matters for y⁺: through its weight, or through a later stage that does.
    pub fn is_used(&self, i: usize) -> bool {
        self.b[i] != 0.0 || (i + 1..self.stages()).any(|j| self.a[j][i] != 0.0 && self.is_used(j))
    }

    fn check(&self) -> Result<()> {
        let s = self.stages();
        if s == 0 {
            return Err(self.wrong("it has no stages".into()));
        }
        if self.a.len() != s {
            return Err(self.wrong(format!(
                "{s} weights need {} rows below the empty first one, not {}",
                s - 1,
                self.a.len() - 1
            )));
        }
        if let Some(i) = (0..s).find(|&i| self.a[i].len() != i) {
            return Err(self.wrong(format!("stage {i} needs {i} coefficients, not {}", self.a[i].len())));
        }
        let all = self.a.iter().flatten().chain(&self.b);
        if let Some(bad) = all.clone().find(|x| !x.is_finite()) {
            return Err(self.wrong(format!("it holds {bad}")));
        }
        if self.order == 0 {
            return Err(self.wrong("order 0 does not converge".into()));
        }
        for (order, condition, value, expected) in self.order_conditions(&self.b) {
            if order <= self.order && (value - expected).abs() > TOLERANCE {
                return Err(self.wrong(format!("{condition} = {value}, but order {order} needs {expected}")));
            }
        }
        Ok(())
    }

    /// The conditions up to order 4 (Hairer, Nørsett, Wanner, *Solving ODEs I*, II.1–II.2).
    fn order_conditions(&self, b: &[f64]) -> Vec<(usize, &'static str, f64, f64)> {
        let s = self.stages();
        let weighted = |of: &dyn Fn(usize) -> f64| (0..s).map(|i| b[i] * of(i)).sum::<f64>();
        let inner = |i: usize, of: &dyn Fn(usize) -> f64| (0..i).map(|j| self.a[i][j] * of(j)).sum::<f64>();
        let c = &self.c;
        vec![
            (1, "Σ b", weighted(&|_| 1.0), 1.0),
            (2, "Σ b c", weighted(&|i| c[i]), 1.0 / 2.0),
            (3, "Σ b c²", weighted(&|i| c[i] * c[i]), 1.0 / 3.0),
            (3, "Σ b a c", weighted(&|i| inner(i, &|j| c[j])), 1.0 / 6.0),
            (4, "Σ b c³", weighted(&|i| c[i].powi(3)), 1.0 / 4.0),
            (4, "Σ b c a c", weighted(&|i| c[i] * inner(i, &|j| c[j])), 1.0 / 8.0),
            (4, "Σ b a c²", weighted(&|i| inner(i, &|j| c[j] * c[j])), 1.0 / 12.0),
            (4, "Σ b a a c", weighted(&|i| inner(i, &|j| inner(j, &|k| c[k]))), 1.0 / 24.0),
        ]
    }

    pub(super) fn wrong(&self, reason: String) -> OdeError {
        OdeError::Tableau { name: self.name.clone(), reason }
    }
}
