//! Where nothing is to be differentiated, nothing is kept; and what a solve does is counted exactly.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder, VarMap};
use candle_ode::prelude::*;
use common::*;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn small() -> (VarMap, ModelField) {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 3, 8);
    fill(&vars, 1, 1.0);
    (vars, field)
}

fn ode(field: &ModelField) -> Ode {
    Ode::new(field).solver(Rk4).span(0.0, 1.0).steps(10).save_at(&[0.0, 0.5, 1.0])
}

fn keeps_nothing(solution: &Solution) {
    assert_eq!(solution.trajectory_bytes(), 0);
    for state in solution.states() {
        assert!(!state.is_tracked());
    }
    assert!(!solution.last().track_op());
}

#[test]
fn a_trajectory_is_its_inner_states_in_the_storage_dtype() {
    let (_, field) = small();
    let y0 = normal(2, &[4, 3], DType::F32);
    for (precision, bytes) in [(Precision::F32, 4), (Precision::F16, 2), (Precision::BF16, 2)] {
        let solution = ode(&field).precision(precision).solve(&y0).unwrap();
        assert_eq!(solution.trajectory_bytes(), 9 * 12 * bytes);
        assert!(solution.last().track_op());
        assert_eq!(solution.last().dtype(), DType::F32);
    }
    assert_eq!(ode(&field).precision(Precision::F64).solve(&y0).unwrap().trajectory_bytes(), 9 * 12 * 8);
    assert_eq!(ode(&field).adjoint(Unrolled).solve(&y0).unwrap().trajectory_bytes(), 0);
}

#[test]
fn no_grad_keeps_nothing_and_computes_the_same() {
    let (_, field) = small();
    let y0 = variable(2, &[4, 3], DType::F32);
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        let tracked = ode(&field).precision(precision).solve(y0.as_tensor()).unwrap();
        let free = ode(&field).precision(precision).no_grad().solve(y0.as_tensor()).unwrap();
        keeps_nothing(&free);
        assert_eq!(bits(free.last()), bits(tracked.last()));
        assert_eq!(free.stats().builds, 1);
    }
}

#[test]
fn a_frozen_field_from_an_untracked_start_keeps_nothing() {
    let (vars, field) = small();
    let frozen = field.clone().freeze(|_| true);
    keeps_nothing(&ode(&frozen).solve(normal(2, &[4, 3], DType::F32)).unwrap());
    // A tracked start makes it a part of the graph again, without a gradient of θ.
    let y0 = variable(2, &[4, 3], DType::F32);
    let grads = ode(&frozen).solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&y0).is_some());
    for (name, param) in sorted(&vars) {
        assert!(grads.get(&param).is_none(), "{name}");
    }
}

#[test]
fn plain_tensors_and_mapped_files_are_fields_that_keep_nothing() {
    let (vars, trained) = small();
    let y0 = normal(2, &[4, 3], DType::F32);
    let expected = ode(&trained).solve(&y0).unwrap();
    let inference = |vb: VarBuilder<'static>| {
        let eval = |m: &Mlp, t: &Time, y: &State, _: &[Tensor]| Ok(State::from(m.forward(t, y.single()?)?));
        ModelField::from_var_builder(vb, |vb| Mlp::new(3, 8, vb), eval).unwrap()
    };

    let tensors: HashMap<String, Tensor> =
        sorted(&vars).into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect();
    let plain = inference(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu));

    let file = tempfile::NamedTempFile::with_suffix(".safetensors").unwrap();
    vars.save(file.path()).unwrap();
    // SAFETY: nobody writes to the file while it is mapped.
    let mapped = unsafe { VarBuilder::from_mmaped_safetensors(&[file.path()], DType::F32, &Device::Cpu) }.unwrap();
    for field in [plain, inference(mapped)] {
        for precision in [Precision::F32, Precision::F16] {
            let solution = ode(&field).precision(precision).solve(&y0).unwrap();
            keeps_nothing(&solution);
            assert_eq!(solution.stats().casts, if precision == Precision::F32 { 0 } else { 4 });
        }
        assert_eq!(bits(ode(&field).solve(&y0).unwrap().last()), bits(expected.last()));
        // It can be differentiated with respect to its start all the same.
        let start = variable(2, &[4, 3], DType::F32);
        let grads = ode(&field).solve(start.as_tensor()).unwrap().last().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&start).is_some());
    }
}

#[test]
fn a_solve_counts_what_it_does() {
    const STEPS: usize = 10;
    for (precision, casts) in [(Precision::F32, 0), (Precision::F16, 4), (Precision::BF16, 4)] {
        for memory in [StageMemory::All, StageMemory::One] {
            let (_, field) = small();
            let adjoint = Discrete::default().stage_memory(memory);
            let solution =
                ode(&field).precision(precision).adjoint(adjoint).solve(normal(2, &[4, 3], DType::F32)).unwrap();
            let forward = solution.stats();
            // The first evaluation is made once to look at it, and once more to compare.
            assert_eq!((forward.evaluations, forward.determinism_checks), (4 * STEPS + 2, 1));
            assert_eq!((forward.linearizations, forward.pullbacks), (0, 0));
            assert_eq!((forward.accepted_steps, forward.rejected_steps, forward.redone_steps), (STEPS, 0, 0));
            assert_eq!((forward.casts, forward.builds), (casts, 1));

            let loss = solution.last().sqr().unwrap().mean_all().unwrap();
            loss.backward().unwrap();
            let both = solution.stats();
            let again = if memory == StageMemory::One { 3 * STEPS } else { 0 };
            assert_eq!(both.evaluations, forward.evaluations + again);
            assert_eq!((both.linearizations, both.pullbacks), (4 * STEPS, 4 * STEPS));
            assert_eq!((both.casts, both.builds), (casts, 2));
            assert_eq!((both.accepted_steps, both.recomputed_steps), (STEPS, 0));
            assert_eq!((both.redone_steps, both.redone_passes, both.scale_changes), (0, 0, 0));
        }
    }
}

#[test]
fn a_structurally_zero_stage_costs_nothing() {
    let (_, field) = small();
    let ode = || Ode::new(&field).span(0.0, 1.0).steps(5).check_determinism(false);
    for (ode, stages) in [(ode().solver(Dopri5), 6), (ode().solver(Tsit5), 6), (ode().solver(Bosh3), 3)] {
        // Warm up: the first solve of a field looks whether it writes to its parameters.
        ode.solve(normal(2, &[4, 3], DType::F32)).unwrap();
        let solution = ode.solve(normal(2, &[4, 3], DType::F32)).unwrap();
        solution.last().sum_all().unwrap().backward().unwrap();
        let stats = solution.stats();
        assert_eq!((stats.evaluations, stats.linearizations, stats.pullbacks), (5 * stages, 5 * stages, 5 * stages));
    }
}

#[test]
fn frozen_parameters_are_not_tracked() {
    let vars = VarMap::new();
    vars.get(3, "a", Init::Const(0.5), DType::F32, &Device::Cpu).unwrap();
    let build = |vb: VarBuilder<'static>| Ok((vb.get(3, "a")?, vb.get(3, "b")?));
    let probed = Arc::new(AtomicBool::new(false));
    let is_probed = probed.clone();
    let eval = move |(a, b): &(Tensor, Tensor), _: &Time, y: &Tensor| {
        assert!(!is_probed.load(Ordering::Relaxed) || !b.track_op());
        y.broadcast_mul(a)?.broadcast_add(b)
    };
    let field = ModelField::new(&vars, &Device::Cpu, build, eval).unwrap().freeze(|name| name == "b");
    let solve = || ode(&field).solve(normal(2, &[4, 3], DType::F32)).unwrap();
    // The first solve of a field runs on copies of its parameters, to see whether it writes to them.
    solve();
    probed.store(true, Ordering::Relaxed);
    let grads = solve().last().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&sorted(&vars)["a"]).is_some() && grads.get(&sorted(&vars)["b"]).is_none());
}

#[test]
fn integer_buffers_stay_what_they_are() {
    let permutation = Tensor::new(&[2u32, 0, 1], &Device::Cpu).unwrap();
    let tensors = std::collections::HashMap::from([("permutation".to_owned(), permutation)]);
    let vb = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let build =
        |vb: candle_nn::VarBuilder<'static>| vb.get_with_hints_dtype(3, "permutation", Default::default(), DType::U32);
    let field =
        ModelField::from_var_builder(vb, build, |p, _, y, _| Ok(State::from(y[0].index_select(p, 1)?))).unwrap();
    let y0 = Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu).unwrap();
    let solution = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(1).precision(Precision::F16).solve(&y0).unwrap();
    assert_eq!(solution.last().to_vec2::<f32>().unwrap(), [[4.0, 3.0, 5.0]]);
}
