//! The one place that calls `Tensor::backward`.

use super::ops::combine::zero_beside;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Tensor};

/// Σ ⟨cotangentᵢ, ∂outputᵢ/∂wanted⟩ for each of `wanted`, detached; `None` where no output depends on it.
///
/// The cotangents are the seeds: an op whose value is a 0-d zero and whose gradient is the cotangent costs nothing and
/// is exact, where `sum(output · cotangent)` would saturate in half precision.
pub(crate) fn vjp(outputs: &[Tensor], cotangents: &[Tensor], wanted: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
    let mut root: Option<Tensor> = None;
    for (output, cotangent) in outputs.iter().zip(cotangents) {
        if output.track_op() {
            let seeded = output.apply_op1(Seed(cotangent.detach()))?;
            root = Some(match root {
                None => seeded,
                Some(root) => (root + seeded)?,
            });
        }
    }
    let Some(root) = root else { return Ok(vec![None; wanted.len()]) };
    let mut gradients = root.backward()?;
    Ok(wanted.iter().map(|leaf| gradients.remove(leaf).map(|gradient| gradient.detach())).collect())
}

struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        zero_beside(storage)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        zero_beside(storage)
    }

    fn metal_fwd(&self, storage: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        zero_beside(storage)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
