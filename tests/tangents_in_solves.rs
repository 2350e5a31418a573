//! Inside a solve layers with their tangents run as one op: values and gradients are those of the layers one by one, in
//! every dtype, along one direction or several, whether or not the directions depend on y.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::ops::{self, Activation, Mlp};
use candle_ode::prelude::*;
use candle_ode::{OdeError, States, Tangent};
use common::against_f64::*;
use common::*;

/// f with tangents along a constant and along what depends on y.
fn along_two(m: &impl Tangent, t: &Time, y: &Tensor) -> candle_core::Result<Tensor> {
    let constant = normal(7, y.dims(), y.dtype());
    let (f, along) = m.tangents(t, y, &Tensor::stack(&[constant, y.sin()?], 0)?)?;
    f + (along.get(0)?.tanh()? + along.get(1)?)?
}

#[test]
fn every_activation_between_layers_of_odd_sizes() {
    for activation in ACTIVATIONS {
        for sizes in [vec![7, 33, 7], vec![5, 70, 19, 5], vec![64, 48, 64]] {
            let (vars, width) = (VarMap::new(), sizes[0]);
            let name = format!("{activation:?} {sizes:?}");
            let build = move |vb: VarBuilder<'static>| {
                let builder = Mlp::builder(&sizes, activation);
                if width == 7 { builder.in_time() } else { builder }.build(vb)
            };
            let field = model_field(&vars, build, along_two);
            for rows in [1, 13, 37] {
                let has_kink = matches!(activation, Activation::Relu | Activation::Elu(_));
                against_f64_within(if has_kink { 10.0 } else { 2.0 }, &field, &vars, &start(2, &[rows, width]), &name);
            }
        }
    }
}

/// The batch in the lanes of vectors, with more rows than are taken at a time; wide layers between narrow ones.
#[test]
fn narrow_layers_and_many_rows() {
    for sizes in [vec![2, 20, 2], vec![1, 40, 1], vec![2, 64, 64, 2]] {
        for rows in [3, 300] {
            let (vars, name, width) = (VarMap::new(), format!("{sizes:?} {rows}"), sizes[0]);
            let sizes = sizes.clone();
            let build = move |vb: VarBuilder<'static>| Mlp::new(&sizes, Activation::Softplus, vb);
            against_f64_within(2.0, &model_field(&vars, build, along_two), &vars, &start(2, &[rows, width]), &name);
        }
    }
}

#[test]
fn no_direction_is_an_error() {
    let vars = VarMap::new();
    let eval = |m: &Mlp, t: &Time, y: &Tensor| {
        let none = Tensor::zeros((0, 3, 4), y.dtype(), y.device())?;
        Ok(m.tangents(t, y, &none)?.0)
    };
    let field = model_field(&vars, |vb| Mlp::new(&[4, 8, 4], Activation::Tanh, vb), eval);
    let error = ode(&field).solve(start(2, &[3, 4]).as_tensor()).unwrap_err();
    assert!(error.to_string().contains("no direction"), "{error}");
}

/// A direction that nothing tracks, one alone, layers without bias, an activation at the end, a state of three
/// dimensions.
#[test]
fn sequences_along_one_direction() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| {
        Ok(ops::seq()
            .add(ops::linear_no_bias(8, 12, vb.pp(0))?)
            .add(Activation::Silu)
            .add_timed(ops::concat_linear(12, 12, vb.pp(1))?)
            .add(ops::linear(12, 8, vb.pp(2))?)
            .add(Activation::Tanh))
    };
    let eval = |m: &ops::Sequential, t: &Time, y: &Tensor| {
        let (f, along) = m.tangent(t, y, &normal(3, y.dims(), y.dtype()))?;
        f + along
    };
    let field = model_field(&vars, build, eval);
    against_f64_within(2.0, &field, &vars, &start(2, &[3, 5, 8]), "a sequence");
}

/// Layers that the time gates, or whose weights a network makes of it: the batch in rows and in the lanes of vectors.
#[test]
fn layers_of_the_time() {
    for (sizes, rows) in [([6, 40], 9), ([2, 7], 130)] {
        let vars = VarMap::new();
        let [outer, inner] = sizes;
        let build = move |vb: VarBuilder<'static>| {
            Ok(ops::seq()
                .add_timed(ops::concat_squash_linear(outer, inner, vb.pp(0))?)
                .add(Activation::Softplus)
                .add_timed(ops::hyper_linear(inner, inner, &[5], vb.pp(1))?)
                .add(Activation::Tanh)
                .add_timed(ops::concat_squash_linear(inner, outer, vb.pp(2))?))
        };
        let field = model_field(&vars, build, along_two);
        let y0 = start(2, &[rows, outer]);
        against_f64_within(2.0, &field, &vars, &y0, &format!("{sizes:?}"));
        let all = gradients(&ode(&field), &vars, &y0);
        for frozen in ["0.layer.weight", "0.layer.bias", "0.gate.bias", "2.shift.weight", "1.hyper.1.weight"] {
            let field = field.clone().freeze(move |name| name == frozen);
            let mut expected = all.clone();
            expected.remove(frozen);
            compare(&gradients(&ode(&field), &vars, &y0), &expected, 1e-7, frozen);
        }
    }
}

/// With a norm among them they are no chain.
#[test]
fn sequences_that_are_no_chain() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| {
        let norm = ops::layer_norm(8, 1e-5, vb.pp(1))?;
        Ok(ops::seq().add(ops::linear(6, 8, vb.pp(0))?).add(norm).add(ops::linear(8, 6, vb.pp(2))?))
    };
    let field = model_field(&vars, build, along_two);
    against_f64_within(4.0, &field, &vars, &start(2, &[9, 6]), "a norm");
}

#[test]
fn what_is_frozen_has_no_gradient_and_scales_change_none() {
    let vars = VarMap::new();
    let field = model_field(&vars, |vb| Mlp::new(&[6, 20, 6], Activation::Softplus, vb), along_two);
    let y0 = start(2, &[9, 6]);
    let all = gradients(&ode(&field), &vars, &y0);
    for frozen in ["0.weight", "0.bias", "1.weight", "1.bias"] {
        let field = field.clone().freeze(move |name| name == frozen);
        let mut expected = all.clone();
        expected.remove(frozen);
        compare(&gradients(&ode(&field), &vars, &y0), &expected, 1e-7, frozen);
    }
    let frozen = gradients(&ode(&field.clone().freeze(|_| true)), &vars, &y0);
    let expected = all.clone().into_iter().filter(|(name, _)| name == "y(T)" || name == "y0").collect();
    compare(&frozen, &expected, 1e-7, "all frozen");
    for scaling in [AdjointScaling::fixed(1024.0).unwrap(), AdjointScaling::fixed(0.25).unwrap()] {
        compare(&gradients(&ode(&field).scaling(scaling), &vars, &y0), &all, 1e-7, "a fixed scale");
    }
}

/// A flow whose density overflows on the way back: of linear layers alone, whose tangents do not depend on y.
#[test]
fn infinities_along_directions_are_found() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| Ok(LogDensity::new(ops::seq().add(ops::linear(4, 4, vb)?), Trace::Exact));
    let field = ModelField::with_state(&vars, &Device::Cpu, build, |flow, t, state| flow.eval(t, state)).unwrap();
    fill(&vars, 5, 1.0);
    let start = State::from([normal(1, &[3, 4], DType::F32), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()]);
    let solution = Ode::new(&field).span(0.0, 0.5).steps(2).solve(start).unwrap();
    let loss = (solution.last_state()[1].sum_all().unwrap() * f64::INFINITY).unwrap();
    let error = OdeError::from(loss.backward().unwrap_err());
    assert!(matches!(error, OdeError::Overflow { .. }), "{error}");
}

struct Outcome {
    states: Vec<Vec<f64>>,
    gradients: Vec<Vec<f64>>,
}

fn flow(dtype: DType, trace: Trace) -> (VarMap, ModelField, [Var; 2]) {
    let vars = VarMap::new();
    let build = move |vb: VarBuilder<'static>| {
        let mlp = Mlp::builder(&[5, 24, 5], Activation::Softplus).in_time().build(vb)?;
        Ok(LogDensity::new(mlp, trace))
    };
    let field = ModelField::with_state(&vars, &Device::Cpu, build, |flow, t, state| flow.eval(t, state)).unwrap();
    fill(&vars, 5, 1.0);
    (vars, field, [variable(1, &[37, 5], dtype), variable(2, &[37], dtype)])
}

fn outcome(ode: &Ode, vars: &VarMap, start: &[Var; 2]) -> Outcome {
    let solution = ode.solve(State::from(start.clone().map(|x| x.as_tensor().clone()))).unwrap();
    let end = solution.last_state();
    let loss = (end[0].sqr().unwrap().mean_all().unwrap() + end[1].sqr().unwrap().mean_all().unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    let wanted = start.iter().cloned().chain(sorted(vars).into_values());
    Outcome {
        states: end.tensors().iter().map(values).collect(),
        gradients: wanted.map(|var| values(grads.get(&var).unwrap())).collect(),
    }
}

/// The ε of a row is the same in whatever tile it lies.
#[test]
fn flows_in_tiles_are_those_of_the_whole() {
    for trace in [Trace::Exact, Trace::Rademacher, Trace::Gaussian] {
        for (precision, dtype, bound) in [(Precision::F64, DType::F64, 1e-12), (Precision::F32, DType::F32, 1e-5)] {
            let (vars, field, start) = flow(dtype, trace);
            let ode = |field: &ModelField| Ode::new(field).span(1.0, 0.0).steps(3).precision(precision).seed(11);
            let whole = outcome(&ode(&field), &vars, &start);
            let field = field.row_wise();
            let in_tiles = |threads| outcome(&ode(&field).tile(8).threads(threads), &vars, &start);
            let (one, two) = (in_tiles(1), in_tiles(2));
            assert_eq!((&one.states, &one.gradients), (&two.states, &two.gradients));
            let pairs = |a: &Outcome, b: &Outcome| {
                let all = |o: &Outcome| o.states.iter().chain(&o.gradients).cloned().collect::<Vec<_>>();
                all(a).into_iter().zip(all(b)).collect::<Vec<_>>()
            };
            for (whole, tiled) in pairs(&whole, &one) {
                let size = whole.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                let worst = whole.iter().zip(&tiled).fold(0.0, |most: f64, (a, b)| most.max((a - b).abs()));
                assert!(worst <= bound * size, "{trace:?} in {precision:?}: {worst:e} of {size:e}");
            }
        }
    }
}

/// Where f is evaluated and where it is linearised it is the same, to the bit, whatever is kept of it.
#[test]
fn what_is_kept_of_a_flow_changes_no_bit() {
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        for trace in [Trace::Exact, Trace::Rademacher] {
            let (vars, field, start) = flow(DType::F32, trace);
            let of = |adjoint: Discrete| {
                let ode = Ode::new(&field).span(1.0, 0.0).steps(4).precision(precision).seed(11).adjoint(adjoint);
                outcome(&ode, &vars, &start)
            };
            let exact = || Discrete::default().codec(States(DType::F32));
            for (kept, other) in [
                (Discrete::default(), Discrete::default().stage_memory(StageMemory::One)),
                (exact(), exact().checkpoints(1)),
                (exact(), exact().keep_linearizations()),
            ] {
                let (kept, other) = (of(kept), of(other));
                assert_eq!(
                    (&kept.states, &kept.gradients),
                    (&other.states, &other.gradients),
                    "{precision:?} {trace:?}"
                );
            }
        }
    }
}
