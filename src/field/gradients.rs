//! The sums of dL/dθ of one backward pass, in the accumulate dtype.

use super::ops::combine::{self, Finite};
use crate::account::{Category, Owned};
use crate::scaling::Scale;
use candle_core::{DType, Tensor, TensorId};
use foldhash::HashMap;

/// The sums of dL/dθ (and dL/d(input)) of one backward pass, by slot, in the accumulate dtype.
#[derive(Debug, Default)]
pub struct Gradients {
    sums: Vec<Option<Sum>>,
    slots: HashMap<TensorId, usize>,
    wide: bool,
    scale: Scale,
    finite: Finite,
    ignored: bool,
}

#[derive(Debug)]
struct Sum {
    tensor: Tensor,
    _owned: Owned,
}

impl Sum {
    /// The sum in `place`; zeros like `like`, if there is none yet.
    fn of<'a>(place: &'a mut Option<Self>, like: &Tensor, wide: bool) -> candle_core::Result<&'a mut Self> {
        match place {
            Some(sum) => Ok(sum),
            empty => {
                let dtype = if wide { DType::F64 } else { DType::F32 };
                let tensor = Tensor::zeros(like.shape(), dtype, like.device())?;
                let bytes = tensor.elem_count() * dtype.size_in_bytes();
                Ok(empty.insert(Self { tensor, _owned: Owned::new(Category::Gradients, bytes) }))
            }
        }
    }
}

impl Gradients {
    /// No sums yet, for `slots` parameters and inputs.
    pub(crate) fn new(slots: usize, accumulate: DType) -> Self {
        let sums = std::iter::repeat_with(|| None).take(slots).collect();
        Self { sums, wide: accumulate == DType::F64, ..Self::default() }
    }

    /// From here on, these leaves stand for the slots.
    pub(crate) fn bind(&mut self, leaves: &[Tensor]) {
        self.slots = leaves.iter().enumerate().map(|(slot, leaf)| (leaf.id(), slot)).collect();
    }

    /// From here on, what is added carries this scale: [`add_leaf`](Self::add_leaf) divides by it.
    pub fn set_scale(&mut self, scale: &Scale) {
        self.scale = scale.clone();
    }

    /// Adds gradient/S to the sum of the parameter or input that `leaf` stands for
    /// ([`VectorField::leaves`](crate::VectorField::leaves)); says whether it stands for one.
    ///
    /// # Errors
    /// Another shape than the leaf's; whatever the device reports.
    pub fn add_leaf(&mut self, leaf: &Tensor, gradient: &Tensor) -> candle_core::Result<bool> {
        match self.slots.get(&leaf.id()) {
            None => Ok(false),
            Some(&slot) => self.add(slot, gradient).map(|()| true),
        }
    }

    /// Adds gradient/S to the sum of a slot; notes whether it is finite.
    pub(crate) fn add(&mut self, slot: usize, gradient: &Tensor) -> candle_core::Result<()> {
        if self.ignored {
            return Ok(());
        }
        let sum = Sum::of(&mut self.sums[slot], gradient, self.wide)?;
        let finite = match &self.scale {
            Scale::Host(s) => combine::accumulate(&mut sum.tensor, 1.0 / s, gradient)?,
            Scale::Device { inverse, .. } => combine::accumulate_by(&mut sum.tensor, inverse, gradient)?,
        };
        self.finite = std::mem::take(&mut self.finite).and(finite);
        Ok(())
    }

    /// Whether what is added is summed, and not left out.
    pub(crate) fn sums(&self) -> bool {
        !self.ignored
    }

    /// Lets `contribute` add to the sum of the parameter that `leaf` stands for, without the scale, if anything
    /// [is summed](Self::sums). Sums in F64 are given what it adds to zeros in F32.
    pub(crate) fn add_in_place(
        &mut self,
        leaf: &Tensor,
        contribute: impl FnOnce(&mut [f32]),
    ) -> candle_core::Result<()> {
        let Some(&slot) = self.slots.get(&leaf.id()) else {
            candle_core::bail!("a layer's parameter is not the field's")
        };
        if self.ignored {
            return Ok(());
        }
        if self.wide {
            let _owned = Owned::new(Category::Scratch, leaf.elem_count() * size_of::<f32>());
            let mut part = vec![0.0; leaf.elem_count()];
            contribute(&mut part);
            let scale = std::mem::take(&mut self.scale);
            let added = self.add(slot, &Tensor::from_vec(part, leaf.shape(), leaf.device())?);
            self.scale = scale;
            return added;
        }
        let sum = Sum::of(&mut self.sums[slot], leaf, false)?;
        combine::in_place(&sum.tensor, contribute)
    }

    /// The sum, in F32, of the parameter that `leaf` stands for, and whether it is a part that has to be added yet:
    /// sums in F64 are given what was added to zeros in F32. `None` if what is added is not wanted.
    #[cfg(feature = "cuda")]
    pub(crate) fn sum_of(&mut self, leaf: &Tensor) -> candle_core::Result<Option<(Tensor, bool)>> {
        let Some(&slot) = self.slots.get(&leaf.id()) else {
            candle_core::bail!("a layer's parameter is not the field's")
        };
        if self.ignored {
            return Ok(None);
        }
        if self.wide {
            return Tensor::zeros(leaf.shape(), DType::F32, leaf.device()).map(|part| Some((part, true)));
        }
        Sum::of(&mut self.sums[slot], leaf, false).map(|sum| Some((sum.tensor.clone(), false)))
    }

    /// Adds to the sum of the parameter that `leaf` stands for, without the scale.
    #[cfg(feature = "cuda")]
    pub(crate) fn add_unscaled(&mut self, leaf: &Tensor, part: &Tensor) -> candle_core::Result<()> {
        let scale = std::mem::take(&mut self.scale);
        let added = self.add_leaf(leaf, part);
        self.scale = scale;
        added.map(drop)
    }

    /// Notes whether something that was added is finite.
    pub(crate) fn note(&mut self, finite: Finite) {
        self.finite = std::mem::take(&mut self.finite).and(finite);
    }

    /// What carries the scale now.
    pub(crate) fn scale(&self) -> &Scale {
        &self.scale
    }

    /// Whether what is added from here on is wanted at all.
    pub(crate) fn ignore(&mut self, ignored: bool) {
        self.ignored = ignored;
    }

    /// Adds another set of sums to this one.
    pub(crate) fn absorb(&mut self, other: Self) -> candle_core::Result<()> {
        self.set_scale(&Scale::default());
        for (slot, sum) in other.sums.into_iter().enumerate() {
            if let Some(sum) = sum {
                self.add(slot, &sum.tensor)?;
            }
        }
        Ok(())
    }

    /// Whether all that was added since the last call is finite: part of [`Pulled::finite`](crate::field::Pulled).
    pub fn take_finite(&mut self) -> Finite {
        std::mem::take(&mut self.finite)
    }

    /// Bytes of the sums.
    pub(crate) fn bytes(&self) -> usize {
        self.sums.iter().flatten().map(|sum| sum._owned.bytes()).sum()
    }

    /// The sums, by slot; `None` where nothing was added.
    pub(crate) fn into_sums(self) -> Vec<Option<Tensor>> {
        self.sums.into_iter().map(|sum| sum.map(|sum| sum.tensor)).collect()
    }
}
