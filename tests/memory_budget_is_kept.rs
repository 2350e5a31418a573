//! A budget takes the cheapest choice that fits, the measured peak keeps to it, the gradient stays what it is, and a
//! budget too small is an error that names the smallest that would do. Alone in its process: the counter is
//! process-wide.
#![allow(missing_docs)]

mod common;

use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_nn::VarMap;
use candle_ode::OdeError;
use candle_ode::memory::{Choices, TrackingAllocator};
use candle_ode::prelude::*;
use common::{bits, fill, mlp_field, variable};

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

fn train(ode: &Ode, y0: &candle_core::Tensor) -> (GradStore, Stats) {
    let solution = ode.solve(y0).unwrap();
    let gradients = solution.last().sum_all().unwrap().backward().unwrap();
    (gradients, solution.stats())
}

fn peak(ode: &Ode, y0: &candle_core::Tensor) -> u64 {
    let before = TrackingAllocator::live();
    TrackingAllocator::reset_peak();
    drop(train(ode, y0));
    TrackingAllocator::peak() - before
}

#[test]
fn the_cheapest_that_fits_is_taken() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 64, 64);
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[128, 64], DType::F32);
    keeps(&Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(64), &y0);

    let y0 = variable(2, &[512, 64], DType::F32);
    let tiled = Ode::new(&field.row_wise()).solver(Heun).span(0.0, 1.0).steps(32).threads(1);
    let choices = keeps(&tiled, &y0);
    // As the plan says, of as many calls the larger tile; and only where none was asked for may it be smaller.
    let tiles = |choices: &Choices| {
        let mut tiles: Vec<_> = choices.0.iter().map(|choice| choice.tile.unwrap()).collect();
        tiles.sort_unstable();
        tiles.dedup();
        tiles
    };
    assert_eq!(tiles(&choices), [8, 32, 128]);
    assert_eq!(tiles(&tiled.clone().tile(100).choices(y0.as_tensor()).unwrap()), [100]);
    let least = choices.0.iter().min_by_key(|choice| choice.bytes()).unwrap();
    let whole = tiled.tile(usize::MAX).choices(y0.as_tensor()).unwrap();
    assert!(least.name.starts_with("replayed") && least.tile == Some(8), "{}", least.name);
    assert!(2 * least.bytes() < whole.0.iter().map(|choice| choice.bytes()).min().unwrap());
    a_codec_may_be_chosen();
}

/// Codecs come in where they are let in: after the states they stand for, before steps that are computed again.
fn a_codec_may_be_chosen() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 64, 64);
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[128, 64], DType::F32);
    let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(64);
    let all = ode.clone().adjoint(Discrete::default().any_codec()).choices(y0.as_tensor()).unwrap();
    let find = |name: &str| all.0.iter().find(|choice| choice.name.starts_with(name)).unwrap();
    let (states, wide, narrow) =
        (find("every state"), find("every increment kept in 16"), find("every increment kept in 8"));
    assert!(states.bytes() > wide.bytes() && wide.bytes() > narrow.bytes());
    assert_eq!((states.calls(), states.calls()), (wide.calls(), narrow.calls()));
    let taken = |budget: u64| {
        let solution =
            ode.clone().adjoint(Discrete::default().any_codec().budget(budget)).solve(y0.as_tensor()).unwrap();
        solution.last().sum_all().unwrap().backward().unwrap();
        (solution.trajectory_bytes(), solution.stats().recomputed_steps)
    };
    const STATE: usize = 128 * 64;
    assert_eq!(taken(states.bytes()), (63 * 4 * STATE, 0));
    assert_eq!(taken(wide.bytes()), (62 * (2 * STATE + 4 * 128) + 4 * STATE, 0));
    assert_eq!(taken(narrow.bytes()), (62 * (STATE + 4 * 128) + 4 * STATE, 0));
    // Not unless they are let in.
    let plain = ode.choices(y0.as_tensor()).unwrap();
    assert!(plain.0.iter().all(|choice| !choice.name.contains("increment")));
}

/// Every budget is kept by the choice with the fewest calls.
fn keeps(ode: &Ode, y0: &Var) -> Choices {
    let choices = ode.choices(y0.as_tensor()).unwrap();
    println!("{choices}");
    assert!(choices.0.len() > 10 && choices.0.is_sorted_by_key(|choice| choice.calls()));
    let (plain, _) = train(ode, y0.as_tensor());

    let bytes = || choices.0.iter().map(|choice| choice.bytes());
    let (least, most) = (bytes().min().unwrap(), bytes().max().unwrap());
    for budget in [least, least + (most - least) / 4, least + (most - least) / 2, most] {
        let within = ode.clone().adjoint(Discrete::default().budget(budget));
        let (gradients, stats) = train(&within, y0.as_tensor());
        assert_eq!(bits(gradients.get(y0).unwrap()), bits(plain.get(y0).unwrap()), "budget {budget}");
        let fewest = choices.0.iter().filter(|choice| choice.bytes() <= budget).map(|choice| choice.calls()).min();
        assert_eq!(Some(stats.evaluations + stats.linearizations + stats.pullbacks), fewest, "budget {budget}");
        let planned = within.plan(y0.as_tensor()).unwrap();
        let calls = planned.evaluations + planned.linearizations + planned.pullbacks;
        assert_eq!(Some(calls), fewest, "the plan is of what the budget takes");
        let peak = peak(&within, y0.as_tensor());
        assert!(peak as f64 <= 1.03 * budget as f64, "{peak} bytes within {budget}");
    }

    match ode.clone().adjoint(Discrete::default().budget(least - 1)).solve(y0.as_tensor()) {
        Err(OdeError::Budget { smallest, .. }) => assert_eq!(smallest, least),
        other => panic!("{:?}", other.map(|solution| solution.stats())),
    }
    choices
}
