//! The weights of a chain's layers: parameters of the open field, or of a tensor that the chain is given beside x, such
//! as a network makes of the time; how they are packed, and where their gradients go.

use super::Link;
use super::given::Way;
use super::order::{Order, Ordered};
use super::parameter::{Parameter, float, with_elements, with_float};
use crate::field::ops::cpu::{Element, Kernel, sum, vectorised};
use crate::field::ops::kernel::{Epilogue, Packed, Pullback, Then, View, ViewMut};
use crate::field::session::{Buffered, Matrix, Session, Shared, Side, Tile};
use crate::field::sink;
use candle_core::{Result, Tensor};
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Weight and bias of a layer.
#[derive(Clone, Debug)]
pub(in crate::field::ops) enum Weights {
    /// Parameters of the open field.
    Parameters {
        weight: Parameter,
        bias: Option<Parameter>,
        /// The time, which multiplies the one column of W beyond the inputs.
        beyond: Option<f64>,
    },
    /// Parameters, of which a gate multiplies each row of W and element of b; a shift is added to the latter. Gate and
    /// shift are elements of what the chain is given.
    Gated { weight: Parameter, bias: Parameter, gate: Range<usize>, shift: Range<usize> },
    /// W and b are elements of what the chain is given.
    Given { weight: Range<usize>, bias: Range<usize> },
}

impl Weights {
    /// Those that are parameters.
    pub(super) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let (weight, bias) = match self {
            Self::Parameters { weight, bias, .. } => (Some(weight), bias.as_ref()),
            Self::Gated { weight, bias, .. } => (Some(weight), Some(bias)),
            Self::Given { .. } => (None, None),
        };
        weight.into_iter().chain(bias)
    }
}

/// The packed weights of a layer that lives as long as its session, by side, once they have been asked for.
#[derive(Debug, Default)]
pub(super) struct Ready([OnceLock<Arc<dyn Any + Send + Sync>>; 2]);

impl Ready {
    fn packed<T: Tile>(&self, side: Side) -> Option<Arc<Shared<T>>> {
        self.0[side as usize].get()?.clone().downcast().ok()
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
    /// dW += gᵀ x and db += Σ g, for those of the two that are tracked; db of those rows of g that the bias was added
    /// to.
    pub(super) fn add_gradients<T: Ordered>(
        &self,
        way: Way<'_>,
        (g, biased): (View<'_, T>, View<'_, T>),
        x: View<'_, T>,
    ) -> Result<()> {
        if !self.is_tracked(way) {
            return Ok(());
        }
        let Way { session, order, given, time } = way;
        let sums = noted_sums(session, order, biased, self.outputs);
        let columns = self.columns();
        let add_outer = |dw: &mut [f32]| {
            T::add_outer(order, session, g, x, ViewMut::new(dw, self.outputs, self.inputs, columns));
        };
        match &self.weights {
            Weights::Gated { weight, bias, gate, shift } => {
                given.add(shift.clone(), |of_shift| add(&sums, of_shift));
                let mut of_weight = f32::spare(session).matrix(self.outputs, self.inputs);
                of_weight.fill(0.0);
                add_outer(&mut of_weight);
                add_gated(way, (weight, bias), gate, (&of_weight, &sums))
            }
            Weights::Given { weight, bias } => {
                given.add(weight.clone(), add_outer);
                given.add(bias.clone(), |of_bias| add(&sums, of_bias));
                Ok(())
            }
            Weights::Parameters { weight, bias, beyond } => {
                self.add_to_parameters((weight, bias.as_ref()), beyond.map(|t| time.unwrap_or(t)), sums, |dw, _| {
                    add_outer(dw);
                })
            }
        }
    }

    /// To what is tracked of a layer's parameters: to dW what `add_outer` adds, which may make the sums, too; to that
    /// of the column beyond the inputs the time as often, and to db the sums.
    fn add_to_parameters(
        &self,
        (weight, bias): (&Parameter, Option<&Parameter>),
        time: Option<f64>,
        mut sums: Matrix<f32>,
        add_outer: impl FnOnce(&mut [f32], &mut [f32]),
    ) -> Result<()> {
        if weight.is_tracked() {
            sink::add_in_place(&weight.leaf, |dw| {
                add_outer(dw, &mut sums);
                if let Some(t) = time {
                    let beyond = dw.iter_mut().skip(self.inputs).step_by(self.columns());
                    beyond.zip(sums.iter()).for_each(|(dw, sum)| *dw += t as f32 * sum);
                }
            })?;
        }
        match bias.filter(|bias| bias.is_tracked()) {
            Some(bias) => bias.add(&sums),
            None => Ok(()),
        }
    }

    /// Before the cotangent g of the result is pulled back to x: adds the gradients of weights that are not added to
    /// along with that, and makes g the cotangent of the product. Says whether gradients are still to be added.
    pub(super) fn before_pull<T: Ordered>(&self, way: Way<'_>, g: &mut Matrix<T>, x: View<'_, T>) -> Result<bool> {
        let adds = matches!(&self.weights, Weights::Parameters { weight, .. } if weight.is_tracked());
        // Where nothing is summed, what adds to the sums is not run.
        if adds && sink::sums() {
            return Ok(true);
        }
        self.add_gradients(way, (g.view(), g.view()), x)?;
        let rows = g.len() / self.outputs;
        self.times_gate(way, g, rows)?;
        Ok(false)
    }

    /// out = then(g W) for the cotangent g of the product; and dW += gᵀ x, db += Σ g, if they are still to be added.
    pub(super) fn pull<T: Ordered>(
        &self,
        way: Way<'_>,
        adds: bool,
        (g, x): (View<'_, T>, View<'_, T>),
        then: Then<'_, T>,
        out: ViewMut<'_, T>,
    ) -> Result<()> {
        let (Way { session, order, time, .. }, b) = (way, self.packed::<T>(way, Side::Backward)?);
        match &self.weights {
            Weights::Parameters { weight, bias, beyond } if adds => {
                let mut sums = f32::spare(session).matrix(1, self.outputs);
                sums.fill(0.0);
                let (beyond, mut is_finite) = (beyond.map(|t| time.unwrap_or(t)), true);
                self.add_to_parameters((weight, bias.as_ref()), beyond, sums, |dw, db| {
                    let dw = ViewMut::new(dw, self.outputs, self.inputs, self.columns());
                    T::pull(order, session, Pullback { g, x, b: &b, then, db, dw, out });
                    is_finite = db.iter().all(|sum| sum.is_finite());
                })?;
                sink::note(is_finite);
                Ok(())
            }
            _ => {
                T::multiply(order, g, &b, &Epilogue { then, ..Epilogue::default() }, out);
                Ok(())
            }
        }
    }

    /// Whether a gradient of it is wanted.
    pub(super) fn is_tracked(&self, way: Way<'_>) -> bool {
        match &self.weights {
            Weights::Parameters { weight, bias, .. } => {
                weight.is_tracked() || bias.as_ref().is_some_and(Parameter::is_tracked)
            }
            Weights::Gated { weight, bias, .. } => weight.is_tracked() || bias.is_tracked() || way.given.is_summed(),
            Weights::Given { .. } => way.given.is_summed(),
        }
    }

    /// From a row of W to the next.
    fn columns(&self) -> usize {
        self.inputs + usize::from(matches!(self.weights, Weights::Parameters { beyond: Some(_), .. }))
    }

    /// W as the right-hand operand of the products on one side.
    pub(super) fn packed<T: Tile>(&self, Way { session, given, .. }: Way<'_>, side: Side) -> Result<Arc<Shared<T>>> {
        let Parameter { leaf, slot } = match &self.weights {
            Weights::Parameters { weight, .. } | Weights::Gated { weight, .. } => weight,
            Weights::Given { weight, .. } => {
                return Ok(Shared::new(self.pack::<T, f32>(side, given.part(weight.clone())?)));
            }
        };
        if let Some(packed) = self.ready.as_ref().and_then(|ready| ready.packed(side)) {
            return Ok(packed);
        }
        let key = (*slot, self.inputs, side);
        let packed = match session.seen(key) {
            Some(packed) => packed,
            None => {
                let leaf = leaf.contiguous()?;
                with_float!(leaf.dtype(), S => {
                    with_elements(&leaf, |w| Ok(session.packed(key, |side| self.pack::<T, S>(side, w))))
                })?
            }
        };
        if let Some(ready) = &self.ready {
            ready.0[side as usize].get_or_init(|| packed.clone());
        }
        Ok(packed)
    }

    fn pack<T: Tile, S: Copy + Into<f32>>(&self, side: Side, w: &[S]) -> Packed<T> {
        let view = View::new(w, self.outputs, self.inputs, self.columns());
        match side {
            Side::Forward => Packed::transposed(view),
            Side::Backward => Packed::straight(view),
        }
    }

    /// What the product is multiplied with.
    pub(super) fn gate<'a>(&self, Way { given, .. }: Way<'a>) -> Result<Option<&'a [f32]>> {
        match &self.weights {
            Weights::Gated { gate, .. } => given.part(gate.clone()).map(Some),
            Weights::Parameters { .. } | Weights::Given { .. } => Ok(None),
        }
    }

    /// From the cotangent of the result to that of the product.
    pub(super) fn times_gate<T: Ordered>(&self, way: Way<'_>, g: &mut [T], rows: usize) -> Result<()> {
        let Some(gate) = self.gate(way)? else { return Ok(()) };
        let times = |g: &mut T, gate: f32| *g = T::of(g.wide() * gate);
        match way.order {
            Order::Rows => {
                for row in g.chunks_exact_mut(self.outputs) {
                    row.iter_mut().zip(gate).for_each(|(g, gate)| times(g, *gate));
                }
            }
            Order::Lanes => {
                for (of_feature, gate) in g.chunks_exact_mut(rows).zip(gate) {
                    of_feature.iter_mut().for_each(|g| times(g, *gate));
                }
            }
        }
        Ok(())
    }

    /// What is added to the product, in F32: b + t w, where w is the column beyond.
    pub(super) fn bias_in_f32(&self, Way { session, given, time, .. }: Way<'_>) -> Result<Option<Matrix<f32>>> {
        let (weight, bias, beyond) = match &self.weights {
            Weights::Parameters { bias: None, beyond: None, .. } => return Ok(None),
            Weights::Parameters { weight, bias, beyond } => (weight, bias, beyond),
            Weights::Gated { bias, gate, shift, .. } => {
                let mut sum = bias.in_f32(session)?;
                let (gate, shift) = (given.part(gate.clone())?, given.part(shift.clone())?);
                sum.iter_mut().zip(gate.iter().zip(shift)).for_each(|(sum, (gate, shift))| *sum = *sum * gate + shift);
                return Ok(Some(sum));
            }
            Weights::Given { bias, .. } => {
                let mut sum = f32::spare(session).matrix(1, self.outputs);
                sum.copy_from_slice(given.part(bias.clone())?);
                return Ok(Some(sum));
            }
        };
        let mut sum = f32::spare(session).matrix(1, self.outputs);
        sum.fill(0.0);
        if let Some(bias) = bias {
            add_elements(&bias.leaf, 1.0, (0, 1), &mut sum)?;
        }
        if let Some(t) = beyond.map(|t| time.unwrap_or(t)) {
            add_elements(&weight.leaf, t as f32, (self.inputs, self.inputs + 1), &mut sum)?;
        }
        Ok(Some(sum))
    }
}

/// With dV and dc of V = σ ∘ W and c = σ ∘ b + s: dW += σ ∘ dV, db += σ ∘ dc, and dσ += Σ W ∘ dV along the rows + b ∘
/// dc.
fn add_gated(
    Way { given, .. }: Way<'_>,
    (weight, bias): (&Parameter, &Parameter),
    gate: &Range<usize>,
    (of_weight, of_bias): (&[f32], &[f32]),
) -> Result<()> {
    let values = given.part(gate.clone())?;
    for (parameter, of) in [(weight, of_weight), (bias, of_bias)] {
        if given.is_summed() {
            let leaf = parameter.leaf.contiguous()?;
            with_float!(leaf.dtype(), T => with_elements::<T, _>(&leaf, |w| {
                given.add(gate.clone(), |sums| vectorised(AddDots { w, of, sums }));
                Ok(())
            }))?;
        }
        if parameter.is_tracked() {
            sink::add_in_place(&parameter.leaf, |sums| vectorised(AddScaledRows { gate: values, of, sums }))?;
        }
    }
    Ok(())
}

/// to += x
fn add(x: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += x);
}

/// sums += Σ W ∘ dW along the rows of a matrix.
struct AddDots<'a, T> {
    w: &'a [T],
    of: &'a [f32],
    sums: &'a mut [f32],
}

impl<T: Element<Wide = f32>> Kernel for AddDots<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let columns = self.of.len() / self.sums.len().max(1);
        let mut space = vec![0.0; columns];
        for (of_row, (w, of)) in
            self.sums.iter_mut().zip(self.w.chunks_exact(columns).zip(self.of.chunks_exact(columns)))
        {
            *of_row += sum(T::widened(w, &mut space), of, |w, of| w * of);
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
    let x = x.contiguous()?;
    with_float!(x.dtype(), S => with_elements::<S, _>(&x, |x| {
        let add = |(sum, x): (&mut f32, &S)| *sum += c * float(*x);
        match step {
            // Elements side by side are added in vectors.
            1 => sum.iter_mut().zip(&x[first..]).for_each(add),
            _ => sum.iter_mut().zip(x.iter().skip(first).step_by(step)).for_each(add),
        }
        Ok(())
    }))
}
