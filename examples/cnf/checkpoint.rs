//! What a run leaves behind to go on from: `model.safetensors`, `optimizer.safetensors` and `state.json`.
//!
//! Each file is replaced in one go and carries its iteration, so that a crash between two of them is noticed.

use crate::cli::Config;
use candle_core::Device;
use candle_nn::VarMap;
use candle_ode::file::write_bytes_atomically;
use candle_ode::optim::Adam;
use candle_ode::{OdeError, Result};
use safetensors::tensor::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::PoisonError;

/// What is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Iterations done.
    pub iteration: u64,
    /// The settings of the run.
    pub config: Config,
}

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const ITERATION: &str = "iteration";

/// Writes the three files into `dir`.
///
/// # Errors
/// [`OdeError::Io`]; those of Candle when a weight cannot be read from its device.
pub fn save(dir: &Path, vars: &VarMap, adam: &mut Adam, state: &State) -> Result<()> {
    fs::create_dir_all(dir).map_err(|source| OdeError::Io { path: dir.to_owned(), source })?;
    let mut weights = BTreeMap::new();
    for (name, var) in vars.data().lock().unwrap_or_else(PoisonError::into_inner).iter() {
        weights.insert(name.clone(), var.as_tensor().to_device(&Device::Cpu)?);
    }
    let wrong = |file: &str, reason: String| OdeError::Format { path: dir.join(file), reason };
    let tag = HashMap::from([(ITERATION.to_owned(), state.iteration.to_string())]);
    let model = serialize(&weights, Some(tag)).map_err(|error| wrong(MODEL, error.to_string()))?;
    let json = serde_json::to_vec_pretty(state).map_err(|error| wrong(STATE, error.to_string()))?;
    adam.set_extra(ITERATION, state.iteration as f64);
    adam.save(dir.join(OPTIMIZER))?;
    write_bytes_atomically(&dir.join(MODEL), &model)?;
    write_bytes_atomically(&dir.join(STATE), &json)
}

/// Reads the settings and the iteration to go on from.
///
/// # Errors
/// [`OdeError::Io`] when there is no checkpoint, [`OdeError::Format`] when it cannot be read.
pub fn state(dir: &Path) -> Result<State> {
    let path = dir.join(STATE);
    let bytes = fs::read(&path).map_err(|source| OdeError::Io { path: path.clone(), source })?;
    serde_json::from_slice(&bytes).map_err(|error| OdeError::Format { path, reason: error.to_string() })
}

/// Loads weights into `vars` and moments into `adam`, both made for `state.config`.
///
/// # Errors
/// [`OdeError::Format`] when a file belongs to another iteration or another model; [`OdeError::Io`].
pub fn load(dir: &Path, vars: &VarMap, adam: &mut Adam, state: &State) -> Result<()> {
    let path = dir.join(MODEL);
    let wrong = |reason: String| OdeError::Format { path: path.clone(), reason };
    let bytes = fs::read(&path).map_err(|source| OdeError::Io { path: path.clone(), source })?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| wrong(error.to_string()))?;
    let tag = header.metadata().as_ref().and_then(|metadata| metadata.get(ITERATION)?.parse::<u64>().ok());
    if tag != Some(state.iteration) {
        return Err(wrong(torn(tag.map(|tag| tag as f64), state.iteration)));
    }
    vars.clone().load(&path)?;
    adam.load(dir.join(OPTIMIZER))?;
    let tag = adam.extra(ITERATION);
    if tag != Some(state.iteration as f64) {
        return Err(OdeError::Format { path: dir.join(OPTIMIZER), reason: torn(tag, state.iteration) });
    }
    Ok(())
}

fn torn(found: Option<f64>, wanted: u64) -> String {
    let found = found.map_or_else(|| "an unknown iteration".to_owned(), |found| format!("iteration {found}"));
    format!("is of {found}, {STATE} of {wanted}: the run was interrupted while it saved, start it afresh")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use candle_nn::{Optimizer, VarBuilder};
    use candle_ode::optim::AdamConfig;

    fn model() -> Result<(VarMap, candle_core::Tensor, Adam)> {
        let vars = VarMap::new();
        let w = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).get_with_hints(
            (2, 3),
            "layer.w",
            candle_nn::init::ONE,
        )?;
        let adam = Adam::from_varmap(&vars, AdamConfig::default())?;
        Ok((vars, w, adam))
    }

    #[test]
    fn saved_run_is_taken_up_and_torn_ones_are_noticed() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let (vars, w, mut adam) = model()?;
        adam.backward_step(&w.sqr()?.sum_all()?)?;
        let saved = State { iteration: 7, config: Config::default() };
        save(dir.path(), &vars, &mut adam, &saved)?;

        let (other_vars, other, mut other_adam) = model()?;
        let found = state(dir.path())?;
        assert_eq!(found, saved);
        load(dir.path(), &other_vars, &mut other_adam, &found)?;
        assert_eq!(other.to_vec2::<f32>()?, w.to_vec2::<f32>()?);
        assert_eq!(other_adam.step_count(), 1);

        let later = State { iteration: 8, ..saved };
        let error = load(dir.path(), &other_vars, &mut other_adam, &later).unwrap_err().to_string();
        assert!(error.contains("model.safetensors: is of iteration 7, state.json of 8"), "{error}");
        assert!(matches!(state(&dir.path().join("none")), Err(OdeError::Io { .. })));
        Ok(())
    }
}
