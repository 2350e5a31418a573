//! Entries of increments on the host: their bytes, and no tensors around them.
//!
//! Tensors of codes and scales take some 500 bytes beside their elements: an eighth of what they are where tiles have
//! 4096 elements in 8 bits.

use super::codec::Entry;
use crate::error::Result;
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use half::{bf16, f16};
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
    /// That of an entry on the host, if its dtypes are among those that [`append`] knows.
    fn of(entry: &Entry) -> Option<Self> {
        let tensors = entry.tensors.iter().map(|x| {
            let known = matches!(x.dtype(), DType::U8 | DType::F16 | DType::BF16 | DType::F32 | DType::F64);
            (known && x.device().is_cpu()).then(|| (x.dtype(), x.shape().clone()))
        });
        Some(Self { tensors: tensors.collect::<Option<_>>()?, shapes: entry.shapes.clone() })
    }
}

impl Image {
    /// The bytes of `entry`; `None` if it is not on the host, or in a dtype that [`append`] does not know. Images of
    /// the same `form` share it.
    pub(crate) fn of(entry: &Entry, form: &mut Option<Arc<Form>>) -> Result<Option<Self>> {
        let Some(own) = Form::of(entry) else { return Ok(None) };
        let form = match form {
            Some(form) if **form == own => form.clone(),
            form => form.insert(Arc::new(own)).clone(),
        };
        let mut bytes = Vec::with_capacity(entry.bytes());
        entry.tensors.iter().try_for_each(|x| append(x, &mut bytes))?;
        Ok(Some(Self { bytes: bytes.into_boxed_slice(), form }))
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

/// Appends the elements of `x` in row-major order.
fn append(x: &Tensor, bytes: &mut Vec<u8>) -> candle_core::Result<()> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let elements = layout.start_offset()..layout.start_offset() + x.elem_count();
    match &*storage {
        Storage::Cpu(CpuStorage::U8(x)) => bytes.extend_from_slice(&x[elements]),
        Storage::Cpu(CpuStorage::F16(x)) => append_each(&x[elements], f16::to_ne_bytes, bytes),
        Storage::Cpu(CpuStorage::BF16(x)) => append_each(&x[elements], bf16::to_ne_bytes, bytes),
        Storage::Cpu(CpuStorage::F32(x)) => append_each(&x[elements], f32::to_ne_bytes, bytes),
        Storage::Cpu(CpuStorage::F64(x)) => append_each(&x[elements], f64::to_ne_bytes, bytes),
        _ => candle_core::bail!("an entry in {:?} does not lie without tensors", x.dtype()),
    }
    Ok(())
}

fn append_each<T: Copy, const N: usize>(x: &[T], of: impl Fn(T) -> [u8; N], bytes: &mut Vec<u8>) {
    let before = bytes.len();
    bytes.resize(before + N * x.len(), 0);
    bytes[before..].as_chunks_mut().0.iter_mut().zip(x).for_each(|(to, x)| *to = of(*x));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::State;

    fn entry(tensors: Vec<Tensor>) -> Entry {
        let state = State::from(Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap());
        Entry::new(tensors, &state)
    }

    fn values(x: &Tensor) -> Vec<f64> {
        x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn an_entry_comes_back_whatever_its_tensors_are_and_wherever_they_begin() {
        let dtypes = [DType::U8, DType::F16, DType::BF16, DType::F32, DType::F64];
        let mut form = None;
        for (first, second) in dtypes.iter().flat_map(|first| dtypes.map(|second| (*first, second))) {
            // Five elements of a byte before others: those begin where none of their kind does.
            let x = Tensor::arange(1f32, 13.0, &Device::Cpu).unwrap().reshape((3, 4)).unwrap();
            let parts =
                [x.narrow(0, 0, 1).unwrap().narrow(1, 1, 3).unwrap(), x.t().unwrap(), x.narrow(1, 1, 2).unwrap()];
            let tensors: Vec<Tensor> = std::iter::once((Tensor::ones(5, DType::F32, &Device::Cpu).unwrap(), first))
                .chain(parts.into_iter().map(|part| (part, second)))
                // A view of what has the dtype already.
                .map(|(x, dtype)| if dtype == DType::F32 { x } else { x.to_dtype(dtype).unwrap() })
                .chain([Tensor::zeros((0, 2), second, &Device::Cpu).unwrap()])
                .collect();
            let entry = entry(tensors);
            let image = Image::of(&entry, &mut form).unwrap().unwrap();
            assert_eq!(image.bytes.len(), entry.bytes());
            let again = image.entry().unwrap();
            assert_eq!(again.shapes, entry.shapes);
            for (again, x) in again.tensors.iter().zip(&entry.tensors) {
                assert_eq!((again.dtype(), again.dims(), values(again)), (x.dtype(), x.dims(), values(x)));
            }
        }
    }

    #[test]
    fn images_of_one_form_share_it() {
        let of = |rows, form: &mut _| {
            let codes = Tensor::zeros((rows, 3), DType::U8, &Device::Cpu).unwrap();
            Image::of(&entry(vec![codes]), form).unwrap().unwrap()
        };
        let mut form = None;
        let (first, second, other) = (of(2, &mut form), of(2, &mut form), of(4, &mut form));
        assert!(Arc::ptr_eq(&first.form, &second.form) && !Arc::ptr_eq(&first.form, &other.form));
        assert_eq!(
            (first.entry().unwrap().tensors[0].dims(), other.entry().unwrap().tensors[0].dims()),
            (&[2, 3][..], &[4, 3][..])
        );
        // Words are left in tensors.
        let words = Tensor::zeros(3, DType::U32, &Device::Cpu).unwrap();
        assert!(Image::of(&entry(vec![words]), &mut form).unwrap().is_none());
    }
}
