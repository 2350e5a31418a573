//! A field declared to be layers, where it is asked for what is not usual: other dtypes, no gradients, observers,
//! states and layers that do not fit, stage states that overflow. It answers as a closure that calls the layers, errors
//! too.
#![allow(missing_docs)]

mod common;
#[path = "common/declared.rs"]
mod declared;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::ops::{Activation, Linear, Mlp, Sequential, linear, linear_no_bias, seq};
use candle_ode::prelude::*;
use candle_ode::{Place, Result};
use common::{bits, normal, sorted, variable};
use declared::Ran::{self, Both, Buffers, Tensors};
use declared::{BUFFERS, TENSORS, alone, answers, are_the_same, both, made_by, ran};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

fn narrow(vb: VarBuilder) -> candle_core::Result<Mlp> {
    Mlp::new(&[2, 24, 2], Activation::Tanh, vb)
}

fn steps(field: &ModelField) -> Ode {
    Ode::new(field).span(0.0, 1.0).steps(4)
}

/// The bits of the last state.
fn last(ode: &Ode, y0: &Tensor) -> Result<Vec<u64>> {
    Ok(bits(ode.solve(y0)?.last()))
}

/// Where solves without gradients run, which give the same.
fn forwards(what: &str, fields: &[ModelField; 2], y0: &Tensor, settings: impl Fn(Ode) -> Ode) -> Option<Ran> {
    let found = fields.each_ref().map(|field| made_by(|| last(&settings(steps(field)), y0).unwrap()));
    let [(declared, of_declared), (called, of_called)] = found;
    assert!(declared == called, "{what}");
    ran(of_declared, of_called)
}

#[test]
fn dtypes_that_differ() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let start = variable(9, &[40, 2], DType::F32);
    let halves = [DType::F32, DType::F16, DType::BF16];
    for (compute, storage) in halves.into_iter().flat_map(|compute| halves.map(|storage| (compute, storage))) {
        let precision = Precision::new().compute(compute).storage(storage);
        // Sums in F64 are made of tensors.
        for (sums, way) in [(DType::F32, BUFFERS), (DType::F64, TENSORS)] {
            let precision = precision.accumulate(sums);
            let steps = |ode: Ode| ode.span(0.0, 1.0).steps(5).precision(precision);
            are_the_same(&format!("{precision:?}"), &fields, &vars, &start, way, steps);
            for dtype in [DType::F16, DType::F64] {
                let y0 = variable(9, &[40, 2], dtype);
                are_the_same(&format!("{precision:?} from {dtype:?}"), &fields, &vars, &y0, way, steps);
            }
        }
    }
}

#[test]
fn parameters_that_stay_in_f32() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let y0 = variable(9, &[40, 2], DType::F32);
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let biases = fields.clone().map(|field| field.keep_f32(|name| name.ends_with("bias")));
        let steps = |ode: Ode| ode.span(0.0, 1.0).steps(5).precision(precision);
        are_the_same(&format!("biases {precision:?}"), &biases, &vars, &y0, BUFFERS, steps);
        // Weights in another dtype than what they are multiplied with are an error of the layer.
        let weights = fields.clone().map(|field| field.keep_f32(|name| name == "1.weight"));
        let found = answers("weights", &weights, |field| last(&steps(Ode::new(field)), &y0));
        assert_eq!(found.is_ok(), precision == Precision::F32, "{found:?}");
    }
}

#[test]
fn solves_without_gradients() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let y0 = variable(9, &[40, 2], DType::F32);
    for (precision, way) in
        [(Precision::F64, Tensors), (Precision::F32, Buffers), (Precision::F16, Buffers), (Precision::BF16, Buffers)]
    {
        let what = format!("{precision:?}");
        let in_precision = |ode: Ode| ode.precision(precision);
        let untracked = y0.as_detached_tensor();
        assert_eq!(forwards(&what, &fields, &untracked, in_precision), Some(way), "{what}, untracked");
        let no_grad = |ode: Ode| in_precision(ode).no_grad();
        assert_eq!(forwards(&what, &fields, y0.as_tensor(), no_grad), Some(way), "{what}, no_grad");
        let frozen = fields.clone().map(|field| field.freeze(|_| true));
        assert_eq!(forwards(&what, &frozen, &untracked, in_precision), Some(way), "{what}, frozen");
        let checked = |ode: Ode| in_precision(ode).check_determinism(false);
        assert_eq!(forwards(&what, &fields, y0.as_tensor(), checked), Some(way), "{what}, unchecked");
    }
}

#[test]
fn a_second_backward_pass() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let y0 = variable(9, &[40, 2], DType::F32);
    for precision in [Precision::F32, Precision::F16] {
        for (consumes, adjoint) in [
            (false, Discrete::default()),
            (false, Discrete::default().checkpoints(2)),
            (true, Discrete::default().consume()),
        ] {
            let gradients = |field: &ModelField, times: usize| -> Result<Vec<Vec<u64>>> {
                let solution = steps(field).precision(precision).adjoint(adjoint.clone()).solve(y0.as_tensor())?;
                let loss = solution.last().sqr()?.sum_all()?;
                let mut found = vec![];
                for _ in 0..times {
                    let grads = loss.backward()?;
                    let parameters = sorted(&vars).into_values().chain([y0.clone()]);
                    found.push(parameters.flat_map(|var| bits(grads.get(&var).unwrap())).collect());
                }
                Ok(found)
            };
            let what = format!("{precision:?} {adjoint:?}");
            let once = answers(&what, &fields, |field| gradients(field, 1)).unwrap();
            match answers(&what, &fields, |field| gradients(field, 2)) {
                Ok(twice) => assert!(!consumes && twice[0] == once[0] && twice[1] == once[0], "{what}"),
                Err(error) => assert!(consumes, "{what}: {error}"),
            }
        }
    }
}

#[test]
fn observers_inputs_and_states_between_steps() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let y0 = variable(9, &[40, 2], DType::F32);
    for precision in [Precision::F32, Precision::F16] {
        for count in [2, 4] {
            let seen = fields.each_ref().map(|field| {
                let seen = Arc::new(Mutex::new(vec![]));
                let shared = seen.clone();
                let ode = steps(field).precision(precision).on_step(move |step| {
                    let mut seen = shared.lock().unwrap();
                    seen.push((step.index, step.t.to_bits(), step.h.to_bits(), bits(&step.y[0])));
                    if seen.len() == count { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
                let (solution, made) = made_by(|| ode.solve(y0.as_tensor()).unwrap());
                let seen = std::mem::take(&mut *seen.lock().unwrap());
                assert_eq!(seen.last().unwrap().3, bits(solution.last()));
                (seen, made)
            });
            let [(declared, of_declared), (called, of_called)] = seen;
            assert!(declared.len() == count && declared == called, "{precision:?}");
            assert_eq!(ran(of_declared, of_called), Some(Buffers));
        }
        // Inputs that nothing asks for.
        let input = variable(4, &[3], DType::F32);
        let with_input =
            |ode: Ode| ode.span(0.0, 1.0).steps(4).precision(precision).inputs(&[input.as_tensor().clone()]);
        are_the_same("inputs", &fields, &vars, &y0, BUFFERS, with_input);
        let gradient = answers("inputs", &fields, |field| {
            let solution = with_input(Ode::new(field)).solve(y0.as_tensor())?;
            Ok(solution.last().sum_all()?.backward()?.get(&input).map(bits))
        });
        assert!(gradient.unwrap().is_none_or(|gradient| gradient.iter().all(|bits| *bits == 0)));
        let between =
            |ode: Ode| ode.span(0.0, 1.0).steps(4).precision(precision).interpolate().save_at(&[0.3, 0.6, 1.0]);
        // What lies within a step is a step with other weights.
        are_the_same("interpolated", &fields, &vars, &y0, BUFFERS, between);
        let dense = answers("dense", &fields, |field| {
            let solution = steps(field).precision(precision).dense().solve(y0.as_tensor())?;
            let within = solution.at(0.37)?.single()?.clone();
            let grads = within.sqr()?.sum_all()?.backward()?;
            Ok([bits(&within), bits(grads.get(&y0).unwrap())])
        });
        assert!(dense.is_ok(), "{dense:?}");
    }
}

/// A field that has met a state that does not fit takes one that does, on buffers: before it has ever taken one, and
/// after.
#[test]
fn states_that_do_not_fit() {
    let _turn = alone();
    let normal = |shape: &[usize]| State::from(normal(9, shape, DType::F32));
    let two = State::from([normal(&[5, 2])[0].clone(), normal(&[5, 2])[0].clone()]);
    let states: [(&str, bool, State); 8] = [
        ("wider", false, normal(&[5, 3])),
        ("narrower", false, normal(&[5, 1])),
        ("two tensors", false, two),
        ("a number", false, normal(&[])),
        ("no features", false, normal(&[5, 0])),
        ("no rows", false, normal(&[0, 2])),
        ("one row", true, normal(&[1, 2])),
        ("rows of rows", true, normal(&[3, 1, 2, 2])),
    ];
    let y0 = variable(9, &[40, 2], DType::F32);
    for (what, fits, state) in &states {
        // Where the first evaluation is not checked, it is a step that meets the state.
        for solves in [|ode: Ode| ode, |ode: Ode| ode.no_grad(), |ode: Ode| ode.check_determinism(false)] {
            let vars = VarMap::new();
            let fields = both(&vars, |vb| narrow(vb));
            for _ in 0..2 {
                let found = answers(what, &fields, |field| {
                    let solution = solves(steps(field)).solve(state.clone())?;
                    Ok(solution.last_state().tensors().iter().map(bits).collect::<Vec<_>>())
                });
                assert_eq!(found.is_ok(), *fits, "{what}: {found:?}");
                assert_eq!(forwards(what, &fields, y0.as_tensor(), solves), Some(Buffers), "after {what}");
            }
            are_the_same(what, &fields, &vars, &y0, BUFFERS, |ode| ode.span(0.0, 1.0).steps(4));
        }
    }
}

/// One row without a batch is a state of rank 1.
#[test]
fn a_state_of_rank_one() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let y0 = variable(9, &[2], DType::F32);
    are_the_same("rank 1", &fields, &vars, &y0, BUFFERS, |ode| ode.span(0.0, 1.0).steps(4));
}

/// Layers whose values are as wide as their arguments must be, and are not; no layers, and none but activations.
#[test]
fn layers_that_do_not_fit() {
    let _turn = alone();
    let y0 = normal(9, &[5, 2], DType::F32);
    let vars = VarMap::new();
    let fields = both(&vars, |vb| Mlp::new(&[2, 8, 3], Activation::Tanh, vb));
    for checked in [true, false] {
        let ode = |field: &ModelField| steps(field).check_determinism(checked);
        let error = answers("wider values", &fields, |field| last(&ode(field), &y0)).unwrap_err();
        assert!(error.contains("shape"), "{error}");
    }
    let vars = VarMap::new();
    let fields = both(&vars, |vb| Ok(seq().add(linear(2, 8, vb.pp(0))?).add(linear(7, 2, vb.pp(1))?)));
    assert!(answers("a gap", &fields, |field| last(&steps(field), &y0)).is_err());
    for activation in [None, Some(Activation::Tanh)] {
        let layers = move |_: VarBuilder<'static>| Ok(activation.map_or(seq(), |activation| seq().add(activation)));
        let fields = both(&VarMap::new(), layers);
        let y0 = variable(9, &[5, 2], DType::F32);
        let what = format!("{activation:?} alone");
        for precision in [Precision::F32, Precision::F16] {
            let found = answers(&what, &fields, |field| {
                let solution = steps(field).precision(precision).solve(y0.as_tensor())?;
                let grads = solution.last().sqr()?.sum_all()?.backward()?;
                Ok([bits(solution.last()), bits(grads.get(&y0).unwrap())])
            });
            assert!(found.is_ok(), "{what}: {found:?}");
        }
        assert_eq!(forwards(&what, &fields, y0.as_tensor(), |ode| ode), Some(Tensors));
        let rank_0 = answers(&what, &fields, |field| last(&steps(field), &Tensor::new(0.5f32, &Device::Cpu)?));
        assert!(rank_0.is_ok(), "{what}: {rank_0:?}");
    }
}

/// Weights that do not come from the builder are constants, or gradients that would be lost: an error that says so.
#[test]
fn weights_from_elsewhere() {
    let _turn = alone();
    let y0 = variable(9, &[40, 2], DType::F32);
    let weight = variable(5, &[2, 8], DType::F32);
    for (captured, is_constant) in [(weight.as_detached_tensor(), true), (weight.as_tensor().clone(), false)] {
        let vars = VarMap::new();
        let fields = both(&vars, move |vb: VarBuilder<'static>| {
            let layers = seq().add(linear_no_bias(2, 8, vb.pp(0))?).add(Activation::Tanh);
            Ok(layers.add(Linear::new(captured.clone(), None)))
        });
        let found = answers("captured", &fields, |field| last(&steps(field), y0.as_tensor()));
        assert_eq!(found.is_ok(), is_constant, "{found:?}");
        if is_constant {
            are_the_same("constant", &fields, &vars, &y0, TENSORS, |ode| ode.span(0.0, 1.0).steps(4));
        }
    }
}

/// tanh of something large: 1, whatever becomes of y.
fn saturating(vb: VarBuilder) -> candle_core::Result<Sequential> {
    Ok(seq().add(linear_no_bias(2, 2, vb.pp(0))?).add(Activation::Tanh))
}

/// f is finite where a stage state is not, and so is y⁺: only the stage state says that it has overflown.
#[test]
fn a_stage_state_that_overflows_where_layers_saturate_is_found_at_the_same_place() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| saturating(vb));
    for (_, var) in sorted(&vars) {
        var.set(&Tensor::full(1e-3f32, var.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    // From 65520 on a number is infinite in F16; y grows by 100 in every step.
    let precision = Precision::new().compute(DType::F16);
    let at_last = |row: usize, of_last: f32| {
        let small = normal(3, &[40, 2], DType::F32).flatten_all().unwrap();
        let mut values = small.to_vec1::<f32>().unwrap();
        values[2 * row + 1] = of_last;
        Var::from_tensor(&Tensor::from_vec(values, (40, 2), &Device::Cpu).unwrap()).unwrap()
    };
    let cases: [(Tableau, f32, (usize, usize, f64)); 5] = [
        (Tableau::clone(Euler.tableau().unwrap()), 65_480.0, (1, 0, 100.0)),
        (Tableau::clone(Midpoint.tableau().unwrap()), 65_390.0, (1, 1, 150.0)),
        (Tableau::clone(Rk4.tableau().unwrap()), 65_440.0, (0, 3, 100.0)),
        (Tableau::clone(Rk4.tableau().unwrap()), 65_380.0, (1, 1, 150.0)),
        (Tableau::clone(Dopri5.tableau().unwrap()), 65_530.0, (0, 0, 0.0)),
    ];
    for (solver, start, (step, stage, time)) in cases {
        let ode = |ode: Ode| ode.solver(solver.clone()).span(0.0, 200.0).steps(2).precision(precision);
        for row in [0, 17, 39] {
            let y0 = at_last(row, start);
            for start in [y0.as_tensor().clone(), y0.as_detached_tensor()] {
                for field in &fields {
                    match ode(Ode::new(field)).solve(&start).unwrap_err() {
                        OdeError::Overflow { place, .. } => {
                            let Place { step: found, stage: at, time: when, dtype } = place;
                            assert_eq!((found, at, dtype), (step, stage, DType::F16), "{}", solver.name());
                            assert!((when - time).abs() < 1e-9, "{when} {time}");
                        }
                        other => panic!("{other}"),
                    }
                }
            }
            // Done again in F32, where it fits.
            let retried = |with: Ode| ode(with).on_overflow(OnOverflow::Retry);
            are_the_same("retried", &fields, &vars, &y0, [Both, Buffers], retried);
        }
        // As far as it fits, nothing is wrong.
        are_the_same("fits", &fields, &vars, &at_last(17, start - 250.0), BUFFERS, ode);
    }
}

/// In BF16 a stage state is as large as in F32, but for the last ones: they are taken as they are.
#[test]
fn the_largest_stage_states_of_bf16_give_the_same() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| saturating(vb));
    let weight = |size: f32| {
        let (_, var) = sorted(&vars).pop_first().unwrap();
        var.set(&Tensor::full(size, var.shape(), &Device::Cpu).unwrap()).unwrap();
    };
    for (size, start) in [(1e-3, 3.4e38f32), (1e-3, -3.4e38), (1e-38, 3.39e38), (0.0, 3.4e38)] {
        weight(size);
        let y0 = Var::from_tensor(&Tensor::full(start, (20, 2), &Device::Cpu).unwrap()).unwrap();
        for precision in [Precision::BF16, Precision::new().compute(DType::BF16), Precision::F32] {
            let what = format!("{size:e} {start:e} {precision:?}");
            let _ = answers(&what, &fields, |field| last(&steps(field).precision(precision), &y0.as_detached_tensor()));
            let _ = answers(&what, &fields, |field| {
                let solution = steps(field).precision(precision).solve(y0.as_tensor())?;
                let grads = solution.last().sum_all()?.backward()?;
                Ok([bits(solution.last()), bits(grads.get(&y0).unwrap())])
            });
        }
    }
}
