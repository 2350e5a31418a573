//! A row-wise field is solved tile by tile with every adjoint, codec and schedule: the same gradient as on the whole
//! batch, the same bits on any number of threads, the same bytes kept.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Conv2d, Conv2dConfig, Module, VarBuilder, VarMap};
use candle_ode::field::draw::Stream;
use candle_ode::ops::{Activation, Dropout, Mlp, Timed};
use candle_ode::prelude::*;
use candle_ode::{Checkpoints, Increments4, Increments8, Increments16, InputOnly, States};
use common::*;
use std::ops::ControlFlow;

/// All that a solve hands out and its loss pulls back, with the solution's counts.
struct Outcome {
    tensors: Vec<(String, Tensor)>,
    stats: Stats,
    tiles: usize,
    bytes: usize,
}

/// A loss over two output times.
fn outcome(ode: &Ode, vars: &VarMap, y0: &[Var]) -> Outcome {
    let start: Vec<Tensor> = y0.iter().map(|y| y.as_tensor().clone()).collect();
    let solution = ode.solve(start).unwrap();
    let parts = solution.states().iter().zip([1.0, 3.0]).flat_map(|(state, weight)| {
        state.tensors().iter().map(move |y| (y.to_dtype(DType::F64)?.sqr()?.mean_all()? * weight)?.sum_all())
    });
    let loss = parts.reduce(|a, b| a? + b?).unwrap().unwrap();
    let grads = loss.backward().unwrap();
    let named = sorted(vars).into_iter().chain(y0.iter().enumerate().map(|(n, y)| (format!("y0 {n}"), y.clone())));
    let mut tensors: Vec<_> = named.map(|(name, var)| (name, grads.get(&var).unwrap().clone())).collect();
    tensors.extend(solution.last_state().tensors().iter().map(|y| ("y(T)".to_owned(), y.detach())));
    Outcome { tensors, stats: solution.stats(), tiles: solution.tiles(), bytes: solution.trajectory_bytes() }
}

fn largest_difference(a: &Outcome, b: &Outcome) -> f64 {
    a.tensors.iter().zip(&b.tensors).map(|((_, a), (_, b))| relative(a, b)).fold(0.0, f64::max)
}

fn adjoints(reversible: bool) -> Vec<Adjoint> {
    let one = Discrete::default().stage_memory(StageMemory::One);
    let discrete = [
        Discrete::default(),
        one,
        Discrete::default().checkpoints(3),
        Discrete::default().schedule(InputOnly).consume(),
        Discrete::default().codec(States(DType::F16)),
        Discrete::default().codec(Increments16),
        Discrete::default().codec(Increments8).checkpoints(2),
        Discrete::default().codec(Increments4),
        Discrete::default().keep_linearizations(),
        Discrete::default().schedule(Checkpoints::new(2).with_stages()).consume(),
    ];
    let discrete = discrete.into_iter().map(Adjoint::from);
    match reversible {
        false => discrete.chain([Backsolve::default().into()]).collect(),
        true => discrete
            .take(1)
            .chain([Reconstruct::default().into(), Reconstruct::default().anchor_every(3).into()])
            .collect(),
    }
}

/// Seven rows in tiles of 1 to 4 against the whole.
fn check(ode: Ode, reversible: bool, vars: &VarMap, y0: &[Var]) {
    for adjoint in adjoints(reversible) {
        let ode = ode.clone().adjoint(adjoint.clone());
        let whole = outcome(&ode.clone().tile(7), vars, y0);
        assert_eq!(whole.tiles, 1);
        for (rows, tiles) in [(1, 7), (2, 4), (4, 2)] {
            let tiled = outcome(&ode.clone().tile(rows), vars, y0);
            let error = largest_difference(&tiled, &whole);
            assert!(error < 1e-12, "{adjoint:?} in tiles of {rows}: {error:e}");
            assert_eq!((tiled.tiles, tiled.bytes), (tiles, whole.bytes), "{adjoint:?} in tiles of {rows}");
            let counts =
                |s: Stats| (s.evaluations, s.linearizations, s.pullbacks, s.accepted_steps, s.recomputed_steps);
            let (tiled, whole) = (counts(tiled.stats), counts(whole.stats));
            // The first solve of a field checks it.
            assert_eq!((tiled.1, tiled.2, tiled.3, tiled.4), (whole.1, whole.2, whole.3, whole.4));
            assert!(tiled.0.abs_diff(whole.0) <= 3, "{tiled:?} {whole:?}");
        }
    }
}

#[test]
fn an_mlp_in_tiles_has_the_gradient_of_the_whole() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F64, 3, 5).row_wise();
    fill(&vars, 1, 1.0);
    let y0 = [variable(9, &[7, 3], DType::F64)];
    let ode = Ode::new(&field).span(0.0, 1.0).steps(9).save_at(&[1.0 / 3.0, 1.0]);
    check(ode.clone().solver(Euler), false, &vars, &y0);
    check(ode.clone().solver(Heun), false, &vars, &y0);
    check(ode.clone().solver(Rk4), false, &vars, &y0);
    check(ode.clone().solver(Dopri5), false, &vars, &y0);
    check(ode.clone().solver(Reversible::new(Midpoint)), true, &vars, &y0);
    check(ode.clone().solver(ReversibleHeun), true, &vars, &y0);
}

struct Net(Conv2d, Conv2d);

impl Net {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        let config = Conv2dConfig { padding: 1, ..Default::default() };
        Ok(Self(candle_nn::conv2d(2, 3, 3, config, vb.pp(0))?, candle_nn::conv2d(3, 2, 3, config, vb.pp(1))?))
    }
}

/// A state of two tensors, images and a number for each.
#[test]
fn a_convolution_over_a_state_of_two_tensors_too() {
    let vars = VarMap::new();
    let eval = |m: &Net, _: &Time, y: &State, _: &[Tensor]| {
        let slope = m.1.forward(&m.0.forward(&y[0])?.tanh()?)?;
        let cost = slope.sqr()?.flatten_from(1)?.sum_keepdim(1)?;
        Ok(State::from([slope, cost]))
    };
    let field = field64(&vars, Net::new, eval).row_wise();
    fill(&vars, 2, 0.7);
    let y0 = [variable(3, &[7, 2, 4, 5], DType::F64), variable(4, &[7, 1], DType::F64)];
    check(Ode::new(&field).span(0.0, 1.0).steps(5).save_at(&[0.2, 1.0]), false, &vars, &y0);
}

/// Layers of this crate, which run as one op: wide ones, or narrow ones whose batch lies in the lanes.
fn chained(vars: &VarMap, width: usize) -> ModelField {
    let build = move |vb: VarBuilder<'static>| Mlp::builder(&[width, 40, width], Activation::Tanh).in_time().build(vb);
    ModelField::new(vars, &Device::Cpu, build, |m: &Mlp, t: &Time, y| m.forward_at(t, y)).unwrap()
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let makes: [fn(&VarMap) -> ModelField; 2] = [|vars| mlp_field(vars, DType::F32, 16, 32), |vars| chained(vars, 16)];
    for make in makes {
        let vars = VarMap::new();
        let field = make(&vars).row_wise();
        fill(&vars, 1, 1.0);
        let y0 = [variable(9, &[50, 16], DType::F32)];
        for precision in [Precision::F32, Precision::F16, Precision::BF16] {
            for adjoint in [Discrete::default().checkpoints(2), Discrete::default().keep_linearizations()] {
                let ode = Ode::new(&field).span(0.0, 1.0).steps(6).save_at(&[0.5, 1.0]).precision(precision);
                let ode = ode.adjoint(adjoint).tile(7);
                let alone = outcome(&ode.clone().threads(1), &vars, &y0);
                for threads in [2, 3, 100] {
                    let many = outcome(&ode.clone().threads(threads), &vars, &y0);
                    for ((name, a), (_, b)) in alone.tensors.iter().zip(&many.tensors) {
                        assert_eq!(bits(a), bits(b), "{name} on {threads} threads in {precision:?}");
                    }
                }
            }
        }
    }
}

/// What a row gives does not depend on the rows beside it, to the last bit; sums over the batch do by their order.
#[test]
fn tiles_of_chained_layers_have_the_states_of_the_whole() {
    for width in [3, 40] {
        let vars = VarMap::new();
        let field = chained(&vars, width).row_wise();
        fill(&vars, 1, 1.0);
        let y0 = [variable(9, &[50, width], DType::F32)];
        for (precision, bound) in [(Precision::F32, 1e-6), (Precision::F16, 1e-5), (Precision::BF16, 1e-3)] {
            let ode = Ode::new(&field).span(0.0, 1.0).steps(6).save_at(&[0.5, 1.0]).precision(precision);
            let whole = outcome(&ode.clone().tile(50), &vars, &y0);
            for rows in [1, 7, 17, 25] {
                let tiled = outcome(&ode.clone().tile(rows), &vars, &y0);
                assert!(largest_difference(&tiled, &whole) < bound, "{precision:?} {width} wide in tiles of {rows}");
                let last = whole.tensors.len() - 1;
                assert_eq!(bits(&tiled.tensors[last].1), bits(&whole.tensors[last].1), "{precision:?} {rows}");
            }
        }
    }
}

/// Solves on several threads at once, each in tiles.
#[test]
fn solves_do_not_disturb_each_other() {
    let vars = VarMap::new();
    let field = chained(&vars, 16).row_wise();
    fill(&vars, 1, 1.0);
    let y0 = [variable(9, &[50, 16], DType::F32)];
    let ode = Ode::new(&field).span(0.0, 1.0).steps(6).save_at(&[0.5, 1.0]).tile(7).threads(2);
    let expected: Vec<_> = outcome(&ode, &vars, &y0).tensors.iter().map(|(_, x)| bits(x)).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let found: Vec<_> = outcome(&ode, &vars, &y0).tensors.iter().map(|(_, x)| bits(x)).collect();
                assert_eq!(found, expected);
            });
        }
    });
}

/// Loss over rows, the largest of which overflow in F16 when they are pulled back: some tiles redo their pass.
#[test]
fn overflows_in_some_tiles_change_no_bit_either() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 4, 8).row_wise();
    fill(&vars, 1, 40.0);
    let y0 = [variable(9, &[12, 4], DType::F32)];
    let ode = || {
        let ode = Ode::new(&field).span(0.0, 0.5).steps(8).save_at(&[0.25, 0.5]).precision(Precision::F16);
        ode.on_overflow(OnOverflow::Retry).scaling(AdjointScaling::per_step()).tile(2)
    };
    let alone = outcome(&ode().threads(1), &vars, &y0);
    let many = outcome(&ode().threads(3), &vars, &y0);
    for ((name, a), (_, b)) in alone.tensors.iter().zip(&many.tensors) {
        assert_eq!(bits(a), bits(b), "{name}");
    }
}

#[test]
fn small_batches_and_what_cannot_be_cut_are_solved_whole() {
    let field = FnField::new(|_: &Time, y: &Tensor| y.tanh()).row_wise();
    let y0 = |rows: usize| normal(1, &[rows, 64], DType::F32);
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).steps(4);
    let tiles = |ode: &Ode, rows: usize| ode.solve(y0(rows)).unwrap().tiles();
    assert_eq!((tiles(&ode, 128), tiles(&ode, 129), tiles(&ode, 1024)), (1, 2, 8));
    assert_eq!(tiles(&ode.clone().no_grad(), 1024), 8);
    assert_eq!(tiles(&ode.clone().on_step(|_| ControlFlow::Continue(())), 1024), 1);
    assert_eq!(tiles(&Ode::new(&field).solver(Dopri5).span(0.0, 1.0).tolerances(1e-3, 1e-3), 1024), 1);
    let plain = FnField::new(|_: &Time, y: &Tensor| y.tanh());
    assert_eq!(tiles(&Ode::new(&plain).span(0.0, 1.0).steps(4), 1024), 1);
}

#[test]
fn dense_output_is_that_of_the_whole() {
    let field = FnField::new(|_: &Time, y: &Tensor| y.sin()).row_wise();
    let y0 = normal(1, &[6, 4], DType::F64);
    let ode = Ode::new(&field).solver(Dopri5).span(0.0, 1.0).steps(4).dense();
    let at = |ode: Ode| ode.solve(&y0).unwrap().at(0.3).unwrap().single().unwrap().clone();
    assert!(relative(&at(ode.clone().tile(2)), &at(ode)) < 1e-14);
}

#[test]
fn what_is_wrong_is_said() {
    let y0 = normal(1, &[6, 4], DType::F32);
    let error = |ode: Ode| ode.solve(&y0).unwrap_err();
    let span = |field: &FnField| Ode::new(field).span(0.0, 1.0).steps(2).tile(2);
    let plain = FnField::new(|_: &Time, y: &Tensor| y.tanh());
    let rows = plain.clone().row_wise();
    assert!(error(span(&plain)).to_string().contains("row_wise"));
    assert!(matches!(error(span(&rows).threads(0)), OdeError::Setting { setting: "threads", .. }));
    assert!(matches!(error(span(&rows).tile(0)), OdeError::Setting { setting: "tile", .. }));
    for refused in [
        span(&rows).on_step(|_| ControlFlow::Continue(())),
        span(&rows).adjoint(Unrolled),
        Ode::new(&rows).solver(Dopri5).span(0.0, 1.0).tolerances(1e-3, 1e-3).tile(2),
    ] {
        let error = error(refused);
        assert!(matches!(&error, OdeError::Unsupported { .. }) && error.to_string().contains("tile"), "{error}");
    }
    for refused in [span(&plain), span(&rows).tile(0), span(&rows).adjoint(Unrolled)] {
        assert!(refused.plan(&y0).is_err(), "a plan refuses what a solve does");
    }
    assert_eq!(span(&rows).plan(&y0).unwrap().tiles, 3);
    assert_eq!(span(&rows).tile(6).plan(&y0).unwrap().tiles, 1);
    let y0 = Var::from_tensor(&y0).unwrap();
    let within = span(&rows).adjoint(Discrete::default().budget(1 << 20)).solve(y0.as_tensor()).unwrap();
    assert_eq!(within.tiles(), 3);
    let state = [normal(1, &[6, 4], DType::F32), normal(1, &[3], DType::F32)];
    assert!(matches!(span(&rows).solve(State::from(state)).unwrap_err(), OdeError::Unsupported { .. }));
}

/// Rows that are all alike would hide a mean over them.
#[test]
fn coupled_rows_are_found() {
    let alike = Tensor::ones((8, 4), DType::F32, &Device::Cpu).unwrap();
    let coupled: [fn(&Tensor) -> candle_core::Result<Tensor>; 3] = [
        |y| y.broadcast_sub(&y.mean_keepdim(0)?),
        |y| y.broadcast_add(&(y.dim(0)? as f64 * Tensor::ones(1, y.dtype(), y.device())?)?),
        |y| y.t()?.contiguous()?.matmul(y).and_then(|gram| y.matmul(&gram)),
    ];
    for f in coupled {
        for rows in [1, 4] {
            let field = FnField::new(move |_: &Time, y: &Tensor| f(y)).row_wise();
            let error = Ode::new(&field).span(0.0, 0.1).steps(2).tile(rows).solve(&alike).unwrap_err();
            assert!(matches!(error, OdeError::NotRowWise { .. }), "{error}");
        }
    }
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F32, 4, 300).row_wise();
        fill(&vars, 1, 2.0);
        Ode::new(&field).span(0.0, 0.1).steps(2).precision(precision).tile(4).solve(&alike).unwrap();
    }
}

/// Drawn by row, a mask is the same in whatever tile a row lies.
#[test]
fn dropout_by_row_in_tiles_is_that_of_the_whole() {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| {
        let mask = Dropout::from_stream(0.4, Stream::next().by_row())?;
        Ok((Mlp::new(&[6, 20, 6], Activation::Tanh, vb)?, mask))
    };
    let eval = |(mlp, mask): &(Mlp, Dropout), _: &Time, y: &Tensor| mask.forward(&mlp.forward(y)?);
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap();
    fill(&vars, 3, 1.0);
    let y0 = [variable(1, &[38, 6], DType::F32)];
    let ode = |field: &ModelField| Ode::new(field).span(0.0, 1.0).steps(3).seed(5);
    let whole = outcome(&ode(&field), &vars, &y0);
    let tiled = outcome(&ode(&field.row_wise()).tile(8).threads(2), &vars, &y0);
    assert!(largest_difference(&whole, &tiled) < 1e-5);
}
