//! What is integrated: one tensor or several of different shapes, moved as one value.

use crate::error::{OdeError, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Index;

/// The state y of an ODE: one tensor, or several that evolve together (a flow carries z and log p).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_ode::State;
///
/// let z = Tensor::zeros((32, 2), DType::F32, &Device::Cpu)?;
/// let log_p = Tensor::zeros(32, DType::F32, &Device::Cpu)?;
/// let y = State::from([z, log_p]);
/// assert_eq!((y.len(), y.numel(), y.bytes(DType::F16)), (2, 96, 192));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct State {
    tensors: Vec<Tensor>,
    /// The largest absolute value, NaN if any is not finite; where it was found when the tensors were made.
    largest: Option<f64>,
}

impl State {
    /// How many tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The tensors, in order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensors, in order, by value.
    pub fn into_tensors(self) -> Vec<Tensor> {
        self.tensors
    }

    /// The tensor of a state of one.
    ///
    /// # Errors
    /// [`OdeError::Unsupported`] if there are several.
    pub fn single(&self) -> Result<&Tensor> {
        match self.tensors.as_slice() {
            [only] => Ok(only),
            several => Err(OdeError::Unsupported {
                what: format!("taking the single tensor of a state of {}", several.len()),
                instead: "take them by index: state[0], state[1] …",
            }),
        }
    }

    /// Elements in all tensors together.
    pub fn numel(&self) -> usize {
        self.tensors.iter().map(Tensor::elem_count).sum()
    }

    /// Bytes of all tensors together in `dtype`.
    pub fn bytes(&self, dtype: DType) -> usize {
        self.numel() * dtype.size_in_bytes()
    }

    /// Bytes of all tensors together, each in its own dtype.
    pub(crate) fn held_bytes(&self) -> usize {
        self.tensors.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }

    /// The device of the first tensor.
    pub fn device(&self) -> &Device {
        static CPU: Device = Device::Cpu;
        self.tensors.first().map_or(&CPU, Tensor::device)
    }

    /// Whether Candle tracks any of the tensors.
    pub fn is_tracked(&self) -> bool {
        self.tensors.iter().any(Tensor::track_op)
    }

    /// The same values, cut from Candle's graph.
    pub fn detach(&self) -> Self {
        Self { tensors: self.tensors.iter().map(Tensor::detach).collect(), ..*self }
    }

    /// Tensors, each with its largest absolute value where that is known.
    ///
    /// # Errors
    /// The first among them.
    pub(crate) fn noted<E>(
        parts: impl ExactSizeIterator<Item = std::result::Result<(Tensor, Option<f64>), E>>,
    ) -> std::result::Result<Self, E> {
        let (mut tensors, mut largest) = (Vec::with_capacity(parts.len()), Some(0.0));
        for part in parts {
            let (tensor, most) = part?;
            largest = largest.zip(most).map(|(a, b)| larger(a, b));
            tensors.push(tensor);
        }
        Ok(Self { tensors, largest })
    }

    /// The largest absolute value, NaN if any is not finite; `None` where it would have to be looked for.
    pub(crate) fn known_largest(&self) -> Option<f64> {
        self.largest
    }

    /// One function over all tensors.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<E>(&self, f: impl FnMut(&Tensor) -> std::result::Result<Tensor, E>) -> std::result::Result<Self, E> {
        self.tensors.iter().map(f).collect::<std::result::Result<Vec<_>, E>>().map(Self::from)
    }
}

/// The larger of two numbers that are not negative; NaN if either is.
pub(crate) fn larger(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}

impl Index<usize> for State {
    type Output = Tensor;

    fn index(&self, index: usize) -> &Tensor {
        &self.tensors[index]
    }
}

impl From<Tensor> for State {
    fn from(tensor: Tensor) -> Self {
        Self::from(vec![tensor])
    }
}

impl From<&Tensor> for State {
    fn from(tensor: &Tensor) -> Self {
        Self::from(vec![tensor.clone()])
    }
}

impl From<Vec<Tensor>> for State {
    fn from(tensors: Vec<Tensor>) -> Self {
        Self { tensors, largest: None }
    }
}

impl<const N: usize> From<[Tensor; N]> for State {
    fn from(tensors: [Tensor; N]) -> Self {
        Self::from(Vec::from(tensors))
    }
}

impl From<&State> for State {
    fn from(state: &State) -> Self {
        state.clone()
    }
}
