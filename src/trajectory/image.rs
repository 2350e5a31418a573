//! Entries of increments on the host: their bytes, and no tensors around them.
//!
//! Tensors of codes and scales take some 500 bytes beside their elements: an eighth of what they are where tiles have
//! 4096 elements in 8 bits.

use super::codec::Entry;
use crate::error::Result;
use candle_core::{DType, Device, Shape, Tensor};
use std::sync::Arc;

/// The bytes of an entry.
#[derive(Debug)]
pub(crate) struct Image {
    bytes: Box<[u8]>,
    form: Arc<Form>,
}

/// What the tensors of an entry are, and those that were encoded.
#[derive(Debug, PartialEq)]
pub(crate) struct Form {
    tensors: Vec<(DType, Shape)>,
    shapes: Vec<Shape>,
}

impl Form {
    /// That of an entry on the host, if its dtypes are made of bytes.
    fn of(entry: &Entry) -> Option<Self> {
        let in_bytes = |dtype| !matches!(dtype, DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0);
        let tensors = entry.tensors.iter().map(|x| (x.device().is_cpu() && in_bytes(x.dtype())).then_some(x));
        let tensors = tensors.map(|x| x.map(|x| (x.dtype(), x.shape().clone()))).collect::<Option<_>>()?;
        Some(Self { tensors, shapes: entry.shapes.clone() })
    }
}

impl Image {
    /// The bytes of `entry`; `None` if it is not on the host. Images of the same `form` share it.
    pub(crate) fn of(entry: &Entry, form: &mut Option<Arc<Form>>) -> Option<Self> {
        let own = Form::of(entry)?;
        let form = match form {
            Some(form) if **form == own => form.clone(),
            form => form.insert(Arc::new(own)).clone(),
        };
        let mut bytes = Vec::with_capacity(entry.bytes());
        entry.tensors.iter().for_each(|x| bytes.extend_from_slice(&safetensors::View::data(&x)));
        Some(Self { bytes: bytes.into_boxed_slice(), form })
    }

    /// The entry again.
    pub(crate) fn entry(&self) -> Result<Entry> {
        let mut from = 0;
        let tensors = self.form.tensors.iter().map(|(dtype, shape)| {
            let to = from + shape.elem_count() * dtype.size_in_bytes();
            let bytes = &self.bytes[std::mem::replace(&mut from, to)..to];
            Tensor::from_raw_buffer(bytes, *dtype, shape.dims(), &Device::Cpu)
        });
        Ok(Entry { tensors: tensors.collect::<candle_core::Result<_>>()?, shapes: self.form.shapes.clone() })
    }
}
