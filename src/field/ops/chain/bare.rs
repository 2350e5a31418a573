//! Layers that are all there is to a field, on buffers of its session.

use super::given::Given;
use super::pass::{self, Pulled, Saved, Saves};
use super::{Chain, Compute, Link, Linked, Order, with_compute};
use crate::Time;
use crate::field::bare::{Bare, Buffers, Rows, Site};
use crate::field::ops::combine::{Source, Sum, Target};
use crate::field::ops::conv::fused::{self, Passed};
use crate::field::ops::conv::{Convolved, ImageLayer};
use crate::field::ops::cpu::{Element, vectorised};
use crate::field::session::{Buffered, Call, Matrix, Session};
use candle_core::{DType, Result, bail};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Layers one after another.
pub trait Stacked {
    /// See [`bare`].
    fn bare(&self, site: &Site<'_>) -> Option<Bare>;
}

/// The layers as steps run them, if all of them can be in one chain that the time makes no weights for, on arguments in
/// the dtype of x whose rows are those of x in shape. Values must have the shape of arguments.
pub(in crate::field::ops) fn bare<'a>(
    layers: impl IntoIterator<Item = &'a dyn Linked>,
    &Site { session, x }: &Site<'_>,
) -> Option<Bare> {
    let (chain, _) = session.open(Call::Value, || {
        let mut chain = Chain::start(x).filter(|_| x.device().is_cpu())?;
        let linked = layers.into_iter().all(|layer| layer.link(Some(&Time::new(0.0, x.device())), x, &mut chain));
        (linked && chain.given.is_empty()).then_some((chain.links, chain.of_images))
    });
    let (mut links, images) = chain?;
    links.iter_mut().for_each(|link| link.ready = Some(Arc::default()));
    let rows = match (links.as_slice(), images.as_slice()) {
        ([first, .., last] | [first @ last], _) if first.inputs == last.outputs => {
            linear(session.clone(), x.dtype(), links)
        }
        (_, [first, .., last] | [first @ last])
            if first.given() == last.made() && images.iter().any(|layer| layer.as_norm().is_none()) =>
        {
            of_images(session.clone(), x.dtype(), images)
        }
        _ => return None,
    };
    rows.ok().map(|rows| Bare::new(&x.dims()[1..], rows))
}

fn linear(session: Arc<Session>, dtype: DType, layers: Vec<Link>) -> Result<Box<dyn Rows>> {
    let is_narrow = Order::is_narrow(&layers);
    with_compute!(dtype, is_narrow, C => Ok(Box::new(Stack::<C, _> { session, layers, compute: PhantomData })))
}

fn of_images(session: Arc<Session>, dtype: DType, layers: Vec<ImageLayer>) -> Result<Box<dyn Rows>> {
    with_compute!(dtype, false, C => Ok(Box::new(Stack::<C, _> { session, layers, compute: PhantomData })))
}

/// Layers of one kind, as steps run them.
trait Runs<C: Compute> {
    /// What their pullback needs, beside the value.
    type Saved;

    /// Whether their pullback needs the value.
    fn needs_value(&self) -> bool;

    /// Writes the value at x at a time, if it is wanted, and gives what the pullback needs, if it `saves`.
    fn value(
        &self,
        at: (&Session, f64),
        x: &[C::Stored],
        saves: bool,
        to: Option<&mut [C::Stored]>,
    ) -> Result<Option<Self::Saved>>;

    /// Adds dL/dθ to the open sums and writes S times dL/dx, for a cotangent that is S times that of the value.
    fn pull(
        &self,
        at: (&Session, f64),
        saved: &Self::Saved,
        of_value: (&[C::Stored], &[C::Stored]),
        to: &mut [C::Stored],
    ) -> Result<()>;
}

impl<C: Compute> Runs<C> for Vec<Link> {
    type Saved = Saved<C::Held>;

    fn needs_value(&self) -> bool {
        pass::needs_value(self)
    }

    fn value(
        &self,
        (session, t): (&Session, f64),
        x: &[C::Stored],
        saves: bool,
        to: Option<&mut [C::Stored]>,
    ) -> Result<Option<Self::Saved>> {
        let saves = if saves { Saves::All } else { Saves::Nothing };
        pass::value::<C>((session, self, Some(t)), x, &Given::default(), saves, to)
    }

    fn pull(
        &self,
        (session, t): (&Session, f64),
        saved: &Self::Saved,
        (value, grad): (&[C::Stored], &[C::Stored]),
        to: &mut [C::Stored],
    ) -> Result<()> {
        pass::pull::<C>((session, self, Some(t)), saved, &Given::default(), Pulled { x: None, value, grad }, to)
    }
}

impl<C: Compute<Held: Convolved>> Runs<C> for Vec<ImageLayer> {
    type Saved = Vec<Passed<C::Held>>;

    fn needs_value(&self) -> bool {
        fused::needs_value(self)
    }

    fn value(
        &self,
        (session, t): (&Session, f64),
        x: &[C::Stored],
        saves: bool,
        to: Option<&mut [C::Stored]>,
    ) -> Result<Option<Self::Saved>> {
        fused::value::<C>((session, self, Some(t)), x, saves, to)
    }

    fn pull(
        &self,
        (session, _): (&Session, f64),
        saved: &Self::Saved,
        of_value: (&[C::Stored], &[C::Stored]),
        to: &mut [C::Stored],
    ) -> Result<()> {
        fused::pull::<C>((session, self), saved, of_value, to)
    }
}

struct Stack<C, L> {
    session: Arc<Session>,
    layers: L,
    compute: PhantomData<C>,
}

impl<C: Compute + 'static, L: Runs<C>> Rows for Stack<C, L> {
    fn buffers(&self, stages: usize, elements: usize) -> Box<dyn Buffers + '_> {
        let stages = (0..stages).map(|_| Stage { t: 0.0, slope: None, saved: None, mu: None }).collect();
        Box::new(Step { stack: self, elements, stages, kappa: None })
    }
}

/// What belongs to a stage.
struct Stage<C: Compute, S> {
    t: f64,
    slope: Option<Matrix<C::Stored>>,
    saved: Option<S>,
    /// S μ and 1/S.
    mu: Option<(Matrix<C::Stored>, f64)>,
}

struct Step<'a, C: Compute, L: Runs<C>> {
    stack: &'a Stack<C, L>,
    elements: usize,
    stages: Vec<Stage<C, L::Saved>>,
    kappa: Option<Matrix<f32>>,
}

impl<C: Compute, L: Runs<C>> Step<'_, C, L> {
    fn buffer<T: Buffered>(&self) -> Matrix<T> {
        T::spare(&self.stack.session).matrix(1, self.elements)
    }

    /// kᵢ, if it is `wanted`, and what the pullback needs, if it is to be saved.
    fn run(
        &mut self,
        (i, t): (usize, f64),
        y: &[f32],
        terms: &[(f64, usize)],
        wanted: bool,
        saves: bool,
    ) -> Result<Option<f64>> {
        let Stack { session, layers, .. } = self.stack;
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
        let saved = layers.value((session, t), point, saves, slope.as_deref_mut())?;
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

impl<C: Compute, L: Runs<C>> Buffers for Step<'_, C, L> {
    fn evaluate(&mut self, i: (usize, f64), y: &[f32], terms: &[(f64, usize)]) -> Result<Option<f64>> {
        self.run(i, y, terms, true, false)
    }

    fn linearize(&mut self, i: (usize, f64), y: &[f32], terms: &[(f64, usize)], wanted: bool) -> Result<()> {
        let wanted = wanted || self.stack.layers.needs_value();
        self.run(i, y, terms, wanted, true).map(drop)
    }

    fn end(&self, y: &[f32], terms: &[(f64, usize)]) -> Result<(Vec<f32>, f64)> {
        let mut end = Vec::with_capacity(self.elements);
        let largest = self.sum(y, self.slopes(terms), &mut end)?;
        Ok((end, largest))
    }

    fn gather(&mut self, (c, lambda): (f64, &[f32]), terms: &[(f64, usize)]) -> Result<f64> {
        if !self.stack.layers.needs_value() {
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
        let Stack { session, layers, .. } = self.stack;
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
        layers.pull((session, self.stages[i].t), &saved, (value, grad), &mut mu)?;
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
