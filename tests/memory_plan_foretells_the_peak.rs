//! A plan says what will be measured: owned bytes exactly, the peak of the heap within three per cent, and how often
//! the field is called. Alone in its process: the counter is process-wide.
#![allow(missing_docs, unreachable_pub)]

mod common;
#[allow(dead_code)]
#[path = "../examples/cnf/flow.rs"]
mod flow;
#[path = "common/own_codec.rs"]
mod own_codec;

use candle_core::{DType, Device, Module, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::account::Category;
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::memory::{MemoryPlan, MemoryProfiler, TrackingAllocator};
use candle_ode::ops::{Activation, Mlp, conv2d, group_norm, seq};
use candle_ode::prelude::*;
use candle_ode::{Checkpoints, Increments4, Increments8, Increments16, InputOnly, SecondLevel, States};
use common::{fill, variable};
use own_codec::Own;

#[global_allocator]
static HEAP: TrackingAllocator = TrackingAllocator::system();

/// Makes a field and where it starts.
type Makes = fn() -> (ModelField, Var);

fn mlp() -> (ModelField, Var) {
    let vars = VarMap::new();
    let build = |vb| Mlp::new(&[64, 64, 64], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y)).unwrap();
    fill(&vars, 1, 1.0);
    (field, variable(2, &[128, 64], DType::F32))
}

/// The same layers, and nothing else, on a wider state.
fn layers() -> (ModelField, Var) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let field = ModelField::of_layers(vb, |vb| Mlp::new(&[64, 64, 64], Activation::Tanh, vb)).unwrap();
    fill(&vars, 1, 1.0);
    (field, variable(2, &[128, 64], DType::F32))
}

/// Those of few features, with the batch in the lanes.
fn narrow_layers() -> (ModelField, Var) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let field = ModelField::of_layers(vb, |vb| Mlp::new(&[3, 64, 3], Activation::Gelu, vb)).unwrap();
    fill(&vars, 1, 1.0);
    (field, variable(2, &[2048, 3], DType::F32))
}

fn convolution() -> (ModelField, Var) {
    let vars = VarMap::new();
    let config = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
    let build = move |vb: VarBuilder<'static>| conv2d(4, 4, 3, config, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m, _: &Time, y| m.forward(y)?.tanh()).unwrap();
    fill(&vars, 1, 1.0);
    (field, variable(2, &[8, 4, 16, 16], DType::F32))
}

/// Convolutions that are the whole field: their steps run on buffers.
fn convolutions() -> (ModelField, Var) {
    let vars = VarMap::new();
    let same = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
    let build = move |vb: VarBuilder<'static>| {
        let layers = seq().add(conv2d(16, 16, 3, same, vb.pp(0))?).add(Activation::Relu);
        Ok(layers.add(conv2d(16, 16, 3, same, vb.pp(1))?))
    };
    let field = ModelField::of_layers(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), build).unwrap();
    fill(&vars, 1, 0.3);
    (field, variable(2, &[6, 16, 12, 12], DType::F32))
}

/// The block of an ODE net, whose norms are part of the same op.
fn norms() -> (ModelField, Var) {
    let vars = VarMap::new();
    let same = candle_nn::Conv2dConfig { padding: 1, ..Default::default() };
    let build = move |vb: VarBuilder<'static>| {
        let layers = seq().add(group_norm(4, 16, 1e-5, vb.pp(0))?).add(Activation::Relu);
        let layers = layers.add(conv2d(16, 16, 3, same, vb.pp(1))?).add(group_norm(4, 16, 1e-5, vb.pp(2))?);
        Ok(layers.add(Activation::Relu).add(conv2d(16, 16, 3, same, vb.pp(3))?).add(group_norm(4, 16, 1e-5, vb.pp(4))?))
    };
    let field = ModelField::of_layers(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), build).unwrap();
    fill(&vars, 1, 0.3);
    (field, variable(2, &[6, 16, 12, 12], DType::F32))
}

/// The reference flow, row by row: what it holds at once is little beside dL/dθ, which Candle is handed at the end.
fn reference_flow() -> (ModelField, State) {
    let vars = VarMap::new();
    let build = |vb: VarBuilder<'static>| Ok(LogDensity::new(flow::HyperFlow::new(2, 128, vb)?, Trace::Exact));
    let field = ModelField::with_state(&vars, &Device::Cpu, build, |flow, t, state| flow.eval(t, state)).unwrap();
    fill(&vars, 1, 1.0);
    let start = [variable(2, &[256, 2], DType::F32), variable(3, &[256], DType::F32)];
    (field.row_wise(), State::from(start.map(|var| var.as_tensor().clone())))
}

/// A solve, and its backward pass if there is one.
fn train(ode: &Ode, y0: &State) -> Solution {
    let solution = ode.solve(y0).unwrap();
    if solution.last().track_op() {
        let sums = solution.states().iter().flat_map(|state| state.tensors()).map(|x| x.sum_all().unwrap());
        sums.reduce(|a, b| (a + b).unwrap()).unwrap().backward().unwrap();
    }
    solution
}

/// The least peak of a few warm training steps above what was live before.
fn measured(ode: &Ode, y0: &State) -> u64 {
    let peak = |_| {
        let before = TrackingAllocator::live();
        TrackingAllocator::reset_peak();
        train(ode, y0);
        TrackingAllocator::peak() - before
    };
    (0..2).map(peak).min().unwrap()
}

fn check(name: &str, ode: &Ode, y0: impl Into<State>) -> (MemoryPlan, u64) {
    let y0 = &y0.into();
    let plan = ode.plan(y0).unwrap();
    let peak = measured(ode, y0);
    let recording = MemoryProfiler::new(&Device::Cpu).filter(|metadata| metadata.is_event()).install().unwrap();
    let solution = train(ode, y0);
    let owned = Category::ALL.map(|category| recording.ledger().highest(category));
    let total = recording.ledger().highest_total();
    drop(recording);
    let ratio = plan.peak.unwrap() as f64 / peak as f64;
    println!("{name}: planned {} measured {peak} ratio {ratio:.4}", plan.peak.unwrap());
    assert_eq!(owned, Category::ALL.map(|category| plan.owned(category)), "{name}");
    assert_eq!(total, plan.owned_peak, "{name}");
    let stats = solution.stats();
    assert_eq!(
        (stats.evaluations, stats.linearizations, stats.pullbacks, stats.recomputed_steps),
        (plan.evaluations, plan.linearizations, plan.pullbacks, plan.recomputed_steps),
        "{name}"
    );
    assert_eq!(solution.trajectory_bytes() as u64, plan.trajectory, "{name}");
    (plan, peak)
}

/// Every codec and schedule there is, alone and together.
fn keepings() -> Vec<(&'static str, Adjoint)> {
    let discrete = Discrete::default;
    let all = vec![
        ("all", discrete()),
        ("all, one stage at a time", discrete().stage_memory(StageMemory::One)),
        ("states in F16", discrete().codec(States(DType::F16))),
        ("increments in 16 bits", discrete().codec(Increments16)),
        ("increments in 8 bits", discrete().codec(Increments8)),
        ("increments in 4 bits", discrete().codec(Increments4)),
        ("increments of one's own", discrete().codec(Own(DType::BF16))),
        ("3 checkpoints", discrete().checkpoints(3)),
        ("3 checkpoints, one stage at a time", discrete().checkpoints(3).stage_memory(StageMemory::One)),
        ("8 checkpoints", discrete().checkpoints(8)),
        ("8 checkpoints, increments in 8 bits", discrete().checkpoints(8).codec(Increments8)),
        ("input only", discrete().schedule(InputOnly)),
        ("input only, increments in 8 bits", discrete().schedule(InputOnly).codec(Increments8)),
        ("consumed", discrete().consume()),
        ("every linearisation", discrete().keep_linearizations()),
        ("all, 4 in memory", discrete().two_levels(4, SecondLevel::temporary_file())),
        ("all in F16, 1 in memory", discrete().codec(States(DType::F16)).two_levels(1, SecondLevel::temporary_file())),
        (
            "increments in 8 bits, 2 in memory",
            discrete().codec(Increments8).two_levels(2, SecondLevel::temporary_file()),
        ),
        ("8 checkpoints, 3 in memory", discrete().checkpoints(8).two_levels(3, SecondLevel::temporary_file())),
        ("3 slots of linearisations", discrete().schedule(Checkpoints::new(3).with_stages())),
        ("3 slots of linearisations, consumed", discrete().schedule(Checkpoints::new(3).with_stages()).consume()),
        (
            "3 slots of linearisations, increments in 8 bits",
            discrete().schedule(Checkpoints::new(3).with_stages()).codec(Increments8),
        ),
    ];
    all.into_iter().map(|(name, discrete)| (name, discrete.into())).collect()
}

type WithSolver = fn(Ode) -> Ode;

/// Adjoints that keep next to nothing, with a solver for each.
fn undone() -> Vec<(&'static str, WithSolver, Adjoint)> {
    let (rk4, euler, dopri5): (WithSolver, WithSolver, WithSolver) =
        (|ode| ode.solver(Rk4), |ode| ode.solver(Euler), |ode| ode.solver(Dopri5));
    let reversible: WithSolver = |ode| ode.solver(Reversible::new(Rk4));
    let reconstruct = Reconstruct::default;
    vec![
        ("reconstructed", reversible, reconstruct().into()),
        ("reconstructed, one stage at a time", reversible, reconstruct().stage_memory(StageMemory::One).into()),
        ("reconstructed, anchors", |ode| ode.solver(Reversible::new(Heun)), reconstruct().anchor_every(5).into()),
        ("solved backwards, RK4", rk4, Backsolve::default().into()),
        ("solved backwards, Euler", euler, Backsolve::default().into()),
        ("solved backwards, Dopri5", dopri5, Backsolve::default().into()),
        ("solved backwards by another", reversible, Backsolve::default().solver(Midpoint).substeps(2).into()),
    ]
}

#[test]
fn planned_is_measured() {
    // Threads that join a product or not, as the scheduler likes, have buffers of their own.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let mut worst = (1.0_f64, String::new());
    // One field at a time: the ledger tells the masters of all that are alive.
    let problems: [(&str, Makes); 6] = [
        ("mlp", mlp),
        ("layers", layers),
        ("narrow layers", narrow_layers),
        ("convolution", convolution),
        ("convolutions", convolutions),
        ("norms", norms),
    ];
    for (problem, make) in problems {
        let (field, y0) = make();
        // Unoptimised, all of it takes a quarter of an hour; the optimised run is the one that counts.
        let (precisions, keepings) = match cfg!(debug_assertions) {
            true => (vec![Precision::F16], keepings().into_iter().step_by(3).collect()),
            false => (vec![Precision::F32, Precision::F16, Precision::BF16], keepings()),
        };
        for precision in precisions {
            let ode = Ode::new(&field).span(0.0, 1.0).precision(precision);
            let mut cell = |solver: &str, steps: usize, (keeping, adjoint): (&str, Adjoint), ode: Ode| {
                let name = format!("{problem}, {:?}, {solver}, {steps} steps, {keeping}", precision.compute_dtype());
                let (plan, peak) = check(&name, &ode.steps(steps).adjoint(adjoint), y0.as_tensor());
                let ratio = plan.peak.unwrap() as f64 / peak as f64;
                if (ratio - 1.0).abs() > (worst.0 - 1.0).abs() {
                    worst = (ratio, name);
                }
            };
            for keeping in keepings.clone() {
                cell("RK4", 16, keeping.clone(), ode.clone().solver(Rk4));
                cell("Euler", 64, keeping, ode.clone().solver(Euler));
            }
            for (name, solver, adjoint) in undone().into_iter().filter(|_| precision != Precision::BF16) {
                cell(name, 16, ("nearly nothing", adjoint), solver(ode.clone()));
            }
            // Outputs in the middle: `Discrete` does not walk back what comes after them.
            let middle = ode.clone().save_at(&[0.25, 0.5]);
            for keeping in keepings.clone().into_iter().filter(|_| precision == Precision::F32) {
                cell("RK4, the middle", 16, keeping, middle.clone().solver(Rk4));
            }
            for (name, solver, adjoint) in undone().into_iter().filter(|_| precision == Precision::F32) {
                cell(name, 16, ("nearly nothing, the middle", adjoint), solver(middle.clone()));
            }
            // Tiles of 42 and 43 rows, of 2 and 3 images.
            let rows = match problem {
                "mlp" | "layers" => 43,
                "narrow layers" => 683,
                _ => 3,
            };
            let tiled = Ode::new(&field.clone().row_wise()).span(0.0, 1.0).precision(precision).tile(rows).threads(1);
            for keeping in keepings.clone() {
                cell("RK4 in tiles", 16, keeping, tiled.clone().solver(Rk4));
            }
            for (name, solver, adjoint) in undone().into_iter().filter(|_| precision == Precision::F32) {
                cell(name, 16, ("tiles", adjoint), solver(tiled.clone()));
            }
            for keeping in keepings.clone().into_iter().take(2) {
                cell("Heun", 16, keeping.clone(), ode.clone().solver(Heun));
                cell("Dopri5", 16, keeping, ode.clone().solver(Dopri5));
            }
        }
    }
    falls_with_the_tile();
    for (name, ratio) in others() {
        if (ratio - 1.0).abs() > (worst.0 - 1.0).abs() {
            worst = (ratio, name);
        }
    }
    println!("worst {worst:?}");
    assert!((worst.0 - 1.0).abs() < 0.03, "{worst:?}");
}

/// Settings beside the matrix: inference, scales that are tried again, sums in F64, inputs with and without gradients.
fn others() -> Vec<(String, f64)> {
    let mut ratios = vec![];
    let mut see = |name: String, ode: Ode, y0: State| {
        let (plan, peak) = check(&name, &ode, y0);
        ratios.push((name, plan.peak.unwrap() as f64 / peak as f64));
    };
    let problems: [(&str, Makes); 3] = [("mlp", mlp), ("layers", layers), ("convolution", convolution)];
    for (problem, make) in problems {
        let (field, y0) = make();
        let row_wise = field.clone().row_wise();
        for precision in [Precision::F32, Precision::F16, Precision::BF16] {
            let name = |what: &str| format!("{problem}, {:?}, {what}", precision.compute_dtype());
            let with = |field: &ModelField| Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(16).precision(precision);
            let ode = with(&field);
            see(name("inference"), ode.clone().no_grad(), y0.as_tensor().into());
            see(name("inference, unchecked"), ode.clone().no_grad().check_determinism(false), y0.as_tensor().into());
            let tiled = with(&row_wise).threads(1).no_grad();
            see(name("inference in tiles of 2"), tiled.clone().tile(2), y0.as_tensor().into());
            let dynamic = ode.clone().scaling(AdjointScaling::dynamic());
            see(name("dynamic scaling"), dynamic.clone(), y0.as_tensor().into());
            see(
                name("dynamic scaling, checkpoints"),
                dynamic.clone().adjoint(Discrete::default().checkpoints(3)),
                y0.as_tensor().into(),
            );
            let undone = dynamic.solver(Reversible::new(Rk4)).adjoint(Reconstruct::default());
            see(name("dynamic scaling, reconstructed"), undone, y0.as_tensor().into());
        }
    }
    let field = FnField::with_inputs(|_, y, inputs| Ok(State::from(y[0].broadcast_mul(&inputs[0])?.tanh()?)));
    let (y0, input) = (variable(2, &[128, 64], DType::F32), variable(3, &[64], DType::F32));
    let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(16);
    // One after another, by the costs that all clones know.
    for (name, input) in [("a plain input", input.as_tensor().detach()), ("a tracked input", input.as_tensor().clone())]
    {
        see(name.to_owned(), ode.clone().inputs(&[input]), y0.as_tensor().into());
    }
    drop(field);
    let (field, start) = reference_flow();
    for precision in [Precision::F32, Precision::BF16] {
        let ode = Ode::new(&field).solver(Rk4).span(1.0, 0.0).steps(8).precision(precision).threads(1);
        for (rows, adjoint) in
            [(256, Discrete::default()), (64, Discrete::default()), (64, Discrete::default().consume())]
        {
            let name = format!("flow, {:?}, tiles of {rows}, {adjoint:?}", precision.compute_dtype());
            see(name, ode.clone().tile(rows).adjoint(adjoint), start.clone());
        }
    }
    ratios
}

/// The peak falls with the tile as the plan says. On several threads the plan is a bound, and the trajectory what it
/// is.
fn falls_with_the_tile() {
    let vars = VarMap::new();
    let build = |vb| Mlp::new(&[64, 128, 64], Activation::Tanh, vb);
    let field = ModelField::new(&vars, &Device::Cpu, build, |m: &Mlp, _: &Time, y| m.forward(y)).unwrap().row_wise();
    fill(&vars, 1, 1.0);
    let y0 = variable(2, &[1024, 64], DType::F32);
    let ode = Ode::new(&field).span(0.0, 1.0).steps(16).precision(Precision::BF16);
    for adjoint in [Discrete::default(), Discrete::default().schedule(InputOnly), Discrete::default().consume()] {
        let ode = ode.clone().adjoint(adjoint.clone());
        let mut last = u64::MAX;
        for rows in [1024, 256, 100, 32] {
            let name = format!("{adjoint:?}, tiles of {rows}");
            let (plan, peak) = check(&name, &ode.clone().tile(rows).threads(1), y0.as_tensor());
            assert_eq!((plan.tiles, plan.threads), (1024_usize.div_ceil(rows), 1), "{name}");
            let planned = plan.peak.unwrap();
            assert!((planned as f64 / peak as f64 - 1.0).abs() < 0.03, "{name}: planned {planned}, measured {peak}");
            assert!(planned < last, "{name}: {planned} of {last}");
            last = planned;
        }
        let mut last = 0;
        for threads in [1, 2, 3] {
            let ode = ode.clone().tile(128).threads(threads);
            let plan = ode.plan(y0.as_tensor()).unwrap();
            let (planned, peak) = (plan.peak.unwrap(), measured(&ode, &y0.as_tensor().into()));
            println!("{threads} threads: planned {planned} measured {peak} ratio {:.4}", planned as f64 / peak as f64);
            assert!(peak as f64 <= 1.03 * planned as f64, "{threads} threads: {peak} is more than {planned}");
            // All threads at their highest at once is not far from what happens.
            assert!(planned as f64 <= 1.6 * peak as f64, "{threads} threads: {planned} for {peak}");
            assert!(planned >= last, "{threads} threads: {planned} of {last}");
            assert_eq!(ode.solve(y0.as_tensor()).unwrap().trajectory_bytes() as u64, plan.trajectory);
            last = planned;
        }
    }
}
