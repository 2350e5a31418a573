//! Entries that wait on a second level of storage come back to the bit, and are not in memory while they wait.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor};
use candle_nn::VarMap;
use candle_ode::memory::TrackingAllocator;
use candle_ode::prelude::*;
use candle_ode::{Checkpoints, Increments4, Increments8, Increments16, InputOnly, SecondLevel, States};
use common::*;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

const STEPS: usize = 13;
const ROWS: usize = 6;

struct Problem {
    vars: VarMap,
    field: ModelField,
    y0: candle_core::Var,
}

impl Problem {
    fn new() -> Self {
        let vars = VarMap::new();
        let field = mlp_field(&vars, DType::F32, 3, 6);
        fill(&vars, 1, 1.0);
        Self { vars, field, y0: variable(9, &[ROWS, 3], DType::F32) }
    }

    fn ode(&self) -> Ode {
        Ode::new(&self.field).solver(Heun).span(0.0, 1.0).steps(STEPS)
    }

    /// The bits of y(T), dL/dy0 and dL/dθ, and bytes on both levels.
    fn bits(&self, ode: Ode, adjoint: Discrete) -> (Vec<Vec<u32>>, [usize; 2]) {
        let solution = ode.adjoint(adjoint).solve(self.y0.as_tensor()).unwrap();
        let bytes = [solution.trajectory_bytes(), solution.second_level_bytes()];
        let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        let all = sorted(&self.vars).into_values().chain([self.y0.clone()]);
        let bits =
            |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
        let gradients = all.map(|var| bits(grads.get(&var).unwrap()));
        (std::iter::once(bits(solution.last())).chain(gradients).collect(), bytes)
    }
}

fn ways() -> Vec<(&'static str, Discrete)> {
    let discrete = Discrete::default;
    vec![
        ("all", discrete()),
        ("all in F16", discrete().codec(States(DType::F16))),
        ("all, consumed", discrete().consume()),
        ("increments of 16 bits", discrete().codec(Increments16)),
        ("increments of 8 bits", discrete().codec(Increments8)),
        ("increments of 4 bits", discrete().codec(Increments4)),
        ("checkpoints", discrete().checkpoints(3)),
        ("checkpoints in increments", discrete().codec(Increments8).checkpoints(4)),
        ("nothing but y0", discrete().schedule(InputOnly)),
    ]
}

#[test]
fn gradients_are_the_same_to_the_bit_wherever_entries_wait() {
    let problem = Problem::new();
    for (name, way) in ways() {
        let (expected, [all, none]) = problem.bits(problem.ode(), way.clone());
        assert_eq!(none, 0, "{name}");
        for resident in [0, 1, 3, STEPS] {
            let two = way.clone().two_levels(resident, SecondLevel::temporary_file());
            let (bits, [here, away]) = problem.bits(problem.ode(), two.clone());
            assert_eq!(bits, expected, "{name}, {resident} resident");
            assert_eq!(here + away, all, "{name}, {resident} resident");
            assert_eq!(
                here,
                two.trajectory_bytes(&[(ROWS, 3).into()], STEPS, Precision::F32),
                "{name}, {resident} resident"
            );
            assert_eq!(away == 0, resident >= STEPS || all == here, "{name}, {resident} resident");
        }
        // On a CPU entries are in the memory of the host as it is.
        let (bits, bytes) = problem.bits(problem.ode(), way.two_levels(1, SecondLevel::Host));
        assert_eq!((bits, bytes), (expected, [all, 0]), "{name}");
    }
}

/// Online checkpoints thin what they keep: increments that lose their support become states, on the level they are on.
#[test]
fn thinned_slots_stay_on_their_level() {
    let problem = Problem::new();
    for way in [Discrete::default(), Discrete::default().codec(Increments8)].map(|way| way.checkpoints(4)) {
        let ode = || Ode::new(&problem.field).solver(Dopri5).span(0.0, 8.0).tolerances(1e-6, 1e-6);
        let (expected, _) = problem.bits(ode(), way.clone());
        for resident in [0, 1, 2] {
            let two = way.clone().two_levels(resident, SecondLevel::temporary_file());
            let (bits, [here, away]) = problem.bits(ode(), two);
            assert_eq!(bits, expected, "{resident} resident");
            assert!(here <= resident * ROWS * 3 * 4 && away > 0, "{resident} resident: {here} bytes here, {away} away");
        }
    }
}

#[test]
fn tiles_share_a_file() {
    let problem = Problem::new();
    let field = problem.field.clone().row_wise();
    let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(STEPS).tile(2).threads(2);
    let (expected, [all, _]) = problem.bits(ode.clone(), Discrete::default());
    let two = Discrete::default().two_levels(2, SecondLevel::temporary_file());
    let (bits, [here, away]) = problem.bits(ode, two);
    assert_eq!((bits, here, away), (expected, 2 * ROWS * 3 * 4, all - 2 * ROWS * 3 * 4));
}

#[test]
fn a_solve_is_pulled_back_twice() {
    let problem = Problem::new();
    let adjoint = Discrete::default().checkpoints(4).two_levels(1, SecondLevel::temporary_file());
    let solution = problem.ode().adjoint(adjoint).solve(problem.y0.as_tensor()).unwrap();
    let gradient = || {
        let grads = solution.last().sum_all().unwrap().backward().unwrap();
        grads.get(&problem.y0).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(gradient(), gradient());
}

#[test]
fn a_directory_that_is_not_there_is_an_error_that_names_it() {
    let problem = Problem::new();
    let adjoint = Discrete::default().two_levels(1, SecondLevel::File("no/such/directory".into()));
    let error = problem.ode().adjoint(adjoint).solve(problem.y0.as_tensor()).unwrap_err();
    assert!(matches!(&error, OdeError::Io { path, .. } if path.ends_with("no/such/directory")), "{error}");
}

#[test]
fn linearisations_stay_where_they_are() {
    let problem = Problem::new();
    let adjoint = Discrete::default().schedule(Checkpoints::new(3).with_stages());
    let adjoint = adjoint.two_levels(1, SecondLevel::temporary_file());
    let error = problem.ode().adjoint(adjoint).solve(problem.y0.as_tensor()).unwrap_err();
    assert!(matches!(error, OdeError::Unsupported { .. }), "{error}");
}
