//! Whatever is kept, and however, the gradient is that of the steps that were taken: in F64 equal to the unrolled one if
//! nothing is rounded, and else to the pullback at the decoded states.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Conv2d, Conv2dConfig, Module, VarMap, conv2d};
use candle_ode::prelude::*;
use candle_ode::schedule::{Action, Schedule};
use candle_ode::{Checkpoints, Codec, Encodes, Increments4, Increments8, Increments16, InputOnly, KeepAll, States};
use common::*;
use std::sync::Arc;

const STEPS: usize = 7;
const SPAN: f64 = 0.9;

/// Puts a codec into an adjoint, and gives it out.
type With = Arc<dyn Fn(Discrete) -> (Discrete, Box<dyn Codec>)>;

/// A problem with a loss over its outputs, its variables by name.
struct Problem {
    vars: VarMap,
    y0: Var,
    field: ModelField,
}

fn mlp(masters: DType) -> Problem {
    let vars = VarMap::new();
    let field = mlp_field(&vars, masters, 3, 6);
    fill(&vars, 1, 1.0);
    Problem { vars, y0: variable(9, &[4, 3], masters), field }
}

/// y ↦ tanh(y ∗ w + b) over images of 2 channels and 4 × 3 pixels.
fn convolution(masters: DType) -> Problem {
    let vars = VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'static>| {
        conv2d(2, 2, 3, Conv2dConfig { padding: 1, ..Default::default() }, vb.pp("conv"))
    };
    let eval = |conv: &Conv2d, t: &Time, y: &Tensor| conv.forward(y)?.broadcast_add(&t.like(y)?)?.tanh();
    let field = ModelField::new_in(masters, &vars, &Device::Cpu, build, eval).unwrap();
    fill(&vars, 1, 0.5);
    Problem { vars, y0: variable(9, &[2, 2, 4, 3], masters), field }
}

impl Problem {
    fn ode(&self, solver: impl Solver, precision: Precision) -> Ode {
        Ode::new(&self.field).solver(solver).span(0.1, 0.1 + SPAN).steps(STEPS).precision(precision)
    }

    /// dL/dy0, each dL/dθ, and y(T), for L = the mean of (y(T) + 1)².
    fn gradients(&self, ode: &Ode, adjoint: impl Into<Adjoint>) -> (Vec<Tensor>, Solution) {
        let solution = ode.clone().adjoint(adjoint).solve(self.y0.as_tensor()).unwrap();
        let loss = (solution.last() + 1.0).unwrap().sqr().unwrap().mean_all().unwrap();
        let grads = loss.backward().unwrap();
        let all = sorted(&self.vars).into_values().chain([self.y0.clone()]);
        (all.map(|var| grads.get(&var).unwrap().clone()).collect(), solution)
    }
}

fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
    a.iter().zip(b).map(|(a, b)| relative(a, b)).fold(0.0, f64::max)
}

fn schedules() -> Vec<(&'static str, Discrete, Arc<dyn Schedule>)> {
    let of = |name, schedule: Arc<dyn Schedule>, discrete| (name, discrete, schedule);
    let mut all = vec![
        of("all", Arc::new(KeepAll), Discrete::default()),
        of("input", Arc::new(InputOnly), Discrete::default().schedule(InputOnly)),
    ];
    for slots in [0, 1, 3, 9] {
        all.push(of("checkpoints", Arc::new(Checkpoints::new(slots)), Discrete::default().checkpoints(slots)));
    }
    all
}

macro_rules! each_solver {
    ($run:ident) => {
        $run(Euler);
        $run(Heun);
        $run(Rk4);
        $run(Dopri5);
    };
}

#[test]
fn exact_codecs_equal_unrolled_with_every_schedule() {
    fn run(solver: impl Solver + Copy) {
        for problem in [mlp(DType::F64), convolution(DType::F64)] {
            let ode = problem.ode(solver, Precision::F64);
            let (oracle, _) = problem.gradients(&ode, Unrolled);
            let (all, _) = problem.gradients(&ode, Discrete::default());
            for (name, discrete, schedule) in schedules() {
                for memory in [StageMemory::All, StageMemory::One] {
                    let discrete = discrete.clone().stage_memory(memory);
                    let (found, solution) = problem.gradients(&ode, discrete.clone());
                    let error = distance(&found, &oracle);
                    assert!(error < 1e-12, "{name}: {error:e}");
                    let same = all.iter().zip(&found).all(|(a, b)| bits(a) == bits(b));
                    assert!(same, "{name} differs in its bits from keeping all");
                    let recomputed = candle_ode::schedule::simulate(schedule.actions(STEPS), STEPS).unwrap().recomputed;
                    assert_eq!(solution.stats().recomputed_steps, recomputed, "{name}");
                    let shapes = [problem.y0.shape().clone()];
                    let bytes = discrete.trajectory_bytes(&shapes, STEPS, Precision::F64);
                    assert_eq!(solution.trajectory_bytes(), bytes, "{name}");
                }
            }
        }
    }
    with_large_stack(|| {
        each_solver!(run);
    });
}

/// The same solve by the actions of its schedule and the public face of its codec: the start of each step as it is
/// reversed, and what is handed out.
fn starts(ode: &Ode, y0: &Tensor, codec: &dyn Codec, schedule: &dyn Schedule) -> (Vec<Tensor>, Tensor) {
    let times: Vec<f64> = (0..=STEPS).map(|n| 0.1 + SPAN * n as f64 / STEPS as f64).collect();
    let times = [&times[..STEPS], &[0.1 + SPAN]].concat();
    let step = |n: usize, y: &Tensor| ode.clone().grid(&times[n..=n + 1]).no_grad().solve(y).unwrap().last().clone();
    let coded = |x: &Tensor| {
        let (entry, _) = codec.encode(&x.into()).unwrap();
        codec.decode(&entry, DType::F64).unwrap()[0].clone()
    };
    let is_increment = codec.encodes() == Encodes::Increments;
    let none = || y0.zeros_like().unwrap();
    // (state, what is kept of it: itself, or an increment)
    let mut slots: Vec<(usize, Tensor, bool)> = vec![];
    let (mut at_hand, mut residual) = (y0.clone(), none());
    let mut found = vec![None; STEPS];
    let mut end = None;
    let mut above = none();
    let actions: Vec<Action> = schedule.actions(STEPS).collect();
    let advance = |n: usize, keep: bool, y: &Tensor, residual: &Tensor, slots: &mut Vec<(usize, Tensor, bool)>| {
        let after = step(n, y);
        if !(is_increment && keep && slots.last().is_some_and(|(at, _, increment)| *at == n && !increment)) {
            let y = (after + residual).unwrap();
            if keep {
                slots.push((n + 1, if is_increment { y.clone() } else { coded(&y) }, false));
            }
            return (y, none());
        }
        let increment = ((after - y).unwrap() + residual).unwrap();
        let decoded = coded(&increment);
        slots.pop();
        slots.push((n, decoded.clone(), true));
        let y = (y + &decoded).unwrap();
        slots.push((n + 1, y.clone(), false));
        (y, (increment - decoded).unwrap())
    };
    for (place, action) in actions.iter().enumerate() {
        match *action {
            Action::Advance { from, to } => {
                for n in from..to {
                    let keep = n + 1 == to && actions.get(place + 1) == Some(&Action::Keep(to));
                    (at_hand, residual) = advance(n, keep, &at_hand, &residual, &mut slots);
                }
                if to == STEPS - 1 && end.is_none() {
                    end = Some((step(to, &at_hand) + &residual).unwrap());
                }
            }
            Action::Keep(_) => {}
            Action::Restore(n) => {
                residual = none();
                at_hand = match slots.iter().find(|(at, _, _)| *at == n) {
                    None => y0.clone(),
                    Some((_, state, false)) => state.clone(),
                    Some((_, increment, true)) => (&above - increment).unwrap(),
                };
                above = at_hand.clone();
            }
            Action::Drop(n) => slots.retain(|(at, _, _)| *at != n),
            Action::Reverse(n) => {
                if n == STEPS - 1 && schedule.keeps_last() {
                    // The start of the last step has been kept for the backward pass.
                    at_hand = if is_increment { at_hand } else { coded(&at_hand) };
                    above = at_hand.clone();
                }
                found[n] = Some(at_hand.clone());
            }
        }
    }
    (found.into_iter().map(Option::unwrap).collect(), end.unwrap())
}

#[test]
fn lossy_codecs_pull_back_at_the_decoded_states() {
    fn run(solver: impl Solver + Copy) {
        let codecs: [With; 6] = [
            Arc::new(|d| (d.codec(States(DType::F32)), Box::new(States(DType::F32)))),
            Arc::new(|d| (d.codec(States(DType::F16)), Box::new(States(DType::F16)))),
            Arc::new(|d| (d.codec(States(DType::BF16)), Box::new(States(DType::BF16)))),
            Arc::new(|d| (d.codec(Increments16), Box::new(Increments16))),
            Arc::new(|d| (d.codec(Increments8), Box::new(Increments8))),
            Arc::new(|d| (d.codec(Increments4), Box::new(Increments4))),
        ];
        for problem in [mlp(DType::F64), convolution(DType::F64)] {
            let ode = problem.ode(solver, Precision::F64);
            for codec in &codecs {
                for (name, discrete, schedule) in schedules() {
                    let (discrete, codec) = codec(discrete);
                    let what = format!("{name}, {codec:?}");
                    let (found, solution) = problem.gradients(&ode, discrete.clone());
                    let shapes = [problem.y0.shape().clone()];
                    let bytes = discrete.trajectory_bytes(&shapes, STEPS, Precision::F64);
                    assert_eq!(solution.trajectory_bytes(), bytes, "{what}");
                    let (starts, end) =
                        starts(&ode, &problem.y0.as_detached_tensor(), codec.as_ref(), schedule.as_ref());
                    assert!(relative(solution.last(), &end) < 1e-13, "{what}: {:e}", relative(solution.last(), &end));
                    // One step at a time, from the decoded states.
                    let times: Vec<f64> = (0..=STEPS).map(|n| 0.1 + SPAN * n as f64 / STEPS as f64).collect();
                    let mut lambda = ((end + 1.0).unwrap() * (2.0 / problem.y0.elem_count() as f64)).unwrap();
                    let names = sorted(&problem.vars);
                    let mut sums: Vec<Tensor> = names.values().map(|var| var.zeros_like().unwrap()).collect();
                    for n in (0..STEPS).rev() {
                        let start = Var::from_tensor(&starts[n]).unwrap();
                        let step = ode.clone().grid(&times[n..=n + 1]).solve(start.as_tensor()).unwrap();
                        let grads = (step.last() * &lambda).unwrap().sum_all().unwrap().backward().unwrap();
                        lambda = grads.get(&start).unwrap().clone();
                        for (sum, var) in sums.iter_mut().zip(names.values()) {
                            *sum = (&*sum + grads.get(var).unwrap()).unwrap();
                        }
                    }
                    let error = distance(&found, &[sums, vec![lambda]].concat());
                    assert!(error < 1e-12, "{what}: {error:e}");
                }
            }
        }
    }
    run(Euler);
    run(Rk4);
}

#[test]
fn half_precisions_stay_within_their_bounds() {
    fn run(solver: impl Solver + Copy) {
        for (problem, exact) in [(mlp(DType::F32), mlp(DType::F64)), (convolution(DType::F32), convolution(DType::F64))]
        {
            let (oracle, _) = exact.gradients(&exact.ode(solver, Precision::F64), Discrete::default());
            for (precision, bound) in [(Precision::F32, 1e-5_f64), (Precision::F16, 5e-3), (Precision::BF16, 5e-2)] {
                // Candle's convolution has no BF16 on the CPU.
                if precision == Precision::BF16 && problem.y0.rank() == 4 {
                    continue;
                }
                let ode = problem.ode(solver, precision);
                for (name, discrete, _) in schedules() {
                    let mut all = vec![(format!("{name}, states"), discrete.clone(), bound)];
                    all.push((format!("{name}, 16"), discrete.clone().codec(Increments16), bound.max(2e-4)));
                    all.push((format!("{name}, 8"), discrete.codec(Increments8), bound.max(2e-2)));
                    for (what, discrete, bound) in all {
                        let (found, _) = problem.gradients(&ode, discrete);
                        let error = distance(&found, &oracle);
                        assert!(error < bound, "{precision:?}, {what}: {error:e}");
                    }
                }
            }
        }
    }
    each_solver!(run);
}

#[test]
fn outputs_on_the_way_count_whatever_is_kept() {
    with_large_stack(|| {
        let problem = mlp(DType::F64);
        let ode = problem.ode(Heun, Precision::F64);
        let times: Vec<f64> = (0..=STEPS).map(|n| 0.1 + SPAN * n as f64 / STEPS as f64).collect();
        // The last of them need not be in the loss.
        for outputs in [vec![0, 3, STEPS], vec![2, 3, 4], vec![1], vec![0]] {
            let wanted: Vec<f64> = outputs.iter().map(|&n| times[n]).collect();
            let gradients = |adjoint: Adjoint| {
                let solution = ode.clone().save_at(&wanted).adjoint(adjoint).solve(problem.y0.as_tensor()).unwrap();
                let parts = solution.states().iter().enumerate();
                let parts = parts.map(|(n, y)| (y[0].sqr().unwrap().mean_all().unwrap() * (n + 1) as f64).unwrap());
                let loss = parts.reduce(|a, b| (a + b).unwrap()).unwrap();
                let grads = loss.backward().unwrap();
                let all = sorted(&problem.vars).into_values().chain([problem.y0.clone()]);
                let found = all.map(|var| grads.get(&var).cloned().unwrap_or_else(|| var.zeros_like().unwrap()));
                (found.collect::<Vec<_>>(), solution.stats())
            };
            let (oracle, _) = gradients(Unrolled.into());
            for (name, discrete, _) in schedules() {
                let (found, stats) = gradients(discrete.into());
                for (found, oracle) in found.iter().zip(&oracle) {
                    let same = values(oracle).iter().all(|x| *x == 0.0) && values(found).iter().all(|x| *x == 0.0);
                    assert!(same || relative(found, oracle) < 1e-12, "{name} with outputs {outputs:?}");
                }
                let last = outputs.iter().max().unwrap();
                assert_eq!(stats.pullbacks, last * 2, "{name}: steps behind the last output cost nothing");
            }
        }
    });
}
