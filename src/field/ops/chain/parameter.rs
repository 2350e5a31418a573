//! Parameters of layers inside a solve: what stands for them, and what they add to dL/dθ.

use crate::field::ops::cpu::Element;
use crate::field::session::{Buffered, Call, Current, Matrix, Session};
use crate::field::sink;
use candle_core::{DType, Result, Tensor, WithDType, bail};

/// Runs `$body` with `$element` standing for the Rust type of a dtype that parameters of chains have.
macro_rules! with_float {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F16 => {
                type $element = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $element = half::bf16;
                $body
            }
            _ => {
                type $element = f32;
                $body
            }
        }
    };
}
pub(super) use with_float;

/// A tensor that stands for a parameter of the open field.
#[derive(Clone, Debug)]
pub(in crate::field::ops) struct Parameter {
    pub(in crate::field::ops) leaf: Tensor,
    pub(in crate::field::ops) slot: usize,
}

impl Parameter {
    /// Weight and bias of a layer on `x`, if kernels of ours can reach them, as [`reached`](Self::reached), and have
    /// dtypes that fit: the weight that of x, the bias that or F32.
    pub(in crate::field::ops) fn of_layer(
        current: &Current,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Option<(Self, Option<Self>)> {
        if weight.dtype() != x.dtype() {
            return None;
        }
        let outputs = *weight.dims().first()?;
        let weight = Self::reached(current, x, weight)?;
        match bias {
            Some(bias) => Some((weight, Some(Self::of_features(current, x, bias, outputs)?))),
            None => Some((weight, None)),
        }
    }

    /// One number for each of so many features, in the dtype of x or F32, if kernels of ours can reach it.
    pub(in crate::field::ops) fn of_features(
        current: &Current,
        x: &Tensor,
        leaf: &Tensor,
        features: usize,
    ) -> Option<Self> {
        let fits = leaf.dims() == [features] && (leaf.dtype() == DType::F32 || leaf.dtype() == x.dtype());
        Self::reached(current, x, leaf).filter(|_| fits)
    }

    /// What stands for a parameter, if what Candle would have to track to reach it is tracked through x.
    fn reached(current: &Current, x: &Tensor, leaf: &Tensor) -> Option<Self> {
        let is_seen = current.call != Call::Graph || x.track_op() || !leaf.track_op();
        let slot = current.session.slot(leaf).filter(|_| is_seen)?;
        Some(Self { leaf: leaf.clone(), slot })
    }

    /// Whether its gradient is wanted.
    pub(in crate::field::ops) fn is_tracked(&self) -> bool {
        self.leaf.track_op()
    }

    /// Lets `with` see the elements, each of which the function gives in F32.
    pub(in crate::field::ops) fn with_floats<R>(&self, with: impl FnOnce(&dyn Fn(usize) -> f32) -> R) -> Result<R> {
        let leaf = self.leaf.contiguous()?;
        with_float!(leaf.dtype(), T => with_elements::<T, _>(&leaf, |x| Ok(with(&|n| float(x[n])))))
    }

    /// Its elements in F32.
    pub(in crate::field::ops) fn in_f32(&self, session: &Session) -> Result<Matrix<f32>> {
        let leaf = self.leaf.contiguous()?;
        let mut floats = f32::spare(session).matrix(1, leaf.elem_count());
        with_float!(leaf.dtype(), T => with_elements(&leaf, |x| {
            T::widen(x, &mut floats);
            Ok(())
        }))?;
        Ok(floats)
    }

    /// Adds to its sum of dL/dθ.
    pub(in crate::field::ops) fn add(&self, gradient: &[f32]) -> Result<()> {
        sink::add_in_place(&self.leaf, |sum| sum.iter_mut().zip(gradient).for_each(|(sum, gradient)| *sum += gradient))
    }
}

/// Exactly, whatever the dtype.
pub(super) fn float(x: impl Into<f32>) -> f32 {
    x.into()
}

/// Lets `with` see the elements of a contiguous tensor on the CPU.
pub(crate) fn with_elements<T: WithDType, R>(x: &Tensor, with: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (candle_core::Storage::Cpu(storage), Some((from, to))) => with(&storage.as_slice::<T>()?[from..to]),
        _ => bail!("kernels of layers take contiguous tensors on the CPU"),
    }
}
