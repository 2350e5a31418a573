//! Schedules are an open set: one of a user's own is followed, and one that is wrong is an error, never a wrong
//! gradient.
#![allow(missing_docs)]

use candle_core::{Device, Var};
use candle_ode::prelude::*;
use candle_ode::schedule::{Action, Schedule, Sweep};

const STEPS: usize = 6;

/// Keeps nothing on the way, and goes back as it is told.
#[derive(Debug)]
struct Told(Vec<Action>);

#[derive(Debug)]
struct Nothing;

impl Sweep for Nothing {
    fn reached(&mut self, _: usize) -> Vec<Action> {
        vec![]
    }
}

impl Schedule for Told {
    fn sweep(&self, _: Option<usize>) -> Box<dyn Sweep> {
        Box::new(Nothing)
    }

    fn reversal(&self, _: &[usize], _: usize, _: bool) -> Box<dyn Iterator<Item = Action> + Send> {
        Box::new(self.0.clone().into_iter())
    }
}

fn gradient(adjoint: Discrete) -> Result<Vec<f32>, OdeError> {
    let field = FnField::new(|_, y| y.tanh());
    let y0 = Var::new(&[0.5f32, -2.0], &Device::Cpu)?;
    let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(STEPS).adjoint(adjoint);
    let grads = ode.solve(y0.as_tensor())?.last().sum_all()?.backward()?;
    Ok(grads.get(&y0).unwrap().to_vec1()?)
}

/// The last step from its start, which is at hand; the others from y0 each.
fn from_the_start() -> Vec<Action> {
    let again = |n: usize| [Action::Restore(0), Action::Advance { from: 0, to: n }, Action::Reverse(n)];
    let inner = (1..STEPS - 1).rev().flat_map(again);
    let last = [Action::Restore(0), Action::Reverse(0)];
    std::iter::once(Action::Reverse(STEPS - 1)).chain(inner).chain(last).collect()
}

#[test]
fn one_that_is_right_is_followed() {
    let told = gradient(Discrete::default().schedule(Told(from_the_start()))).unwrap();
    assert_eq!(told, gradient(Discrete::default()).unwrap());
}

#[test]
fn one_that_is_wrong_is_an_error() {
    let right = from_the_start();
    let with = |at: usize, action| {
        let mut actions = right.clone();
        actions[at] = action;
        actions
    };
    for (index, actions) in [
        // Ends early; reverses a step twice, one that is not there, one that does not start at hand; goes beyond the
        // end.
        (right.len() - 1, right[..right.len() - 1].to_vec()),
        (1, with(1, Action::Reverse(STEPS - 1))),
        (0, with(0, Action::Reverse(STEPS))),
        (2, with(2, Action::Reverse(STEPS - 2))),
        (2, with(2, Action::Advance { from: 0, to: STEPS })),
        (2, with(2, Action::Advance { from: 1, to: 2 })),
        (0, vec![]),
    ] {
        match gradient(Discrete::default().schedule(Told(actions.clone()))) {
            Err(OdeError::IllegalAction { index: at, .. }) => assert_eq!(at, index, "{actions:?}"),
            other => panic!("{actions:?}: {other:?}"),
        }
    }
    let unknown = Told(with(1, Action::Restore(3)));
    assert!(matches!(gradient(Discrete::default().schedule(unknown)), Err(OdeError::Unsupported { .. })));
}
