//! Fields in every precision against themselves in F64, where layers of `ops` run one by one.

use super::*;
use candle_ode::ops::Activation;

/// All of them.
pub const ACTIVATIONS: [Activation; 12] = [
    Activation::Identity,
    Activation::Tanh,
    Activation::Sigmoid,
    Activation::Softplus,
    Activation::Silu,
    Activation::Gelu,
    Activation::Relu,
    Activation::Elu(1.0),
    Activation::Elu(-0.5),
    Activation::Sin,
    Activation::Cos,
    Activation::LogCosh,
];

pub type Gradients = BTreeMap<String, Tensor>;

/// y(T), dL/dy0 and dL/dθ of mean y(T)², in F64.
pub fn gradients(ode: &Ode, vars: &VarMap, y0: &Var) -> Gradients {
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
    let mut found: Gradients = [("y(T)".to_owned(), solution.last().detach())].into();
    found.extend(grads.get(y0).map(|g| ("y0".to_owned(), g.clone())));
    found.extend(sorted(vars).into_iter().filter_map(|(name, var)| Some((name, grads.get(&var)?.clone()))));
    found.into_iter().map(|(name, x)| (name, x.to_dtype(DType::F64).unwrap())).collect()
}

pub fn compare(found: &Gradients, exact: &Gradients, bound: f64, what: &str) {
    assert_eq!(found.keys().collect::<Vec<_>>(), exact.keys().collect::<Vec<_>>(), "{what}");
    for (name, exact) in exact {
        let error = relative(&found[name], exact);
        assert!(error < bound, "{what}, {name}: {error:e}");
    }
}

/// Bounds of NUMERICS §9, over two steps.
pub const BOUNDS: [(Precision, f64); 3] = [(Precision::F32, 1e-5), (Precision::F16, 2e-3), (Precision::BF16, 2e-2)];

pub fn start(seed: u64, shape: &[usize]) -> Var {
    variable(seed, shape, DType::F32)
}

pub fn ode(field: &ModelField) -> Ode {
    Ode::new(field).span(0.0, 0.5).steps(2)
}

/// `field` in each precision against itself in F64, where layers run one by one.
pub fn against_f64(field: &ModelField, vars: &VarMap, y0: &Var, what: &str) {
    against_f64_within(1.0, field, vars, y0, what);
}

/// As [`against_f64`], with bounds of half precision so many times as wide: near a kink of f rounding decides the
/// slope, and sums may cancel.
pub fn against_f64_within(kinks: f64, field: &ModelField, vars: &VarMap, y0: &Var, what: &str) {
    let wide = Var::from_tensor(&y0.to_dtype(DType::F64).unwrap()).unwrap();
    let exact = gradients(&ode(field).precision(Precision::F64), vars, &wide);
    for (precision, bound) in BOUNDS {
        let found = gradients(&ode(field).precision(precision), vars, y0);
        let bound = if precision == Precision::F32 { bound } else { bound * kinks };
        compare(&found, &exact, bound, &format!("{what} in {precision:?}"));
    }
}

pub fn model_field<M: 'static>(
    vars: &VarMap,
    build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
    eval: impl Fn(&M, &Time, &Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static,
) -> ModelField {
    let field = ModelField::new(vars, &Device::Cpu, build, eval).unwrap();
    fill(vars, 5, 1.0);
    field
}

/// Fixed scales give the gradients that those of each step give.
pub fn scales_change_nothing(field: &ModelField, vars: &VarMap, y0: &Var) {
    let plain = gradients(&ode(field), vars, y0);
    for scale in [1024.0, 0.25] {
        let scaling = AdjointScaling::fixed(scale).unwrap();
        compare(&gradients(&ode(field).scaling(scaling), vars, y0), &plain, 1e-7, "a fixed scale");
    }
}

/// Of each of those names alone, a frozen parameter has no gradient and changes no other, in any precision.
pub fn frozen_changes_no_other(field: &ModelField, vars: &VarMap, y0: &Var, names: &[&'static str]) {
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let all = gradients(&ode(field).precision(precision), vars, y0);
        for &frozen in names {
            let field = field.clone().freeze(move |name| name == frozen);
            let mut expected = all.clone();
            assert!(expected.remove(frozen).is_some(), "{frozen}");
            compare(&gradients(&ode(&field).precision(precision), vars, y0), &expected, 1e-7, frozen);
        }
    }
}

/// Each sample alone gives the bits that it gives among others.
pub fn samples_do_not_see_each_other(field: &ModelField, y0: &Tensor) {
    for precision in [Precision::F32, Precision::BF16] {
        let ode = ode(field).precision(precision);
        let whole = ode.solve(y0).unwrap().last().clone();
        for n in 0..y0.dims()[0] {
            let alone = ode.solve(y0.narrow(0, n, 1).unwrap()).unwrap();
            assert_eq!(bits(alone.last()), bits(&whole.narrow(0, n, 1).unwrap()), "{precision:?}");
        }
    }
}
