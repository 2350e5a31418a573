//! A chain on the time alone: one row, which is no row of the batch, through a network that makes weights.
//!
//! Its own weights are read where they lie, since packing them would take longer than the products; dL/dW is added in
//! place to the F32 sums. Half precision is held in F32 between the layers.

use super::given::{Given, Way};
use super::{Chain, Compute, Link, Linked, Order, Weights, with_compute, with_elements};
use crate::Time;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::cpu::{Element, Kernel, sum, vectorised};
use crate::field::session::{Buffered, Matrix, Session};
use crate::field::sink;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType, bail};
use std::sync::{Arc, Mutex, PoisonError};

/// The time as `(1, 1)` in the dtype of x.
pub(in crate::field::ops) fn column(t: &Time, x: &Tensor) -> Result<Tensor> {
    t.like(x)?.reshape((1, 1))
}

/// Runs layers on the time alone op by op: a chain on what is not tracked is there where f is evaluated, not where it
/// is linearised, and rounds in other places.
pub(in crate::field::ops) fn by_ops(run: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    Session::shut(run)
}

/// The value of the layers at the time `(1, 1)`, if they are one chain that kernels of ours run.
pub(in crate::field::ops) fn of_time<'a>(
    layers: impl IntoIterator<Item = &'a dyn Linked>,
    t: &Tensor,
) -> Result<Option<Tensor>> {
    let Some(mut chain) = Chain::start(t).filter(|_| t.device().is_cpu()) else { return Ok(None) };
    if !layers.into_iter().all(|layer| layer.link(None, t, &mut chain)) {
        return Ok(None);
    }
    let parameters = chain.links.iter().flat_map(|link| link.weights.parameters());
    let tracked = parameters.filter(|_| chain.in_graph).find(|parameter| parameter.is_tracked());
    let through = tracked.map_or_else(|| t.detach(), |parameter| parameter.leaf.clone());
    let is_node = t.track_op() || through.track_op();
    let op = OfTime { session: chain.current.session, links: chain.links, is_node, saved: Mutex::default() };
    let t = t.contiguous()?;
    if is_node { t.apply_op2(&through, op) } else { t.apply_op2_no_bwd(&through, &op) }.map(Some)
}

/// (t, a parameter) ↦ the value; nothing goes back to the parameter, whose gradient is in the open sums.
struct OfTime {
    session: Arc<Session>,
    links: Vec<Link>,
    is_node: bool,
    /// What the pullback needs; from the forward pass on.
    saved: Mutex<Option<Saved>>,
}

#[derive(Default)]
struct Saved {
    /// The time and the results of the layers, the last of them only if f′ is a function of it.
    values: Vec<Matrix<f32>>,
    /// By layer, what was activated, where f′ is a function of that.
    inputs: Vec<Option<Matrix<f32>>>,
}

impl OfTime {
    fn vector(&self, len: usize) -> Matrix<f32> {
        f32::spare(&self.session).matrix(1, len)
    }

    fn way<'a>(&'a self, given: &'a Given) -> Way<'a> {
        Way { session: &self.session, order: Order::Rows, given, time: None }
    }

    fn value<T: Element<Wide = f32>>(&self, t: &[T]) -> Result<Vec<T>> {
        let (mut saved, given) = (Saved::default(), Given::default());
        let mut y = self.vector(t.len());
        T::widen(t, &mut y);
        for link in &self.links {
            let x = y;
            y = self.vector(link.outputs);
            match link.bias_in_f32(self.way(&given))? {
                Some(bias) => y.copy_from_slice(&bias),
                None => y.fill(0.0),
            }
            link.with_weight(|w| vectorised(TimesWeight::<T> { w, x: &x, y: &mut y }))?;
            let keeps_input = self.is_node && link.then.keeps() == Keeps::Input;
            saved.inputs.push(keeps_input.then(|| {
                let mut input = self.vector(y.len());
                input.copy_from_slice(&y);
                input
            }));
            link.then.value_in_place(&mut y);
            saved.values.push(x);
        }
        let mut value = vec![T::from_f64(0.0); y.len()];
        T::narrow(&y, &mut value);
        if self.is_node {
            if self.links.last().is_some_and(|link| link.then.keeps() == Keeps::Value) {
                saved.values.push(y);
            }
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        }
        Ok(value)
    }

    /// Adds dL/dW and dL/db of every layer to the open sums, and gives dL/dt.
    fn pull<T: Element<Wide = f32>>(&self, grad: &[T]) -> Result<Vec<T>> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Saved { values, inputs }) = &*saved else { bail!("a chain pulls back what it has evaluated") };
        let (scale, given) = (sink::scale()?, Given::default());
        let mut g = self.vector(grad.len());
        T::widen(grad, &mut g);
        g.iter_mut().for_each(|g| *g /= scale as f32);
        for (n, link) in self.links.iter().enumerate().rev() {
            match (link.then.keeps(), &inputs[n]) {
                (Keeps::Value, _) => link.then.times_slope(&values[n + 1], &mut g),
                (_, Some(input)) => link.then.times_slope(input, &mut g),
                _ => {}
            }
            link.add_gradients(self.way(&given), (g.view(), g.view()), values[n].view())?;
            let mut of_x = self.vector(link.inputs);
            of_x.fill(0.0);
            link.with_weight(|w| vectorised(TimesTransposed::<T> { w, g: &g, x: &mut of_x }))?;
            g = of_x;
        }
        g.iter_mut().for_each(|g| *g *= scale as f32);
        let mut of_t = vec![T::from_f64(0.0); g.len()];
        T::narrow(&g, &mut of_t);
        Ok(of_t)
    }
}

impl CustomOp2 for OfTime {
    fn name(&self) -> &'static str {
        "layers-of-time"
    }

    fn cpu_fwd(&self, t: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("a chain takes a contiguous tensor") };
        with_compute!(t.dtype(), true, C => {
            type Stored = <C as Compute>::Stored;
            let value = self.value(&Stored::cpu_storage_as_slice(t)?[from..to])?;
            let shape = Shape::from((1, value.len()));
            Ok((C::storage(value), shape))
        })
    }

    fn bwd(&self, t: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        with_compute!(t.dtype(), true, C => {
            let of_t = with_elements::<<C as Compute>::Stored, _>(&grad, |grad| self.pull(grad))?;
            Ok((t.track_op().then(|| Tensor::from_vec(of_t, t.shape(), t.device())).transpose()?, None))
        })
    }
}

impl Link {
    fn with_weight<T: WithDType>(&self, with: impl FnOnce(&[T])) -> Result<()> {
        let Weights::Parameters { weight, .. } = &self.weights else {
            bail!("a network of the time is made of parameters")
        };
        with_elements(&weight.leaf.contiguous()?, |w| {
            with(w);
            Ok(())
        })
    }
}

/// y += W x
struct TimesWeight<'a, T> {
    w: &'a [T],
    x: &'a [f32],
    y: &'a mut [f32],
}

impl<T: Element<Wide = f32>> Kernel for TimesWeight<'_, T> {
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
struct TimesTransposed<'a, T> {
    w: &'a [T],
    g: &'a [f32],
    x: &'a mut [f32],
}

impl<T: Element<Wide = f32>> Kernel for TimesTransposed<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut space = vec![0.0; self.x.len()];
        for (g, w) in self.g.iter().zip(self.w.chunks_exact(self.x.len())) {
            self.x.iter_mut().zip(T::widened(w, &mut space)).for_each(|(x, w)| *x += g * w);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::ops::{Activation, Linear};
    use crate::field::session::Call;
    use candle_core::{DType, Device, Var};

    /// Whether two layers of such parameters are one op on a time in `dtype`, and what it has packed.
    fn fused(dtype: DType, weights: DType, bias: DType) -> (bool, usize) {
        let ones = |shape: &[usize], dtype| Var::ones(shape, dtype, &Device::Cpu).unwrap().as_tensor().clone();
        let leaves = [ones(&[3, 1], weights), ones(&[3], bias), ones(&[4, 3], weights)];
        let first = Linear::new(leaves[0].clone(), Some(leaves[1].clone()));
        let last = Linear::new(leaves[2].clone(), None);
        let t = Tensor::zeros((1, 1), dtype, &Device::Cpu).unwrap();
        let run = || of_time([&first as &dyn Linked, &Activation::Tanh, &last], &t).unwrap();
        assert!(run().is_none(), "outside of a solve");
        let packed = Arc::default();
        let session = Session::new(&leaves, Arc::clone(&packed), true);
        let in_graph = session.open(Call::Graph, run).0;
        let alone = session.open(Call::Value, run).0;
        assert_eq!(in_graph.is_some(), alone.is_some());
        assert!(in_graph.as_ref().is_none_or(Tensor::track_op) && !alone.is_some_and(|value| value.track_op()));
        (in_graph.is_some(), packed.bytes())
    }

    #[test]
    fn layers_on_the_time_are_one_op_that_packs_nothing() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert_eq!(fused(dtype, dtype, dtype), (true, 0), "{dtype:?}");
            assert_eq!(fused(dtype, dtype, DType::F32), (true, 0), "{dtype:?}");
        }
        assert_eq!(fused(DType::F64, DType::F64, DType::F64), (false, 0));
        assert_eq!(fused(DType::F16, DType::F32, DType::F32), (false, 0));
    }
}
