//! Manual gradients against Candle's own unrolled graph and against central finite differences.

use super::*;
use candle_core::backprop::GradStore;

/// A loss as a function of named variables, for any way of finding its gradient.
pub struct Case {
    pub vars: Vec<(String, Var)>,
    pub loss: Box<dyn Fn(Adjoint) -> std::result::Result<Tensor, OdeError>>,
}

impl Case {
    pub fn new(
        vars: impl IntoIterator<Item = (String, Var)>,
        loss: impl Fn(Adjoint) -> std::result::Result<Tensor, OdeError> + 'static,
    ) -> Self {
        Self { vars: vars.into_iter().collect(), loss: Box::new(loss) }
    }

    pub fn gradients(&self, adjoint: impl Into<Adjoint>) -> GradStore {
        (self.loss)(adjoint.into()).unwrap().backward().unwrap()
    }

    /// Manual == unrolled to 1e-12, for both stage memories, bit-identical to each other; and == finite differences.
    pub fn check(&self) {
        self.equals_unrolled();
        self.equals_finite_differences();
    }

    pub fn equals_unrolled(&self) {
        let all = self.gradients(Discrete::default());
        let one = self.gradients(Discrete::default().stage_memory(StageMemory::One));
        let oracle = self.gradients(Unrolled);
        for (name, var) in &self.vars {
            let Some(expected) = oracle.get(var) else {
                let nothing = |of: &GradStore| of.get(var).is_none_or(|g| values(g).iter().all(|g| *g == 0.0));
                assert!(nothing(&all) && nothing(&one), "{name} has a gradient out of nothing");
                continue;
            };
            let (all, one) = (all.get(var).unwrap(), one.get(var).unwrap());
            assert_eq!((all.dtype(), all.dims()), (var.dtype(), var.dims()), "{name}");
            assert_eq!(bits(all), bits(one), "{name} depends on the stage memory");
            let error = relative(all, expected);
            assert!(error < 1e-12, "{name} against unrolled: {error:e}");
        }
    }

    pub fn equals_finite_differences(&self) {
        let grads = self.gradients(Discrete::default());
        let loss = || (self.loss)(Discrete::default().into()).unwrap().to_scalar::<f64>().unwrap();
        for (name, var) in &self.vars {
            let differences = differences(var, 1e-5, loss);
            match grads.get(var) {
                Some(gradient) => {
                    let error = relative(gradient, &differences);
                    assert!(error < 1e-8, "{name} against differences: {error:e}");
                }
                None => assert!(values(&differences).iter().all(|d| *d == 0.0), "{name} has no gradient but matters"),
            }
        }
    }
}

/// (L(x + ε) − L(x − ε)) / 2ε for each element x of `var`, which is left as it was.
pub fn differences(var: &Var, epsilon: f64, loss: impl Fn() -> f64) -> Tensor {
    let start = var.as_tensor().copy().unwrap();
    let flat = values(&start);
    let shifted = |n: usize, by: f64| {
        let mut x = flat.clone();
        x[n] += by;
        let moved = Tensor::from_vec(x, start.shape(), start.device()).unwrap().to_dtype(start.dtype()).unwrap();
        var.set(&moved).unwrap();
        loss()
    };
    let slope = |n: usize| (shifted(n, epsilon) - shifted(n, -epsilon)) / (2.0 * epsilon);
    let differences: Vec<f64> = (0..flat.len()).map(slope).collect();
    var.set(&start).unwrap();
    Tensor::from_vec(differences, start.shape(), start.device()).unwrap()
}
