//! The kernels of [`rows`](crate::field::ops::rows) on tensors in F32 that lie on CUDA, outside any graph. `None` where
//! kernels of ours do not take them.

use super::arguments::{CodedRows, Element};
use super::device::{Gpu, LARGEST, Value, address, dense, runs};
use super::machine::Machine;
use crate::field::ops::combine::Finite;
use crate::field::ops::rows::{Code, Followed, rows};
use candle_core::{DType, Result, Shape, Tensor};

/// Whether kernels take all of them.
fn fits(operands: &[&Tensor]) -> bool {
    let [first, ..] = operands else { return false };
    let same = |x: &Tensor| x.shape() == first.shape() && x.device().same_device(first.device());
    operands.iter().all(|x| runs(x) && x.dtype() == DType::F32 && same(x))
}

/// What codes are written to, with scales, their flag and the largest of each row.
struct Entry {
    codes: Value,
    scales: Value,
    flag: Tensor,
    largest: Tensor,
}

impl Entry {
    fn new(gpu: &Gpu, code: Code, shape: &Shape) -> Result<Self> {
        let (rows, width) = rows(shape);
        let of_codes = (rows, code.columns(width));
        let codes = if code == Code::Half { gpu.output(Element::F16, of_codes) } else { gpu.bytes(of_codes) }?;
        let (scales, flag) = (gpu.output(Element::F32, (rows, 1))?, gpu.zeros(())?);
        Ok(Self { codes, scales, flag, largest: gpu.zeros(rows)? })
    }

    fn written_by(&self, call: CodedRows) -> Result<CodedRows> {
        let (largest, flag) = (address(&self.largest)?, address(&self.flag)?);
        Ok(CodedRows { codes: self.codes.at(), scales: self.scales.at(), largest, flag, ..call })
    }

    fn tensors(self) -> (Tensor, Tensor, Finite) {
        (self.codes.tensor(), self.scales.tensor(), Finite::Device(vec![self.flag]))
    }
}

/// [`Code::encode`].
pub(in crate::field::ops) fn encode_rows(code: Code, x: &Tensor) -> Result<Option<(Tensor, Tensor, Finite)>> {
    if !fits(&[x]) {
        return Ok(None);
    }
    let (gpu, x) = (Gpu::of(x)?, dense(x)?);
    let entry = Entry::new(&gpu, code, x.shape())?;
    let call = entry.written_by(CodedRows::new(code, x.shape()).of(address(&x)?))?;
    // SAFETY: dense tensors of these rows on this device.
    unsafe { call.encode_sum(&gpu)? };
    Ok(Some(entry.tensors()))
}

/// [`Code::follow`].
pub(in crate::field::ops) fn follow_rows(
    code: Code,
    before: &Tensor,
    after: &Tensor,
    left: Option<&Tensor>,
) -> Result<Option<Followed>> {
    let operands: Vec<&Tensor> = [before, after].into_iter().chain(left).collect();
    if !fits(&operands) || operands.iter().any(|x| x.track_op()) {
        return Ok(None);
    }
    let (gpu, shape) = (Gpu::of(before)?, before.shape());
    let (before, after) = (dense(before)?, dense(after)?);
    let left = left.map(dense).transpose()?;
    let entry = Entry::new(&gpu, code, shape)?;
    let (next, residual) = (gpu.output(Element::F32, shape)?, gpu.output(Element::F32, shape)?);
    let from = [address(&before)?, address(&after)?];
    let call = CodedRows::new(code, shape);
    let call = call.following(from, left.as_ref().map(address).transpose()?, [next.at(), residual.at()]);
    let call = entry.written_by(call)?;
    // SAFETY: dense tensors of these rows on this device.
    unsafe { call.encode_sum(&gpu)? };
    let (codes, scales, finite) = entry.tensors();
    let (next, residual) = (next.tensor(), residual.tensor());
    Ok(Some(Followed { codes, scales, finite, next, residual, largest: None }))
}

/// [`Code::decode`] in F32.
pub(in crate::field::ops) fn decode_rows(
    code: Code,
    codes: &Tensor,
    scales: &Tensor,
    shape: &Shape,
) -> Result<Option<Tensor>> {
    let (rows, width) = rows(shape);
    let on_device = runs(scales) && codes.device().same_device(scales.device()) && shape.elem_count() <= LARGEST;
    let wanted = (code.dtype(), rows * code.columns(width), DType::F32, rows);
    if !on_device || (codes.dtype(), codes.elem_count(), scales.dtype(), scales.elem_count()) != wanted {
        return Ok(None);
    }
    let (gpu, codes, scales) = (Gpu::of(scales)?, dense(codes)?, dense(scales)?);
    let values = gpu.output(Element::F32, shape)?;
    let (codes, scales) = (address(&codes)?, address(&scales)?);
    let call = CodedRows { codes, scales, next: values.at(), ..CodedRows::new(code, shape) };
    // SAFETY: dense tensors of these rows on this device.
    unsafe { gpu.launch(&call.decode())? };
    Ok(Some(values.tensor()))
}
