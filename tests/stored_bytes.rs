//! What a trajectory occupies, to the byte, for every codec and schedule.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Shape, Tensor, Var};
use candle_ode::prelude::*;
use candle_ode::{Checkpoints, Codec, Encodes, Increments4, Increments8, Increments16, InputOnly, KeepAll, Schedule};
use candle_ode::{States, schedule};
use common::*;

/// Two tensors: rows of an odd width, and one number a row.
const ROWS: usize = 5;
const WIDTH: usize = 7;

fn bytes(adjoint: Discrete, steps: usize) -> usize {
    let field = FnField::with_state(|_: &Time, y: &State| Ok(State::from([y[0].neg()?, y[1].sin()?])));
    let y0 = State::from([
        Var::from_tensor(&normal(1, &[ROWS, WIDTH], DType::F32)).unwrap().into_inner(),
        normal(2, &[ROWS], DType::F32),
    ]);
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(steps).adjoint(adjoint.clone());
    let found = ode.solve(y0).unwrap().trajectory_bytes();
    let shapes = [Shape::from((ROWS, WIDTH)), Shape::from(ROWS)];
    assert_eq!(adjoint.trajectory_bytes(&shapes, steps, Precision::F32), found);
    found
}

const ELEMENTS: usize = ROWS * WIDTH + ROWS;
/// In F32, a row of the first tensor each and one for the second.
const SCALES: usize = 4 * (ROWS + 1);

#[test]
fn a_step_costs_exactly_what_its_codec_says() {
    let cases = [
        (Discrete::default(), 4 * ELEMENTS, 4 * ELEMENTS),
        (Discrete::default().codec(States(DType::F32)), 4 * ELEMENTS, 4 * ELEMENTS),
        (Discrete::default().codec(States(DType::F16)), 2 * ELEMENTS, 2 * ELEMENTS),
        (Discrete::default().codec(States(DType::BF16)), 2 * ELEMENTS, 2 * ELEMENTS),
        // The latest state is kept in the accumulate dtype.
        (Discrete::default().codec(Increments16), 2 * ELEMENTS + SCALES, 4 * ELEMENTS),
        (Discrete::default().codec(Increments8), ELEMENTS + SCALES, 4 * ELEMENTS),
        // An odd row has half a byte to spare.
        (Discrete::default().codec(Increments4), ROWS * 4 + 3 + SCALES, 4 * ELEMENTS),
    ];
    for (adjoint, entry, last) in cases {
        assert_eq!(bytes(adjoint.clone(), 1), 0, "y0 costs nothing");
        assert_eq!(bytes(adjoint.clone(), 2), last);
        for steps in 3..12 {
            assert_eq!(bytes(adjoint.clone(), steps), (steps - 2) * entry + last, "{steps} steps: {adjoint:?}");
        }
    }
}

#[test]
fn a_schedule_costs_its_slots_and_the_start_of_the_last_step() {
    let entry = 4 * ELEMENTS;
    for steps in 1..30 {
        assert_eq!(bytes(Discrete::default().schedule(InputOnly), steps), 0);
        assert_eq!(bytes(Discrete::default().schedule(KeepAll), steps), (steps - 1) * entry);
        for slots in 0..6 {
            let kept = (slots + 1).min(steps - 1);
            assert_eq!(
                bytes(Discrete::default().checkpoints(slots), steps),
                kept * entry,
                "{steps} steps, {slots} slots"
            );
            assert_eq!(
                bytes(Discrete::default().checkpoints(slots).codec(States(DType::F16)), steps),
                kept * entry / 2
            );
        }
    }
}

#[test]
fn increments_need_a_state_where_a_schedule_jumps() {
    for (steps, slots) in [(9, 3), (20, 4), (20, 18), (40, 30)] {
        let mut states: Vec<usize> = vec![];
        let mut sweep = Checkpoints::new(slots).sweep(Some(steps));
        for state in 1..steps {
            states.extend(
                sweep.reached(state).iter().filter(|action| matches!(action, schedule::Action::Keep(_))).map(|_| state),
            );
        }
        let small = Increments8.bytes(&[Shape::from((ROWS, WIDTH)), Shape::from(ROWS)]);
        assert_eq!((Increments8.encodes(), small), (Encodes::Increments, ELEMENTS + SCALES));
        let pairs = states.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count();
        let whole = states.len() - pairs + usize::from(states.last() != Some(&(steps - 1)));
        let found = bytes(Discrete::default().codec(Increments8).checkpoints(slots), steps);
        assert_eq!(found, pairs * small + whole * 4 * ELEMENTS, "{steps} steps, {slots} slots: {states:?}");
    }
}

#[test]
fn an_increment_of_any_size_is_carried_through() {
    // Constant, zero, tiny and huge slopes, and a row of zeros beside them: y(T) is right to one quantum of the last.
    for (slope, codec) in [0.0, 1e-42, 1e-30, 0.5, 1e30, 2e37].into_iter().flat_map(|s| (0..3).map(move |c| (s, c))) {
        let field = FnField::new(move |t: &Time, y: &Tensor| {
            let row = Tensor::new(&[[slope as f32], [0f32]], y.device())?;
            (y - y)?.broadcast_add(&(row * (1.0 + t.value()))?)
        });
        let y0 = Var::zeros((2, 3), DType::F32, &candle_core::Device::Cpu).unwrap();
        let adjoint = match codec {
            0 => Discrete::default().codec(Increments16),
            1 => Discrete::default().codec(Increments8),
            _ => Discrete::default().codec(Increments4),
        };
        let solution =
            Ode::new(&field).solver(Midpoint).span(0.0, 1.0).steps(10).adjoint(adjoint).solve(y0.as_tensor());
        let solution = solution.unwrap();
        let found = values(solution.last());
        let tolerance = 1e-5 * slope + 5e-44;
        assert!(found[..3].iter().all(|y| (y - 1.5 * slope).abs() <= tolerance), "{slope:e}: {found:?}");
        assert!(found[3..].iter().all(|y| *y == 0.0));
        let gradient = solution.last().sum_all().unwrap().backward().unwrap();
        assert!(values(gradient.get(&y0).unwrap()).iter().all(|g| *g == 1.0));
    }
}
