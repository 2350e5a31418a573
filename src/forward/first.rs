//! What is checked at the first evaluation: that f is a pure function, and leaves its parameters alone.

use super::{Checked, Forward};
use crate::State;
use crate::error::{OdeError, Result};
use crate::field::ops::combine;
use crate::field::{Casts, Opened, Opening, VectorField, beside, draw, on_host};
use crate::precision::unit_roundoff;
use crate::solver::{Clock, Slopes, Stages};
use crate::stats::{Counters, count};
use crate::tiles::Tiles;
use crate::time::TimeGrid;
use candle_core::{DType, Tensor};
use std::sync::Arc;

impl Forward<'_> {
    /// The first evaluation, twice: same bits, nothing captured, nothing written.
    pub(super) fn check_first(&self, opened: &mut Opened<'_>, start: &State) -> Result<()> {
        let probed = if self.checked.writes && self.field.needs_probe() { Some(self.probe(start)?) } else { None };
        if !self.checked.determinism {
            return Ok(());
        }
        count(&self.counters.determinism_checks);
        let field = opened.get(self.precision.compute_dtype())?;
        let first = self.first_slope(field, start)?;
        // Candle's own graph runs op by op, and what runs in chains need not give the same bits.
        let second = match probed.filter(|_| self.opening != Opening::Track) {
            Some(slope) => slope,
            None => self.first_slope(field, start)?,
        };
        check_same_bits(self.course.ends().0, &first, &second)
    }

    /// The same for the first of several tiles of `start`, on behalf of all; and, once in the life of a field, that its
    /// rows do not see each other.
    pub(crate) fn check_tile(&self, first: &State, start: &State) -> Result<()> {
        let mut opened = self.opened();
        self.check_first(&mut opened, first)?;
        if self.checked.writes && self.field.needs_row_check() {
            let field = opened.get(self.precision.compute_dtype())?;
            // A tile may be a single row, which says nothing.
            let rows = Tiles::batch(first).unwrap_or(0).max(2);
            let several = start.detach().try_map(|x| x.narrow(0, 0, rows))?;
            check_rows(&several, rows, self.precision.compute_dtype(), |y| self.first_slope(field, y))?;
            self.field.rows_checked();
        }
        Ok(())
    }

    /// The same pass without checks, with counters of its own.
    pub(crate) fn checked_already(&self, counters: Arc<Counters>) -> Self {
        Self { checked: Checked { writes: false, determinism: false }, counters, ..self.clone() }
    }

    /// Opens the field over copies of its parameters, evaluates it, and looks whether it wrote to them. Gives the first
    /// slope, to be compared with that of the field as it is built for the pass.
    fn probe(&self, start: &State) -> Result<State> {
        count(&self.counters.probes);
        let field = self.field.open(&self.casts.casts, Opening::Probe, self.seed)?;
        let slope = self.first_slope(field.as_ref(), start)?;
        check_unchanged(field.leaves(), &self.casts.casts)?;
        self.field.probed();
        Ok(slope)
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

/// Near the first point, f of some rows must be what it is of all of them, but for rounding: a matrix product may sum
/// fewer rows in another order. Rows that were alike would hide a mean over them, so they are moved apart.
fn check_rows(first: &State, rows: usize, compute: DType, f: impl Fn(&State) -> Result<State>) -> Result<()> {
    let mut n = 0;
    let apart = |x: &Tensor| {
        n += 1;
        beside(&x.detach().to_dtype(DType::F32)?, n)?.to_dtype(x.dtype())
    };
    let all = first.try_map(apart)?;
    let whole = f(&all)?;
    let of = |from: usize, rows: usize| all.try_map(|x| x.narrow(0, from, rows)?.contiguous());
    let half = rows / 2;
    let (head, tail) = (f(&of(0, half)?)?, draw::from_row(half, || f(&of(half, rows - half)?))?);
    let tolerance = 64.0 * unit_roundoff(compute).min(1e-4);
    for (tensor, whole) in whole.tensors().iter().enumerate() {
        let alone = Tensor::cat(&[&head[tensor], &tail[tensor]], 0)?;
        let (whole, alone) = (on_host(whole)?.to_vec1::<f64>()?, on_host(&alone)?.to_vec1::<f64>()?);
        let largest = whole.iter().chain(&alone).fold(0.0, |largest: f64, x| largest.max(x.abs()));
        let differs = |(whole, alone): (&f64, &f64)| (whole - alone).abs() > tolerance * largest;
        if let Some(index) = whole.iter().zip(&alone).position(differs) {
            return Err(OdeError::NotRowWise { tensor, index, whole: whole[index], alone: alone[index] });
        }
    }
    Ok(())
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

/// Elements that are compared at a time on the CPU: what is copied for it is small beside any state worth a plan. From
/// another device all come in one read.
const CHUNK: usize = 512;

/// The first element that differs in its bits, as (flat index, value, value).
fn first_difference(a: &Tensor, b: &Tensor) -> Result<Option<(usize, f64, f64)>> {
    let (a, b) = (a.detach().flatten_all()?, b.detach().flatten_all()?);
    let count = a.elem_count();
    let chunk = if a.device().is_cpu() { CHUNK } else { count.max(1) };
    for from in (0..count).step_by(chunk) {
        let values = |x: &Tensor| on_host(&x.narrow(0, from, chunk.min(count - from))?)?.to_vec1::<f64>();
        let (a, b) = (values(&a)?, values(&b)?);
        if let Some(index) = a.iter().zip(&b).position(|(a, b)| a.to_bits() != b.to_bits()) {
            return Ok(Some((from + index, a[index], b[index])));
        }
    }
    Ok(None)
}
