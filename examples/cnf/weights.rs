//! First weights that depend on the seed alone; those of candle-nn come from the thread's own generator.

use crate::draws::{Purpose, draws};
use candle_core::{Result, Tensor, Var};
use candle_nn::VarMap;
use rand::Rng;
use std::collections::BTreeMap;
use std::sync::PoisonError;

/// Draws every `weight` of shape `(out, in)` and its `bias` uniformly from ±1/√in, as PyTorch's linear layers do.
///
/// # Errors
/// When the device fails.
pub fn initialise(vars: &VarMap, seed: u64) -> Result<()> {
    let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let sorted: BTreeMap<&String, &Var> = vars.iter().collect();
    for (index, (name, var)) in sorted.iter().enumerate() {
        let weight = name.strip_suffix("bias").map(|layer| format!("{layer}weight"));
        let weight = weight.and_then(|weight| sorted.get(&weight)).unwrap_or(var);
        let bound = 1.0 / (weight.dims().last().copied().unwrap_or(1).max(1) as f64).sqrt();
        let mut rng = draws(seed, Purpose::Weights, index as u64);
        let values = (0..var.elem_count()).map(|_| rng.random_range(-bound..bound));
        var.set(&Tensor::from_iter(values, var.device())?.reshape(var.shape())?.to_dtype(var.dtype())?)?;
    }
    Ok(())
}
