//! A solve is an ordinary part of Candle's graph.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Init, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, linear, seq};
use candle_ode::prelude::*;
use common::gradcheck::Case;
use common::*;
use std::rc::Rc;

fn small(masters: DType) -> (VarMap, ModelField) {
    let vars = VarMap::new();
    let field = mlp_field(&vars, masters, 3, 8);
    fill(&vars, 1, 1.0);
    (vars, field)
}

fn mean_square(solution: &Solution) -> candle_core::Result<Tensor> {
    solution.last().sqr()?.mean_all()
}

#[test]
fn several_solves_in_one_loss() {
    with_large_stack(|| {
        let (vars, field) = small(DType::F64);
        let y0 = variable(2, &[4, 3], DType::F64);
        let names: Vec<_> = sorted(&vars).into_iter().chain([("y0".to_owned(), y0.clone())]).collect();
        Case::new(names, move |adjoint| {
            let ode = Ode::new(&field).solver(Heun).adjoint(adjoint);
            // Two in a row over the same parameters, and one beside them from the same start.
            let first = ode.clone().span(0.0, 0.5).steps(3).solve(y0.as_tensor())?;
            let second = ode.clone().span(0.5, 1.0).steps(2).solver(Rk4).solve(first.last())?;
            let beside = ode.span(1.0, 0.0).steps(2).solve(y0.as_tensor())?;
            Ok((((mean_square(&first)? + mean_square(&second)?)? * 2.0)? + beside.last().sin()?.sum_all()?)?)
        })
        .check();
    });
}

#[test]
fn a_solve_inside_a_larger_network() {
    with_large_stack(|| {
        let (vars, field) = small(DType::F64);
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let encoder = linear(5, 3, vb.pp("encoder")).unwrap();
        let decoder = linear(3, 2, vb.pp("decoder")).unwrap();
        fill(&vars, 1, 1.0);
        let x = variable(2, &[4, 5], DType::F64);
        let names: Vec<_> = sorted(&vars).into_iter().chain([("x".to_owned(), x.clone())]).collect();
        assert_eq!(names.len(), 9);
        Case::new(names, move |adjoint| {
            let y0 = encoder.forward(&x)?.tanh()?;
            let solution = Ode::new(&field).span(0.0, 1.0).steps(3).adjoint(adjoint).solve(&y0)?;
            let skip = (solution.last() + &y0)?;
            Ok(decoder.forward(&skip)?.sqr()?.mean_all()?)
        })
        .check();
    });
}

#[test]
fn a_second_backward_gives_the_same_bits() {
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let (vars, field) = small(DType::F32);
        let y0 = variable(2, &[4, 3], DType::F32);
        let ode = Ode::new(&field).span(0.0, 1.0).steps(5).precision(precision);
        let solution = ode.solve(y0.as_tensor()).unwrap();
        let loss = mean_square(&solution).unwrap();
        let (first, second) = (loss.backward().unwrap(), loss.backward().unwrap());
        let other = (mean_square(&solution).unwrap() * 1.0).unwrap().backward().unwrap();
        for (name, var) in sorted(&vars).into_iter().chain([("y0".into(), y0)]) {
            let bits_of = |grads: &candle_core::backprop::GradStore| bits(grads.get(&var).unwrap());
            assert_eq!(bits_of(&first), bits_of(&second), "{precision:?} {name}");
            assert_eq!(bits_of(&first), bits_of(&other), "{precision:?} {name}");
        }
    }
}

#[test]
fn two_threads_on_one_loss_do_not_mix() {
    let (vars, field) = small(DType::F32);
    let y0 = variable(2, &[16, 3], DType::F32);
    let solution = Ode::new(&field).span(0.0, 1.0).steps(6).precision(Precision::F16).solve(y0.as_tensor()).unwrap();
    let all: Vec<Var> = sorted(&vars).into_values().chain([y0]).collect();
    // Different losses over one solve: whatever is taken from the other thread is wrong.
    let losses = [1.0, -3.0].map(|by| (mean_square(&solution).unwrap() * by).unwrap());
    let gradients = |loss: &Tensor| -> Vec<Vec<u64>> {
        let grads = loss.backward().unwrap();
        all.iter().map(|var| bits(grads.get(var).unwrap())).collect()
    };
    let alone = [gradients(&losses[0]), gradients(&losses[1])];
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (losses, alone, gradients) = (&losses, &alone, &gradients);
            scope.spawn(move || {
                for n in 0..150 {
                    let which = if n % 10 == 9 { 1 - thread } else { thread };
                    assert_eq!(gradients(&losses[which]), alone[which], "repetition {n} on thread {thread}");
                }
            });
        }
    });
}

#[test]
fn two_thousand_parameters_on_a_stack_of_two_mebibytes() {
    const COUNT: usize = 2000;
    let run = || {
        let vars = VarMap::new();
        let field = field64(
            &vars,
            |vb| (0..COUNT).map(|n| vb.get(2, &format!("p{n}"))).collect::<candle_core::Result<Vec<_>>>(),
            |parameters, _, y, _| {
                let all = Tensor::stack(parameters, 0)?;
                Ok(State::from(y.single()?.broadcast_mul(&all.mean(0)?)?))
            },
        );
        fill(&vars, 1, 1.0);
        let y0 = variable(1, &[1, 2], DType::F64);
        let solution = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(2).solve(y0.as_tensor()).unwrap();
        let loss = solution.last().sum_all().unwrap();
        let grads = loss.backward().unwrap();
        // dL/dp = (y₀ h + …)/COUNT is the same for all of them.
        let all: Vec<Vec<u64>> = sorted(&vars).values().map(|var| bits(grads.get(var).unwrap())).collect();
        assert_eq!(all.len(), COUNT);
        assert!(all.iter().all(|gradient| *gradient == all[0]));
    };
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn models_need_be_neither_send_nor_sync() {
    struct Local(candle_nn::Sequential, Rc<Linear>);
    let vars = VarMap::new();
    let field = field64(
        &vars,
        |vb| {
            let shared = Rc::new(linear(3, 3, vb.pp("shared"))?);
            let inner = shared.clone();
            let layers = seq().add(linear(3, 8, vb.pp("in"))?).add_fn(|x| x.tanh()).add(linear(8, 3, vb.pp("out"))?);
            Ok(Local(layers.add_fn(move |x| x.tanh()), inner))
        },
        |Local(layers, shared), _, y, _| Ok(State::from(shared.forward(&layers.forward(y.single()?)?)?)),
    );
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[4, 3], DType::F64);
    let solution = Ode::new(&field).span(0.0, 1.0).steps(3).solve(y0.as_tensor()).unwrap();
    let loss = mean_square(&solution).unwrap();
    let here = loss.backward().unwrap();
    // The backward pass may run on another thread than the forward pass did.
    let there = std::thread::spawn(move || loss.backward().unwrap()).join().unwrap();
    for (name, var) in sorted(&vars) {
        assert_eq!(bits(here.get(&var).unwrap()), bits(there.get(&var).unwrap()), "{name}");
    }
}

#[test]
fn candles_adamw_learns_from_the_gradients() {
    for precision in [Precision::F32, Precision::F16] {
        let (vars, field) = small(DType::F32);
        let target = normal(7, &[16, 3], DType::F32);
        let y0 = normal(2, &[16, 3], DType::F32);
        let mut optimizer = AdamW::new(vars.all_vars(), ParamsAdamW { lr: 2e-2, ..Default::default() }).unwrap();
        let ode = Ode::new(&field).solver(Midpoint).span(0.0, 1.0).steps(4).precision(precision);
        let mut losses = vec![];
        for _ in 0..60 {
            let solution = ode.solve(&y0).unwrap();
            let loss = (solution.last() - &target).unwrap().sqr().unwrap().mean_all().unwrap();
            losses.push(loss.to_scalar::<f32>().unwrap());
            optimizer.step(&loss.backward().unwrap()).unwrap();
        }
        assert!(losses[59] < 0.5 * losses[0], "{precision:?}: from {} to {}", losses[0], losses[59]);
    }
}

#[test]
fn masters_changed_between_solve_and_backward_follow_candles_rule() {
    // y1 = y0 (1 + h p) with h = 1, L = y1²: dL/dp = 2 y1 y0 with the y1 that was handed out and y0 = 3, and
    // dL/dy0 = 2 y1 (1 + p), with the p that the backward pass sees.
    let seen = |master: DType, precision: Precision| {
        let vars = VarMap::new();
        vars.get(1, "p", Init::Const(0.5), master, &Device::Cpu).unwrap();
        let eval = |p: &Tensor, _: &Time, y: &Tensor| y.broadcast_mul(p);
        let field = ModelField::new(&vars, &Device::Cpu, |vb| vb.get(1, "p"), eval).unwrap();
        let y0 = Var::new(&[3f32], &Device::Cpu).unwrap();
        let solution = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(1).precision(precision);
        let solution = solution.solve(y0.as_tensor()).unwrap();
        let loss = solution.last().sqr().unwrap().sum_all().unwrap();
        let p = sorted(&vars)["p"].clone();
        p.set(&Tensor::new(&[1.5f32], &Device::Cpu).unwrap().to_dtype(master).unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        assert_eq!(values(grads.get(&p).unwrap()), [2.0 * 4.5 * 3.0]);
        values(grads.get(&y0).unwrap())[0] / (2.0 * 4.5) - 1.0
    };
    // Not cast: the new value. Cast for this solve: the old one.
    assert_eq!(seen(DType::F32, Precision::F32), 1.5);
    assert_eq!(seen(DType::F32, Precision::F16), 0.5);
    assert_eq!(seen(DType::F64, Precision::F32), 0.5);
}

#[test]
fn a_backward_that_fails_leaves_nothing_to_the_next() {
    /// Passes a value on and refuses its cotangent as long as it is told to.
    struct Refuse(std::sync::Arc<std::sync::atomic::AtomicBool>);
    impl candle_core::CustomOp1 for Refuse {
        fn name(&self) -> &'static str {
            "refuse"
        }

        fn cpu_fwd(
            &self,
            storage: &candle_core::CpuStorage,
            layout: &candle_core::Layout,
        ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
            use candle_core::backend::BackendStorage;
            Ok((storage.to_dtype(layout, storage.dtype())?, layout.shape().clone()))
        }

        fn bwd(&self, _: &Tensor, _: &Tensor, cotangent: &Tensor) -> candle_core::Result<Option<Tensor>> {
            match self.0.load(std::sync::atomic::Ordering::Relaxed) {
                true => candle_core::bail!("refused"),
                false => Ok(Some(cotangent.clone())),
            }
        }
    }
    let (vars, field) = small(DType::F64);
    let y0 = variable(2, &[4, 3], DType::F64);
    let solution = odeint(&field, y0.as_tensor(), &[0.0, 0.2, 0.5, 1.0], Heun).unwrap();
    let loss = |n: usize| solution.states()[n][0].sqr().unwrap().mean_all().unwrap();
    let gradients = |of: &Tensor| {
        let grads = of.backward().unwrap();
        sorted(&vars).into_values().chain([y0.clone()]).map(|var| bits(grads.get(&var).unwrap())).collect::<Vec<_>>()
    };
    let alone = gradients(&loss(1));
    // Both outputs are in the loss: one leaves its cotangent, then the other's is refused on the way.
    let refusing = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    for (first, second) in [(2, 3), (3, 2)] {
        let refused = loss(second).apply_op1(Refuse(refusing.clone())).unwrap();
        assert!((refused + loss(first)).unwrap().backward().is_err());
        let refused = loss(second).apply_op1(Refuse(refusing.clone())).unwrap();
        assert!((loss(first) + refused).unwrap().backward().is_err());
        assert_eq!(gradients(&loss(1)), alone);
    }
}
