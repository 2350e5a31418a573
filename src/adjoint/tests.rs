//! Two levels of storage on a simulated device, whose copies are late: solves and their gradients as they are without.

use super::Discrete;
use crate::account::{Category, alive_here, at_most};
use crate::prelude::*;
use crate::trajectory::Simulated;
use crate::{Increments8, Increments16, InputOnly, SecondLevel, States};
use candle_core::{DType, Device, Tensor, Var};
use std::sync::{Arc, Mutex};

const STEPS: usize = 13;
const STATE: usize = 6 * 3 * 4;

impl Discrete {
    /// With entries on a simulated device.
    fn simulated(mut self, resident: usize, device: &Simulated) -> Self {
        self.levels = Some((resident, SecondLevel::Host, device.movers()));
        self
    }
}

fn start() -> Var {
    let values: Vec<f32> = (0..18).map(|n| (n as f32 * 0.7).sin()).collect();
    Var::from_tensor(&Tensor::from_vec(values, (6, 3), &Device::Cpu).unwrap()).unwrap()
}

fn field(seen: Arc<Mutex<Vec<usize>>>, device: Simulated) -> impl Fn(&Time, &Tensor) -> candle_core::Result<Tensor> {
    move |_, y| {
        seen.lock().unwrap().push(device.copies());
        (y.sqr()? - 0.8)?.tanh()? - y.sin()?
    }
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// The bits of y(T) and, so often as asked, of dL/dy0.
fn run(ode: &Ode, y0: &Var, backward: usize) -> Vec<Vec<u32>> {
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let loss = solution.last().sqr().unwrap().mean_all().unwrap();
    let gradient = |_| bits(loss.backward().unwrap().get(y0).unwrap());
    std::iter::once(bits(solution.last())).chain((0..backward).map(gradient)).collect()
}

#[test]
fn bits_are_the_same_and_at_most_one_more_entry_is_on_the_device() {
    let y0 = start();
    let ways: [(&str, Discrete, usize); 7] = [
        ("all", Discrete::default(), 2),
        ("all in F16", Discrete::default().codec(States(DType::F16)), 2),
        ("all, consumed", Discrete::default().consume(), 1),
        ("increments", Discrete::default().codec(Increments16), 2),
        ("checkpoints", Discrete::default().checkpoints(4), 2),
        ("checkpoints in increments", Discrete::default().codec(Increments8).checkpoints(4), 2),
        ("nothing but y0", Discrete::default().schedule(InputOnly), 2),
    ];
    for (name, way, backward) in ways {
        for eager in [false, true] {
            for adaptive in [false, true] {
                let device = Simulated::new(eager);
                let field = FnField::new(field(Arc::default(), device.clone()));
                let ode = Ode::new(&field).span(0.0, 1.0);
                let ode = match adaptive {
                    true => ode.solver(Dopri5).tolerances(1e-7, 1e-7),
                    false => ode.solver(Heun).steps(STEPS),
                };
                let expected = run(&ode.clone().adjoint(way.clone()), &y0, backward);
                for resident in [0, 1, 3, STEPS] {
                    let before = alive_here(Category::Trajectory);
                    let two = ode.clone().adjoint(way.clone().simulated(resident, &device));
                    let planned = two.plan(y0.as_tensor()).map(|plan| plan.owned(Category::Trajectory) as usize);
                    let (bits, most) = at_most(Category::Trajectory, || run(&two, &y0, backward));
                    // Moved one after another.
                    let filed = way.clone().two_levels(resident, SecondLevel::temporary_file());
                    let filed = ode.clone().adjoint(filed);
                    let (_, alone) = at_most(Category::Trajectory, || run(&filed, &y0, backward));
                    let what = format!("{name}, {resident} resident, eager: {eager}, adaptive: {adaptive}");
                    assert_eq!(bits, expected, "{what}");
                    assert!(most <= alone + STATE, "{what}: {most} bytes, and {alone} with nothing in flight");
                    assert!(!name.starts_with("all") || most <= (resident + 2) * STATE, "{what}: {most} bytes");
                    assert_eq!(planned.ok(), (!adaptive).then_some(most), "{what}");
                    assert_eq!((alive_here(Category::Trajectory), device.wrong()), (before, vec![]), "{what}");
                }
            }
        }
    }
}

#[test]
fn an_entry_comes_back_while_the_step_after_it_is_pulled_back() {
    let (y0, device, seen) = (start(), Simulated::new(false), Arc::default());
    let field = FnField::new(field(Arc::clone(&seen), device.clone()));
    let ode = Ode::new(&field).solver(Heun).span(0.0, 1.0).steps(STEPS);
    run(&ode.clone().adjoint(Discrete::default()), &y0, 1);
    let adjoint = Discrete::default().simulated(0, &device);
    let solution = ode.clone().adjoint(adjoint.clone()).solve(y0.as_tensor()).unwrap();
    let loss = solution.last().sum_all().unwrap();
    seen.lock().unwrap().clear();
    drop(loss.backward().unwrap());
    // Twelve have left, and no copy is made twice; that below is always on its way.
    let mut copies = seen.lock().unwrap().clone();
    copies.dedup();
    assert_eq!(copies, (14..=24).collect::<Vec<_>>());
    drop((solution, loss));
    // The next solve locks no memory.
    assert_eq!(device.buffers(), 12);
    run(&ode.adjoint(adjoint), &y0, 1);
    assert_eq!((device.buffers(), device.wrong()), (12, vec![]));
}
