//! Clipping by the norm of all gradients together.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};

/// Scales the gradients of `vars` so that their 2-norm, taken over all of them together, is at most `max_norm`;
/// returns the norm before.
///
/// The norm is summed in F64 (F32 on Metal) and read from the device once. Variables without a gradient are skipped.
/// When the norm is infinite or NaN the gradients stay as they are: check the returned value and skip the step.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_ode::optim::clip_grad_norm;
///
/// let x = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let mut grads = (x.sqr()?.sum_all()? * 0.5)?.backward()?;
/// assert_eq!(clip_grad_norm(std::slice::from_ref(&x), &mut grads, 1.0)?, 5.0);
/// assert!((clip_grad_norm(&[x], &mut grads, 2.0)? - 1.0).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of Candle; gradients are then unchanged.
///
/// # Reference
/// Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", arXiv 1211.5063, algorithm 1.
pub fn clip_grad_norm(vars: &[Var], grads: &mut GradStore, max_norm: f64) -> Result<f64> {
    let squares = vars.iter().filter_map(|var| grads.get(var)).map(sum_of_squares).collect::<Result<Vec<_>>>()?;
    let Some(first) = squares.first() else { return Ok(0.0) };
    let device = first.device().clone();
    let squares = squares.iter().map(|square| square.to_device(&device)).collect::<Result<Vec<_>>>()?;
    let squares = Tensor::stack(&squares, 0)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let norm = squares.to_vec1::<f64>()?.into_iter().sum::<f64>().sqrt();
    if norm.is_finite() && norm > max_norm {
        let clipped = vars
            .iter()
            .filter_map(|var| grads.get(var).map(|grad| Ok((var, (grad.detach() * (max_norm / norm))?))))
            .collect::<Result<Vec<_>>>()?;
        for (var, grad) in clipped {
            grads.insert(var, grad);
        }
    }
    Ok(norm)
}

fn sum_of_squares(grad: &Tensor) -> Result<Tensor> {
    let dtype = if grad.device().is_metal() { DType::F32 } else { DType::F64 };
    grad.detach().to_dtype(dtype)?.sqr()?.sum_all()
}
