//! A chain on one row that is no row of the batch: a network of the time, which makes weights.
//!
//! Its weights are read where they lie, since packing them would take longer than the products. Candle's graph leads through
//! one of its parameters, since the time need not be tracked; dL/dW is added in place to the F32 sums. Half precision is held
//! in F32 between the layers.

use super::{Chain, Compute, Link, Linked, Order, with_compute, with_elements};
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::cpu::{Element, Kernel, sum, vectorised};
use crate::field::session::{Call, Matrix, Session, Tile};
use crate::field::sink;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};
use std::sync::{Arc, Mutex, PoisonError};

/// The value of the layers at x `(1, inputs)`, if they are one chain that kernels of ours run.
pub(in crate::field::ops) fn of_row<'a>(
    layers: impl IntoIterator<Item = &'a dyn Linked>,
    x: &Tensor,
) -> Result<Option<Tensor>> {
    let Some(mut chain) = Chain::start(x).filter(|_| x.device().is_cpu()) else { return Ok(None) };
    // Whether x is tracked does not matter.
    let call = std::mem::replace(&mut chain.current.call, Call::Value);
    if !layers.into_iter().all(|layer| layer.link(None, x, &mut chain)) {
        return Ok(None);
    }
    let x = x.contiguous()?;
    let row = Row { session: chain.current.session, links: chain.links, passed: Mutex::default() };
    let parameters = row.links.iter().flat_map(|link| std::iter::once(&link.weight).chain(&link.bias));
    let tracked = parameters.filter(|_| call == Call::Graph).find(|parameter| parameter.is_tracked());
    let through = tracked.map_or_else(|| x.detach(), |parameter| parameter.leaf.clone());
    let is_node = x.track_op() || through.track_op();
    let value = if is_node { x.apply_op2(&through, row) } else { x.apply_op2_no_bwd(&through, &row) };
    value.map(Some)
}

struct Row {
    session: Arc<Session>,
    links: Vec<Link>,
    /// By layer, what the pullback needs; from the forward pass on.
    passed: Mutex<Vec<Passed>>,
}

/// What the pullback of a layer needs.
struct Passed {
    x: Matrix<f32>,
    /// What f′ is a function of.
    kept: Matrix<f32>,
}

impl Row {
    fn vector(&self, len: usize) -> Matrix<f32> {
        f32::spare(&self.session).matrix(1, len)
    }

    fn copy(&self, of: &[f32]) -> Matrix<f32> {
        let mut copy = self.vector(of.len());
        copy.copy_from_slice(of);
        copy
    }

    fn value<T: Element<Wide = f32>>(&self, x: &[T]) -> Result<Vec<T>> {
        let mut y = self.vector(x.len());
        T::widen(x, &mut y);
        let mut passed = vec![];
        for link in &self.links {
            let x = y;
            y = self.vector(link.outputs);
            match link.bias_in_f32(&self.session)? {
                Some(bias) => y.copy_from_slice(&bias),
                None => y.fill(0.0),
            }
            link.with_weight(|w| vectorised(Products::<T> { w, x: &x, y: &mut y }))?;
            let input = (link.then.keeps() == Keeps::Input).then(|| self.copy(&y));
            link.then.value_in_place(&mut y);
            let kept = match link.then.keeps() {
                Keeps::Value => self.copy(&y),
                _ => input.unwrap_or_else(|| self.vector(0)),
            };
            passed.push(Passed { x, kept });
        }
        *self.passed.lock().unwrap_or_else(PoisonError::into_inner) = passed;
        let mut value = vec![T::from_f64(0.0); y.len()];
        T::narrow(&y, &mut value);
        Ok(value)
    }

    /// Adds dL/dW and dL/db of every layer to the open sums, and gives dL/dx.
    fn pull<T: Element<Wide = f32>>(&self, grad: &[T]) -> Result<Vec<T>> {
        let passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        if passed.is_empty() {
            bail!("a chain pulls back what it has evaluated")
        }
        let scale = sink::scale()?;
        let mut g = self.vector(grad.len());
        T::widen(grad, &mut g);
        g.iter_mut().for_each(|g| *g /= scale as f32);
        for (link, Passed { x, kept }) in self.links.iter().zip(&*passed).rev() {
            if link.then.keeps() != Keeps::Nothing {
                link.then.times_slope(kept, &mut g);
            }
            link.add_gradients(&self.session, Order::Rows, (g.view(), g.view()), x.view())?;
            let mut of_x = self.vector(link.inputs);
            of_x.fill(0.0);
            link.with_weight(|w| vectorised(Rows::<T> { w, g: &g, x: &mut of_x }))?;
            g = of_x;
        }
        g.iter_mut().for_each(|g| *g *= scale as f32);
        let mut of_x = vec![T::from_f64(0.0); g.len()];
        T::narrow(&g, &mut of_x);
        Ok(of_x)
    }
}

impl CustomOp2 for Row {
    fn name(&self) -> &'static str {
        "layers-of-time"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("a chain takes a contiguous tensor") };
        with_compute!(x.dtype(), true, C => {
            type Stored = <C as Compute>::Stored;
            let value = self.value(&Stored::cpu_storage_as_slice(x)?[from..to])?;
            let shape = Shape::from((1, value.len()));
            Ok((C::storage(value), shape))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        with_compute!(x.dtype(), true, C => {
            let of_x = with_elements::<<C as Compute>::Stored, _>(&grad, |grad| self.pull(grad))?;
            Ok((x.track_op().then(|| Tensor::from_vec(of_x, x.shape(), x.device())).transpose()?, None))
        })
    }
}

impl Link {
    fn with_weight<T: WithDType>(&self, with: impl FnOnce(&[T])) -> Result<()> {
        with_elements(&self.weight.leaf.contiguous()?, |w| {
            with(w);
            Ok(())
        })
    }
}

/// y += W x
struct Products<'a, T> {
    w: &'a [T],
    x: &'a [f32],
    y: &'a mut [f32],
}

impl<T: Element<Wide = f32>> Kernel for Products<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut space = vec![0.0; self.x.len()];
        for (y, w) in self.y.iter_mut().zip(self.w.chunks_exact(self.x.len())) {
            *y += sum(T::widened(w, &mut space), self.x, |w, x| w * x);
        }
    }
}

/// x += Wᵀ g
struct Rows<'a, T> {
    w: &'a [T],
    g: &'a [f32],
    x: &'a mut [f32],
}

impl<T: Element<Wide = f32>> Kernel for Rows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut space = vec![0.0; self.x.len()];
        for (g, w) in self.g.iter().zip(self.w.chunks_exact(self.x.len())) {
            self.x.iter_mut().zip(T::widened(w, &mut space)).for_each(|(x, w)| *x += g * w);
        }
    }
}
