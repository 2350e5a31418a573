//! A tile through the layers of a chain, and back.

use super::Link;
use super::compute::{Compute, Input};
use super::given::{Given, Way};
use super::order::{Order, Ordered};
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::kernel::{Epilogue, Held, Then, View};
use crate::field::session::{Buffered, Matrix, Session, Side, Tile};
use crate::field::sink;
use candle_core::{Result, bail};

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

/// Writes the value of the chain at x, if it is wanted, and gives what the pullback needs.
pub(super) fn value<C: Compute>(
    (session, links, time): (&Session, &[Link], Option<f64>),
    x: &[C::Stored],
    given: &Given,
    saves: Saves,
    to: Option<&mut [C::Stored]>,
) -> Result<Option<Saved<C::Held>>> {
    let rows = x.len() / links[0].inputs;
    let order = Order::of(links, rows);
    let way = Way { session, order, given, time };
    let x = C::held(session, order, x, rows);
    let (last, before) = (&links[links.len() - 1], &links[..links.len() - 1]);
    let looks_back = saves != Saves::Nothing;
    // Where nobody looks back, only the last result is kept.
    let (mut hidden, mut inputs, mut at) = (vec![], vec![], None::<Matrix<C::Held>>);
    for link in before {
        let mut out = order.tile(session, rows, link.outputs);
        let kept = link.value(way, from(&x, at.as_ref().or(hidden.last())), &mut out)?;
        if looks_back {
            hidden.push(out);
            inputs.push(kept);
        } else {
            at = Some(out);
        }
    }
    let mut kept = Ok(None);
    if let Some(to) = to {
        C::store(session, order, rows, to, |out| {
            kept = last.value(way, from(&x, at.as_ref().or(hidden.last())), out);
        });
    }
    let kept = kept?;
    if !looks_back {
        return Ok(None);
    }
    inputs.push(kept);
    let x = (saves == Saves::All).then(|| x.own(session));
    Ok(Some(Saved { x, hidden, inputs }))
}

/// What the next layer is given.
fn from<'a, T: Ordered>(x: &'a Input<'_, T>, result: Option<&'a Matrix<T>>) -> View<'a, T> {
    result.map_or_else(|| x.view(), Matrix::view)
}

/// Whether the pullback needs the value of the chain.
pub(super) fn needs_value(links: &[Link]) -> bool {
    links.last().is_some_and(|link| link.then.keeps() != Keeps::Nothing)
}

/// What a chain has made of x, and a cotangent of it.
pub(super) struct Pulled<'a, T> {
    /// x, unless it has been saved.
    pub(super) x: Option<&'a [T]>,
    /// The value; nothing where it was not wanted.
    pub(super) value: &'a [T],
    /// S times the cotangent of the value.
    pub(super) grad: &'a [T],
}

/// Adds dL/dW and dL/db of every layer to the open sums, and writes S times dL/dx.
pub(super) fn pull<C: Compute>(
    (session, links, time): (&Session, &[Link], Option<f64>),
    saved: &Saved<C::Held>,
    given: &Given,
    Pulled { x, value, grad }: Pulled<'_, C::Stored>,
    to: &mut [C::Stored],
) -> Result<()> {
    let rows = grad.len() / links[links.len() - 1].outputs;
    let (order, scale) = (Order::of(links, rows), sink::scale()?);
    let way = Way { session, order, given, time };
    let g = {
        let is_kept = links.last().is_some_and(|link| link.then.keeps() == Keeps::Value);
        let value = is_kept.then(|| C::held(session, order, value, rows));
        let grad = C::held(session, order, grad, rows);
        seed(way, links, saved, value.as_ref().map(Input::view), grad.view(), scale)
    };
    let x = x.map(|x| C::held(session, order, x, rows));
    match saved.x.as_ref().map(Matrix::view).or(x.as_ref().map(Input::view)) {
        Some(x) => back::<C>(way, links, saved, x, g, to),
        None => bail!("a chain pulls back what it has saved, or is given"),
    }
}

/// The cotangent of the last product: grad/S, through the last activation.
fn seed<T: Ordered>(
    Way { session, order, .. }: Way<'_>,
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
    let columns = grad.columns();
    match kept {
        None => {
            for (row, g) in g.chunks_exact_mut(columns).enumerate() {
                g.iter_mut().zip(grad.row(row)).for_each(|(g, grad)| *g = T::of(grad.wide() * inverse));
            }
        }
        Some(kept) => {
            let mut slopes = f32::spare(session).matrix(1, columns);
            for (row, g) in g.chunks_exact_mut(columns).enumerate() {
                slopes.iter_mut().zip(kept.row(row)).for_each(|(slope, kept)| *slope = kept.wide());
                then.slope_in_place(&mut slopes);
                let scaled = g.iter_mut().zip(grad.row(row)).zip(slopes.iter());
                scaled.for_each(|((g, grad), slope)| *g = T::of(grad.wide() * inverse * slope));
            }
        }
    }
    g
}

/// From the cotangent `g` of the last product, which is not scaled, to that of x, which is: written to `to`.
fn back<C: Compute>(
    way: Way<'_>,
    links: &[Link],
    saved: &Saved<C::Held>,
    x: View<'_, C::Held>,
    mut g: Matrix<C::Held>,
    to: &mut [C::Stored],
) -> Result<()> {
    let (Way { session, order, .. }, scale) = (way, sink::scale()?);
    let rows = if order == Order::Rows { x.rows() } else { x.columns() };
    for (n, link) in links.iter().enumerate().skip(1).rev() {
        let input = saved.hidden[n - 1].view();
        let adds = link.before_pull(way, &mut g, input)?;
        let then = match kept(links, saved, n - 1, Some(input)) {
            Some(kept) => Then::TimesSlope(links[n - 1].then, kept),
            None => Then::Nothing,
        };
        let mut out = order.tile(session, rows, link.inputs);
        link.pull(way, adds, (g.view(), input), then, order.write(&mut out, rows))?;
        g = out;
    }
    let first = &links[0];
    let adds = first.before_pull(way, &mut g, x)?;
    let mut pulled = Ok(());
    C::store(session, order, rows, to, |out| {
        pulled = first.pull(way, adds, (g.view(), x), Then::Nothing, order.write(out, rows));
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x = C::Held::of(x.wide() * scale as f32));
        }
    });
    pulled
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

impl Link {
    /// f(x W[:, ..inputs]ᵀ + b + t w), and what was activated where f′ is a function of that.
    fn value<T: Ordered>(&self, way: Way<'_>, x: View<'_, T>, out: &mut [T]) -> Result<Option<Matrix<T>>> {
        let Way { session, order, .. } = way;
        let packed = self.packed::<T>(way, Side::Forward)?;
        let bias = self.bias_in_f32(way)?;
        let (gate, bias) = (self.gate(way)?, bias.as_deref());
        let rows = out.len() / self.outputs;
        if self.then.keeps() != Keeps::Input {
            let then = Then::activation(self.then);
            T::multiply(order, x, &packed, &Epilogue { gate, bias, then }, order.write(out, rows));
            return Ok(None);
        }
        let mut z = order.tile(session, rows, self.outputs);
        T::multiply(order, x, &packed, &Epilogue { gate, bias, then: Then::Nothing }, order.write(&mut z, rows));
        out.copy_from_slice(&z);
        self.then.value_of_held(out);
        Ok(Some(z))
    }
}
