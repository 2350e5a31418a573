//! Looks, once in the life of a field, whether its pullback is that of f: some ops cut Candle's graph without a word.
//!
//! Near the first point, for a random direction v in one tensor of the state or in the parameters, the difference
//! quotient d = (f(x + εv) − f(x))/ε is pulled back: ⟨Jᵀd, v⟩ must be ⟨d, d⟩. What two lengths ε disagree by, and what
//! rounding may add, u(‖f‖ + ‖y‖)/ε, say how far d can be trusted. Where it cannot, or where f is flat, as ⌈y⌉ is, the
//! graph must at least reach what f depends on further away. Runs on two rows of the batch if f allows it, in F64 or
//! the widest dtype that f runs in.

use super::model::{Constructor, Model};
use super::{Casts, draw, on_host, vjp};
use crate::error::OdeError;
use crate::precision::unit_roundoff;
use crate::{State, Time};
use candle_core::{DType, Result, Tensor};

/// Says which tensors f depends on in a way that its graph does not have.
///
/// # Errors
/// [`OdeError::NoBackward`] that names them. A field that fails near the first point is left to fail by itself.
pub(super) fn check(constructor: &dyn Constructor, casts: &Casts, seed: u64, t: &Time, y: &State) -> Result<()> {
    for dtype in dtypes(casts) {
        for y in [few_rows(y), Some(y.clone())].into_iter().flatten() {
            let Ok(near) = Near::new(constructor, casts, seed, t, &y, dtype) else { continue };
            return match near.cut() {
                Ok(cut) if !cut.is_empty() => Err(OdeError::graph_cut(&cut.join(" or ")).into()),
                // What has no backward pass at all says so when it is asked for one.
                _ => Ok(()),
            };
        }
    }
    Ok(())
}

/// Parameters that take more than this in F64 are looked at in F32.
const MUCH: usize = 64 << 20;

fn dtypes(casts: &Casts) -> Vec<DType> {
    let elements: usize = casts.leaves().iter().map(Tensor::elem_count).sum();
    let wide = (!casts.device().is_metal() && elements * 8 <= MUCH).then_some(DType::F64);
    let mut dtypes: Vec<DType> = wide.into_iter().chain([DType::F32, casts.dtype()]).collect();
    dtypes.dedup();
    dtypes
}

/// The length of a step of a difference quotient, relative to the size of what is moved.
fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-6,
        DType::F32 => 1e-3,
        DType::F16 => 0.0625,
        _ => 0.25,
    }
}

/// Two rows of a batch, if it is one.
fn few_rows(y: &State) -> Option<State> {
    let rows = y.tensors().first()?.dims().first().copied()?;
    let is_batch = rows > 2 && y.tensors().iter().all(|x| x.dims().first() == Some(&rows));
    is_batch.then(|| y.try_map(|x| x.narrow(0, 0, 2))).and_then(Result::ok)
}

/// f at a point near the first one: at the first one itself ReLU(0) and the like may have no derivative.
struct Near<'a> {
    constructor: &'a dyn Constructor,
    model: Box<dyn Model>,
    seed: u64,
    t: Time,
    casts: Casts,
    y: State,
    f: State,
}

impl<'a> Near<'a> {
    fn new(
        constructor: &'a dyn Constructor,
        casts: &Casts,
        seed: u64,
        t: &Time,
        y: &State,
        dtype: DType,
    ) -> Result<Self> {
        let mut n = 0;
        let mut near = |x: &Tensor| {
            n += 1;
            let x = x.detach().to_dtype(dtype)?;
            leaf(&beside(&x, n)?)
        };
        let y = y.try_map(&mut near)?;
        let casts = casts.in_dtype(dtype, |x| match x.is_variable() {
            true => near(x),
            false if x.dtype().is_float() => x.to_dtype(dtype),
            false => Ok(x.clone()),
        })?;
        let t = Time::new(t.value(), casts.device());
        let model = draw::seeded(seed, || constructor.build(casts.var_builder()))?;
        let f = model.eval(&t, &y, casts.inputs())?;
        Ok(Self { constructor, model, seed, t, casts, y, f })
    }

    /// The names of what f depends on, and its graph does not know or knows wrongly.
    fn cut(&self) -> Result<Vec<String>> {
        let mut cut = vec![];
        for (n, leaf) in self.y.tensors().iter().enumerate() {
            let along = |epsilon: f64| {
                let mut y = self.y.detach().into_tensors();
                y[n] = moved(&y[n], epsilon, &direction(&y[n], n)?)?;
                self.model.eval(&self.t, &State::from(y), self.casts.inputs())
            };
            if self.is_cut(along, &[(leaf, n)])? {
                cut.push(format!("tensor {n} of the state"));
            }
        }
        let all: Vec<usize> = (0..self.casts.leaves().len()).filter(|&slot| self.is_looked_at(slot)).collect();
        if !self.is_cut_from(&all)? {
            return Ok(cut);
        }
        for slot in all {
            if self.is_cut_from(&[slot])? {
                cut.push(format!("`{}`", self.casts.names()[slot]));
            }
        }
        Ok(cut)
    }

    /// A BatchNorm in evaluation mode detaches its running statistics, and means it.
    fn is_looked_at(&self, slot: usize) -> bool {
        let name = &self.casts.names()[slot];
        self.casts.leaves()[slot].is_variable() && !name.ends_with("running_mean") && !name.ends_with("running_var")
    }

    fn is_cut_from(&self, slots: &[usize]) -> Result<bool> {
        let along = |epsilon: f64| {
            let mut slot = 0;
            let casts = self.casts.detached().in_dtype(self.casts.dtype(), |x| {
                slot += 1;
                match slots.contains(&(slot - 1)) {
                    true => moved(x, epsilon, &direction(x, slot - 1)?),
                    false => Ok(x.clone()),
                }
            })?;
            let model = draw::seeded(self.seed, || self.constructor.build(casts.var_builder()))?;
            model.eval(&self.t, &self.y.detach(), casts.inputs())
        };
        let leaves: Vec<(&Tensor, usize)> = slots.iter().map(|&slot| (&self.casts.leaves()[slot], slot)).collect();
        self.is_cut(along, &leaves)
    }

    fn is_reached(&self, leaves: &[(&Tensor, usize)]) -> bool {
        let mut nodes = self.f.tensors().iter().filter(|f| f.track_op()).flat_map(|f| f.sorted_nodes());
        nodes.any(|node| leaves.iter().any(|(leaf, _)| leaf.id() == node.id()))
    }

    /// Whether the pullback to `leaves`, each with the number of its direction, contradicts f `along` them.
    fn is_cut(&self, along: impl Fn(f64) -> Result<State>, leaves: &[(&Tensor, usize)]) -> Result<bool> {
        let epsilon = epsilon(self.casts.dtype());
        // A field that is not defined there says nothing about its graph.
        let (Ok(far), Ok(close)) = (along(epsilon), along(epsilon / 2.0)) else { return Ok(false) };
        let quotient = |there: &State, epsilon: f64| {
            let pairs = there.tensors().iter().zip(self.f.tensors());
            let quotients = pairs.map(|(there, here)| (there.detach() - here.detach())? / epsilon);
            quotients.collect::<Result<Vec<Tensor>>>()
        };
        let (rough, d) = (quotient(&far, epsilon)?, quotient(&close, epsilon / 2.0)?);
        let squared = dots(d.iter().zip(&d))?;
        let disagreement = d.iter().zip(&rough).map(|(a, b)| a - b).collect::<Result<Vec<_>>>()?;
        // Both lengths may give the same few ulp of f, or of what f is made of: y Φ(y) is y times what is left of 1 −
        // 1.
        let rounding = unit_roundoff(self.casts.dtype()) * (size(&self.f)? + size(&self.y)?) / (epsilon / 2.0);
        let off = dots(disagreement.iter().zip(&disagreement))?.sqrt() + rounding;
        // Nor does a NaN.
        if !(squared + off).is_finite() {
            return Ok(false);
        }
        let doubt = 10.0 * off / squared.sqrt();
        // Squares underflow before d does.
        if squared < f64::MIN_POSITIVE / f64::EPSILON || doubt >= 0.5 {
            return Ok(!self.is_reached(leaves) && along(0.5).is_ok_and(|far| differs(&self.f, &far).unwrap_or(false)));
        }
        let wanted: Vec<Tensor> = leaves.iter().map(|(leaf, _)| (*leaf).clone()).collect();
        let pulled = vjp::vjp(self.f.tensors(), &d, &wanted)?;
        let mut known = 0.0;
        for (pulled, (leaf, n)) in pulled.iter().zip(leaves) {
            if let Some(pulled) = pulled {
                known += dots([(pulled, &direction(leaf, *n)?)])?;
            }
        }
        Ok((known - squared).abs() > doubt.max(1e-3) * squared)
    }
}

/// A point a hundredth of its size away from `x`: another one for each `n`.
pub(crate) fn beside(x: &Tensor, n: usize) -> Result<Tensor> {
    moved(x, 0.01, &direction(x, n)?)
}

/// Normal numbers times the size of what is moved: made anew each time they are needed, and never kept.
fn direction(x: &Tensor, n: usize) -> Result<Tensor> {
    let values = on_host(x)?;
    let size = values.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt();
    let draws = draw::Stream::from_seed(n as u64).normal(x.shape(), x.dtype(), x.device())?;
    draws * if size > 0.0 { size } else { 1.0 }
}

fn moved(x: &Tensor, epsilon: f64, v: &Tensor) -> Result<Tensor> {
    x + (v * epsilon)?
}

fn leaf(x: &Tensor) -> Result<Tensor> {
    super::ops::combine::leaf(x, x.dtype())
}

fn differs(a: &State, b: &State) -> Result<bool> {
    let pairs = a.tensors().iter().zip(b.tensors());
    let differences = pairs.map(|(a, b)| on_host(a)? - on_host(b)?).collect::<Result<Vec<_>>>()?;
    Ok(dots(differences.iter().zip(&differences))? > 0.0)
}

/// ‖x‖, in F64.
fn size(x: &State) -> Result<f64> {
    Ok(dots(x.tensors().iter().zip(x.tensors()))?.sqrt())
}

/// Σ ⟨a, b⟩, in F64.
fn dots<'a>(pairs: impl IntoIterator<Item = (&'a Tensor, &'a Tensor)>) -> Result<f64> {
    let dot = |(a, b): (&Tensor, &Tensor)| (on_host(a)? * on_host(b)?)?.sum_all()?.to_scalar::<f64>();
    pairs.into_iter().map(dot).sum()
}
