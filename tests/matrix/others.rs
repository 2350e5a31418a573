//! `Reconstruct`, `Backsolve` and `Unrolled`, Candle's own convolution, and what cannot be put together.

use super::*;

pub fn all(method: Method) {
    let mut failures = Failures::default();
    reversible_in_f64(&mut failures, method);
    backsolve_converges(&mut failures, method);
    others_near_f64(&mut failures, method);
    candle_convolution(&mut failures, method);
    refused(&mut failures, method);
    let refusals = match method.name {
        "Euler" | "Rk4" => 5,
        "adaptive Dopri5" => 2,
        _ => 3,
    };
    failures.report(2 * 6 + 2 + 2 * 3 * 3 + 4 + refusals);
}

/// Reversible solvers, in F64: `Discrete` and `Reconstruct`, whatever it keeps, are the unrolled gradient.
fn reversible_in_f64(failures: &mut Failures, method: Method) {
    for problem in small(DType::F64) {
        let ode = method.reversible(&problem.field).precision(Precision::F64);
        let ode = method.paced(ode, LENGTH, STEPS, 1e-6);
        let unrolled = problem.gradients(&ode, Unrolled).unwrap();
        let ways: [(&str, Adjoint); 6] = [
            ("Discrete", Discrete::default().into()),
            ("Discrete, 2 states", Discrete::default().checkpoints(2).into()),
            ("Reconstruct", Reconstruct::default().into()),
            ("Reconstruct, one stage", Reconstruct::default().stage_memory(StageMemory::One).into()),
            ("Reconstruct, anchors everywhere", Reconstruct::default().anchor_every(1).into()),
            ("Reconstruct, an anchor in 3", Reconstruct::default().anchor_every(3).into()),
        ];
        for (way, adjoint) in ways {
            failures.cell(format!("reversible {}, {}, {way}", method.name, problem.name), || {
                let found = problem.gradients(&ode, adjoint)?;
                let wrong = beyond("differs", distance(&found.gradients, &unrolled.gradients), 1e-12);
                Ok(wrong.into_iter().chain(unless(found.times == unrolled.times, "takes other steps")).collect())
            });
        }
    }
}

/// `Backsolve`, in F64: the gap to the gradient of the steps closes at the order of the method, or with the tolerance.
fn backsolve_converges(failures: &mut Failures, method: Method) {
    for problem in small(DType::F64) {
        let over = |steps: usize, tolerance: f64| {
            let ode = method.over(&problem.field).precision(Precision::F64);
            let ode = method.paced(ode, LENGTH, steps, tolerance);
            let exact = problem.gradients(&ode, Discrete::default())?;
            Ok::<_, OdeError>(distance(&problem.gradients(&ode, Backsolve::default())?.gradients, &exact.gradients))
        };
        failures.cell(format!("{}, {}, Backsolve", method.name, problem.name), || {
            if method.is_adaptive {
                let gaps = [over(0, 1e-4)?, over(0, 1e-6)?, over(0, 1e-8)?];
                let closes = gaps.windows(2).all(|pair| pair[1] < pair[0] / 10.0) && gaps[0] < 1e-3;
                return Ok(unless(closes, &format!("does not converge: {gaps:?}")).into_iter().collect());
            }
            let first = (64.0 / method.order / method.order).max(4.0) as usize;
            let gaps = [over(first, 0.0)?, over(2 * first, 0.0)?, over(4 * first, 0.0)?];
            let order = (gaps[0] / gaps[2]).log2() / 2.0;
            // A symmetric error may cancel: one order more is fine.
            let holds = order > method.order - 0.2 && order < method.order + 1.3 && gaps[2] > 1e-14;
            Ok(unless(holds, &format!("is of order {order:.2}: {gaps:?}")).into_iter().collect())
        });
    }
}

/// The other adjoints in each precision against themselves in F64, over the same steps.
fn others_near_f64(failures: &mut Failures, method: Method) {
    let ways: [(&str, Adjoint, bool); 3] = [
        ("Reconstruct", Reconstruct::default().into(), true),
        ("Backsolve", Backsolve::default().into(), false),
        ("Unrolled", Unrolled.into(), false),
    ];
    for (problem, exact) in larger(DType::F32).into_iter().zip(larger(DType::F64)) {
        for (way, adjoint, is_reversible) in &ways {
            let over = |field| if *is_reversible { method.reversible(field) } else { method.over(field) };
            for (precision, bound) in BOUNDS {
                let name = format!("{}, {:?}, {}, {way}", method.name, precision.compute_dtype(), problem.name);
                failures.cell(name, || {
                    let ode = method.paced(over(&problem.field).precision(precision), 1.0, MORE_STEPS, 3e-3);
                    let found = problem.gradients(&ode, adjoint.clone())?;
                    let ode = over(&exact.field).precision(Precision::F64).grid(&found.times);
                    let exact = exact.gradients(&ode, adjoint.clone())?;
                    let error = distance(&found.gradients, &exact.gradients);
                    Ok(beyond("is off", error, bound).into_iter().collect())
                });
            }
        }
    }
}

/// Candle's own convolution, which it has no BF16 for on the CPU.
fn candle_convolution(failures: &mut Failures, method: Method) {
    let [problem, exact] = [DType::F32, DType::F64].map(|masters| Problem::candle_convolution(masters, [2, 3, 5, 5]));
    let over = |field, precision| method.paced(method.over(field).precision(precision), 1.0, MORE_STEPS, 3e-3);
    failures.cell(format!("{}, F64, {}", method.name, exact.name), || {
        let ode = over(&exact.field, Precision::F64);
        let (found, unrolled) = (exact.gradients(&ode, Discrete::default())?, exact.gradients(&ode, Unrolled)?);
        Ok(beyond("differs", distance(&found.gradients, &unrolled.gradients), 1e-12).into_iter().collect())
    });
    for (precision, bound) in BOUNDS {
        failures.cell(format!("{}, {precision:?}, {}", method.name, problem.name), || {
            let found = problem.gradients(&over(&problem.field, precision), Discrete::default());
            if precision == Precision::BF16 {
                return Ok(is_refused(found, "unsupported dtype BF16 for op"));
            }
            let found = found?;
            let ode = method.over(&exact.field).precision(Precision::F64).grid(&found.times);
            let exact = exact.gradients(&ode, Discrete::default())?;
            Ok(beyond("is off", distance(&found.gradients, &exact.gradients), bound).into_iter().collect())
        });
    }
}

/// What cannot be put together says so, and what to do instead.
fn refused(failures: &mut Failures, method: Method) {
    let problem = Problem::mlp(DType::F64, 4, 3, 6);
    let (base, reversible) = (method.over(&problem.field), method.reversible(&problem.field));
    let over = |ode: &Ode| method.paced(ode.clone(), LENGTH, STEPS, 1e-3);
    let kept = || Discrete::default().keep_linearizations();
    let mut all: Vec<(&str, Ode, Adjoint, &str)> = vec![
        (
            "Reconstruct over it",
            over(&base),
            Reconstruct::default().into(),
            "whose steps cannot be undone, is not supported",
        ),
        ("Backsolve by reversible steps", over(&reversible), Backsolve::default().into(), "name one for the way back"),
    ];
    if !method.is_adaptive {
        let words = "keeping the linearisations of the steps of Reversible";
        all.push(("linearisations of reversible steps", over(&reversible), kept().into(), words));
    }
    if ["Euler", "Rk4"].contains(&method.name) {
        for (name, ode) in [("adaptive", &base), ("reversible and adaptive", &reversible)] {
            let ode = ode.clone().span(START, START + LENGTH).tolerances(1e-3, 1e-3);
            all.push((name, ode, Discrete::default().into(), "has no error estimate, which adaptive steps need"));
        }
    }
    for (name, ode, adjoint, words) in all {
        failures.cell(format!("{}, {name}", method.name), || Ok(is_refused(problem.gradients(&ode, adjoint), words)));
    }
}
