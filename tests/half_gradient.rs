//! Gradients in mixed precision: within their bounds against F64, and in the dtype of what they belong to.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarMap};
use candle_ode::prelude::*;
use common::*;
use std::collections::BTreeMap;

const BATCH: usize = 64;
const DIM: usize = 16;
const HIDDEN: usize = 64;

/// M1's size and span, one hidden layer, with masters in the dtype that `master` says.
fn problem(master: impl Fn(&str) -> DType) -> (VarMap, ModelField) {
    let exact = VarMap::new();
    mlp_field(&exact, DType::F64, DIM, HIDDEN);
    fill(&exact, 3, 1.0);
    let vars = VarMap::new();
    for (name, var) in sorted(&exact) {
        let made = vars.get(var.shape(), &name, Init::Const(0.0), master(&name), &Device::Cpu).unwrap();
        assert_eq!(made.dtype(), master(&name));
        sorted(&vars)[&name].set(&var.to_dtype(master(&name)).unwrap()).unwrap();
    }
    let field = mlp_field(&vars, DType::F32, DIM, HIDDEN);
    (vars, field)
}

fn gradients(ode: &Ode, y0: &Var, vars: &VarMap) -> BTreeMap<String, Tensor> {
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let named = sorted(vars).into_iter().chain([("y0".to_owned(), y0.clone())]);
    named.map(|(name, var)| (name, grads.get(&var).unwrap().clone())).collect()
}

fn start(dtype: DType) -> Var {
    variable(5, &[BATCH, DIM], dtype)
}

fn ode(field: &ModelField, precision: Precision) -> Ode {
    Ode::new(field).span(0.0, 1.0).steps(32).precision(precision)
}

fn exact() -> BTreeMap<String, Tensor> {
    let (vars, field) = problem(|_| DType::F64);
    gradients(&ode(&field, Precision::F64), &start(DType::F64), &vars)
}

const BOUNDS: [(Precision, f64); 3] = [(Precision::F32, 1e-5), (Precision::F16, 2e-3), (Precision::BF16, 2e-2)];

#[test]
fn every_precision_is_within_its_bound() {
    let exact = exact();
    let (vars, field) = problem(|_| DType::F64);
    for (precision, bound) in BOUNDS {
        for (name, gradient) in gradients(&ode(&field, precision), &start(DType::F64), &vars) {
            let error = relative(&gradient, &exact[&name]);
            assert!(error < bound, "{precision:?} {name}: {error:e}");
        }
    }
}

#[test]
fn stage_memory_changes_no_bit_in_half_precision() {
    let (vars, field) = problem(|_| DType::F32);
    for (precision, _) in BOUNDS {
        let with = |memory| {
            let adjoint = Discrete::default().stage_memory(memory);
            gradients(&ode(&field, precision).solver(Dopri5).adjoint(adjoint), &start(DType::F32), &vars)
        };
        let (all, one) = (with(StageMemory::All), with(StageMemory::One));
        for (name, gradient) in all {
            assert_eq!(bits(&gradient), bits(&one[&name]), "{precision:?} {name}");
        }
    }
}

#[test]
fn masters_of_several_dtypes_get_gradients_in_their_own() {
    let exact = exact();
    let dtype = |name: &str| match name {
        "in.weight" => DType::F64,
        "in.bias" => DType::F16,
        "out.weight" => DType::F32,
        _ => DType::BF16,
    };
    for (precision, bound) in BOUNDS {
        let (vars, field) = problem(dtype);
        for (name, gradient) in gradients(&ode(&field, precision), &start(DType::F32), &vars) {
            let own = if name == "y0" { DType::F32 } else { dtype(&name) };
            assert_eq!(gradient.dtype(), own, "{name}");
            // Two masters are themselves rounded to half precision, and so are their gradients.
            let error = relative(&gradient, &exact[&name]);
            assert!(error < bound.max(1e-2), "{precision:?} {name}: {error:e}");
        }
    }
}

#[test]
fn kept_f32_parameters_are_given_in_f32() {
    let vars = VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'static>| Ok((vb.get(4, "gain")?, vb.get(4, "shift")?));
    let eval = |(gain, shift): &(Tensor, Tensor), _: &Time, y: &Tensor| {
        assert_eq!(gain.dtype(), if y.dtype() == DType::F64 { DType::F64 } else { DType::F32 });
        assert_eq!(shift.dtype(), y.dtype());
        let scaled = y.to_dtype(gain.dtype())?.broadcast_mul(gain)?.to_dtype(y.dtype())?;
        scaled.broadcast_add(shift)?.tanh()
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap().keep_f32(|name| name == "gain");
    fill(&vars, 3, 1.0);
    let run = |precision, dtype| {
        let y0 = variable(5, &[BATCH, 4], dtype);
        gradients(&ode(&field, precision), &y0, &vars)
    };
    let exact = run(Precision::F64, DType::F64);
    for (precision, bound) in BOUNDS {
        for (name, gradient) in run(precision, DType::F32) {
            assert_eq!(gradient.dtype(), DType::F32);
            let error = relative(&gradient, &exact[&name]);
            assert!(error < bound, "{precision:?} {name}: {error:e}");
        }
    }
    // Two parameters, one of them cast, in each of them.
    let solution = ode(&field, Precision::F16).solve(start_of(4).as_tensor()).unwrap();
    assert_eq!(solution.stats().casts, 1);
}

fn start_of(dim: usize) -> Var {
    variable(5, &[BATCH, dim], DType::F32)
}

#[test]
fn a_half_precision_y0_gets_a_gradient_in_its_dtype() {
    let exact = exact();
    for dtype in [DType::F16, DType::BF16] {
        for precision in [Precision::F32, Precision::F16, Precision::BF16] {
            let (vars, field) = problem(|_| DType::F32);
            let gradient = &gradients(&ode(&field, precision), &start(dtype), &vars)["y0"];
            assert_eq!(gradient.dtype(), dtype);
            let error = relative(gradient, &exact["y0"]);
            assert!(error < 2e-2, "{dtype:?} {precision:?}: {error:e}");
        }
    }
}

#[test]
fn a_gradient_that_does_not_fit_a_half_precision_y0_is_an_error() {
    let field = FnField::with_state(|_, y| y.try_map(|y| y * 0.5));
    let (wide, narrow) = (variable(1, &[3], DType::F32), variable(2, &[2, 2], DType::F16));
    let start = State::from([wide.as_tensor().clone(), narrow.as_tensor().clone()]);
    let solution = Ode::new(&field).span(0.0, 1.0).steps(4).precision(Precision::F16).solve(start).unwrap();
    assert_eq!(solution.last_state()[1].dtype(), DType::F32);
    let loss = |by: f64| {
        let parts = solution.last_state().tensors().iter().map(|y| y.sum_all());
        (Tensor::stack(&parts.collect::<candle_core::Result<Vec<_>>>().unwrap(), 0).unwrap().sum_all().unwrap() * by)
            .unwrap()
    };
    // e^½ · 30 000 fits into F16, e^½ · 50 000 does not.
    let fits = loss(3e4).backward().unwrap();
    let (a, b) = (values(fits.get(&wide).unwrap()), values(fits.get(&narrow).unwrap()));
    assert!(a.iter().chain(&b).all(|g| (g / (3e4 * 0.5f64.exp()) - 1.0).abs() < 2e-3), "{a:?} {b:?}");
    match OdeError::from(loss(5e4).backward().unwrap_err()) {
        OdeError::GradientOverflow { tensor, dtype } => assert_eq!((tensor, dtype), (1, DType::F16)),
        other => panic!("{other}"),
    }
}
