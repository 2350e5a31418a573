//! The states a walk has kept, encoded: each by itself, or as the increment to the next.

use super::codec::{Codec, Encodes, Entry, States};
use crate::State;
use crate::account::{Category, Owned};
use crate::error::{OdeError, Result};
use crate::field::{Finite, sum};
use crate::solver::Linearized;
use candle_core::DType;
use std::collections::BTreeMap;
use std::sync::Arc;

/// One kept state.
#[derive(Debug)]
pub(crate) struct Kept {
    at: usize,
    /// Whether the entry is y_{at+1} − y_at.
    is_increment: bool,
    entry: Entry,
    codec: Arc<dyn Codec>,
    owned: Owned,
}

impl Kept {
    /// What an entry takes in a list of entries, beside itself.
    pub(crate) const BESIDE: usize = size_of::<Self>() + 3 * size_of::<usize>();

    fn decode(&self, dtype: DType) -> Result<State> {
        let _span = tracing::trace_span!(target: "candle_ode", "decode").entered();
        let state = self.codec.decode(&self.entry, dtype)?;
        if state.len() != self.entry.shapes.len() {
            let (found, expected) = (state.len(), self.entry.shapes.len());
            return Err(OdeError::Unsupported {
                what: format!("a codec that decodes {found} tensors where it was given {expected}"),
                instead: "Codec::decode gives back the tensors that were encoded",
            });
        }
        Ok(state)
    }
}

/// A state that is at hand: as it is, or to be decoded when it is needed, and every time it is.
pub(crate) enum AtHand {
    /// As it is.
    State(State),
    /// To be decoded to this dtype.
    Kept(Arc<Kept>, DType),
}

impl AtHand {
    /// The state.
    pub(crate) fn state(&self) -> Result<State> {
        match self {
            Self::State(state) => Ok(state.clone()),
            Self::Kept(kept, dtype) => kept.decode(*dtype),
        }
    }
}

/// Kept states, earliest first, and what rounding has left over of the state at hand.
#[derive(Debug)]
pub(crate) struct Slots {
    codec: Arc<dyn Codec>,
    accumulate: DType,
    kept: Vec<Arc<Kept>>,
    residual: Option<(State, Owned)>,
    /// The last state that was restored, from which the one below may have to be decoded.
    above: Option<(usize, State)>,
    /// By state, the linearisations of the step that led to it.
    linearized: BTreeMap<usize, Arc<Linearized>>,
}

impl Slots {
    pub(crate) fn new(codec: Arc<dyn Codec>, accumulate: DType) -> Self {
        Self { codec, accumulate, kept: vec![], residual: None, above: None, linearized: BTreeMap::new() }
    }

    /// The same entries, for a walk that may drop them without taking them from others.
    pub(crate) fn share(&self) -> Self {
        Self { kept: self.kept.clone(), linearized: self.linearized.clone(), ..self.emptied() }
    }

    /// No entries, for a walk that starts over.
    pub(crate) fn emptied(&self) -> Self {
        Self::new(self.codec.clone(), self.accumulate)
    }

    /// Keeps the linearisations of the step that led to state `n`.
    pub(crate) fn keep_linearized(&mut self, n: usize, linearized: Arc<Linearized>) {
        self.linearized.insert(n, linearized);
    }

    /// The linearisations of the step that led to state `n`, if they are kept.
    pub(crate) fn linearized(&self, n: usize) -> Option<Arc<Linearized>> {
        self.linearized.get(&n).cloned()
    }

    /// The states that are kept, ascending.
    pub(crate) fn states(&self) -> Vec<usize> {
        self.kept.iter().map(|kept| kept.at).collect()
    }

    /// Bytes of all entries.
    pub(crate) fn bytes(&self) -> usize {
        self.kept.iter().map(|kept| kept.owned.bytes()).sum()
    }

    /// The dtype entries are kept in.
    pub(crate) fn dtype(&self) -> DType {
        self.codec.dtype()
    }

    /// A state that was computed as `after`, with what rounding has left over so far.
    pub(crate) fn whole(&self, after: &State) -> Result<State> {
        match &self.residual {
            None => Ok(after.clone()),
            Some((residual, _)) => sum(Some(after), &[(1.0, residual)], self.accumulate),
        }
    }

    /// The step from `before` (state n − 1) has led to `after`: gives the state n to go on from, and keeps it if wanted.
    /// `exactly` sees whether its encoding is finite and may ask for one that rounds nothing.
    pub(crate) fn reach(
        &mut self,
        n: usize,
        before: &State,
        after: State,
        keep: bool,
        mut exactly: impl FnMut(&Finite) -> Result<bool>,
    ) -> Result<(State, Finite)> {
        let follows = self.kept.last().is_some_and(|kept| kept.at + 1 == n && !kept.is_increment);
        if keep && follows && self.codec.encodes() == Encodes::Increments {
            let increment = self.increment(before, &after)?;
            let (entry, finite) = self.encode(&self.codec, &increment)?;
            // Where no increment fits, the state is kept as it is.
            if !exactly(&finite)? {
                return Ok((self.follow(n, before, &increment, entry)?, finite));
            }
        }
        let y = self.whole(&after)?;
        self.residual = None;
        let finite = if keep { self.keep(n, &y, exactly)? } else { Finite::default() };
        Ok((y, finite))
    }

    /// Keeps state `n`, unless it is kept.
    pub(crate) fn keep(
        &mut self,
        n: usize,
        y: &State,
        mut exactly: impl FnMut(&Finite) -> Result<bool>,
    ) -> Result<Finite> {
        if self.kept.last().is_some_and(|kept| kept.at == n) {
            return Ok(Finite::default());
        }
        let codec = match self.codec.encodes() {
            Encodes::States => self.codec.clone(),
            Encodes::Increments => self.exact(),
        };
        let (entry, finite) = self.encode(&codec, y)?;
        if !exactly(&finite)? {
            self.push(n, false, codec, entry);
            return Ok(finite);
        }
        let exact = self.exact();
        let (entry, _) = self.encode(&exact, y)?;
        self.push(n, false, exact, entry);
        Ok(Finite::default())
    }

    /// State `n`, to be used as long as it is at hand.
    pub(crate) fn restore(&mut self, n: usize) -> Result<AtHand> {
        self.residual = None;
        let missing = || OdeError::Unsupported {
            what: format!("a schedule that restores state {n}, which it has not kept or has dropped"),
            instead: "check it with candle_ode::schedule::simulate",
        };
        let index = self.kept.iter().position(|kept| kept.at == n).ok_or_else(missing)?;
        if !self.kept[index].is_increment {
            let kept = self.kept[index].clone();
            if self.codec.encodes() == Encodes::States {
                return Ok(AtHand::Kept(kept, self.accumulate));
            }
            let state = kept.decode(self.accumulate)?;
            self.above = Some((n, state.clone()));
            return Ok(AtHand::State(state));
        }
        // The nearest state that is known, from there down.
        let known = |at: usize| self.above.as_ref().filter(|(above, _)| *above == at).map(|(_, state)| state.clone());
        let mut from = index;
        let mut state = loop {
            if let Some(state) = known(self.kept[from].at + 1) {
                break state;
            }
            from += 1;
            match self.kept.get(from) {
                Some(kept) if !kept.is_increment => break kept.decode(self.accumulate)?,
                Some(_) => {}
                None => return Err(missing()),
            }
        };
        if !self.kept[from].is_increment {
            from -= 1;
        }
        // Increments lead down from the state just above them alone.
        let above = self.kept.get(from + 1).map_or(self.kept[from].at + 1, |kept| kept.at);
        if above != self.kept[from].at + 1 && known(self.kept[from].at + 1).is_none() {
            return Err(missing());
        }
        for kept in self.kept[index..=from].iter().rev() {
            state = sum(Some(&state), &[(-1.0, &kept.decode(self.accumulate)?)], self.accumulate)?;
        }
        self.above = Some((n, state.clone()));
        Ok(AtHand::State(state))
    }

    /// Frees the entry of state `n`. An increment below it that could not be decoded any more becomes a state.
    pub(crate) fn drop_state(&mut self, n: usize) -> Result<()> {
        self.linearized.remove(&n);
        let Some(index) = self.kept.iter().position(|kept| kept.at == n) else { return Ok(()) };
        let depends = index > 0 && self.kept[index - 1].is_increment;
        if depends && self.above.as_ref().is_none_or(|(above, _)| *above != n) {
            // A forward pass that thins its slots goes on from where it is.
            let residual = self.residual.take();
            let restored = self.restore(n - 1)?;
            self.residual = residual;
            let AtHand::State(state) = restored else { return Ok(()) };
            let codec = self.exact();
            let (entry, _) = codec.encode(&state)?;
            self.kept[index - 1] = Arc::new(kept(n - 1, false, codec, entry));
            self.above = None;
        }
        self.kept.remove(index);
        Ok(())
    }

    /// y_n − y_{n−1} + e.
    fn increment(&self, before: &State, after: &State) -> Result<State> {
        match &self.residual {
            None => sum(Some(after), &[(-1.0, before)], self.accumulate),
            // What is small is added last, to a difference of neighbours.
            Some((residual, _)) => sum(Some(residual), &[(1.0, after), (-1.0, before)], self.accumulate),
        }
    }

    /// State n − 1, the last in a slot, is kept by its increment from now on, and state n beside it.
    fn follow(&mut self, n: usize, before: &State, increment: &State, entry: Entry) -> Result<State> {
        let kept = kept(n - 1, true, self.codec.clone(), entry);
        let decoded = kept.decode(self.accumulate)?;
        let y = sum(Some(before), &[(1.0, &decoded)], self.accumulate)?;
        let residual = sum(Some(increment), &[(-1.0, &decoded)], self.accumulate)?;
        let owned = Owned::new(Category::Scratch, residual.bytes(self.accumulate));
        self.residual = Some((residual, owned));
        self.kept.pop();
        self.kept.push(Arc::new(kept));
        let exact = self.exact();
        let (entry, _) = self.encode(&exact, &y)?;
        self.push(n, false, exact, entry);
        Ok(y)
    }

    fn encode(&self, codec: &Arc<dyn Codec>, values: &State) -> Result<(Entry, Finite)> {
        let _span = tracing::trace_span!(target: "candle_ode", "encode").entered();
        codec.encode(values)
    }

    /// A codec that rounds nothing.
    fn exact(&self) -> Arc<dyn Codec> {
        Arc::new(States(self.accumulate))
    }

    fn push(&mut self, at: usize, is_increment: bool, codec: Arc<dyn Codec>, entry: Entry) {
        self.kept.push(Arc::new(kept(at, is_increment, codec, entry)));
    }
}

fn kept(at: usize, is_increment: bool, codec: Arc<dyn Codec>, entry: Entry) -> Kept {
    let owned = Owned::entry(codec.name(), entry.bytes());
    Kept { at, is_increment, entry, codec, owned }
}
