//! The state of an optimiser in a safetensors file.
//!
//! Tensors `first.NAME` and `second.NAME` for each variable; the metadata key `candle-ode.adam` holds a JSON object
//! with the step count, the learning rate and the extra numbers, as the bits of their F64 in hexadecimal.

use super::{Adam, AdamRule, Slot};
use crate::file::write_bytes_atomically;
use crate::{OdeError, Result};
use candle_core::{Device, Tensor};
use candle_nn::Optimizer;
use safetensors::tensor::{SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

const KEY: &str = "candle-ode.adam";

/// What is not a tensor. Floats go as bits: JSON knows neither infinities nor NaN.
#[derive(Serialize, Deserialize)]
struct Scalars {
    step: u64,
    learning_rate: Bits,
    extras: BTreeMap<String, Bits>,
}

/// An F64 as the hexadecimal digits of its bits.
#[derive(Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[derive(Clone, Copy)]
struct Bits(f64);

impl From<Bits> for String {
    fn from(Bits(value): Bits) -> Self {
        format!("{:016x}", value.to_bits())
    }
}

impl TryFrom<String> for Bits {
    type Error = std::num::ParseIntError;
    fn try_from(digits: String) -> std::result::Result<Self, Self::Error> {
        u64::from_str_radix(&digits, 16).map(|bits| Self(f64::from_bits(bits)))
    }
}

impl<C: AdamRule> Adam<C> {
    /// Writes step count, learning rate, moments and extra numbers; the file at `path` is replaced in one go.
    ///
    /// # Errors
    /// [`OdeError::Io`] when the file cannot be written, and those of Candle when a moment cannot be read.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut tensors = BTreeMap::new();
        for slot in &self.slots {
            for (key, moment) in [(first_key(slot), &slot.first), (second_key(slot), &slot.second)] {
                tensors.insert(key, moment.to_device(&Device::Cpu)?);
            }
        }
        let bytes = serialize(&tensors, Some(HashMap::from([(KEY.to_owned(), self.scalars(path)?)])))
            .map_err(|error| format_error(path, error.to_string()))?;
        write_bytes_atomically(path, &bytes)
    }

    /// Takes up a saved state: the next step gives the same bits as if the saved optimiser had gone on.
    ///
    /// The variables themselves are the `VarMap`'s to load; β₁, β₂, ε and decay are those given at construction.
    ///
    /// # Errors
    /// [`OdeError::Io`] when the file cannot be read; [`OdeError::Format`] when it is no such file, lacks the moments
    /// of a variable, has moments of a variable that is not here, or of another shape or dtype. The optimiser is then
    /// as it was.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| OdeError::Io { path: path.to_owned(), source })?;
        let wrong = |reason: String| format_error(path, reason);
        let file = SafeTensors::deserialize(&bytes).map_err(|error| wrong(format!("no safetensors file: {error}")))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| wrong(error.to_string()))?;
        let Some(scalars) = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY)) else {
            return Err(wrong(format!("no state of an optimiser: the metadata has no `{KEY}`")));
        };
        let scalars: Scalars =
            serde_json::from_str(scalars).map_err(|error| wrong(format!("metadata `{KEY}`: {error}")))?;

        let known = self.slots.iter().flat_map(|slot| [first_key(slot), second_key(slot)]).collect::<Vec<_>>();
        if let Some(stranger) = file.names().into_iter().filter(|name| !known.iter().any(|key| key == name)).min() {
            return Err(wrong(format!("holds `{stranger}`, and no such variable is optimised here")));
        }
        let moments = self
            .slots
            .iter()
            .map(|slot| {
                let first = moment(&file, &first_key(slot), &slot.first).map_err(wrong)?;
                let second = moment(&file, &second_key(slot), &slot.second).map_err(wrong)?;
                Ok((first, second))
            })
            .collect::<Result<Vec<_>>>()?;

        for (slot, (first, second)) in self.slots.iter_mut().zip(moments) {
            (slot.first, slot.second) = (first, second);
        }
        self.step = scalars.step;
        self.set_learning_rate(scalars.learning_rate.0);
        self.extras = scalars.extras.into_iter().map(|(name, Bits(value))| (name, value)).collect();
        Ok(())
    }

    fn scalars(&self, path: &Path) -> Result<String> {
        let scalars = Scalars {
            step: self.step,
            learning_rate: Bits(self.learning_rate()),
            extras: self.extras.iter().map(|(name, &value)| (name.clone(), Bits(value))).collect(),
        };
        serde_json::to_string(&scalars).map_err(|error| format_error(path, error.to_string()))
    }
}

fn first_key(slot: &Slot) -> String {
    format!("first.{}", slot.name)
}

fn second_key(slot: &Slot) -> String {
    format!("second.{}", slot.name)
}

fn moment(file: &SafeTensors<'_>, key: &str, like: &Tensor) -> std::result::Result<Tensor, String> {
    use candle_core::safetensors::Load;
    let view = file.tensor(key).map_err(|_| format!("has no `{key}`"))?;
    let loaded = view.load(like.device()).map_err(|error| format!("`{key}`: {error}"))?;
    if loaded.shape() != like.shape() || loaded.dtype() != like.dtype() {
        return Err(format!(
            "`{key}` is {:?} {:?}, and {:?} {:?} is needed",
            loaded.dtype(),
            loaded.dims(),
            like.dtype(),
            like.dims()
        ));
    }
    Ok(loaded)
}

fn format_error(path: &Path, reason: String) -> OdeError {
    OdeError::Format { path: path.to_owned(), reason }
}
