//! A tile through the layers of a chain, and back.

use super::compute::{Compute, Input};
use super::{Link, Parameter, with_elements};
use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::kernel::{
    Epilogue, Held, Packed, Rounding, Then, View, ViewMut, add_column_sums, add_outer, multiply,
};
use crate::field::session::{Matrix, Session, Shared, Side, Tile};
use crate::field::sink;
use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

/// What a tile's pullback needs of its way forward.
pub(super) struct Saved<T> {
    /// The results of all layers but the last.
    hidden: Vec<Matrix<T>>,
    /// By layer, what was activated, where f′ is a function of that.
    inputs: Vec<Option<Matrix<T>>>,
}

impl<T> Default for Saved<T> {
    fn default() -> Self {
        Self { hidden: vec![], inputs: vec![] }
    }
}

/// The value of the chain at x; what the pullback needs goes to `saved`.
pub(super) fn value<C: Compute>(
    session: &Session,
    links: &[Link],
    x: &[C::Stored],
    mut saved: Option<&mut Saved<C::Held>>,
) -> Result<Vec<C::Stored>> {
    let rows = x.len() / links[0].inputs;
    let spare = C::Held::spare(session);
    let mut input = C::held(session, x, rows);
    let mut hidden: Vec<Matrix<C::Held>> = vec![];
    let (last, before) = (&links[links.len() - 1], &links[..links.len() - 1]);
    for link in before {
        let mut out = spare.matrix(rows, link.outputs()?);
        let kept = link.value(session, hidden.last().map_or(input.view(), Matrix::view), &mut out, saved.is_some())?;
        match &mut saved {
            Some(saved) => {
                saved.inputs.push(kept);
                hidden.push(out);
            }
            // Nobody looks back: the layer before the last is done with.
            None => {
                hidden.clear();
                hidden.push(out);
            }
        }
        if saved.is_none() && matches!(input, Input::Here(_)) {
            input = Input::There(View::new(&[], 0, 0, 0));
        }
    }
    let from = hidden.last().map_or(input.view(), Matrix::view);
    let (mut kept, outputs) = (Ok(None), last.outputs()?);
    let is_saving = saved.is_some();
    let stored = C::stored(session, rows, outputs, |out| kept = last.value(session, from, out, is_saving));
    let kept = kept?;
    if let Some(saved) = saved {
        saved.inputs.push(kept);
        saved.hidden = hidden;
    }
    Ok(stored)
}

/// Adds dL/dW and dL/db of every layer to the open sums, and gives dL/dx.
pub(super) fn pull<C: Compute>(
    session: &Session,
    links: &[Link],
    saved: &Saved<C::Held>,
    x: &Tensor,
    value: &Tensor,
    grad: &Tensor,
) -> Result<Option<Tensor>> {
    let rows = x.elem_count() / links[0].inputs;
    let scale = sink::scale()?;
    let dx = with_elements::<C::Stored, _>(x, |x| {
        with_elements::<C::Stored, _>(value, |value| {
            with_elements::<C::Stored, _>(grad, |grad| {
                let (x, value) = (C::held(session, x, rows), C::held(session, value, rows));
                let g = seed::<C>(session, links, saved, value.view(), grad, scale)?;
                back::<C>(session, links, saved, x.view(), g, scale)
            })
        })
    })?;
    Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
}

/// The cotangent of the last product: grad/S, through the last activation.
fn seed<C: Compute>(
    session: &Session,
    links: &[Link],
    saved: &Saved<C::Held>,
    value: View<'_, C::Held>,
    grad: &[C::Stored],
    scale: f64,
) -> Result<Matrix<C::Held>> {
    let (rows, columns) = (value.rows(), value.columns());
    let mut g = C::Held::spare(session).matrix(rows, columns);
    let inverse = (1.0 / scale) as f32;
    for (g, grad) in g.iter_mut().zip(grad) {
        *g = C::Held::of((*grad).into() * inverse);
    }
    let n = links.len() - 1;
    if let Some(kept) = kept(links, saved, n, value) {
        let mut slopes = f32::spare(session).matrix(1, columns);
        for (row, g) in g.chunks_exact_mut(columns).enumerate() {
            for (slope, kept) in slopes.iter_mut().zip(kept.row(row)) {
                *slope = kept.wide();
            }
            links[n].then.slope_in_place(&mut slopes);
            for (g, slope) in g.iter_mut().zip(slopes.iter()) {
                *g = C::Held::of(g.wide() * slope);
            }
        }
    }
    Ok(g)
}

/// From the cotangent `g` of the last product, which is not scaled, to that of x, which is.
fn back<C: Compute>(
    session: &Session,
    links: &[Link],
    saved: &Saved<C::Held>,
    x: View<'_, C::Held>,
    mut g: Matrix<C::Held>,
    scale: f64,
) -> Result<Vec<C::Stored>> {
    let spare = C::Held::spare(session);
    let rows = x.rows();
    for (n, link) in links.iter().enumerate().skip(1).rev() {
        let input = saved.hidden[n - 1].view();
        link.add_gradients(session, g.view(), input)?;
        let mut out = spare.matrix(rows, link.inputs);
        let before = &links[n - 1];
        let then = match kept(links, saved, n - 1, input) {
            Some(kept) => Then::TimesSlope(before.then, kept),
            None => Then::Nothing,
        };
        let packed = link.packed::<C::Held>(session, Side::Backward)?;
        multiply(g.view(), &packed, &Epilogue { bias: None, then, rounding: Rounding::None }, whole(&mut out, rows));
        g = out;
    }
    let first = &links[0];
    first.add_gradients(session, g.view(), x)?;
    let packed = first.packed::<C::Held>(session, Side::Backward)?;
    Ok(C::stored(session, rows, first.inputs, |out| {
        multiply(g.view(), &packed, &Epilogue::default(), whole(out, rows));
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x = C::Held::of(x.wide() * scale as f32));
        }
    }))
}

/// What f′ of layer `n` is a function of, given the layer's result.
fn kept<'a, T: Tile>(links: &[Link], saved: &'a Saved<T>, n: usize, result: View<'a, T>) -> Option<View<'a, T>> {
    match links[n].then.keeps() {
        Keeps::Nothing => None,
        Keeps::Value => Some(result),
        Keeps::Input => saved.inputs[n].as_ref().map(Matrix::view),
    }
}

fn whole<T>(values: &mut [T], rows: usize) -> ViewMut<'_, T> {
    let columns = values.len() / rows.max(1);
    ViewMut::new(values, rows, columns, columns)
}

impl Link {
    fn outputs(&self) -> Result<usize> {
        self.weight.leaf.dim(0)
    }

    /// f(x W[:, ..inputs]ᵀ + b + t w), and what was activated if the pullback will ask for it.
    fn value<T: Tile>(
        &self,
        session: &Session,
        x: View<'_, T>,
        out: &mut [T],
        saving: bool,
    ) -> Result<Option<Matrix<T>>> {
        let packed = self.packed::<T>(session, Side::Forward)?;
        let bias = self.bias_in_f32(session)?;
        let bias = bias.as_deref();
        let rows = x.rows();
        // A value is the same to the bit, saved or not.
        if self.then.keeps() != Keeps::Input {
            let then = match self.then {
                Activation::Identity => Then::Nothing,
                activation => Then::Activation(activation),
            };
            multiply(x, &packed, &Epilogue { bias, then, rounding: Rounding::None }, whole(out, rows));
            return Ok(None);
        }
        let mut z = T::spare(session).matrix(rows, self.outputs()?);
        let then = Then::Nothing;
        multiply(x, &packed, &Epilogue { bias, then, rounding: Rounding::None }, whole(&mut z, rows));
        let mut row = f32::spare(session).matrix(1, self.outputs()?);
        for (z, out) in z.chunks_exact(row.len()).zip(out.chunks_exact_mut(row.len())) {
            row.iter_mut().zip(z).for_each(|(row, z)| *row = z.wide());
            self.then.value_in_place(&mut row);
            out.iter_mut().zip(row.iter()).for_each(|(out, row)| *out = T::of(*row));
        }
        Ok(saving.then_some(z))
    }

    /// dW += gᵀ x and db += Σ g, for those of the two that are tracked.
    fn add_gradients<T: Tile>(&self, session: &Session, g: View<'_, T>, x: View<'_, T>) -> Result<()> {
        let tracked = |parameter: &&Parameter| parameter.leaf.track_op();
        let (weight, bias) = (Some(&self.weight).filter(tracked), self.bias.as_ref().filter(tracked));
        if weight.is_none() && bias.is_none() {
            return Ok(());
        }
        let mut sums = f32::spare(session).matrix(1, g.columns());
        sums.fill(0.0);
        add_column_sums(g, &mut sums);
        // A cotangent that is not finite shows in its sums.
        sink::note(sums.iter().all(|sum| sum.is_finite()));
        if let Some(weight) = weight {
            let (rows, columns) = weight.leaf.dims2()?;
            sink::add_in_place(&weight.leaf, |dw| {
                T::spare(session).with_scratch(|scratch| {
                    add_outer(g, x, ViewMut::new(dw, rows, self.inputs, columns), scratch);
                });
                if let Some(t) = self.beyond {
                    let beyond = dw.iter_mut().skip(self.inputs).step_by(columns);
                    beyond.zip(sums.iter()).for_each(|(dw, sum)| *dw += t as f32 * sum);
                }
            })?;
        }
        match bias {
            Some(bias) => {
                sink::add_in_place(&bias.leaf, |db| db.iter_mut().zip(sums.iter()).for_each(|(db, sum)| *db += sum))
            }
            None => Ok(()),
        }
    }

    /// W as the right-hand operand of the products on one side.
    fn packed<T: Tile>(&self, session: &Session, side: Side) -> Result<Arc<Shared<T>>> {
        let Parameter { leaf, slot } = &self.weight;
        let leaf = leaf.detach().contiguous()?;
        Ok(match leaf.dtype() {
            DType::F16 => with_elements(&leaf, |w| Ok(self.pack::<T, half::f16>(session, *slot, side, w)))?,
            DType::BF16 => with_elements(&leaf, |w| Ok(self.pack::<T, half::bf16>(session, *slot, side, w)))?,
            _ => with_elements(&leaf, |w| Ok(self.pack::<T, f32>(session, *slot, side, w)))?,
        })
    }

    fn pack<T: Tile, S: Copy + Into<f32>>(
        &self,
        session: &Session,
        slot: usize,
        side: Side,
        w: &[S],
    ) -> Arc<Shared<T>> {
        session.packed(slot, side, || {
            let columns = self.inputs + usize::from(self.beyond.is_some());
            let view = View::new(w, w.len() / columns, self.inputs, columns);
            match side {
                Side::Forward => Packed::transposed(view),
                Side::Backward => Packed::straight(view),
            }
        })
    }

    /// b + t w in F32, where w is the column beyond.
    fn bias_in_f32(&self, session: &Session) -> Result<Option<Matrix<f32>>> {
        if self.bias.is_none() && self.beyond.is_none() {
            return Ok(None);
        }
        let mut sum = f32::spare(session).matrix(1, self.outputs()?);
        sum.fill(0.0);
        if let Some(bias) = &self.bias {
            add_elements(&bias.leaf, 1.0, (0, 1), &mut sum)?;
        }
        if let Some(t) = self.beyond {
            add_elements(&self.weight.leaf, t as f32, (self.inputs, self.inputs + 1), &mut sum)?;
        }
        Ok(Some(sum))
    }
}

/// sum += c · (every `step`th element of x from `first` on).
fn add_elements(x: &Tensor, c: f32, (first, step): (usize, usize), sum: &mut [f32]) -> Result<()> {
    fn add<S: Copy + Into<f32>>(x: &[S], c: f32, (first, step): (usize, usize), sum: &mut [f32]) -> Result<()> {
        x.iter().skip(first).step_by(step).zip(sum).for_each(|(x, sum)| *sum += c * (*x).into());
        Ok(())
    }
    let x = x.detach().contiguous()?;
    match x.dtype() {
        DType::F16 => with_elements::<half::f16, _>(&x, |x| add(x, c, (first, step), sum)),
        DType::BF16 => with_elements::<half::bf16, _>(&x, |x| add(x, c, (first, step), sum)),
        _ => with_elements::<f32, _>(&x, |x| add(x, c, (first, step), sum)),
    }
}
