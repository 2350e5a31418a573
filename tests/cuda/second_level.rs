//! Entries that wait on the host and are copied beside what is computed: the bits are those of entries that stay.

use super::gpu;
use crate::common::{bits, normal, sorted};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarMap;
use candle_ode::memory::{CudaSettings, cuda_device_with};
use candle_ode::ops::{Activation, Mlp};
use candle_ode::prelude::*;
use candle_ode::{Increments8, Increments16, SecondLevel, States};

const STEPS: usize = 13;
/// Long enough that copies take a while.
const SHAPE: [usize; 2] = [4096, 256];

struct Problem {
    vars: VarMap,
    field: ModelField,
    y0: Var,
}

impl Problem {
    fn new(device: &Device) -> Self {
        let vars = VarMap::new();
        let build = |vb| Mlp::new(&[SHAPE[1], 64, SHAPE[1]], Activation::Tanh, vb);
        let field = ModelField::new(&vars, device, build, |m, _: &Time, y| m.forward(y)).unwrap();
        for (n, (_, var)) in sorted(&vars).into_iter().enumerate() {
            let values = (normal(n as u64, var.dims(), DType::F32) / 16.0).unwrap();
            var.set(&values.to_device(device).unwrap()).unwrap();
        }
        let y0 = Var::from_tensor(&normal(9, &SHAPE, DType::F32).to_device(device).unwrap()).unwrap();
        Self { vars, field, y0 }
    }

    /// The bits of y(T) and, so often as asked, of dL/dy0 and dL/dθ; and bytes on both levels.
    fn run(&self, adjoint: Discrete, backward: usize) -> (Vec<Vec<u64>>, [usize; 2]) {
        let ode = Ode::new(&self.field).solver(Heun).span(0.0, 1.0).steps(STEPS).adjoint(adjoint);
        let solution = ode.solve(self.y0.as_tensor()).unwrap();
        let bytes = [solution.trajectory_bytes(), solution.second_level_bytes()];
        let loss = solution.last().sqr().unwrap().mean_all().unwrap();
        let on_host = |x: &Tensor| bits(&x.to_device(&Device::Cpu).unwrap());
        let mut all = vec![on_host(solution.last())];
        for _ in 0..backward {
            let grads = loss.backward().unwrap();
            let vars = sorted(&self.vars).into_values().chain([self.y0.clone()]);
            all.extend(vars.map(|var| on_host(grads.get(&var).unwrap())));
        }
        (all, bytes)
    }
}

fn compare(device: &Device) {
    let problem = Problem::new(device);
    let ways: [(&str, Discrete, usize); 7] = [
        ("all", Discrete::default(), 2),
        ("all in F16", Discrete::default().codec(States(DType::F16)), 2),
        ("all, consumed", Discrete::default().consume(), 1),
        ("checkpoints", Discrete::default().checkpoints(4), 2),
        ("increments of 16 bits", Discrete::default().codec(Increments16), 2),
        ("increments of 8 bits", Discrete::default().codec(Increments8), 2),
        ("increments, consumed", Discrete::default().codec(Increments8).consume(), 1),
    ];
    for (name, way, backward) in ways {
        let (expected, [all, none]) = problem.run(way.clone(), backward);
        assert_eq!(none, 0, "{name}");
        for resident in [0, 1, 3] {
            let two = way.clone().two_levels(resident, SecondLevel::Host);
            // Twice, since the second solve finds buffers of the first.
            for _ in 0..2 {
                let (bits, [here, away]) = problem.run(two.clone(), backward);
                assert!(bits == expected, "{name}, {resident} resident: other bits");
                assert_eq!((here + away, away > 0), (all, true), "{name}, {resident} resident");
            }
        }
    }
}

#[test]
fn bits_are_the_same_wherever_entries_wait() {
    let Some(gpu) = gpu() else { return };
    compare(&gpu);
}

#[test]
fn bits_are_the_same_where_events_are_tracked() {
    let Some(_gpu) = gpu() else { return };
    compare(&cuda_device_with(0, CudaSettings { track_events: true, ..CudaSettings::default() }).unwrap());
}

#[test]
fn tiles_share_a_stream_of_copies() {
    let Some(gpu) = gpu() else { return };
    let problem = Problem::new(&gpu);
    let field = problem.field.clone().row_wise();
    let run = |adjoint: Discrete| {
        let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(STEPS).tile(1024).adjoint(adjoint);
        let solution = ode.solve(problem.y0.as_tensor()).unwrap();
        let grads = solution.last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        [solution.last(), grads.get(&problem.y0).unwrap()].map(|x| bits(&x.to_device(&Device::Cpu).unwrap()))
    };
    assert!(run(Discrete::default()) == run(Discrete::default().two_levels(2, SecondLevel::Host)), "other bits");
}
