//! What is checked at the first evaluation: that f is a pure function, and leaves its parameters alone.

use super::Forward;
use crate::State;
use crate::error::{OdeError, Result};
use crate::field::ops::combine;
use crate::field::{Casts, Opened, Opening, VectorField, on_host};
use crate::solver::{Clock, Slopes, Stages};
use crate::stats::count;
use crate::time::TimeGrid;
use candle_core::Tensor;

impl Forward<'_> {
    /// Once in the life of a field: opens it over copies of its parameters, evaluates it, and looks whether it wrote to
    /// them. Gives the first slope, to be compared with that of the field as it is built for the pass.
    pub(super) fn probe(&self, start: &State) -> Result<State> {
        count(&self.counters.probes);
        let field = self.field.open(&self.casts.casts, Opening::Probe, self.seed)?;
        let slope = self.first_slope(field.as_ref(), start)?;
        check_unchanged(field.leaves(), &self.casts.casts)?;
        self.field.probed();
        Ok(slope)
    }

    /// The first evaluation, twice: same bits, nothing captured.
    pub(super) fn check_first(&self, opened: &mut Opened<'_>, start: &State, probed: Option<State>) -> Result<()> {
        if !self.checked.determinism {
            return Ok(());
        }
        count(&self.counters.determinism_checks);
        let field = opened.get(self.precision.compute_dtype())?;
        let first = self.first_slope(field, start)?;
        let second = match probed {
            Some(slope) => slope,
            None => self.first_slope(field, start)?,
        };
        check_same_bits(self.course.ends().0, &first, &second)
    }

    fn first_slope(&self, field: &dyn VectorField, start: &State) -> Result<State> {
        let compute = self.precision.compute_dtype();
        let (t, end) = self.course.ends();
        let clock = Clock::new(&TimeGrid::new(vec![t, end])?, self.solver.nodes(), start.device());
        let at = clock.step(0, compute);
        let y = start.detach().try_map(|x| combine::combine(Some(x), &[], compute))?;
        // The unrolled graph reaches captured tensors by itself.
        let slopes = if self.opening == Opening::Track { Slopes::Cut } else { Slopes::Refuse };
        Stages::new(field, self.precision.accumulate_dtype(), &self.counters, slopes).slope(&at, 0, &y)
    }
}

/// The copies that a probe was given must still hold what they were copied from.
fn check_unchanged(copies: &[Tensor], casts: &Casts) -> Result<()> {
    for ((copy, cast), name) in copies.iter().zip(casts.leaves()).zip(casts.names()) {
        if first_difference(copy, cast)?.is_some() {
            return Err(OdeError::ParameterChanged { name: name.clone() });
        }
    }
    Ok(())
}

fn check_same_bits(time: f64, first: &State, second: &State) -> Result<()> {
    for (tensor, (a, b)) in first.tensors().iter().zip(second.tensors()).enumerate() {
        if let Some((index, first, second)) = first_difference(a, b)? {
            return Err(OdeError::NotDeterministic { time, tensor, index, first, second });
        }
    }
    Ok(())
}

/// The first element that differs in its bits, as (flat index, value, value).
fn first_difference(a: &Tensor, b: &Tensor) -> Result<Option<(usize, f64, f64)>> {
    let values = |x: &Tensor| on_host(x)?.to_vec1::<f64>();
    let (a, b) = (values(a)?, values(b)?);
    let found = a.iter().zip(&b).position(|(a, b)| a.to_bits() != b.to_bits());
    Ok(found.map(|index| (index, a[index], b[index])))
}
