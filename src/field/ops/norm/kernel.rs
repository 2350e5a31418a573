//! The normalisation loops on the CPU: one group at a time, widened into a buffer that stays in cache.

use super::Norm;
use crate::field::ops::cpu::{Element, Kernel, dense, dense_wide, sum, vectorised, with_element};
use crate::field::ops::real::Real;
use candle_core::{CpuStorage, Layout, Result, Shape, Storage, Tensor, WithDType, op::BackpropOp};

/// How the elements of x fall into groups: x is `(samples, per_sample, channels, inner)`, a group is one
/// `(channels, inner)`, and parameter `g · channels + c` belongs to channel c of the g-th group of every sample.
#[derive(Clone, Copy, Debug)]
pub(in crate::field::ops) struct Groups {
    pub(in crate::field::ops) per_sample: usize,
    pub(in crate::field::ops) channels: usize,
    pub(in crate::field::ops) inner: usize,
}

impl Groups {
    /// Elements in a group.
    pub(in crate::field::ops) fn size(self) -> usize {
        self.channels * self.inner
    }

    /// Elements of the weight.
    pub(super) fn parameters(self) -> usize {
        self.per_sample * self.channels
    }

    /// The parameters of the `n`-th group of x, spread over its elements.
    #[inline(always)]
    fn spread<W: Real>(self, n: usize, parameters: &[W], over: &mut [W]) {
        let first = (n % self.per_sample) * self.channels;
        let parameters = &parameters[first..first + self.channels];
        if self.inner == 1 {
            over.copy_from_slice(parameters);
        } else {
            for (over, &parameter) in over.chunks_mut(self.inner).zip(parameters) {
                over.fill(parameter);
            }
        }
    }
}

/// (x − mean) / sqrt(var + ε) in place; gives 1 / sqrt(var + ε). Two passes, of elements that are counted from the
/// first one, so that a large mean costs no digits.
#[inline(always)]
fn standardise<W: Real>(x: &mut [W], remove_mean: bool, eps: f64) -> W {
    let count = W::of(x.len() as f64);
    if remove_mean {
        let origin = x.first().copied().unwrap_or(W::ZERO);
        let mean = sum(x, x, |a, _| a - origin) / count;
        x.iter_mut().for_each(|x| *x = *x - origin - mean);
    }
    let variance = sum(x, x, |a, b| a * b) / count;
    let scale = W::ONE / (variance + W::of(eps)).sqrt();
    x.iter_mut().for_each(|x| *x *= scale);
    scale
}

/// The forward pass.
pub(super) struct Normalise<'a, T: Element> {
    pub(super) x: &'a [T],
    pub(super) groups: Groups,
    pub(super) remove_mean: bool,
    pub(super) eps: f64,
    pub(super) weight: Option<&'a [T::Wide]>,
    pub(super) bias: Option<&'a [T::Wide]>,
}

impl<T: Element> Kernel for Normalise<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run(self) -> Vec<T> {
        let size = self.groups.size();
        let mut y = vec![T::from_f64(0.0); self.x.len()];
        let (mut wide, mut parameters) = (vec![T::Wide::ZERO; size], vec![T::Wide::ZERO; size]);
        for (n, (x, y)) in self.x.chunks_exact(size.max(1)).zip(y.chunks_exact_mut(size.max(1))).enumerate() {
            T::widen(x, &mut wide);
            standardise(&mut wide, self.remove_mean, self.eps);
            if let Some(weight) = self.weight {
                self.groups.spread(n, weight, &mut parameters);
                wide.iter_mut().zip(&parameters).for_each(|(x, &w)| *x *= w);
            }
            if let Some(bias) = self.bias {
                self.groups.spread(n, bias, &mut parameters);
                wide.iter_mut().zip(&parameters).for_each(|(x, &b)| *x += b);
            }
            T::narrow(&wide, y);
        }
        y
    }
}

/// The backward pass: the gradient of x, and for each parameter Σ g x̂ (for w) and Σ g (for b).
pub(super) struct Pull<'a, T: Element> {
    pub(super) x: &'a [T],
    pub(super) grad: &'a [T],
    pub(super) norm: Norm,
    pub(super) weight: Option<&'a [T::Wide]>,
}

impl<T: Element> Kernel for Pull<'_, T> {
    type Output = (Vec<T>, Vec<T::Wide>);

    /// With x̂ the normalised x, g the cotangent times w and s = 1 / sqrt(var + ε):
    /// dx = s (g − mean(g) − x̂ mean(g x̂)), without mean(g) where the mean was not removed.
    #[inline(always)]
    fn run(self) -> Self::Output {
        let Norm { groups, remove_mean, eps, .. } = self.norm;
        let size = groups.size();
        let mut for_x = vec![T::from_f64(0.0); self.x.len()];
        let mut sums = ParameterSums::<T::Wide>::new(groups);
        let buffer = || vec![T::Wide::ZERO; size];
        let (mut x, mut g, mut w) = (buffer(), buffer(), buffer());
        let count = T::Wide::of(size as f64);
        let slices = self.x.chunks_exact(size.max(1)).zip(self.grad.chunks_exact(size.max(1)));
        for (n, ((x_n, g_n), out)) in slices.zip(for_x.chunks_exact_mut(size.max(1))).enumerate() {
            T::widen(x_n, &mut x);
            T::widen(g_n, &mut g);
            let scale = standardise(&mut x, remove_mean, eps);
            sums.add(n, &x, &g);
            if let Some(weight) = self.weight {
                groups.spread(n, weight, &mut w);
                g.iter_mut().zip(&w).for_each(|(g, &w)| *g *= w);
            }
            let mean = if remove_mean { sum(&g, &g, |g, _| g) / count } else { T::Wide::ZERO };
            let along = sum(&g, &x, |g, x| g * x) / count;
            g.iter_mut().zip(&x).for_each(|(g, &x)| *g = scale * (*g - mean - x * along));
            T::narrow(&g, out);
        }
        (for_x, sums.total())
    }
}

/// Σ g x̂ and Σ g over the samples, by blocks of them.
struct ParameterSums<W> {
    groups: Groups,
    block: Vec<W>,
    total: Vec<W>,
}

impl<W: Real> ParameterSums<W> {
    const BLOCK: usize = 64;

    #[inline(always)]
    fn new(groups: Groups) -> Self {
        let zeros = || vec![W::ZERO; 2 * groups.parameters()];
        Self { groups, block: zeros(), total: zeros() }
    }

    #[inline(always)]
    fn add(&mut self, n: usize, x: &[W], grad: &[W]) {
        let Groups { per_sample, channels, inner } = self.groups;
        if n > 0 && n.is_multiple_of(per_sample * Self::BLOCK) {
            self.close_block();
        }
        let first = (n % per_sample) * channels;
        let (for_weight, for_bias) = self.block.split_at_mut(per_sample * channels);
        let (for_weight, for_bias) = (&mut for_weight[first..first + channels], &mut for_bias[first..first + channels]);
        if inner == 1 {
            for (((for_weight, for_bias), &x), &g) in for_weight.iter_mut().zip(for_bias).zip(x).zip(grad) {
                *for_weight += g * x;
                *for_bias += g;
            }
        } else {
            let channels = x.chunks_exact(inner).zip(grad.chunks_exact(inner));
            for ((for_weight, for_bias), (x, g)) in for_weight.iter_mut().zip(for_bias).zip(channels) {
                *for_weight += sum(g, x, |g, x| g * x);
                *for_bias += sum(g, g, |g, _| g);
            }
        }
    }

    #[inline(always)]
    fn close_block(&mut self) {
        for (total, block) in self.total.iter_mut().zip(&mut self.block) {
            *total += std::mem::replace(block, W::ZERO);
        }
    }

    #[inline(always)]
    fn total(mut self) -> Vec<W> {
        self.close_block();
        self.total
    }
}

/// The gradient of x and the sums Σ g x̂ and Σ g per parameter, `(2, parameters)` in F32 (F64 for F64).
pub(super) fn pull_on_cpu(norm: Norm, x: &Tensor, weight: Option<&Tensor>, grad: &Tensor) -> Result<(Tensor, Tensor)> {
    let parameters = norm.groups.parameters();
    with_element!(x.dtype(), norm.name, T => {
        type Wide = <T as Element>::Wide;
        let weight = weight.map(|w| on_cpu(w, dense_wide::<Wide>)).transpose()?;
        let (for_x, sums) = on_cpu(x, |x, lx| on_cpu(grad, |grad, lg| {
            let (x, grad) = (dense::<T>(x, lx)?, dense::<T>(grad, lg)?);
            Ok(vectorised(Pull::<T> { x: &x, grad: &grad, norm, weight: weight.as_deref() }))
        }))?;
        Ok((leaf(for_x, x.shape().clone()), leaf(sums, Shape::from((2, parameters)))))
    })
}

/// Runs `f` on the storage of a tensor on the CPU.
fn on_cpu<R>(tensor: &Tensor, f: impl FnOnce(&CpuStorage, &Layout) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(storage, layout),
        _ => candle_core::bail!("a norm's cotangent is not on the device of its argument"),
    }
}

fn leaf<T: WithDType>(data: Vec<T>, shape: Shape) -> Tensor {
    Tensor::from_storage(Storage::Cpu(T::to_cpu_storage_owned(data)), shape, BackpropOp::none(), false)
}
