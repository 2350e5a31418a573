//! The kernels of [`combine`](crate::field::ops::combine) on tensors that lie on CUDA, outside any graph. `None` where
//! kernels of ours do not take them.

use super::arguments::{AddRows, Combine, Element, Look, PowerOfTwo, Term};
use super::device::{Gpu, address, dense, runs};
use super::machine::Machine;
use candle_core::{DType, Result, Tensor};

/// base + by · Σ cᵢ xᵢ in `dtype`, where `by` is a number in F32 on the device, and a number that is NaN if an element
/// of the result is not finite and 0 else, where that is wanted.
pub(in crate::field::ops) fn combine(
    base: Option<&Tensor>,
    terms: &[(f64, &Tensor)],
    by: Option<&Tensor>,
    dtype: DType,
    flagged: bool,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let operands: Vec<&Tensor> = base.into_iter().chain(terms.iter().map(|(_, x)| *x)).collect();
    let Some(first) = operands.first() else { return Ok(None) };
    let fits = |x: &&Tensor| runs(x) && x.shape() == first.shape() && x.device().same_device(first.device());
    let Some(element) = Element::of(dtype).filter(|_| terms.len() <= Combine::TERMS && operands.iter().all(fits))
    else {
        return Ok(None);
    };
    let gpu = Gpu::of(first)?;
    let (base, by) = (base.map(dense).transpose()?, by.map(dense).transpose()?);
    let dense_terms = terms.iter().map(|(c, x)| Ok((*c, dense(x)?))).collect::<Result<Vec<_>>>()?;
    let (y, flag) = (gpu.output(element, first.shape())?, flagged.then(|| gpu.zeros(())).transpose()?);
    let at = |x: &Option<Tensor>| x.as_ref().map_or(Ok(0), address);
    let mut all = [Term { x: 0, element: 0, c: 0.0 }; Combine::TERMS];
    for (term, (c, x)) in all.iter_mut().zip(&dense_terms) {
        *term = Term { x: address(x)?, element: number(x), c: *c as f32 };
    }
    let call = Combine {
        terms: all,
        base: at(&base)?,
        by: at(&by)?,
        y: y.at(),
        flag: at(&flag)?,
        count: first.elem_count() as u32,
        length: terms.len() as i32,
        base_element: base.as_ref().map_or(0, number),
        element: element as i32,
    };
    // SAFETY: dense tensors of the same shape on this device; `by` and the flag are numbers in F32.
    unsafe { gpu.launch(&call.launch())? };
    Ok(Some((y.tensor(), flag)))
}

/// A dtype as kernels know it; that of a tensor without kernels is never asked for.
fn number(x: &Tensor) -> i32 {
    Element::of(x.dtype()).unwrap_or(Element::F32) as i32
}

/// sum += c · by · x in place, `sum` in F32; gives a number that is NaN if what was added is not finite.
pub(in crate::field::ops) fn accumulate(
    sum: &Tensor,
    c: f64,
    by: Option<&Tensor>,
    x: &Tensor,
) -> Result<Option<Tensor>> {
    let same = x.shape() == sum.shape() && x.device().same_device(sum.device());
    let fits = sum.dtype() == DType::F32 && sum.is_contiguous() && runs(x) && same;
    let Some(element) = Element::of(x.dtype()).filter(|_| fits) else { return Ok(None) };
    let (gpu, x, by) = (Gpu::of(x)?, dense(x)?, by.map(dense).transpose()?);
    let flag = gpu.zeros(())?;
    let call = AddRows {
        by: by.as_ref().map_or(Ok(0), address)?,
        flag: address(&flag)?,
        factor: c as f32,
        ..AddRows::new(address(&x)?, address(sum)?, (1, x.elem_count() as u32))
    };
    // SAFETY: dense tensors of the same shape on this device; `by` and the flag are numbers in F32.
    unsafe { gpu.launch(&call.launch(element))? };
    Ok(Some(flag))
}

fn look(x: &Tensor, result: &Tensor) -> Result<Look> {
    Ok(Look { x: address(x)?, result: address(result)?, count: x.elem_count() as u32, element: number(x) })
}

/// A number that is NaN if an element is not finite and 0 else.
pub(in crate::field::ops) fn finite(x: &Tensor) -> Result<Option<Tensor>> {
    if !runs(x) {
        return Ok(None);
    }
    let (gpu, x) = (Gpu::of(x)?, dense(x)?);
    let flag = gpu.zeros(())?;
    // SAFETY: a dense tensor on this device, and a number in F32.
    unsafe { gpu.launch(&look(&x, &flag)?.find_non_finite())? };
    Ok(Some(flag))
}

/// max |x| over all tensors as a number in F32; NaN if an element is.
pub(in crate::field::ops) fn max_abs(tensors: &[&Tensor]) -> Result<Option<Tensor>> {
    let Some(first) = tensors.first() else { return Ok(None) };
    if !tensors.iter().all(|x| runs(x) && x.device().same_device(first.device())) {
        return Ok(None);
    }
    let gpu = Gpu::of(first)?;
    let largest = gpu.zeros(())?;
    for x in tensors {
        let x = dense(x)?;
        // SAFETY: a dense tensor on this device, and a number in F32 that is not negative.
        unsafe { gpu.launch(&look(&x, &largest)?.max_abs())? };
    }
    Ok(Some(largest))
}

/// The power of two S with ½ < S · largest ≤ 1, shifted down by the headroom, and 1/S; exponents are those of `range`.
pub(in crate::field::ops) fn power_of_two(
    largest: &Tensor,
    headroom: i32,
    (lowest, highest): (i32, i32),
) -> Result<Option<(Tensor, Tensor)>> {
    if !runs(largest) || largest.dtype() != DType::F32 {
        return Ok(None);
    }
    let gpu = Gpu::of(largest)?;
    let (scale, inverse) = (gpu.output(Element::F32, ())?, gpu.output(Element::F32, ())?);
    let call =
        PowerOfTwo { largest: address(largest)?, scale: scale.at(), inverse: inverse.at(), headroom, lowest, highest };
    // SAFETY: three numbers in F32 on this device.
    unsafe { gpu.launch(&call.launch())? };
    Ok(Some((scale.tensor(), inverse.tensor())))
}
