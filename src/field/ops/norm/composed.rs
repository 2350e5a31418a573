//! The normalisations as compositions of Candle's ops in F32 (F64 for F64): the tangent, which must itself be
//! differentiable, and the passes on devices without kernels of ours.

use super::Norm;
use crate::field::ops::cpu::wide_dtype;
use candle_core::{Result, Tensor};

/// What the formulas share, each `(samples, per_sample, channels, inner)` or broadcasting against it.
struct Parts {
    /// The normalised x.
    standard: Tensor,
    /// 1 / sqrt(var + ε)
    scale: Tensor,
}

impl Norm {
    /// x in F32 (F64 for F64) as `(samples, per_sample, channels, inner)`.
    fn wide(&self, x: &Tensor) -> Result<Tensor> {
        let groups = self.groups;
        x.to_dtype(wide_dtype(x.dtype()))?.reshape(((), groups.per_sample, groups.channels, groups.inner))
    }

    /// w or b in F32 (F64 for F64) as `(1, per_sample, channels, 1)`.
    fn spread(&self, parameter: &Tensor) -> Result<Tensor> {
        let wide = parameter.to_dtype(wide_dtype(parameter.dtype()))?;
        wide.reshape((1, self.groups.per_sample, self.groups.channels, 1))
    }

    /// The mean over each group.
    fn mean(&self, x: &Tensor) -> Result<Tensor> {
        x.sum_keepdim((2, 3))? / self.groups.size() as f64
    }

    fn parts(&self, x: &Tensor) -> Result<Parts> {
        let centred = match self.remove_mean {
            // Counted from the first element, so that a large mean costs no digits.
            true => {
                let x = x.broadcast_sub(&x.detach().narrow(2, 0, 1)?.narrow(3, 0, 1)?)?;
                x.broadcast_sub(&self.mean(&x)?)?
            }
            false => x.clone(),
        };
        let scale = (self.mean(&centred.sqr()?)? + self.eps)?.sqrt()?.recip()?;
        Ok(Parts { standard: centred.broadcast_mul(&scale)?, scale })
    }

    /// s (g − mean(g) − x̂ mean(g x̂)): J g without the weight, and, J being symmetric, Jᵀ g.
    fn project(&self, parts: &Parts, g: &Tensor) -> Result<Tensor> {
        let along = self.mean(&(g * &parts.standard)?)?;
        let rest = (g - parts.standard.broadcast_mul(&along)?)?;
        let rest = if self.remove_mean { rest.broadcast_sub(&self.mean(g)?)? } else { rest };
        rest.broadcast_mul(&parts.scale)
    }
}

/// The normalised x times w plus b, in the dtype of x.
pub(super) fn value(norm: Norm, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut y = norm.parts(&norm.wide(x)?)?.standard;
    if let Some(weight) = weight {
        y = y.broadcast_mul(&norm.spread(weight)?)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&norm.spread(bias)?)?;
    }
    y.reshape(x.shape())?.to_dtype(x.dtype())
}

/// J v, in the dtype of x.
pub(super) fn tangent(norm: Norm, x: &Tensor, weight: Option<&Tensor>, v: &Tensor) -> Result<Tensor> {
    let parts = norm.parts(&norm.wide(x)?)?;
    let mut pushed = norm.project(&parts, &norm.wide(v)?)?;
    if let Some(weight) = weight {
        pushed = pushed.broadcast_mul(&norm.spread(weight)?)?;
    }
    pushed.reshape(x.shape())?.to_dtype(x.dtype())
}

/// The gradient of x and the sums Σ g x̂ and Σ g per parameter, `(2, parameters)`.
pub(super) fn pull(norm: Norm, x: &Tensor, weight: Option<&Tensor>, grad: &Tensor) -> Result<(Tensor, Tensor)> {
    let parts = norm.parts(&norm.wide(x)?)?;
    let grad = norm.wide(grad)?;
    let sums = [(&grad * &parts.standard)?, grad.clone()]
        .iter()
        .map(|g| g.sum((0, 3))?.flatten_all())
        .collect::<Result<Vec<_>>>()?;
    let scaled = match weight {
        Some(weight) => grad.broadcast_mul(&norm.spread(weight)?)?,
        None => grad,
    };
    let for_x = norm.project(&parts, &scaled)?.reshape(x.shape())?.to_dtype(x.dtype())?;
    Ok((for_x, Tensor::stack(&sums, 0)?))
}
