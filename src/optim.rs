//! Adam and AdamW with a state that can be read, saved and resumed to the same bits.
//!
//! For each variable θ with gradient g, at its optimiser's step n = 1, 2, …:
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
//! θ ← (1 − lr·decay) θ − lr · m/(1 − β₁ⁿ) / (√(v/(1 − β₂ⁿ)) + ε)
//! ```
//!
//! Adam is the same with decay = 0. Moments have the variable's dtype, or F32 for F16 and BF16 variables, whose
//! update is computed in F32 and rounded once.
//!
//! # Reference
//! Kingma, Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, algorithm 1; Loshchilov, Hutter,
//! "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2.

mod clip;
mod saved;

pub use clip::clip_grad_norm;

use crate::account::{Category, Owned};
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Optimizer, VarMap};
use std::collections::BTreeMap;
use std::sync::PoisonError;

/// Settings of [`Adam`].
#[derive(Clone, Debug, PartialEq)]
pub struct AdamConfig {
    /// Learning rate.
    pub lr: f64,
    /// How much of the first moment is kept, β₁.
    pub beta1: f64,
    /// How much of the second moment is kept, β₂.
    pub beta2: f64,
    /// Added to the root of the second moment, ε.
    pub eps: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8 }
    }
}

/// Settings of [`AdamW`].
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Learning rate, moments and ε.
    pub adam: AdamConfig,
    /// Share of each variable taken away per step and unit of learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { adam: AdamConfig::default(), weight_decay: 1e-2 }
    }
}

/// What tells Adam from AdamW: implemented by their settings, and by nothing else.
pub trait AdamRule: sealed::Sealed {
    /// Learning rate, moments and ε.
    fn adam(&self) -> &AdamConfig;
    /// The same, to change.
    fn adam_mut(&mut self) -> &mut AdamConfig;
    /// Decoupled weight decay.
    fn weight_decay(&self) -> f64;
}

impl AdamRule for AdamConfig {
    fn adam(&self) -> &AdamConfig {
        self
    }
    fn adam_mut(&mut self) -> &mut AdamConfig {
        self
    }
    fn weight_decay(&self) -> f64 {
        0.0
    }
}

impl AdamRule for AdamWConfig {
    fn adam(&self) -> &AdamConfig {
        &self.adam
    }
    fn adam_mut(&mut self) -> &mut AdamConfig {
        &mut self.adam
    }
    fn weight_decay(&self) -> f64 {
        self.weight_decay
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::AdamConfig {}
    impl Sealed for super::AdamWConfig {}
}

/// Adam; with [`AdamWConfig`] it is [`AdamW`].
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{Optimizer, VarBuilder, VarMap};
/// use candle_ode::optim::{Adam, AdamConfig};
///
/// let vars = VarMap::new();
/// let w = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).get_with_hints((2, 2), "w", candle_nn::init::ONE)?;
/// let mut adam = Adam::from_varmap(&vars, AdamConfig { lr: 1e-2, ..Default::default() })?;
/// adam.backward_step(&w.sqr()?.sum_all()?)?;
/// assert_eq!(adam.step_count(), 1);
/// assert_eq!(adam.first_moment("w").unwrap().dims(), &[2, 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Adam<C = AdamConfig> {
    slots: Vec<Slot>,
    step: u64,
    config: C,
    extras: BTreeMap<String, f64>,
}

/// Adam with decoupled weight decay.
pub type AdamW = Adam<AdamWConfig>;

/// A variable and its moments.
#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    first: Tensor,
    second: Tensor,
    _owned: Owned,
}

impl Slot {
    fn new(name: String, var: Var) -> Result<Self> {
        let dtype = moment_dtype(var.dtype());
        let first = Tensor::zeros(var.shape(), dtype, var.device())?;
        let second = first.zeros_like()?;
        let bytes = 2 * var.elem_count() * dtype.size_in_bytes();
        Ok(Self { name, var, first, second, _owned: Owned::new(Category::Optimizer, bytes) })
    }
}

fn moment_dtype(master: DType) -> DType {
    match master {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

impl<C: AdamRule> Adam<C> {
    /// An optimiser of every float variable of `vars`, in the order of their names.
    ///
    /// # Errors
    /// Those of Candle when the moments are allocated.
    pub fn from_varmap(vars: &VarMap, config: C) -> Result<Self> {
        // A panic elsewhere while the lock was held does not harm the map: it only ever gains whole variables.
        let data = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
        let named: BTreeMap<String, Var> = data.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        drop(data);
        Self::named(named, config)
    }

    /// An optimiser of the float variables among `vars`, each with the name its state goes by.
    ///
    /// # Errors
    /// Those of Candle when the moments are allocated.
    pub fn named(vars: impl IntoIterator<Item = (String, Var)>, config: C) -> Result<Self> {
        let slots = vars
            .into_iter()
            .filter(|(_, var)| var.dtype().is_float())
            .map(|(name, var)| Slot::new(name, var))
            .collect::<Result<_>>()?;
        Ok(Self { slots, step: 0, config, extras: BTreeMap::new() })
    }

    /// How many steps were taken.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// The settings; the learning rate is the present one.
    pub fn config(&self) -> &C {
        &self.config
    }

    /// Names of the variables, in the order they are stepped. [`Optimizer::new`] names them `0`, `1`, ….
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.iter().map(|slot| slot.name.as_str())
    }

    /// m of the variable of that name, in its shape; F32, or F64 for an F64 variable.
    pub fn first_moment(&self, name: &str) -> Option<&Tensor> {
        self.slot(name).map(|slot| &slot.first)
    }

    /// v of the variable of that name, in its shape; F32, or F64 for an F64 variable.
    pub fn second_moment(&self, name: &str) -> Option<&Tensor> {
        self.slot(name).map(|slot| &slot.second)
    }

    /// Keeps a number with the state, to be saved and loaded with it: the headroom of a loss scale, say.
    pub fn set_extra(&mut self, name: impl Into<String>, value: f64) {
        self.extras.insert(name.into(), value);
    }

    /// The number kept under that name.
    pub fn extra(&self, name: &str) -> Option<f64> {
        self.extras.get(name).copied()
    }

    fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.name == name)
    }

    /// One update from the gradient; θ, m and v change together or not at all.
    fn update(config: &C, step: u64, slot: &mut Slot, grad: &Tensor) -> Result<()> {
        let AdamConfig { lr, beta1, beta2, eps } = *config.adam();
        let dtype = slot.first.dtype();
        // Gradients of Candle may drag their own graph along.
        let grad = grad.detach().to_dtype(dtype)?;
        let theta = slot.var.as_detached_tensor().to_dtype(dtype)?;
        let first = ((&slot.first * beta1)? + (&grad * (1.0 - beta1))?)?;
        let second = ((&slot.second * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        let unbiased = |beta: f64| 1.0 / (1.0 - beta.powf(step as f64));
        let divisor = ((&second * unbiased(beta2))?.sqrt()? + eps)?;
        let change = ((&first * unbiased(beta1))? / divisor)?;
        let kept = (theta * (1.0 - lr * config.weight_decay()))?;
        let next = (kept - (change * lr)?)?;
        slot.var.set(&next.to_dtype(slot.var.dtype())?)?;
        (slot.first, slot.second) = (first, second);
        Ok(())
    }
}

impl<C: AdamRule> Optimizer for Adam<C> {
    type Config = C;

    fn new(vars: Vec<Var>, config: C) -> Result<Self> {
        Self::named(vars.into_iter().enumerate().map(|(index, var)| (index.to_string(), var)), config)
    }

    /// Steps every variable that has a gradient in `grads`; the others, and their moments, stay as they are.
    fn step(&mut self, grads: &GradStore) -> Result<()> {
        for slot in &self.slots {
            if let Some(grad) = grads.get(&slot.var).filter(|grad| grad.shape() != slot.var.shape()) {
                let (found, wanted) = (grad.shape(), slot.var.shape());
                candle_core::bail!("the gradient of `{}` has shape {found:?}, its variable {wanted:?}", slot.name);
            }
        }
        self.step += 1;
        for slot in &mut self.slots {
            if let Some(grad) = grads.get(&slot.var) {
                Self::update(&self.config, self.step, slot, grad)?;
            }
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.config.adam().lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.config.adam_mut().lr = lr;
    }
}
