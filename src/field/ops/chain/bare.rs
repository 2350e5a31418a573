//! Layers that are all there is to a field, on buffers of its session.

use super::given::Given;
use super::pass::{self, Pulled, Saved, Saves};
use super::{Chain, Compute, Link, Linked, Order, with_compute};
use crate::Time;
use crate::field::bare::{Bare, Buffers, Rows, Site};
use crate::field::ops::combine::{Source, Sum, Target};
use crate::field::ops::cpu::{Element, vectorised};
use crate::field::session::{Buffered, Call, Matrix, Session};
use candle_core::{Result, bail};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Layers one after another.
pub trait Stacked {
    /// See [`bare`].
    fn bare(&self, site: &Site<'_>) -> Option<Bare>;
}

/// The layers as steps run them, if all of them can be in one chain that the time makes no weights for, on arguments in the
/// dtype of x whose rows are as wide as those of x. Values must be as wide as arguments.
pub(in crate::field::ops) fn bare<'a>(
    layers: impl IntoIterator<Item = &'a dyn Linked>,
    &Site { session, x }: &Site<'_>,
) -> Option<Bare> {
    let (links, _) = session.open(Call::Value, || {
        let mut chain = Chain::start(x).filter(|_| x.device().is_cpu())?;
        let linked = layers.into_iter().all(|layer| layer.link(Some(&Time::new(0.0, x.device())), x, &mut chain));
        (linked && chain.given.is_empty()).then_some(chain.links)
    });
    let mut links = links?;
    links.iter_mut().for_each(|link| link.ready = Some(Arc::default()));
    let (first, last) = (links.first()?, links.last()?);
    if first.inputs != last.outputs {
        return None;
    }
    let (is_narrow, session) = (Order::is_narrow(&links), session.clone());
    let rows = with_compute!(x.dtype(), is_narrow, C => {
        Ok(Box::new(Stack::<C> { session, links, compute: PhantomData }) as Box<dyn Rows>)
    });
    rows.ok().map(Bare::new)
}

struct Stack<C> {
    session: Arc<Session>,
    links: Vec<Link>,
    compute: PhantomData<C>,
}

impl<C: Compute + 'static> Rows for Stack<C> {
    fn features(&self) -> usize {
        self.links[0].inputs
    }

    fn buffers(&self, stages: usize, elements: usize) -> Box<dyn Buffers + '_> {
        let stages = (0..stages).map(|_| Stage { t: 0.0, slope: None, saved: None, mu: None }).collect();
        Box::new(Step::<C> { layers: self, elements, stages, kappa: None })
    }
}

/// What belongs to a stage.
struct Stage<C: Compute> {
    t: f64,
    slope: Option<Matrix<C::Stored>>,
    saved: Option<Saved<C::Held>>,
    /// S μ and 1/S.
    mu: Option<(Matrix<C::Stored>, f64)>,
}

struct Step<'a, C: Compute> {
    layers: &'a Stack<C>,
    elements: usize,
    stages: Vec<Stage<C>>,
    kappa: Option<Matrix<f32>>,
}

impl<C: Compute> Step<'_, C> {
    fn buffer<T: Buffered>(&self) -> Matrix<T> {
        T::spare(&self.layers.session).matrix(1, self.elements)
    }

    /// kᵢ, if it is `wanted`, and what the pullback needs, if it is to be saved.
    fn run(
        &mut self,
        (i, t): (usize, f64),
        y: &[f32],
        terms: &[(f64, usize)],
        wanted: bool,
        saves: Saves,
    ) -> Result<Option<f64>> {
        let Stack { session, links, .. } = self.layers;
        let mut slope = wanted.then(|| self.buffer());
        let (mut own, mut largest) = (None, None);
        let point: &[C::Stored] = match C::Stored::same(y).filter(|_| terms.is_empty()) {
            Some(y) => y,
            None => {
                let point = own.insert(self.buffer::<C::Stored>());
                largest = Some(self.sum(y, self.slopes(terms), &mut point[..])?);
                point
            }
        };
        let saved = pass::value::<C>((session, links, Some(t)), point, &Given::default(), saves, slope.as_deref_mut())?;
        let stage = &mut self.stages[i];
        (stage.t, stage.slope, stage.saved) = (t, slope, saved);
        Ok(largest)
    }

    fn slopes<'b>(&'b self, terms: &'b [(f64, usize)]) -> impl Iterator<Item = (f32, &'b [C::Stored])> + Clone {
        terms.iter().filter_map(|&(c, j)| Some((c as f32, self.stages[j].slope.as_deref()?)))
    }

    fn cotangents<'b>(&'b self, terms: &'b [(f64, usize)]) -> impl Iterator<Item = (f32, &'b [C::Stored])> + Clone {
        terms.iter().filter_map(|&(c, j)| {
            let (mu, inverse) = self.stages[j].mu.as_ref()?;
            Some(((c * inverse) as f32, &mu[..]))
        })
    }

    /// base + Σ terms, rounded once; its largest absolute value.
    fn sum<'b, T: Target<f32> + ?Sized>(
        &self,
        base: &[f32],
        terms: impl Iterator<Item = (f32, &'b [C::Stored])> + Clone,
        to: &mut T,
    ) -> Result<f64>
    where
        C: 'b,
    {
        vectorised(Sum { base: Some(base), terms, count: self.elements, to })
    }
}

/// An operand of a sum.
#[derive(Clone, Copy)]
enum Operand<'a, T> {
    Stored(&'a [T]),
    Wide(&'a [f32]),
}

impl<T: Element<Wide = f32>> Source<f32> for Operand<'_, T> {
    #[inline(always)]
    fn read<'a>(&'a self, range: Range<usize>, space: &'a mut [f32]) -> Result<&'a [f32]> {
        match self {
            Self::Stored(x) => x.read(range, space),
            Self::Wide(x) => x.read(range, space),
        }
    }
}

impl<C: Compute> Buffers for Step<'_, C> {
    fn evaluate(&mut self, i: (usize, f64), y: &[f32], terms: &[(f64, usize)]) -> Result<Option<f64>> {
        self.run(i, y, terms, true, Saves::Nothing)
    }

    fn linearize(&mut self, i: (usize, f64), y: &[f32], terms: &[(f64, usize)], wanted: bool) -> Result<()> {
        let wanted = wanted || pass::needs_value(&self.layers.links);
        self.run(i, y, terms, wanted, Saves::All).map(drop)
    }

    fn end(&self, y: &[f32], terms: &[(f64, usize)]) -> Result<(Vec<f32>, f64)> {
        let mut end = Vec::with_capacity(self.elements);
        let largest = self.sum(y, self.slopes(terms), &mut end)?;
        Ok((end, largest))
    }

    fn gather(&mut self, (c, lambda): (f64, &[f32]), terms: &[(f64, usize)]) -> Result<f64> {
        if !pass::needs_value(&self.layers.links) {
            // No stage is evaluated any more, and no pullback reads them.
            self.stages.iter_mut().for_each(|stage| stage.slope = None);
        }
        let mut kappa = self.kappa.take().unwrap_or_else(|| self.buffer());
        let of_lambda = (c != 0.0).then_some((c as f32, Operand::Wide(lambda)));
        let of_later = self.cotangents(terms).map(|(c, mu)| (c, Operand::Stored(mu)));
        let (terms, to) = (of_lambda.into_iter().chain(of_later), &mut kappa[..]);
        let largest = vectorised(Sum { base: None::<&[f32]>, terms, count: self.elements, to })?;
        self.kappa = Some(kappa);
        Ok(largest)
    }

    fn pull(&mut self, i: usize, scale: f64) -> Result<()> {
        let Stack { session, links, .. } = self.layers;
        let (Some(kappa), Some(saved)) = (&self.kappa, self.stages[i].saved.take()) else {
            bail!("a stage is pulled back once, after it was linearised")
        };
        let mut own = None;
        let grad: &[C::Stored] = match C::Stored::same(kappa).filter(|_| scale == 1.0) {
            Some(kappa) => kappa,
            None => {
                let scaled = own.insert(self.buffer::<C::Stored>());
                let (terms, to) = (std::iter::once((scale as f32, &kappa[..])), &mut scaled[..]);
                vectorised(Sum { base: None::<&[f32]>, terms, count: self.elements, to })?;
                scaled
            }
        };
        let mut mu = self.buffer();
        let slope = self.stages[i].slope.take();
        let value = slope.as_deref().unwrap_or_default();
        let layers = (&**session, &links[..], Some(self.stages[i].t));
        pass::pull::<C>(layers, &saved, &Given::default(), Pulled { x: None, value, grad }, &mut mu)?;
        self.stages[i].mu = Some((mu, 1.0 / scale));
        Ok(())
    }

    fn is_finite(&self, i: usize) -> bool {
        let is_finite = |x: &C::Stored, inverse: f64| (Into::<f32>::into(*x) * inverse as f32).is_finite();
        self.stages[i].mu.as_ref().is_none_or(|(mu, inverse)| mu.iter().all(|x| is_finite(x, *inverse)))
    }

    fn back(&self, lambda: &[f32], terms: &[(f64, usize)]) -> Result<(Vec<f32>, f64)> {
        let mut back = Vec::with_capacity(self.elements);
        let largest = self.sum(lambda, self.cotangents(terms), &mut back)?;
        Ok((back, largest))
    }
}
