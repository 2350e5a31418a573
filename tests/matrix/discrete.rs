//! `Discrete` with every codec and every schedule.

use super::*;
use crate::decoded::Decoded;
use candle_ode::Encodes;
use candle_ode::schedule::{Schedule, simulate_slots};

const NO_LINEARISATIONS: &str = "keeping the linearisations of steps of adaptive length is not supported";

/// In F64: the pullback at the decoded states, which without rounding is the unrolled gradient, and the same bits
/// whatever is computed again.
pub fn in_f64(method: Method) {
    let mut failures = Failures::default();
    for problem in small(DType::F64) {
        let base = method.over(&problem.field).precision(Precision::F64);
        let ode = method.paced(base.clone(), LENGTH, STEPS, 1e-7);
        let unrolled = problem.gradients(&ode, Unrolled).unwrap().gradients;
        let all = problem.gradients(&ode, Discrete::default()).unwrap();
        assert!(all.times.len() > if method.is_adaptive { 10 } else { STEPS }, "{} steps", all.times.len() - 1);
        for Coding { name: codec_name, codec, with, rounding } in codings() {
            for row in schedules() {
                let name = format!("{}, {}, {codec_name}, {}", method.name, problem.name, row.name);
                failures.cell(name, || {
                    let (discrete, with_stages) = (with(row.discrete.clone()), row.with_stages());
                    if with_stages && method.is_adaptive {
                        return Ok(is_refused(problem.gradients(&ode, discrete), NO_LINEARISATIONS));
                    }
                    let found = problem.gradients(&ode, discrete.clone())?;
                    let (codec, schedule, known) = (codec.as_ref(), row.schedule.as_ref(), !method.is_adaptive);
                    let mut wrong = as_foretold(&found, &discrete, schedule, known, Precision::F64);
                    let decoded = Decoded { ode: base.clone(), codec, schedule, known, times: &found.times };
                    let (gradients, end) = decoded.gradients(&problem)?;
                    let error = distance(&found.gradients, &gradients);
                    wrong.extend(beyond("differs from the pullback at the decoded states", error, 1e-12));
                    let error = relative(found.solution.last(), &end);
                    wrong.extend(beyond("hands out another end", error, 1e-13));
                    if rounding > 0.0 {
                        return Ok(wrong);
                    }
                    let error = distance(&found.gradients, &unrolled);
                    wrong.extend(beyond("differs from the unrolled gradient", error, 1e-12));
                    if !with_stages {
                        let one = problem.gradients(&ode, discrete.stage_memory(StageMemory::One))?;
                        let same = |of: &Found| equal_bits(&of.gradients, &found.gradients);
                        wrong.extend(unless(same(&one), "differs in its bits with one stage at a time"));
                        wrong.extend(unless(same(&all), "differs in its bits from keeping all"));
                    }
                    Ok(wrong)
                });
            }
        }
    }
    failures.report(2 * 7 * 10);
}

/// In F32 and half precision: near the gradient in F64, up to the rounding of what is kept.
pub fn near_f64(method: Method) {
    let mut failures = Failures::default();
    for (problem, exact) in larger(DType::F32).into_iter().zip(larger(DType::F64)) {
        let mut exact = Exact::new(|times: &[f64]| {
            let ode = method.over(&exact.field).precision(Precision::F64).grid(times);
            exact.gradients(&ode, Discrete::default()).unwrap().gradients
        });
        for (precision, bound) in BOUNDS {
            let ode = method.paced(method.over(&problem.field).precision(precision), 1.0, MORE_STEPS, 3e-3);
            for Coding { name: codec_name, codec, with, rounding } in codings() {
                for row in schedules() {
                    let name = format!("{}, {precision:?}, {}, {codec_name}, {}", method.name, problem.name, row.name);
                    failures.cell(name, || {
                        let discrete = with(row.discrete.clone());
                        if row.with_stages() && method.is_adaptive {
                            return Ok(is_refused(problem.gradients(&ode, discrete), NO_LINEARISATIONS));
                        }
                        let found = problem.gradients(&ode, discrete.clone())?;
                        let known = !method.is_adaptive;
                        let mut wrong = as_foretold(&found, &discrete, row.schedule.as_ref(), known, precision);
                        let longest = found.times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
                        // States are rounded as they are, and increments by so much less than they are shorter.
                        let share = if codec.encodes() == Encodes::States { 1.0 } else { longest };
                        let bound = bound + rounding * share;
                        let error = distance(&found.gradients, exact.over(&found.times));
                        wrong.extend(beyond("is off", error, bound));
                        Ok(wrong)
                    });
                }
            }
        }
    }
    failures.report(2 * 3 * 7 * 10);
}

/// Steps computed again and bytes kept are those that the schedule and the codec say.
fn as_foretold(
    found: &Found,
    discrete: &Discrete,
    schedule: &dyn Schedule,
    known: bool,
    precision: Precision,
) -> Vec<String> {
    let (stats, steps) = (found.solution.stats(), found.times.len() - 1);
    let shapes = [found.solution.last().shape().clone()];
    let (actions, bytes) = match known {
        true => (schedule.actions(steps), discrete.trajectory_bytes(&shapes, steps, precision)),
        false => (schedule.actions_online(steps), discrete.trajectory_bytes_online(&shapes, steps, precision)),
    };
    let recomputed = simulate_slots(actions, steps, schedule.slot()).unwrap().recomputed;
    let counted = format!("{} steps computed again, not {recomputed}", stats.recomputed_steps);
    let kept = format!("{} bytes kept, not {bytes}", found.solution.trajectory_bytes());
    let wrong = [
        unless(stats.recomputed_steps == recomputed, &counted),
        unless(found.solution.trajectory_bytes() == bytes, &kept),
    ];
    wrong.into_iter().flatten().collect()
}
