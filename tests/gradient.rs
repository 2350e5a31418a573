//! In F64 the manual gradient is that of the steps taken: equal to the unrolled one, and to finite differences.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module, VarMap, linear, linear_no_bias};
use candle_ode::prelude::*;
use common::gradcheck::Case;
use common::*;

fn named(vars: &VarMap, extra: impl IntoIterator<Item = (&'static str, Var)>) -> Vec<(String, Var)> {
    let extra = extra.into_iter().map(|(name, var)| (name.to_owned(), var));
    sorted(vars).into_iter().chain(extra).collect()
}

/// ½ Σ y² over all tensors of a state.
fn half_square(state: &State) -> candle_core::Result<Tensor> {
    let parts = state.tensors().iter().map(|y| y.sqr()?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
    Tensor::stack(&parts, 0)?.sum_all()? * 0.5
}

/// A case of a solve from a variable; the loss is ½ y(T)².
fn case(ode: Ode, vars: &VarMap, y0: Var, start: impl Fn(&Tensor) -> Tensor + Send + 'static) -> Case {
    let names = named(vars, [("y0", y0.clone())]);
    Case::new(names, move |adjoint| {
        let solution = ode.clone().adjoint(adjoint).solve(start(y0.as_tensor()))?;
        Ok(half_square(solution.last_state())?)
    })
}

fn mlp_case(solver: impl Solver, t0: f64, t1: f64, steps: usize) -> Case {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F64, 3, 5);
    fill(&vars, 1, 1.0);
    case(
        Ode::new(&field).solver(solver).span(t0, t1).steps(steps),
        &vars,
        variable(9, &[4, 3], DType::F64),
        Tensor::clone,
    )
}

macro_rules! solvers {
    ($($test:ident: $solver:expr),* $(,)?) => {
        $(#[test] fn $test() {
            with_large_stack(|| {
                for (t0, t1, steps) in [(0.0, 1.0, 6), (1.0, -0.5, 4)] {
                    mlp_case($solver, t0, t1, steps).equals_unrolled();
                }
                mlp_case($solver, 0.2, 0.5, 1).check();
            });
        })*
    };
}

mod of_every_solver {
    use super::*;
    solvers! {
        euler: Euler, midpoint: Midpoint, heun: Heun, ralston: Ralston, rk3: Rk3, rk4: Rk4,
        three_eighths: ThreeEighths, bosh3: Bosh3, dopri5: Dopri5, tsit5: Tsit5,
        own_tableau: Tableau::new("Ralston 3", 3, &[&[0.5], &[0.0, 0.75]], &[2. / 9., 1. / 3., 4. / 9.]).unwrap(),
    }
}

#[test]
fn carries_no_graph() {
    let case = mlp_case(Rk4, 0.0, 1.0, 3);
    let grads = case.gradients(Discrete::default());
    assert!(case.vars.iter().all(|(_, var)| !grads.get(var).unwrap().track_op()));
}

#[test]
fn of_states_of_one_to_four_dimensions() {
    with_large_stack(|| {
        for shape in [&[3][..], &[4, 3], &[2, 2, 3], &[2, 1, 2, 3], &[1, 3], &[1]] {
            let dim = *shape.last().unwrap();
            let vars = VarMap::new();
            let field = field64(
                &vars,
                move |vb| Ok((vb.get(dim, "a")?, vb.get(dim, "b")?)),
                |(a, b), t, y, _| {
                    let y = y.single()?;
                    let bent = y.broadcast_mul(a)?.tanh()?.broadcast_mul(b)?;
                    let coupled = bent.broadcast_add(&(y.mean_all()? * 0.3)?)?;
                    Ok(State::from(coupled.broadcast_mul(&(t.like(y)? + 1.0)?)?))
                },
            );
            fill(&vars, 2, 1.0);
            let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(4);
            case(ode, &vars, variable(3, shape, DType::F64), Tensor::clone).check();
        }
    });
}

#[test]
fn of_a_scalar_state() {
    with_large_stack(|| {
        let field = FnField::new(|t: &Time, y: &Tensor| y.sin()?.broadcast_add(&t.like(y)?));
        let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(5);
        case(ode, &VarMap::new(), variable(3, &[], DType::F64), Tensor::clone).check();
    });
}

#[test]
fn of_a_state_of_two_tensors_of_different_shapes() {
    with_large_stack(|| {
        let vars = VarMap::new();
        let field = field64(
            &vars,
            |vb| Mlp::new(3, 5, vb),
            |m, t, state, _| {
                let (z, log_p) = (&state[0], &state[1]);
                let f = m.forward(t, z)?.broadcast_mul(&log_p.cos()?.unsqueeze(1)?)?;
                Ok(State::from([f.clone(), (f.sum(1)? * 0.1)?.sub(log_p)?]))
            },
        );
        fill(&vars, 4, 1.0);
        let (z, log_p) = (variable(5, &[4, 3], DType::F64), variable(6, &[4], DType::F64));
        let names = named(&vars, [("z", z.clone()), ("log_p", log_p.clone())]);
        let ode = Ode::new(&field).solver(Bosh3).span(0.0, 1.0).steps(3).save_at(&[1.0 / 3.0, 1.0]);
        let run = move |adjoint, second: bool| {
            let start = State::from([z.as_tensor().clone(), log_p.as_tensor().clone()]);
            let solution = ode.clone().adjoint(adjoint).solve(start)?;
            match second {
                true => Ok(solution.states()[0][1].sqr()?.sum_all()?),
                false => Ok((half_square(&solution.states()[1])? + half_square(&solution.states()[0])?)?),
            }
        };
        let other = run.clone();
        Case::new(names.clone(), move |adjoint| run(adjoint, false)).check();
        // A loss that sees only one tensor of one output.
        Case::new(names, move |adjoint| other(adjoint, true)).check();
    });
}

#[test]
fn of_y0_that_is_a_view() {
    with_large_stack(|| {
        type View = (&'static [usize], fn(&Tensor) -> Tensor);
        let views: [View; 4] = [
            (&[3, 4], |x| x.t().unwrap()),
            (&[8, 3], |x| x.narrow(0, 2, 4).unwrap()),
            (&[4, 6], |x| x.narrow(1, 2, 3).unwrap()),
            (&[1, 3], |x| x.broadcast_as((4, 3)).unwrap()),
        ];
        for (shape, view) in views {
            let vars = VarMap::new();
            let field = mlp_field(&vars, DType::F64, 3, 5);
            fill(&vars, 1, 1.0);
            let ode = Ode::new(&field).solver(Rk3).span(0.0, 1.0).steps(3);
            case(ode, &vars, variable(7, shape, DType::F64), view).check();
        }
    });
}

#[test]
fn of_a_batch_of_one_over_one_step() {
    with_large_stack(|| {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F64, 3, 5);
        fill(&vars, 8, 1.0);
        let ode = Ode::new(&field).solver(Tsit5).span(0.0, 0.5).steps(1);
        case(ode, &vars, variable(7, &[1, 3], DType::F64), Tensor::clone).check();
    });
}

#[test]
fn of_inputs_that_are_variables_and_computed_from_variables() {
    with_large_stack(|| {
        let vars = VarMap::new();
        let field = field64(
            &vars,
            |vb| Mlp::new(3, 5, vb),
            |m, t, y, inputs| {
                let y = y.single()?;
                let [bias, gain, unused] = inputs else { candle_core::bail!("{} inputs", inputs.len()) };
                assert_eq!((unused.dtype(), gain.dtype()), (y.dtype(), y.dtype()));
                Ok(State::from(m.forward(t, y)?.broadcast_add(bias)?.broadcast_mul(gain)?))
            },
        );
        fill(&vars, 1, 1.0);
        let (y0, w) = (variable(2, &[4, 3], DType::F64), variable(3, &[3], DType::F64));
        let v = variable(4, &[3, 1], DType::F64);
        let names = named(&vars, [("y0", y0.clone()), ("w", w.clone()), ("v", v.clone())]);
        let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).steps(3);
        Case::new(names, move |adjoint| {
            let computed = (v.broadcast_mul(&w)?.sum(0)?.tanh()? + 1.0)?;
            let inputs = [w.as_tensor().clone(), computed, v.t()?];
            let solution = ode.clone().inputs(&inputs).adjoint(adjoint).solve(y0.as_tensor())?;
            // The input is used outside of the solve as well.
            Ok((half_square(solution.last_state())? + w.sqr()?.sum_all()?)?)
        })
        .check();
    });
}

#[test]
fn of_one_tensor_in_several_roles() {
    with_large_stack(|| {
        // The same variable is y0, twice an input, and what a computed input comes from.
        let field = FnField::with_inputs(|_, y, inputs| {
            let y = y.single()?;
            let pushed = ((&inputs[0] * y)?.sin()? + (&inputs[1] * 0.5)?)?;
            Ok(State::from((pushed - (&inputs[2] * y)?)?))
        });
        let x = variable(2, &[4], DType::F64);
        let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(4);
        Case::new([("x".to_owned(), x.clone())], move |adjoint| {
            let inputs = [x.as_tensor().clone(), x.as_tensor().clone(), x.sqr()?];
            Ok(half_square(ode.clone().inputs(&inputs).adjoint(adjoint).solve(x.as_tensor())?.last_state())?)
        })
        .check();
    });
}

#[test]
fn of_parameters_used_twice_not_at_all_or_frozen() {
    with_large_stack(|| {
        let vars = VarMap::new();
        let field = field64(
            &vars,
            |vb| {
                let layer = linear(3, 3, vb.pp("twice"))?;
                let again: Linear = linear_no_bias(3, 3, vb.pp("twice"))?;
                let fixed = linear(3, 3, vb.pp("fixed"))?;
                vb.get(7, "unused")?;
                Ok((layer, again, fixed))
            },
            |(layer, again, fixed), t, y, _| {
                let y = y.single()?;
                let hidden = layer.forward(y)?.broadcast_add(&t.like(y)?)?.tanh()?;
                Ok(State::from((again.forward(&layer.forward(&hidden)?.tanh()?)? + fixed.forward(y)?)?))
            },
        );
        fill(&vars, 1, 0.7);
        let y0 = variable(2, &[4, 3], DType::F64);
        let ode = |field: &ModelField| Ode::new(field).solver(Heun).span(0.0, 1.0).steps(4);
        case(ode(&field), &vars, y0.clone(), Tensor::clone).check();
        let whole = case(ode(&field), &vars, y0.clone(), Tensor::clone).gradients(Discrete::default());
        let frozen = field.freeze(|name| name.starts_with("fixed"));
        let frozen = case(ode(&frozen), &vars, y0, Tensor::clone);
        frozen.equals_unrolled();
        let part = frozen.gradients(Discrete::default());
        for (name, var) in &frozen.vars {
            match (part.get(var), whole.get(var)) {
                (Some(part), Some(whole)) => assert_eq!(bits(part), bits(whole), "{name}"),
                (None, _) => assert!(name.starts_with("fixed") || name == "unused", "{name}"),
                (Some(_), None) => panic!("{name} has no gradient unless others are frozen"),
            }
        }
    });
}

#[test]
fn of_several_outputs_in_one_loss() {
    with_large_stack(|| {
        for wanted in [&[0.0, 0.3, 1.0][..], &[1.0, 0.5, 0.0, 0.5], &[0.3], &[0.0], &[0.3, 0.5]] {
            let vars = VarMap::new();
            let field = mlp_field(&vars, DType::F64, 3, 5);
            fill(&vars, 1, 1.0);
            let y0 = variable(9, &[2, 3], DType::F64);
            let names = named(&vars, [("y0", y0.clone())]);
            let ode = Ode::new(&field).solver(Rk4).grid(&[0.0, 0.1, 0.3, 0.5, 0.9, 1.0]).save_at(wanted);
            let (times, outputs) = (wanted.to_vec(), wanted.len());
            Case::new(names, move |adjoint| {
                let solution = ode.clone().adjoint(adjoint).solve(y0.as_tensor())?;
                assert_eq!((solution.times(), solution.states().len()), (times.as_slice(), outputs));
                let mut loss = Tensor::zeros((), DType::F64, y0.device())?;
                for (n, state) in solution.states().iter().enumerate() {
                    loss = (loss + (half_square(state)? * (n as f64 + 1.0))?)?;
                }
                Ok(loss)
            })
            .check();
        }
    });
}

/// Layers are pulled back without a graph, but not where only a graph shows what is cut: at some times alone, say.
#[test]
fn gradients_that_are_stopped_at_some_times_stay_stopped() {
    let vars = VarMap::new();
    let build = |vb| candle_ode::ops::Mlp::new(&[3, 8, 3], candle_ode::ops::Activation::Tanh, vb);
    let eval = |m: &candle_ode::ops::Mlp, t: &Time, y: &Tensor| {
        if t.value() < 0.5 { m.forward(y) } else { m.forward(&y.detach()) }
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap().stops_gradients();
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[4, 3], DType::F32);
    let gradient = |adjoint: Adjoint| {
        let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(8).adjoint(adjoint);
        let loss = ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().sum_all().unwrap();
        loss.backward().unwrap().get(&y0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let expected = gradient(Unrolled.into());
    for _ in 0..2 {
        let got = gradient(Discrete::default().into());
        let error = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-5, "{got:?}, not {expected:?}");
    }
}
