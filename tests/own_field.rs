//! Vector fields are an open set: one written by hand, pullback and all, gives the gradients of the same model.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::field::{Opening, Pulled};
use candle_ode::ops::combine;
use candle_ode::prelude::*;
use candle_ode::{Casts, Gradients, Linearization, Params, Result, Scale, VectorField};
use common::*;

/// f(y) = tanh(y W), with the pullback worked out on paper.
#[derive(Clone)]
struct ByHand(Params);

struct Open {
    leaves: Vec<Tensor>,
}

struct At {
    y: Tensor,
    w: Tensor,
    value: State,
}

impl Field for ByHand {
    fn params(&self) -> &Params {
        &self.0
    }

    fn open(&self, casts: &Casts, _: Opening, _: u64) -> Result<Box<dyn VectorField>> {
        Ok(Box::new(Open { leaves: casts.leaves().to_vec() }))
    }
}

impl VectorField for Open {
    fn eval(&self, _: &Time, y: &State) -> candle_core::Result<State> {
        Ok(State::from(y.single()?.matmul(&self.leaves[0].detach())?.tanh()?))
    }

    fn linearize(&self, t: &Time, y: &State) -> candle_core::Result<Box<dyn Linearization>> {
        let value = self.eval(t, y)?;
        Ok(Box::new(At { y: y.single()?.clone(), w: self.leaves[0].clone(), value }))
    }

    fn leaves(&self) -> &[Tensor] {
        &self.leaves
    }
}

impl Linearization for At {
    fn value(&self) -> &State {
        &self.value
    }

    fn pull(&self, cotangent: &State, scale: &Scale, gradients: &mut Gradients) -> candle_core::Result<Pulled> {
        let (kappa, f) = (cotangent.single()?, self.value.single()?);
        let kappa = scale.apply(kappa, f.dtype())?;
        let inner = (kappa * (1.0 - f.sqr()?)?)?;
        gradients.set_scale(scale);
        gradients.add_leaf(&self.w, &self.y.t()?.matmul(&inner)?)?;
        let mu = scale.undo(&inner.matmul(&self.w.detach().t()?)?, cotangent.single()?.dtype())?;
        let finite = combine::finite(&mu)?.and(gradients.take_finite());
        Ok(Pulled { y: State::from(mu), t: None, finite })
    }
}

#[test]
fn a_field_by_hand_gives_the_gradients_of_the_model() {
    for (precision, bound) in [(Precision::F64, 1e-13), (Precision::F32, 1e-6), (Precision::F16, 2e-3)] {
        let vars = VarMap::new();
        let model = ModelField::new_in(
            DType::F64,
            &vars,
            &Device::Cpu,
            |vb| vb.get((5, 5), "w"),
            |w: &Tensor, _: &Time, y: &Tensor| y.matmul(w)?.tanh(),
        )
        .unwrap();
        fill(&vars, 3, 1.0);
        let w = sorted(&vars)["w"].clone();
        let own = ByHand(Params::new([("w".to_owned(), w.as_tensor().clone())]));
        let y0 = Var::from_tensor(&normal(9, &[7, 5], DType::F64)).unwrap();
        let gradients = |ode: Ode| {
            let solution = ode.span(0.0, 1.0).steps(6).precision(precision).solve(y0.as_tensor()).unwrap();
            let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
            [&y0, &w].map(|x| grads.get(x).unwrap().clone())
        };
        let (by_hand, by_candle) = (gradients(Ode::new(&own)), gradients(Ode::new(&model)));
        for (by_hand, by_candle) in by_hand.iter().zip(&by_candle) {
            let error = relative(by_hand, by_candle);
            assert!(error < bound, "{:?}: {error:e}", precision.compute_dtype());
        }
    }
}
