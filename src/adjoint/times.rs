//! Gradients of times. A step from t of length h gives dL/dt at constant h and dL/dh; a point of the grid is the end of
//! one step and the start of the next, and a tensor of times is a linear function of the points:
//!
//! dL/dt_n = (dL/dt of step n) − (dL/dh of step n) + (dL/dh of step n − 1).

use crate::error::{OdeError, Result};
use crate::field::Finite;
use crate::field::ops::combine;
use crate::solver::StepTimes;
use candle_core::{DType, Device, Shape, Tensor};

/// A tensor of times that is differentiated: each of its elements moves points of the grid.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    pub(crate) tensor: Tensor,
    /// By element, the derivatives of the points it moves, as (point, derivative).
    pub(crate) moves: Vec<Vec<(usize, f64)>>,
}

/// dL/d(each of `moments`), in its dtype on its device, from the steps of a walk backwards. One read from the device.
///
/// # Errors
/// [`OdeError::SumOverflow`] where it, or a product on the way to it, is too large.
pub(super) fn gradients(
    moments: &[Moments],
    steps: usize,
    of_steps: &[(usize, StepTimes)],
) -> Result<Vec<Option<Tensor>>> {
    let tensors: Vec<&Tensor> = of_steps.iter().flat_map(|(_, times)| times.tensors()).collect();
    let read = match tensors.as_slice() {
        [] => vec![],
        several => Tensor::stack(several, 0)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1::<f64>()?,
    };
    let mut read = read.into_iter();
    let mut points = vec![0.0; steps + 1];
    for (step, times) in of_steps {
        let mut next = |known: bool| if known { read.next().unwrap_or(0.0) } else { 0.0 };
        let (start, length) = (next(times.start.is_some()), next(times.length.is_some()));
        points[*step] += start - length;
        points[step + 1] += length;
    }
    let gradient = |moments: &Moments| {
        let of = |moves: &Vec<(usize, f64)>| moves.iter().map(|(point, derivative)| derivative * points[*point]).sum();
        let values: Vec<f64> = moments.moves.iter().map(of).collect();
        let (shape, device): (&Shape, _) = (moments.tensor.shape(), moments.tensor.device());
        let gradient = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(moments.tensor.dtype())?;
        if Finite::read(&[combine::finite(&gradient)?])? != [true] {
            return Err(OdeError::SumOverflow { shape: shape.clone(), dtype: gradient.dtype() });
        }
        Ok(Some(gradient.to_device(device)?))
    };
    moments.iter().map(gradient).collect()
}
