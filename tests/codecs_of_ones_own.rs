//! A codec of increments that leaves it to the trait where they lead.
#![allow(missing_docs)]

mod common;
#[path = "common/own_codec.rs"]
mod own_codec;

use candle_core::{DType, Tensor, Var};
use candle_ode::prelude::*;
use candle_ode::{Codec, Increments16};
use common::{values, variable};
use own_codec::Own;

fn gradient(ode: &Ode, y0: &Var) -> Vec<f64> {
    let loss = ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().sum_all().unwrap();
    values(loss.backward().unwrap().get(y0).unwrap())
}

fn error(found: &[f64], exact: &[f64]) -> f64 {
    let size = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
    found.iter().zip(exact).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt() / size
}

#[test]
fn gradients_are_those_of_increments_in_its_dtype() {
    let field = FnField::new(|t: &Time, y: &Tensor| y.sin()?.affine(1.0, t.value()));
    let y0 = variable(3, &[8, 5], DType::F32);
    let ode = Ode::new(&field).span(0.0, 1.0).steps(32);
    let with = |codec: Option<Own>| match codec {
        Some(codec) => gradient(&ode.clone().adjoint(Discrete::default().codec(codec)), &y0),
        None => gradient(&ode, &y0),
    };
    let exact = with(None);
    let ours = error(&gradient(&ode.clone().adjoint(Discrete::default().codec(Increments16)), &y0), &exact);
    let (half, brain) = (error(&with(Some(Own(DType::F16))), &exact), error(&with(Some(Own(DType::BF16))), &exact));
    println!("F16 {half:.1e}, BF16 {brain:.1e}, Increments16 {ours:.1e}");
    assert!(half > 0.0 && half < 1e-5 && ours < 1e-5, "{half:e} {ours:e}");
    assert!(half < brain && brain < 1e-4, "{brain:e}");
    let single = with(Some(Own(DType::F32)));
    assert!(error(&single, &exact) < 1e-6);
    // Nothing is rounded, but y⁺ − y is.
    let kept =
        ode.adjoint(Discrete::default().codec(Own(DType::F16))).solve(y0.as_tensor()).unwrap().trajectory_bytes();
    assert_eq!(kept, 30 * Own(DType::F16).bytes(&[(8, 5).into()]) + 8 * 5 * 4);
}

/// An increment that has no codes is not decoded: the state is kept as it is.
#[test]
fn what_it_cannot_hold_is_kept_whole() {
    let field = FnField::new(|t: &Time, y: &Tensor| if t.value() < 0.5 { y.affine(0.0, 1e7) } else { y.neg() });
    let y0 = variable(3, &[4], DType::F32);
    let codec = || Discrete::default().codec(Own(DType::F16));
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(8).adjoint(codec());
    let refused = ode.solve(y0.as_tensor()).unwrap_err();
    assert!(matches!(refused, OdeError::StorageOverflow { .. }), "{refused:?}");
    let solution = ode.clone().on_overflow(OnOverflow::Retry).solve(y0.as_tensor()).unwrap();
    let exact = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(8).solve(y0.as_tensor()).unwrap();
    assert_eq!(values(solution.last()), values(exact.last()));
    // Steps of 1e7/8 lead to 5e6, and what is an eighth of that does not fit either: seven states in F32.
    assert_eq!(solution.trajectory_bytes(), 7 * 4 * 4);
}
