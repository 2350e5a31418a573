//! Parameters: masters in the caller's dtype, casts made once per solve, gradient sums in the accumulate dtype.

use super::ops::combine::{self, Finite};
use super::session::{PackedWeights, Session};
use crate::account::{Category, Owned};
use crate::error::{OdeError, Result};
use crate::precision::largest_finite;
use candle_core::{DType, Device, Tensor, TensorId};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

/// One parameter of a model.
#[derive(Clone, Debug)]
pub(crate) struct Param {
    pub(crate) name: String,
    /// The caller's tensor: a variable of the `VarMap`, or a plain tensor of an inference field.
    pub(crate) master: Tensor,
    pub(crate) frozen: bool,
    pub(crate) keep_f32: bool,
    _owned: Arc<Owned>,
}

/// The masters of the fields that are alive.
static MASTERS: LazyLock<Mutex<HashMap<TensorId, Weak<Owned>>>> = LazyLock::new(Mutex::default);

/// Announces a master, unless another field has.
fn announced(master: &Tensor) -> Arc<Owned> {
    let mut masters = MASTERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(owned) = masters.get(&master.id()).and_then(Weak::upgrade) {
        return owned;
    }
    masters.retain(|_, owned| owned.strong_count() > 0);
    let owned = Arc::new(Owned::new(Category::Parameters, held_bytes(master)));
    masters.insert(master.id(), Arc::downgrade(&owned));
    owned
}

fn held_bytes(x: &Tensor) -> usize {
    x.elem_count() * x.dtype().size_in_bytes()
}

/// The parameters of a field, by name.
#[derive(Clone, Debug, Default)]
pub struct Params(pub(crate) Vec<Param>);

impl Params {
    /// Parameters of a field of one's own: names and masters. The order is that of the slots.
    pub fn new(named: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        let param = |(name, master)| {
            let _owned = announced(&master);
            Param { name, master, frozen: false, keep_f32: false, _owned }
        };
        Self(named.into_iter().map(param).collect())
    }

    /// Names, in the order of the slots (sorted for a [`ModelField`](crate::ModelField)).
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|param| param.name.as_str())
    }

    /// How many parameters.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of the masters.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|param| held_bytes(&param.master)).sum()
    }

    /// Masters and `inputs` in `compute`: once per solve. Parameters marked so stay in F32.
    ///
    /// # Errors
    /// A NaN or infinite value, an integer input, or another device than `device`.
    pub fn cast(&self, inputs: &[Tensor], compute: DType, device: &Device) -> Result<Casts> {
        let _span = tracing::trace_span!(target: "candle_ode", "cast").entered();
        let mut casts = Casts::empty(compute, device);
        let mut checks = vec![];
        let mut bytes = 0;
        for source in self.sources(inputs) {
            source.check_device(device)?;
            let dtype = source.dtype(compute)?;
            let leaf = if source.tensor.dtype() == dtype && source.tensor.is_variable() {
                source.tensor.clone()
            } else if source.tensor.dtype() == dtype && !source.trainable {
                source.tensor.detach()
            } else {
                casts.count += usize::from(source.tensor.dtype() != dtype);
                bytes += source.tensor.elem_count() * dtype.size_in_bytes();
                combine::leaf(source.tensor, dtype)?
            };
            let leaf = if source.trainable { leaf } else { leaf.detach() };
            checks.push(if dtype.is_float() { combine::finite(&leaf)? } else { Finite::default() });
            casts.push(source, leaf);
        }
        for (n, finite) in Finite::read(&checks)?.into_iter().enumerate() {
            if !finite {
                let (name, dtype) = (casts.names[n].clone(), casts.leaves[n].dtype());
                let (index, value) = first_non_finite(&casts.leaves[n])?;
                let source = self.sources(inputs).nth(n).map_or(Ok(value), |source| at(source.tensor, index))?;
                return Err(match source.is_finite() {
                    true => {
                        OdeError::CastOverflow { name, index, value: source, dtype, largest: largest_finite(dtype) }
                    }
                    false => OdeError::NonFiniteParameter { name, index, value },
                });
            }
        }
        casts.owned = (bytes > 0).then(|| Arc::new(Owned::new(Category::Casts, bytes)));
        Ok(casts)
    }

    /// As [`cast`](Self::cast), but tracked by Candle all the way to the masters and inputs.
    pub(crate) fn cast_tracked(&self, inputs: &[Tensor], compute: DType, device: &Device) -> Result<Casts> {
        let mut casts = Casts::empty(compute, device);
        for source in self.sources(inputs) {
            source.check_device(device)?;
            let tensor = if source.trainable { source.tensor.clone() } else { source.tensor.detach() };
            let dtype = source.dtype(compute)?;
            casts.push(source, tensor.to_dtype(dtype)?);
        }
        Ok(casts)
    }

    /// Parameters, then inputs: the order of slots everywhere.
    fn sources<'a>(&'a self, inputs: &'a [Tensor]) -> impl Iterator<Item = Source<'a>> {
        let params = self.0.iter().map(|param| Source {
            name: param.name.clone(),
            tensor: &param.master,
            trainable: !param.frozen && param.master.track_op() && param.master.dtype().is_float(),
            keep_f32: param.keep_f32,
            is_input: false,
        });
        let inputs = inputs.iter().enumerate().map(|(n, tensor)| Source {
            name: format!("input {n}"),
            tensor,
            trainable: tensor.track_op(),
            keep_f32: false,
            is_input: true,
        });
        params.chain(inputs)
    }

    /// What a solve is differentiated with respect to, by slot; `None` for what is frozen or untracked.
    pub(crate) fn trainable(&self, inputs: &[Tensor]) -> Vec<Option<Tensor>> {
        self.sources(inputs).map(|source| source.trainable.then(|| source.tensor.clone())).collect()
    }
}

struct Source<'a> {
    name: String,
    tensor: &'a Tensor,
    trainable: bool,
    keep_f32: bool,
    is_input: bool,
}

impl Source<'_> {
    /// Integer parameters stay what they are; integer inputs are refused.
    fn dtype(&self, compute: DType) -> Result<DType> {
        let own = self.tensor.dtype();
        match (own.is_float(), self.is_input) {
            (true, _) if self.keep_f32 => Ok(if compute == DType::F64 { DType::F64 } else { DType::F32 }),
            (true, _) => Ok(compute),
            (false, false) => Ok(own),
            (false, true) => Err(OdeError::UnsupportedDType {
                what: self.name.clone(),
                dtype: own,
                hint: "inputs of a solve are differentiable: give floats, and capture integer tensors in the closure",
            }),
        }
    }

    fn check_device(&self, device: &Device) -> Result<()> {
        if self.tensor.device().same_device(device) {
            return Ok(());
        }
        let what = if self.is_input { self.name.clone() } else { format!("parameter `{}`", self.name) };
        Err(OdeError::DeviceMismatch { what, expected: device.location(), found: self.tensor.device().location() })
    }
}

/// All elements in F64, on the host: not every device has F64.
pub(crate) fn on_host(x: &Tensor) -> candle_core::Result<Tensor> {
    x.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()
}

/// The first NaN or infinity of a tensor, as (flat index, value).
pub(crate) fn first_non_finite(x: &Tensor) -> Result<(usize, f64)> {
    let values = on_host(x)?.to_vec1::<f64>()?;
    let found = values.iter().position(|v| !v.is_finite());
    Ok(found.map_or((0, 0.0), |index| (index, values[index])))
}

/// The element at a flat, row-major index.
fn at(x: &Tensor, index: usize) -> Result<f64> {
    Ok(on_host(&x.flatten_all()?.narrow(0, index, 1)?)?.to_vec1::<f64>()?[0])
}

/// Parameters and inputs in the compute dtype, shared by the forward and the backward pass of one solve.
#[derive(Clone, Debug)]
pub struct Casts {
    dtype: DType,
    names: Vec<String>,
    leaves: Vec<Tensor>,
    device: Device,
    params: usize,
    count: usize,
    owned: Option<Arc<Owned>>,
    packed: Arc<PackedWeights>,
    /// Those of the passes that linearise at this moment.
    packed_back: Arc<Mutex<Weak<PackedWeights>>>,
}

impl Casts {
    fn empty(dtype: DType, device: &Device) -> Self {
        let device = device.clone();
        Self {
            dtype,
            names: vec![],
            leaves: vec![],
            device,
            params: 0,
            count: 0,
            owned: None,
            packed: Arc::default(),
            packed_back: Arc::default(),
        }
    }

    fn push(&mut self, source: Source<'_>, leaf: Tensor) {
        self.params += usize::from(!source.is_input);
        self.names.push(source.name);
        self.leaves.push(leaf);
    }

    /// The dtype the vector field runs in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device they are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many tensors changed their dtype.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of the casts we own.
    pub fn bytes(&self) -> usize {
        self.owned.as_ref().map_or(0, |owned| owned.bytes())
    }

    /// One tensor per slot: parameters in the order of their names, then inputs.
    pub fn leaves(&self) -> &[Tensor] {
        &self.leaves
    }

    /// The inputs alone.
    pub fn inputs(&self) -> &[Tensor] {
        &self.leaves[self.params..]
    }

    /// Names by slot.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// What the layers of a field opened over these tensors share.
    pub(super) fn session(&self, linearises: bool) -> Arc<Session> {
        // What is linearised sees the parameters as they are now: a backward pass packs them anew.
        let packed = match linearises {
            false => self.packed.clone(),
            true => self.pack_once(),
        };
        Session::new(&self.leaves, packed, linearises)
    }

    /// As long as the answer lives, passes that linearise share what they pack.
    pub(crate) fn pack_once(&self) -> Arc<PackedWeights> {
        let mut back = self.packed_back.lock().unwrap_or_else(PoisonError::into_inner);
        back.upgrade().unwrap_or_else(|| {
            let fresh = Arc::default();
            *back = Arc::downgrade(&fresh);
            fresh
        })
    }

    /// Bytes of the weights that the passes which linearise at this moment have packed.
    pub(crate) fn packed_back(&self) -> usize {
        let back = self.packed_back.lock().unwrap_or_else(PoisonError::into_inner);
        back.upgrade().map_or(0, |packed| packed.bytes())
    }

    /// The same values, untracked: what a forward pass runs on.
    pub(crate) fn detached(&self) -> Self {
        Self { leaves: self.leaves.iter().map(Tensor::detach).collect(), ..self.clone() }
    }

    /// Other values, in `dtype`: those that are not the same tensors are scratch.
    pub(crate) fn in_dtype(
        &self,
        dtype: DType,
        f: impl FnMut(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Self> {
        let leaves = self.leaves.iter().map(f).collect::<candle_core::Result<Vec<_>>>()?;
        let made = leaves.iter().zip(&self.leaves).filter(|(made, leaf)| made.id() != leaf.id());
        let bytes = made.map(|(made, _)| held_bytes(made)).sum();
        let owned = Some(Arc::new(Owned::new(Category::Scratch, bytes)));
        Ok(Self { dtype, leaves, packed: Arc::default(), owned, ..self.clone() })
    }

    /// The same values in storages of their own, as variables: writing to them harms nobody.
    pub(crate) fn copied(&self) -> Result<Self> {
        Ok(self.in_dtype(self.dtype, |leaf| combine::leaf(leaf, leaf.dtype()))?)
    }

    /// A `VarBuilder` that hands out the parameters.
    pub(crate) fn var_builder(&self) -> VarBuilder<'static> {
        let by_name = self.names.iter().cloned().zip(self.leaves.iter().cloned()).take(self.params).collect();
        VarBuilder::from_backend(Box::new(ByName(by_name)), self.dtype, self.device.clone())
    }
}

/// Tensors by name, as a backend of Candle's `VarBuilder`.
struct ByName(HashMap<String, Tensor>);

impl SimpleBackend for ByName {
    fn get(
        &self,
        shape: candle_core::Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            candle_core::bail!("parameter `{name}` has shape {:?}, the model asks for {shape:?}", tensor.shape())
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        match self.0.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => candle_core::bail!(
                "the model asks for parameter `{name}`, which it did not ask for when the field was made"
            ),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}
