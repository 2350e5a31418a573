//! Every way of finding the gradient over every method, precision and field: all adjoints, and with `Discrete` every
//! codec and every schedule. In F64 the gradient is the unrolled one, or with a codec that rounds the pullback at the
//! decoded states; half precision stays near F64; what cannot be put together is an error that says so.
//!
//! A cell that fails is named, and all of them are gone through first.
#![allow(missing_docs, unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;
mod decoded;
mod discrete;
mod others;
mod table;

use candle_core::{DType, Tensor};
use candle_ode::prelude::*;
use common::problem::*;
use common::*;
use std::collections::HashMap;
use table::*;

/// `what` with its error, unless that is below the bound.
fn beyond(what: &str, error: f64, bound: f64) -> Option<String> {
    if error < bound { None } else { Some(format!("{what} by {error:.1e}, bound {bound:.1e}")) }
}

fn unless(holds: bool, what: &str) -> Option<String> {
    if holds { None } else { Some(what.to_owned()) }
}

const LENGTH: f64 = 0.9;
const STEPS: usize = 7;

/// The problems in F64.
fn small(masters: DType) -> [Problem; 2] {
    [Problem::mlp(masters, 4, 3, 6), Problem::convolution(masters, [2, 2, 4, 3])]
}

/// That it is an error with these words.
fn is_refused(result: Result<Found, OdeError>, words: &str) -> Vec<String> {
    match result {
        Ok(_) => vec!["is not refused".into()],
        Err(error) => unless(error.to_string().contains(words), &error.to_string()).into_iter().collect(),
    }
}

/// The problems in half precision, and what they are compared with.
fn larger(masters: DType) -> [Problem; 2] {
    let images = [2, 3, 5, 5];
    [Problem::mlp(masters, 16, 8, 32), Problem::convolution(masters, images)]
}

const MORE_STEPS: usize = 16;
/// Of the relative error of each gradient against F64, where nothing is rounded but f and what is kept by default.
const BOUNDS: [(Precision, f64); 3] = [(Precision::F32, 1e-5), (Precision::F16, 2e-3), (Precision::BF16, 2e-2)];

/// Gradients in F64 over given steps, once for each.
struct Exact<F> {
    known: HashMap<Vec<u64>, Vec<Tensor>>,
    make: F,
}

impl<F: Fn(&[f64]) -> Vec<Tensor>> Exact<F> {
    fn new(make: F) -> Self {
        Self { known: HashMap::new(), make }
    }

    fn over(&mut self, times: &[f64]) -> &[Tensor] {
        let key = times.iter().map(|t| t.to_bits()).collect();
        self.known.entry(key).or_insert_with(|| (self.make)(times))
    }
}

/// With a stack for Candle's backward; products this small are slower on several threads.
fn on_one_thread(run: impl FnOnce() + Send) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).stack_size(256 << 20).build().unwrap();
    pool.install(run);
}

macro_rules! methods {
    ($($name:ident: $method:expr),*) => {
        $(mod $name {
            use super::*;
            #[test]
            fn discrete_in_f64() {
                on_one_thread(|| discrete::in_f64($method));
            }
            #[test]
            fn discrete_near_f64() {
                on_one_thread(|| discrete::near_f64($method));
            }
            #[test]
            fn other_adjoints() {
                on_one_thread(|| others::all($method));
            }
        })*
    };
}

methods!(euler: EULER, heun: HEUN, rk4: RK4, dopri5: DOPRI5, dopri5_adaptive: DOPRI5_ADAPTIVE);
