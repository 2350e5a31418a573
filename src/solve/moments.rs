//! Times given as tensors, so that they have gradients: the ends of the span, the grid, or the output times.

use super::Ode;
use crate::adjoint::{Adjoint, Moments};
use crate::error::{OdeError, Result};
use crate::field::on_host;
use crate::time::position;
use candle_core::{Device, Tensor};

/// The tensors that times were given as.
#[derive(Clone, Debug, Default)]
pub(super) struct TimeTensors {
    pub(super) span: Option<[Tensor; 2]>,
    pub(super) grid: Option<Tensor>,
    pub(super) outputs: Option<Tensor>,
}

impl TimeTensors {
    fn all(&self) -> impl Iterator<Item = &Tensor> {
        self.span.iter().flatten().chain(&self.grid).chain(&self.outputs)
    }

    pub(super) fn is_tracked(&self) -> bool {
        self.all().any(Tensor::track_op)
    }
}

impl Ode {
    /// The same solve with the times in the tensors as numbers.
    pub(super) fn with_times_read(&self) -> Result<Self> {
        let mut ode = self.clone();
        if let Some([t0, t1]) = &self.time_tensors.span {
            ode.span = Some((one("span_tensors", t0)?, one("span_tensors", t1)?));
        }
        if let Some(times) = &self.time_tensors.grid {
            ode.grid = Some(many("grid_tensor", times)?);
        }
        if let Some(times) = &self.time_tensors.outputs {
            ode.save_at = many("save_at_tensor", times)?;
        }
        Ok(ode)
    }

    /// Whether times with gradients fit the other settings.
    pub(super) fn check_moments(&self, device: &Device) -> Result<()> {
        let refuse = |what: &str, instead| {
            Err(OdeError::Unsupported { what: format!("the gradient of times with {what}"), instead })
        };
        if let Some(other) = self.time_tensors.all().find(|tensor| !tensor.device().same_device(device)) {
            let (expected, found) = (device.location(), other.device().location());
            return Err(OdeError::DeviceMismatch { what: "a tensor of times".into(), expected, found });
        }
        if self.time_tensors.span.is_some() && self.grid.is_some() {
            return refuse("a span beside a grid", "give the grid alone: its first and last times are the ends");
        }
        if self.time_tensors.outputs.as_ref().is_some_and(Tensor::track_op) {
            let mut times = self.save_at.clone();
            times.sort_by(f64::total_cmp);
            if times.windows(2).any(|pair| pair[0] == pair[1]) {
                return refuse("the same output time twice", "give it once, and use its state twice");
            }
        }
        if !matches!(self.adjoint, Adjoint::Discrete(_)) {
            return refuse("this adjoint", "use Discrete");
        }
        if self.solver.interpolated(0.5).is_none() {
            return refuse(self.solver.name(), "use an explicit Runge–Kutta method");
        }
        if self.dense || self.interpolate {
            return refuse("dense output", "step to the output times, without .interpolate() and .dense()");
        }
        if !self.is_adaptive() && self.time_tensors.outputs.as_ref().is_some_and(Tensor::track_op) {
            return refuse("output times on given steps", "give them as the steps, .grid_tensor(&times)");
        }
        Ok(())
    }

    /// What each of the tracked tensors moves, on the steps with these ends.
    pub(super) fn moments(&self, times: &[f64]) -> Vec<Moments> {
        let TimeTensors { span, grid, outputs } = &self.time_tensors;
        let at = |t: f64| -> Vec<(usize, f64)> { position(times, t).map(|n| (n, 1.0)).into_iter().collect() };
        let mut all = vec![];
        if let Some(tensor) = outputs {
            let moves = self.save_at.iter().map(|t| at(*t)).collect();
            all.push(Moments { tensor: tensor.clone(), moves });
        }
        if let Some(tensor) = grid {
            let moves = (0..tensor.elem_count()).map(|n| if n < times.len() { vec![(n, 1.0)] } else { vec![] });
            all.push(Moments { tensor: tensor.clone(), moves: moves.collect() });
        }
        if let (Some([t0, t1]), Some((start, end))) = (span, self.span) {
            let (of_start, of_end) = if self.is_adaptive() {
                // An end that is an output time as well is that.
                let own = |t: f64| if outputs.is_some() && self.save_at.contains(&t) { vec![] } else { at(t) };
                (own(start), own(end))
            } else {
                let fraction = |n: usize| n as f64 / self.steps as f64;
                (
                    (0..times.len()).map(|n| (n, 1.0 - fraction(n))).collect(),
                    (0..times.len()).map(|n| (n, fraction(n))).collect(),
                )
            };
            all.push(Moments { tensor: t0.clone(), moves: vec![of_start] });
            all.push(Moments { tensor: t1.clone(), moves: vec![of_end] });
        }
        all.retain(|moments| moments.tensor.track_op());
        all
    }
}

/// A tensor of one time.
fn one(setting: &'static str, tensor: &Tensor) -> Result<f64> {
    match many(setting, tensor)?.as_slice() {
        [t] => Ok(*t),
        several => wrong(setting, format!("{} times", several.len()), "each end of a span is one time: a 0-d tensor"),
    }
}

/// A tensor of times in a row.
fn many(setting: &'static str, tensor: &Tensor) -> Result<Vec<f64>> {
    if !tensor.dtype().is_float() {
        return wrong(setting, format!("{:?}", tensor.dtype()), "times are floats; convert with .to_dtype(..)");
    }
    if tensor.rank() > 1 {
        return wrong(setting, format!("a shape of {:?}", tensor.shape()), "times are a 1-d tensor");
    }
    Ok(on_host(tensor)?.to_vec1::<f64>()?)
}

fn wrong<T>(setting: &'static str, value: String, hint: &'static str) -> Result<T> {
    Err(OdeError::Setting { setting, value, hint })
}
