//! A tile through the layers of a chain, and back.

use super::compute::{Compute, Input};
use super::order::{Order, Ordered};
use super::weights::{Given, Run};
use super::{Link, Parameter, Weights, with_elements};
use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::cpu::{CHUNK, Kernel, sum, vectorised};
use crate::field::ops::kernel::{Epilogue, Held, Packed, Then, View, ViewMut};
use crate::field::session::{Matrix, Session, Shared, Side, Tile};
use crate::field::sink;
use candle_core::{DType, Result, Tensor, bail};
use std::sync::Arc;

/// What is saved on the way forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Saves {
    Nothing,
    /// What the layers make of x.
    Results,
    /// x, too.
    All,
}

/// What a tile's pullback needs of its way forward.
pub(super) struct Saved<T> {
    x: Option<Matrix<T>>,
    /// The results of all layers but the last.
    hidden: Vec<Matrix<T>>,
    /// By layer, what was activated, where f′ is a function of that.
    inputs: Vec<Option<Matrix<T>>>,
}

/// A value with what was saved on the way.
type Valued<C> = (Vec<<C as Compute>::Stored>, Option<Saved<<C as Compute>::Held>>);

/// The value of the chain at x, and what the pullback needs.
pub(super) fn value<C: Compute>(
    session: &Session,
    links: &[Link],
    x: &[C::Stored],
    given: &Given,
    saves: Saves,
) -> Result<Valued<C>> {
    let rows = x.len() / links[0].inputs;
    let order = Order::of(links, rows);
    let run = Run { session, order, given };
    let x = C::held(session, order, x, rows);
    let (last, before) = (&links[links.len() - 1], &links[..links.len() - 1]);
    let (mut hidden, mut inputs) = (Vec::<Matrix<C::Held>>::new(), vec![]);
    for link in before {
        let mut out = order.tile(session, rows, link.outputs);
        inputs.push(link.value(run, from(&x, &hidden), &mut out)?);
        if saves == Saves::Nothing {
            // Nobody looks back.
            hidden.clear();
            inputs.clear();
        }
        hidden.push(out);
    }
    let mut kept = Ok(None);
    let stored = C::stored(session, order, [rows, last.outputs], |out| {
        kept = last.value(run, from(&x, &hidden), out);
    });
    inputs.push(kept?);
    let x = (saves == Saves::All).then(|| x.own(session));
    let saved = (saves != Saves::Nothing).then_some(Saved { x, hidden, inputs });
    Ok((stored, saved))
}

/// What the next layer is given.
fn from<'a, T: Ordered>(x: &'a Input<'_, T>, hidden: &'a [Matrix<T>]) -> View<'a, T> {
    hidden.last().map_or_else(|| x.view(), Matrix::view)
}

/// Adds dL/dW and dL/db of every layer to the open sums, and gives dL/dx; `x` is there unless it has been saved.
pub(super) fn pull<C: Compute>(
    session: &Session,
    links: &[Link],
    saved: &Saved<C::Held>,
    x: Option<&Tensor>,
    given: &Given,
    value: &Tensor,
    grad: &Tensor,
) -> Result<Vec<C::Stored>> {
    let rows = value.elem_count() / links[links.len() - 1].outputs;
    let (order, scale) = (Order::of(links, rows), sink::scale()?);
    let run = Run { session, order, given };
    let g = with_elements::<C::Stored, _>(value, |value| {
        with_elements::<C::Stored, _>(grad, |grad| {
            let is_kept = links.last().is_some_and(|link| link.then.keeps() == Keeps::Value);
            let value = is_kept.then(|| C::held(session, order, value, rows));
            let grad = C::held(session, order, grad, rows);
            Ok(seed(run, links, saved, value.as_ref().map(Input::view), grad.view(), scale))
        })
    })?;
    match (&saved.x, x) {
        (Some(x), _) => back::<C>(run, links, saved, x.view(), g, scale),
        (None, Some(x)) => with_elements(x, |x| {
            let x = C::held(session, order, x, rows);
            back::<C>(run, links, saved, x.view(), g, scale)
        }),
        (None, None) => bail!("a chain pulls back what it has saved, or is given"),
    }
}

/// The cotangent of the last product: grad/S, through the last activation.
fn seed<T: Ordered>(
    Run { session, order, .. }: Run<'_>,
    links: &[Link],
    saved: &Saved<T>,
    value: Option<View<'_, T>>,
    grad: View<'_, T>,
    scale: f64,
) -> Matrix<T> {
    let last = links.len() - 1;
    let rows = if order == Order::Rows { grad.rows() } else { grad.columns() };
    let mut g = order.tile(session, rows, links[last].outputs);
    let inverse = (1.0 / scale) as f32;
    let (then, kept) = (links[last].then, kept(links, saved, last, value));
    let mut slopes = f32::spare(session).matrix(1, grad.columns());
    for (row, g) in g.chunks_exact_mut(grad.columns()).enumerate() {
        let scaled = g.iter_mut().zip(grad.row(row));
        match kept {
            None => scaled.for_each(|(g, grad)| *g = T::of(grad.wide() * inverse)),
            Some(kept) => {
                slopes.iter_mut().zip(kept.row(row)).for_each(|(slope, kept)| *slope = kept.wide());
                then.slope_in_place(&mut slopes);
                scaled.zip(slopes.iter()).for_each(|((g, grad), slope)| *g = T::of(grad.wide() * inverse * slope));
            }
        }
    }
    g
}

/// From the cotangent `g` of the last product, which is not scaled, to that of x, which is.
fn back<C: Compute>(
    run: Run<'_>,
    links: &[Link],
    saved: &Saved<C::Held>,
    x: View<'_, C::Held>,
    mut g: Matrix<C::Held>,
    scale: f64,
) -> Result<Vec<C::Stored>> {
    let Run { session, order, .. } = run;
    let rows = if order == Order::Rows { x.rows() } else { x.columns() };
    for (n, link) in links.iter().enumerate().skip(1).rev() {
        let input = saved.hidden[n - 1].view();
        link.add_gradients(run, (g.view(), g.view()), input)?;
        let then = match kept(links, saved, n - 1, Some(input)) {
            Some(kept) => Then::TimesSlope(links[n - 1].then, kept),
            None => Then::Nothing,
        };
        let mut out = order.tile(session, rows, link.inputs);
        let packed = link.packed::<C::Held>(run, Side::Backward)?;
        let epilogue = Epilogue { then, ..Epilogue::default() };
        C::Held::multiply(order, g.view(), &packed, &epilogue, order.write(&mut out, rows));
        g = out;
    }
    let first = &links[0];
    first.add_gradients(run, (g.view(), g.view()), x)?;
    let packed = first.packed::<C::Held>(run, Side::Backward)?;
    Ok(C::stored(session, order, [rows, first.inputs], |out| {
        C::Held::multiply(order, g.view(), &packed, &Epilogue::default(), order.write(out, rows));
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x = C::Held::of(x.wide() * scale as f32));
        }
    }))
}

/// What f′ of layer `n` is a function of, given the layer's result if it is that.
fn kept<'a, T: Tile>(
    links: &[Link],
    saved: &'a Saved<T>,
    n: usize,
    result: Option<View<'a, T>>,
) -> Option<View<'a, T>> {
    match links[n].then.keeps() {
        Keeps::Nothing => None,
        Keeps::Value => result,
        Keeps::Input => saved.inputs[n].as_ref().map(Matrix::view),
    }
}

/// Σ g over its rows; notes whether they are finite, as they are not where a cotangent is not.
pub(super) fn noted_sums<T: Ordered>(session: &Session, order: Order, g: View<'_, T>, features: usize) -> Matrix<f32> {
    let mut sums = f32::spare(session).matrix(1, features);
    sums.fill(0.0);
    T::add_sums(order, g, &mut sums);
    sink::note(sums.iter().all(|sum| sum.is_finite()));
    sums
}

impl Link {
    /// f(x W[:, ..inputs]ᵀ + b + t w), and what was activated where f′ is a function of that.
    fn value<T: Ordered>(&self, run: Run<'_>, x: View<'_, T>, out: &mut [T]) -> Result<Option<Matrix<T>>> {
        let Run { session, order, .. } = run;
        let packed = self.packed::<T>(run, Side::Forward)?;
        let bias = self.bias_in_f32(run)?;
        let bias = bias.as_deref();
        let rows = out.len() / self.outputs;
        if self.then.keeps() != Keeps::Input {
            let then = match self.then {
                Activation::Identity => Then::Nothing,
                activation => Then::Activation(activation),
            };
            T::multiply(order, x, &packed, &Epilogue { bias, then }, order.write(out, rows));
            return Ok(None);
        }
        let mut z = order.tile(session, rows, self.outputs);
        T::multiply(order, x, &packed, &Epilogue { bias, then: Then::Nothing }, order.write(&mut z, rows));
        let mut wide = [0.0; CHUNK];
        for (z, out) in z.chunks(CHUNK).zip(out.chunks_mut(CHUNK)) {
            let wide = &mut wide[..z.len()];
            wide.iter_mut().zip(z).for_each(|(wide, z)| *wide = z.wide());
            self.then.value_in_place(wide);
            out.iter_mut().zip(wide).for_each(|(out, wide)| *out = T::of(*wide));
        }
        Ok(Some(z))
    }

    /// dW += gᵀ x and db += Σ g, for those of the two that are tracked; db of those rows of g that the bias was added to.
    pub(super) fn add_gradients<T: Ordered>(
        &self,
        run: Run<'_>,
        (g, biased): (View<'_, T>, View<'_, T>),
        x: View<'_, T>,
    ) -> Result<()> {
        if !self.is_tracked(run) {
            return Ok(());
        }
        let Run { session, order, given } = run;
        let sums = noted_sums(session, order, biased, self.outputs);
        let columns = self.columns();
        let add_outer = |dw: &mut [f32]| {
            T::add_outer(order, session, g, x, ViewMut::new(dw, self.outputs, self.inputs, columns));
        };
        match &self.weights {
            Weights::Gated { weight, bias, first } => self.add_gated(run, (weight, bias, *first), add_outer, &sums),
            Weights::Given { first } => {
                let count = self.outputs * self.inputs;
                given.add(*first, count, add_outer);
                given.add(first + count, self.outputs, |db| {
                    db.iter_mut().zip(sums.iter()).for_each(|(db, sum)| *db += sum)
                });
                Ok(())
            }
            Weights::Parameters { weight, bias, beyond } => {
                if weight.is_tracked() {
                    sink::add_in_place(&weight.leaf, |dw| {
                        add_outer(dw);
                        if let Some(t) = beyond {
                            let beyond = dw.iter_mut().skip(self.inputs).step_by(columns);
                            beyond.zip(sums.iter()).for_each(|(dw, sum)| *dw += *t as f32 * sum);
                        }
                    })?;
                }
                match bias.as_ref().filter(|bias| bias.is_tracked()) {
                    Some(bias) => bias.add(&sums),
                    None => Ok(()),
                }
            }
        }
    }

    /// With dV and dc of V = σ ∘ W and c = σ ∘ b + s: dW += σ ∘ dV, db += σ ∘ dc, dσ += Σ W ∘ dV + b ∘ dc along the
    /// rows of W, ds += dc.
    fn add_gated(
        &self,
        Run { session, given, .. }: Run<'_>,
        (weight, bias, first): (&Parameter, &Parameter, usize),
        add_outer: impl FnOnce(&mut [f32]),
        of_bias: &[f32],
    ) -> Result<()> {
        let mut of_weight = f32::spare(session).matrix(self.outputs, self.inputs);
        of_weight.fill(0.0);
        add_outer(&mut of_weight);
        let gate = given.part(first, self.outputs);
        if given.is_summed() {
            let (w, b) = (weight.in_f32(session)?, bias.in_f32(session)?);
            given.add(first, self.outputs, |sums| {
                vectorised(AddDots { a: &w, b: &of_weight, sums });
                sums.iter_mut().zip(b.iter().zip(of_bias)).for_each(|(sum, (b, of))| *sum += b * of);
            });
            given.add(first + self.outputs, self.outputs, |sums| {
                sums.iter_mut().zip(of_bias).for_each(|(sum, of)| *sum += of)
            });
        }
        if weight.is_tracked() {
            sink::add_in_place(&weight.leaf, |sums| vectorised(AddScaledRows { gate, of: &of_weight, sums }))?;
        }
        if bias.is_tracked() {
            sink::add_in_place(&bias.leaf, |sums| vectorised(AddScaledRows { gate, of: of_bias, sums }))?;
        }
        Ok(())
    }

    /// Whether a gradient of it is wanted.
    pub(super) fn is_tracked(&self, run: Run<'_>) -> bool {
        match &self.weights {
            Weights::Parameters { weight, bias, .. } => {
                weight.is_tracked() || bias.as_ref().is_some_and(Parameter::is_tracked)
            }
            Weights::Gated { weight, bias, .. } => weight.is_tracked() || bias.is_tracked() || run.given.is_summed(),
            Weights::Given { .. } => run.given.is_summed(),
        }
    }

    /// From a row of W to the next.
    fn columns(&self) -> usize {
        self.inputs + usize::from(matches!(self.weights, Weights::Parameters { beyond: Some(_), .. }))
    }

    /// W as the right-hand operand of the products on one side.
    pub(super) fn packed<T: Tile>(&self, Run { session, given, .. }: Run<'_>, side: Side) -> Result<Arc<Shared<T>>> {
        let Parameter { leaf, slot } = match &self.weights {
            Weights::Parameters { weight, .. } => weight,
            Weights::Gated { weight, first, .. } => {
                let mut w = weight.in_f32(session)?;
                let gate = given.part(*first, self.outputs);
                w.chunks_exact_mut(self.inputs).zip(gate).for_each(|(w, gate)| w.iter_mut().for_each(|w| *w *= gate));
                return Ok(Shared::new(self.pack::<T, f32>(side, &w)));
            }
            Weights::Given { first } => {
                return Ok(Shared::new(self.pack::<T, f32>(side, given.part(*first, self.outputs * self.inputs))));
            }
        };
        let key = (*slot, self.inputs, side);
        if let Some(packed) = session.seen(key) {
            return Ok(packed);
        }
        let leaf = leaf.contiguous()?;
        match leaf.dtype() {
            DType::F16 => with_elements(&leaf, |w| Ok(session.packed(key, |side| self.pack::<T, half::f16>(side, w)))),
            DType::BF16 => {
                with_elements(&leaf, |w| Ok(session.packed(key, |side| self.pack::<T, half::bf16>(side, w))))
            }
            _ => with_elements(&leaf, |w| Ok(session.packed(key, |side| self.pack::<T, f32>(side, w)))),
        }
    }

    fn pack<T: Tile, S: Copy + Into<f32>>(&self, side: Side, w: &[S]) -> Packed<T> {
        let view = View::new(w, self.outputs, self.inputs, self.columns());
        match side {
            Side::Forward => Packed::transposed(view),
            Side::Backward => Packed::straight(view),
        }
    }

    /// b + t w in F32, where w is the column beyond.
    pub(super) fn bias_in_f32(&self, Run { session, given, .. }: Run<'_>) -> Result<Option<Matrix<f32>>> {
        let (weight, bias, beyond) = match &self.weights {
            Weights::Parameters { bias: None, beyond: None, .. } => return Ok(None),
            Weights::Parameters { weight, bias, beyond } => (weight, bias, beyond),
            Weights::Gated { bias, first, .. } => {
                let mut sum = bias.in_f32(session)?;
                let (gate, shift) = given.part(*first, 2 * self.outputs).split_at(self.outputs);
                sum.iter_mut().zip(gate.iter().zip(shift)).for_each(|(sum, (gate, shift))| *sum = *sum * gate + shift);
                return Ok(Some(sum));
            }
            Weights::Given { first } => {
                let mut bias = f32::spare(session).matrix(1, self.outputs);
                bias.copy_from_slice(given.part(first + self.outputs * self.inputs, self.outputs));
                return Ok(Some(bias));
            }
        };
        let mut sum = f32::spare(session).matrix(1, self.outputs);
        sum.fill(0.0);
        if let Some(bias) = bias {
            add_elements(&bias.leaf, 1.0, (0, 1), &mut sum)?;
        }
        if let Some(t) = beyond {
            add_elements(&weight.leaf, *t as f32, (self.inputs, self.inputs + 1), &mut sum)?;
        }
        Ok(Some(sum))
    }
}

/// sums += Σ a ∘ b along the rows of a matrix.
struct AddDots<'a> {
    a: &'a [f32],
    b: &'a [f32],
    sums: &'a mut [f32],
}

impl Kernel for AddDots<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { a, b, sums } = self;
        let columns = a.len() / sums.len().max(1);
        for (sum_of_row, (a, b)) in sums.iter_mut().zip(a.chunks_exact(columns).zip(b.chunks_exact(columns))) {
            *sum_of_row += sum(a, b, |a, b| a * b);
        }
    }
}

/// sums += gate ∘ of, an element of the gate for each row.
struct AddScaledRows<'a> {
    gate: &'a [f32],
    of: &'a [f32],
    sums: &'a mut [f32],
}

impl Kernel for AddScaledRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { gate, of, sums } = self;
        let columns = of.len() / gate.len().max(1);
        for (gate, (sums, of)) in gate.iter().zip(sums.chunks_exact_mut(columns).zip(of.chunks_exact(columns))) {
            sums.iter_mut().zip(of).for_each(|(sum, of)| *sum += gate * of);
        }
    }
}

/// sum += c · (every `step`th element of x from `first` on).
fn add_elements(x: &Tensor, c: f32, (first, step): (usize, usize), sum: &mut [f32]) -> Result<()> {
    fn add<S: Copy + Into<f32>>(x: &[S], c: f32, (first, step): (usize, usize), sum: &mut [f32]) -> Result<()> {
        x.iter().skip(first).step_by(step).zip(sum).for_each(|(x, sum)| *sum += c * (*x).into());
        Ok(())
    }
    let x = x.contiguous()?;
    match x.dtype() {
        DType::F16 => with_elements::<half::f16, _>(&x, |x| add(x, c, (first, step), sum)),
        DType::BF16 => with_elements::<half::bf16, _>(&x, |x| add(x, c, (first, step), sum)),
        _ => with_elements::<f32, _>(&x, |x| add(x, c, (first, step), sum)),
    }
}
