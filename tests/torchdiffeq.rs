//! A small field agrees with torchdiffeq: y(T), the loss and every gradient, in F64.
//!
//! `tests/fixtures/torchdiffeq.py` made the numbers and says with which versions.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, Linear, Module, VarBuilder, VarMap, linear};
use candle_ode::prelude::*;
use common::*;
use serde_json::Value;

/// tanh([y, t] W₁ᵀ + b₁) W₂ᵀ + b₂, the field of the fixture.
struct Field(Linear, Linear);

impl Field {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        Ok(Self(linear(4, 8, vb.pp("inner"))?, linear(8, 3, vb.pp("outer"))?))
    }

    fn forward(&self, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
        let time = t.like(y)?.broadcast_as((y.dim(0)?, 1))?;
        self.1.forward(&self.0.forward(&Tensor::cat(&[y, &time], 1)?)?.tanh()?)
    }
}

/// A number, or nested rows of them.
fn tensor(value: &Value) -> Tensor {
    match value {
        Value::Array(rows) => Tensor::stack(&rows.iter().map(tensor).collect::<Vec<_>>(), 0).unwrap(),
        number => Tensor::new(number.as_f64().unwrap(), &Device::Cpu).unwrap(),
    }
}

fn agrees(method: &str, solver: impl Solver) {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/torchdiffeq.json")).unwrap();
    let fixture: Value = serde_json::from_str(&text).unwrap();
    let solves = fixture["solves"].as_array().unwrap();
    let expected = solves.iter().find(|solve| solve["method"] == method).unwrap();

    let vars = VarMap::new();
    for (name, value) in fixture["theta"].as_object().unwrap() {
        let value = tensor(value);
        vars.get(value.shape(), name, Init::Const(0.0), DType::F64, &Device::Cpu).unwrap();
        sorted(&vars)[name].set(&value).unwrap();
    }
    let field = field64(&vars, Field::new, |m, t, y, _| Ok(State::from(m.forward(t, y.single()?)?)));
    assert_eq!(field.params().len(), 4);
    let y0 = Var::from_tensor(&tensor(&fixture["y0"])).unwrap();
    let times = values(&tensor(&fixture["times"]));
    let solution = Ode::new(&field).solver(solver).grid(&times).solve(y0.as_tensor()).unwrap();
    let loss = solution.last().sqr().unwrap().mean_all().unwrap();
    let grads = loss.backward().unwrap();

    let same = |what: &str, ours: &Tensor, theirs: &Value| {
        let (ours, theirs) = (values(ours), values(&tensor(theirs)));
        assert_eq!(ours.len(), theirs.len(), "{what}");
        for (a, b) in ours.iter().zip(&theirs) {
            assert!((a - b).abs() < 1e-10, "{method}, {what}: {a} here, {b} there");
        }
    };
    same("y(T)", solution.last(), &expected["y_end"]);
    same("loss", &loss, &expected["loss"]);
    same("dL/dy0", grads.get(&y0).unwrap(), &expected["dl_dy0"]);
    for (name, gradient) in expected["dl_dtheta"].as_object().unwrap() {
        same(name, grads.get(&sorted(&vars)[name]).unwrap(), gradient);
    }
}

#[test]
fn euler_agrees() {
    agrees("euler", Euler);
}

#[test]
fn midpoint_agrees() {
    agrees("midpoint", Midpoint);
}

#[test]
fn heun_agrees() {
    agrees("heun2", Heun);
}

#[test]
fn the_three_eighths_rule_is_their_rk4() {
    agrees("rk4", ThreeEighths);
}
