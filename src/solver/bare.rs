//! Steps of explicit Runge–Kutta methods through fields that are layers alone, on buffers: the formulas of
//! `explicit.rs` in the same order, to the same bits, without a tensor for each stage state, slope and cotangent.

use super::Step;
use super::explicit::stages_used;
use super::stages::{Pullbacks, Stages, StepAt};
use super::tableau::Tableau;
use crate::State;
use crate::error::Result;
use crate::field::{Bare, Finite, with_elements};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// A step; `None` if something in it is not finite: where it became so is for those to say who look at every stage.
pub(crate) fn step(
    tableau: &Tableau,
    layers: &Bare,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    y: &State,
) -> Result<Option<Step>> {
    let mut buffers = layers.buffers(tableau.stages(), y.numel());
    let (end, is_finite) = with_floats(y, |floats| {
        let (mut is_finite, mut terms) = (true, vec![]);
        for i in stages_used(tableau) {
            let _span = tracing::trace_span!(target: "candle_ode", "stage", index = i).entered();
            fill(&mut terms, 0..i, |j| at.h * tableau.a(i, j));
            let largest = stages.bare_slope(at, i, || buffers.evaluate((i, at.time(i).value()), floats, &terms))?;
            is_finite &= largest.is_none_or(f64::is_finite);
        }
        fill(&mut terms, 0..tableau.stages(), |j| at.h * tableau.weights()[j]);
        let (end, largest) = buffers.end(floats, &terms)?;
        Ok((state(end, largest, y)?, is_finite && largest.is_finite()))
    })?;
    if !is_finite {
        return Ok(None);
    }
    stages.evaluated(stages_used(tableau).count());
    Ok(Some(Step { y: end, finite: vec![Finite::default(); tableau.stages()] }))
}

/// The pullback of a step, with all of its stages linearised at once.
pub(crate) fn pullback(
    tableau: &Tableau,
    layers: &Bare,
    stages: &Stages<'_>,
    at: &StepAt<'_>,
    y: State,
    lambda: &State,
    pullbacks: &mut Pullbacks<'_>,
) -> Result<State> {
    let mut buffers = layers.buffers(tableau.stages(), y.numel());
    let (last, mut terms) = (stages_used(tableau).last(), vec![]);
    with_floats(&y, |floats| {
        for i in stages_used(tableau) {
            let _span = tracing::trace_span!(target: "candle_ode", "stage", index = i).entered();
            fill(&mut terms, 0..i, |j| at.h * tableau.a(i, j));
            stages.bare_linearization(at, i, || {
                buffers.linearize((i, at.time(i).value()), floats, &terms, Some(i) != last)
            })?;
        }
        Ok(())
    })?;
    drop(y);
    with_floats(lambda, |floats| {
        let mut finite = vec![];
        for i in stages_used(tableau).rev() {
            let _span = tracing::trace_span!(target: "candle_ode", "stage", index = i).entered();
            // κᵢ = h (bᵢ λ + Σ aⱼᵢ μⱼ)
            fill(&mut terms, i + 1..tableau.stages(), |j| at.h * tableau.a(j, i));
            let largest = buffers.gather((at.h * tableau.weights()[i], floats), &terms)?;
            finite.push((i, pullbacks.pull_bare(at, i, largest, |scale| buffers.pull(i, scale))?));
        }
        fill(&mut terms, 0..tableau.stages(), |i| f64::from(u8::from(tableau.is_used(i))));
        let (back, largest) = buffers.back(floats, &terms)?;
        for (i, of_sums) in finite {
            // Each of the cotangents is a term of what is finite.
            let is_finite = largest.is_finite() || buffers.is_finite(i);
            pullbacks.note(at, i, of_sums.and(Finite::Host(is_finite)));
        }
        state(back, largest, lambda)
    })
}

/// The terms of a sum over some stages, those that are not structurally zero.
fn fill(terms: &mut Vec<(f64, usize)>, stages: Range<usize>, c: impl Fn(usize) -> f64) {
    terms.clear();
    terms.extend(stages.map(|j| (c(j), j)).filter(|(c, _)| *c != 0.0));
}

fn with_floats<R>(state: &State, with: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    with_elements(&state[0].contiguous()?, |x| Ok(with(x)))?
}

/// Floats shaped as `like`, with their largest absolute value.
fn state(floats: Vec<f32>, largest: f64, like: &State) -> Result<State> {
    let tensor = Tensor::from_vec(floats, like[0].shape(), &Device::Cpu);
    Ok(State::noted(std::iter::once(tensor.map(|tensor| (tensor, Some(largest)))))?)
}
