//! Inside a solve the layers of `ops` run as one op, with kernels of their own: the values and gradients are those of
//! the same layers one by one, in every dtype, whatever is frozen, without bias, in time, or made elsewhere.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::ops::{self, Activation, Mlp, Planar, Timed, affine};
use candle_ode::prelude::*;
use candle_ode::{State, Tangent};
use common::against_f64::*;
use common::*;

#[test]
fn every_activation_between_layers_of_odd_sizes() {
    for activation in ACTIVATIONS {
        for sizes in [vec![7, 33, 7], vec![5, 70, 19, 5], vec![64, 64]] {
            let (vars, width) = (VarMap::new(), sizes[0]);
            let name = format!("{activation:?} {sizes:?}");
            let field = model_field(&vars, move |vb| Mlp::new(&sizes, activation, vb), |m, _, y| m.forward(y));
            for rows in [1, 13, 37] {
                let has_kink = matches!(activation, Activation::Relu | Activation::Elu(-0.5));
                let kinks = if has_kink { 10.0 } else { 1.0 };
                against_f64_within(kinks, &field, &vars, &start(2, &[rows, width]), &name);
            }
        }
    }
}

#[test]
fn layers_that_see_the_time() {
    for activation in [Activation::Tanh, Activation::Gelu] {
        let vars = VarMap::new();
        let build = move |vb| Mlp::builder(&[6, 40, 6], activation).in_time().build(vb);
        let field = model_field(&vars, build, |m, t, y| m.forward_at(t, y));
        against_f64(&field, &vars, &start(2, &[9, 6]), &format!("{activation:?} in time"));
    }
}

/// All linearisations of a step or one at a time give the same gradients, to the bit.
fn same_bits_evaluated_and_linearised(field: &ModelField, vars: &VarMap, y0: &Var, what: &str) {
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let of = |memory| {
            let adjoint = Discrete::default().stage_memory(memory);
            let all = gradients(&ode(field).precision(precision).adjoint(adjoint), vars, y0);
            all.into_iter().map(|(name, x)| (name, bits(&x))).collect::<Vec<_>>()
        };
        assert_eq!(of(StageMemory::All), of(StageMemory::One), "{what}, {precision:?}");
    }
}

/// Any parameter frozen, or all of them: the other gradients are the same. Gives those with none frozen.
fn freezing_changes_no_other(field: &ModelField, vars: &VarMap, y0: &Var) -> Gradients {
    let all = gradients(&ode(field), vars, y0);
    for frozen in sorted(vars).into_keys() {
        let name = frozen.clone();
        let some = field.clone().freeze(move |other| other == name);
        let mut expected = all.clone();
        expected.remove(&frozen);
        compare(&gradients(&ode(&some), vars, y0), &expected, 1e-7, &frozen);
    }
    let of_y0 = gradients(&ode(&field.clone().freeze(|_| true)), vars, y0);
    let expected = all.clone().into_iter().filter(|(name, _)| name.starts_with('y')).collect();
    compare(&of_y0, &expected, 1e-7, "all frozen");
    all
}

#[test]
fn layers_whose_weights_are_made_of_the_time() {
    fn check<M: Timed + 'static>(
        name: &str,
        build: impl Fn(VarBuilder<'static>) -> candle_core::Result<M> + Send + Sync + 'static,
    ) {
        let vars = VarMap::new();
        let field = model_field(&vars, build, |m: &M, t, y| m.forward_at(t, y)?.tanh());
        let y0 = start(2, &[9, 6]);
        against_f64(&field, &vars, &y0, name);
        same_bits_evaluated_and_linearised(&field, &vars, &y0, name);
    }
    check("a hyper layer", |vb| ops::hyper_linear(6, 6, &[12], vb));
    check("a concat-squash layer", |vb| ops::concat_squash_linear(6, 6, vb));
}

/// A gated layer, one whose weights a network makes, one in time and a plain one as one op, its parameters in one
/// another's way: values, gradients, what is frozen, gradients of times; the batch in rows and in the lanes of vectors.
#[test]
fn layers_of_the_time_in_a_chain_of_others() {
    let field = |vars: &VarMap, [outer, inner]: [usize; 2], activation| {
        let build = move |vb: VarBuilder<'static>| {
            Ok(ops::seq()
                .add_timed(ops::concat_squash_linear(outer, inner, vb.pp(0))?)
                .add(activation)
                .add_timed(ops::hyper_linear(inner, inner, &[5], vb.pp(1))?)
                .add(activation)
                .add_timed(ops::concat_linear(inner, inner, vb.pp(2))?)
                .add(ops::linear(inner, inner, vb.pp(3))?)
                .add(activation)
                .add_timed(ops::concat_squash_linear(inner, outer, vb.pp(4))?))
        };
        model_field(vars, build, |m, t, y| m.forward_at(t, y))
    };
    for (sizes, rows) in [([6, 40], 9), ([3, 19], 37), ([2, 7], 300), ([1, 33], 1)] {
        for activation in [Activation::Tanh, Activation::Softplus, Activation::Gelu] {
            let vars = VarMap::new();
            let field = field(&vars, sizes, activation);
            let what = format!("{sizes:?} with {activation:?}, {rows} rows");
            let y0 = start(2, &[rows, sizes[0]]);
            // The cotangents of weights that a network makes are sums over the batch, which cancel, rounded to the
            // dtype.
            against_f64_within(3.0, &field, &vars, &y0, &what);
            same_bits_evaluated_and_linearised(&field, &vars, &y0, &what);
        }
    }
    let (vars, y0) = (VarMap::new(), start(2, &[9, 6]));
    let field = field(&vars, [6, 20], Activation::Tanh);
    let all = freezing_changes_no_other(&field, &vars, &y0);
    for scale in [1024.0, 0.25] {
        let scaled = ode(&field).scaling(AdjointScaling::fixed(scale).unwrap());
        compare(&gradients(&scaled, &vars, &y0), &all, 1e-6, "a fixed scale");
    }
    gradients_of_times(&field, &y0);
}

/// Norms and functions between them, and a branch that does not depend on y.
#[test]
fn layers_of_the_time_in_parts_of_a_field() {
    let build = |vb: VarBuilder<'static>| {
        let there = ops::seq()
            .add_timed(ops::concat_squash_linear(6, 12, vb.pp(0))?)
            .add(Activation::Tanh)
            .add(ops::layer_norm(12, 1e-2, vb.pp(1))?)
            .add_timed(ops::hyper_linear(12, 6, &[5], vb.pp(2))?)
            .add_fn(|x| x * 0.5);
        let beside = ops::seq()
            .add_timed(ops::hyper_linear(6, 6, &[5], vb.pp(3))?)
            .add(Activation::Softplus)
            .add_timed(ops::concat_squash_linear(6, 6, vb.pp(4))?);
        Ok((there, beside))
    };
    let vars = VarMap::new();
    let field = model_field(&vars, build, |(there, beside), t, y| {
        let constant = normal(7, y.dims(), y.dtype());
        there.forward_at(t, y)? + beside.forward_at(t, &constant)?.tanh()?
    });
    let y0 = start(2, &[9, 6]);
    against_f64_within(3.0, &field, &vars, &y0, "parts");
    same_bits_evaluated_and_linearised(&field, &vars, &y0, "parts");
}

/// Layers on a constant, with their tangents: Candle comes back to them through their parameters alone.
#[test]
fn layers_on_what_y_does_not_reach() {
    let build = |vb: VarBuilder<'static>| {
        let along = ops::seq()
            .add_timed(ops::concat_squash_linear(6, 12, vb.pp(0))?)
            .add(Activation::Tanh)
            .add(ops::linear(12, 6, vb.pp(1))?);
        let mlp = |n| Mlp::new(&[6, 12, 6], Activation::Tanh, vb.pp(n));
        Ok((along, ops::concat_squash_linear(6, 6, vb.pp(2))?, mlp(3)?, mlp(4)?))
    };
    let vars = VarMap::new();
    let field = model_field(&vars, build, |(along, squash, first, last), t, y| {
        let constant = normal(7, y.dims(), y.dtype());
        let (value, pushed) = along.tangent(t, &constant, &constant.sin()?)?;
        let beside = ((value + pushed)? + (squash.forward_at(t, &constant)? + first.forward(&constant)?)?)?;
        last.forward(&(y + beside)?)
    });
    let y0 = start(2, &[9, 6]);
    against_f64_within(3.0, &field, &vars, &y0, "a constant");
    same_bits_evaluated_and_linearised(&field, &vars, &y0, "a constant");
    freezing_changes_no_other(&field, &vars, &y0);
}

/// Planar units whose weights a network makes of the time: dL/dy0, dL/dθ and dL/dt, whatever is frozen.
#[test]
fn a_network_of_the_time_makes_planar_units() {
    const UNITS: usize = 9;
    let field = |vars: &VarMap, activation| {
        let build = move |vb| Mlp::new(&[1, 12, 5, 7 * UNITS], activation, vb);
        model_field(vars, build, move |hyper: &Mlp, t, z| {
            let made = hyper.of_time(t, z)?;
            assert_eq!(made.dims(), [7 * UNITS]);
            let part = |n: usize| made.narrow(0, 3 * n * UNITS, 3 * UNITS)?.reshape((UNITS, 3));
            Planar::new(&part(0)?, &made.narrow(0, 6 * UNITS, UNITS)?, &part(1)?, activation)?.forward(z)
        })
    };
    let y0 = start(2, &[9, 3]);
    for activation in [Activation::Tanh, Activation::Silu, Activation::Identity] {
        let vars = VarMap::new();
        let field = field(&vars, activation);
        against_f64(&field, &vars, &y0, &format!("planar units with {activation:?}"));
        same_bits_evaluated_and_linearised(&field, &vars, &y0, &format!("{activation:?}"));
        freezing_changes_no_other(&field, &vars, &y0);
    }
    gradients_of_times(&field(&VarMap::new(), Activation::Tanh), &y0);
}

/// Gradients of both ends against those in F64.
fn gradients_of_times(field: &ModelField, y0: &Var) {
    let of_times = |precision| {
        let ends = [0.1, 0.7].map(|t: f64| Var::new(t, &Device::Cpu).unwrap());
        let ode = ode(field).span_tensors(&ends[0], &ends[1]).precision(precision);
        let solution = ode.solve(y0.as_tensor()).unwrap();
        let grads = solution.last().sum_all().unwrap().backward().unwrap();
        ends.map(|t| grads.get(&t).unwrap().to_dtype(DType::F64).unwrap().to_scalar::<f64>().unwrap())
    };
    let exact = of_times(Precision::F64);
    // BF16 rounds the times themselves to three digits.
    for (precision, bound) in [BOUNDS[0], BOUNDS[1]] {
        for (found, exact) in of_times(precision).into_iter().zip(exact) {
            assert!((found - exact).abs() < bound * exact.abs(), "{precision:?}: {found} for {exact}");
        }
    }
}

/// Weights behind a gate are summed in F32: F16 knows no 2048.5.
#[test]
fn gated_parameters_are_summed_without_rounding() {
    let vars = VarMap::new();
    let field = ModelField::new(
        &vars,
        &Device::Cpu,
        |vb| ops::concat_squash_linear(1, 1, vb),
        |layer, t, y| layer.forward_at(t, y),
    )
    .unwrap();
    for (name, var) in sorted(&vars) {
        // A gate of ½.
        let value = if name.starts_with("gate") { 0.0 } else { 1.0 };
        var.set(&(var.ones_like().unwrap() * value).unwrap()).unwrap();
    }
    let y0 = Tensor::ones((4097, 1), DType::F32, &Device::Cpu).unwrap();
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(1).precision(precision);
        let grads = ode.solve(&y0).unwrap().last().sum_all().unwrap().backward().unwrap();
        let vars = sorted(&vars);
        let found = ["layer.weight", "layer.bias"].map(|name| values(grads.get(&vars[name]).unwrap()));
        assert_eq!(found, [[2048.5], [2048.5]], "{precision:?}");
    }
}

/// Their divergence, too: gradients of log-densities.
#[test]
fn the_divergence_of_planar_units_has_gradients() {
    const UNITS: usize = 9;
    struct Flow(Mlp);
    impl Flow {
        fn units(&self, t: &Time, z: &Tensor) -> candle_core::Result<Planar> {
            let made = self.0.of_time(t, z)?;
            let part = |n: usize| made.narrow(0, 3 * n * UNITS, 3 * UNITS)?.reshape((UNITS, 3));
            Planar::new(&part(0)?, &made.narrow(0, 6 * UNITS, UNITS)?, &part(1)?, Activation::Tanh)
        }
    }
    impl Tangent for Flow {
        fn tangent(&self, t: &Time, z: &Tensor, v: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
            self.units(t, z)?.tangent(t, z, v)
        }
        fn trace(&self, t: &Time, z: &Tensor) -> candle_core::Result<Option<(Tensor, Tensor)>> {
            self.units(t, z)?.trace(t, z)
        }
    }
    let vars = VarMap::new();
    let build = |vb| Ok(LogDensity::new(Flow(Mlp::new(&[1, 12, 7 * UNITS], Activation::Tanh, vb)?), Trace::Exact));
    let field = ModelField::with_state(&vars, &Device::Cpu, build, |flow, t, y| flow.eval(t, y)).unwrap();
    fill(&vars, 5, 1.0);
    let run = |precision: Precision| -> Gradients {
        let dtype = if precision == Precision::F64 { DType::F64 } else { DType::F32 };
        let z = Var::from_tensor(&start(2, &[9, 3]).to_dtype(dtype).unwrap()).unwrap();
        let state = State::from([z.as_tensor().clone(), Tensor::zeros(9, dtype, &Device::Cpu).unwrap()]);
        let solution = ode(&field).precision(precision).solve(state).unwrap();
        let [end, log_p] = solution.last_state().tensors() else { panic!("a state of two tensors") };
        let grads = (log_p.mean_all().unwrap() + end.sqr().unwrap().mean_all().unwrap()).unwrap().backward().unwrap();
        let of_theta = sorted(&vars).into_iter().map(|(name, var)| (name, grads.get(&var).unwrap().clone()));
        let all = of_theta.chain([("z".to_owned(), grads.get(&z).unwrap().clone())]);
        all.map(|(name, x)| (name, x.detach().to_dtype(DType::F64).unwrap())).collect()
    };
    let exact = run(Precision::F64);
    for (precision, bound) in BOUNDS {
        compare(&run(precision), &exact, bound, &format!("a log-density in {precision:?}"));
    }
}

/// Weights of planar units that are parameters themselves are summed in F32: F16 knows no 4097, and BF16 none from 4096
/// to 4128.
#[test]
fn planar_units_of_parameters_are_summed_without_rounding() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| {
        Planar::new(&vb.get((1, 1), "w")?, &vb.get(1, "b")?, &vb.get((1, 1), "u")?, Activation::Identity)
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, |units, _, z| units.forward(z)).unwrap();
    for var in sorted(&vars).values() {
        var.set(&var.ones_like().unwrap()).unwrap();
    }
    let z = Tensor::ones((4097, 1), DType::F32, &Device::Cpu).unwrap();
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let of = |field: &ModelField| {
            let ode = Ode::new(field).solver(Euler).span(0.0, 1.0).steps(1).precision(precision);
            ode.solve(&z).unwrap().last().sum_all().unwrap().backward().unwrap()
        };
        let (grads, vars) = (of(&field), sorted(&vars));
        let found = ["w", "b", "u"].map(|name| values(grads.get(&vars[name]).unwrap()));
        assert_eq!(found, [[4097.0], [4097.0], [2.0 * 4097.0]], "{precision:?}");
        let grads = of(&field.clone().freeze(|name| name != "b"));
        assert_eq!(values(grads.get(&vars["b"]).unwrap()), [4097.0], "{precision:?}");
        assert!(grads.get(&vars["w"]).is_none() && grads.get(&vars["u"]).is_none());
    }
}

/// An activation first, two in a row, one at the end, a closure between, layers without bias, a state of three
/// dimensions.
#[test]
fn sequences_of_all_kinds() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| {
        let inner = ops::seq().add(ops::linear(8, 8, vb.pp("inner"))?).add(Activation::Silu);
        Ok(ops::seq()
            .add(Activation::Sin)
            .add(ops::linear_no_bias(8, 12, vb.pp(0))?)
            .add(Activation::Tanh)
            .add(Activation::Sigmoid)
            .add(ops::linear(12, 8, vb.pp(1))?)
            .add_fn(|x| x * 0.5)
            .add(inner)
            .add_timed(ops::concat_linear(8, 8, vb.pp(2))?)
            .add(Activation::Softplus))
    };
    let field = model_field(&vars, build, |m, t, y| m.forward_at(t, y));
    against_f64(&field, &vars, &start(2, &[3, 5, 8]), "a sequence");
    let turned = model_field(&VarMap::new(), |vb| ops::linear(8, 8, vb), |m, _, y| m.forward(&y.t()?)?.t());
    let y0 = start(2, &[8, 8]);
    assert!(ode(&turned).solve(y0.as_tensor()).is_ok());
}

#[test]
fn what_is_frozen_has_no_gradient_and_changes_no_other() {
    let vars = VarMap::new();
    let field = model_field(&vars, |vb| Mlp::new(&[6, 20, 6], Activation::Tanh, vb), |m, _, y| m.forward(y));
    let y0 = start(2, &[9, 6]);
    for precision in [Precision::F32, Precision::F16] {
        let all = gradients(&ode(&field).precision(precision), &vars, &y0);
        for frozen in ["0.weight", "0.bias", "1.weight", "1.bias"] {
            let field = field.clone().freeze(move |name| name == frozen);
            let mut expected = all.clone();
            expected.remove(frozen);
            compare(&gradients(&ode(&field).precision(precision), &vars, &y0), &expected, 1e-7, frozen);
        }
    }
}

/// A weight made by another layer, and a layer on what does not depend on y, are reached through Candle's graph.
#[test]
fn weights_from_elsewhere_and_branches_without_y_keep_their_gradients() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| {
        Ok((ops::linear(1, 36, vb.pp("hyper"))?, ops::linear(1, 6, vb.pp("time"))?, ops::linear(6, 6, vb.pp("last"))?))
    };
    let eval = |(hyper, time, last): &(ops::Linear, ops::Linear, ops::Linear), t: &Time, y: &Tensor| {
        let t = t.like(y)?;
        let made = affine(y, &hyper.forward(&t)?.reshape((6, 6))?, None)?;
        last.forward(&made.broadcast_add(&time.forward(&t)?)?.tanh()?)
    };
    let field = model_field(&vars, build, eval);
    against_f64(&field, &vars, &start(2, &[9, 6]), "a hypernetwork");
}

#[test]
fn scales_and_wide_sums_change_nothing() {
    let vars = VarMap::new();
    let build = |vb| Mlp::builder(&[6, 20, 6], Activation::Tanh).in_time().build(vb);
    let field = model_field(&vars, build, |m, t, y| m.forward_at(t, y));
    let y0 = start(2, &[9, 6]);
    let plain = gradients(&ode(&field), &vars, &y0);
    for scaling in [AdjointScaling::fixed(1024.0).unwrap(), AdjointScaling::fixed(0.25).unwrap()] {
        compare(&gradients(&ode(&field).scaling(scaling), &vars, &y0), &plain, 1e-7, "a fixed scale");
    }
    let wide = Precision::new().compute(DType::F32).accumulate(DType::F64);
    compare(&gradients(&ode(&field).precision(wide), &vars, &y0), &plain, 1e-6, "sums in F64");
}

/// One tensor as the weight of a layer and of one that sees the time, and of two layers of a chain.
#[test]
fn layers_may_share_their_weights() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| {
        let weight = vb.get((6, 6), "shared")?;
        let bias = vb.get(6, "bias")?;
        Ok((ops::Linear::new(weight.clone(), Some(bias)), ops::ConcatLinear::new(weight, None)))
    };
    let eval = |(plain, in_time): &(ops::Linear, ops::ConcatLinear), t: &Time, y: &Tensor| {
        let again = plain.forward(&plain.forward(y)?.tanh()?)?;
        Tensor::cat(&[&in_time.forward_at(t, &again.narrow(1, 0, 5)?)?.narrow(1, 0, 5)?, &again.narrow(1, 5, 1)?], 1)
    };
    let field = model_field(&vars, build, eval);
    against_f64(&field, &vars, &start(2, &[9, 6]), "a shared weight");
}

/// Masters that are not cast are seen as they are when a pass begins: the layers of a pass are of one set of values.
#[test]
fn a_step_of_the_optimiser_before_the_backward_pass_is_seen_by_all_of_it() {
    let gradients = |chained: bool| {
        let vars = VarMap::new();
        let build = |vb: VarBuilder<'static>| {
            let alone = [candle_nn::linear(6, 20, vb.pp(0))?, candle_nn::linear(20, 6, vb.pp(1))?];
            Ok((Mlp::new(&[6, 20, 6], Activation::Tanh, vb)?, alone))
        };
        let eval = move |(mlp, [first, last]): &(Mlp, [candle_nn::Linear; 2]), _: &Time, y: &Tensor| {
            if chained { mlp.forward(y) } else { last.forward(&first.forward(y)?.tanh()?) }
        };
        let field = model_field(&vars, build, eval);
        let y0 = start(2, &[9, 6]);
        let solution = ode(&field).solve(y0.as_tensor()).unwrap();
        for var in sorted(&vars).values() {
            var.set(&(var.as_tensor() * 0.5).unwrap()).unwrap();
        }
        let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        let found = sorted(&vars).into_iter().map(|(name, var)| (name, grads.get(&var).unwrap().clone()));
        found.map(|(name, x)| (name, x.to_dtype(DType::F64).unwrap())).collect::<Gradients>()
    };
    compare(&gradients(true), &gradients(false), 1e-5, "halved on the way");
}

/// A hidden unit that overflows to ∞ where the cotangent is 0 makes 0 · ∞ of a weight gradient.
#[test]
fn sums_that_are_not_finite_are_an_error() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| Mlp::new(&[1, 1, 1], Activation::Relu, vb);
    let field = model_field(&vars, build, |m, _, y| m.forward(y)?.tanh());
    let data = sorted(&vars);
    data["0.weight"].set(&Tensor::new(&[[1e30f32]], &Device::Cpu).unwrap()).unwrap();
    data["1.weight"].set(&Tensor::new(&[[1e-9f32]], &Device::Cpu).unwrap()).unwrap();
    let y0 = Var::new(&[[1e20f32]], &Device::Cpu).unwrap();
    let solved = Ode::new(&field).solver(Euler).span(0.0, 1e-3).steps(1).solve(y0.as_tensor());
    let error = match solved {
        Ok(solution) => OdeError::from(solution.last().sum_all().unwrap().backward().unwrap_err()),
        Err(error) => error,
    };
    assert!(matches!(error, OdeError::SumOverflow { .. } | OdeError::Overflow { .. }), "{error}");
}

/// A cotangent that is not finite is found, and the place is named.
#[test]
fn infinities_on_the_way_back_are_found() {
    let vars = VarMap::new();
    let field = model_field(&vars, |vb| Mlp::new(&[4, 8, 4], Activation::Relu, vb), |m, _, y| m.forward(y));
    let solution = ode(&field).solve(start(2, &[3, 4]).as_tensor()).unwrap();
    let loss = (solution.last().sum_all().unwrap() * f64::INFINITY).unwrap();
    let error = OdeError::from(loss.backward().unwrap_err());
    assert!(matches!(error, OdeError::Overflow { .. }), "{error}");
}

/// Outside a solve a layer is an op of Candle's graph like any other.
#[test]
fn outside_a_solve_candle_reaches_the_weights() {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let mlp = Mlp::new(&[3, 8, 2], Activation::Tanh, vb).unwrap();
    let loss = mlp.forward(&normal(1, &[5, 3], DType::F32)).unwrap().sqr().unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    assert!(sorted(&vars).values().all(|var| grads.get(var).is_some()));
}
