//! The states a walk has kept, encoded: each by itself, or as the increment to the next.

use super::codec::{Codec, Encodes, Entry, Followed, Increment, States};
use super::image::Form;
use super::kept::{AtHand, Encoded, InFlight, Kept};
use super::second_level::TwoLevels;
use crate::State;
use crate::account::{Category, Owned};
use crate::error::{OdeError, Result};
use crate::field::{Finite, sum};
use crate::solver::Linearized;
use candle_core::DType;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Kept states, earliest first, and what rounding has left over of the state at hand.
#[derive(Debug)]
pub(crate) struct Slots {
    codec: Arc<dyn Codec>,
    accumulate: DType,
    levels: Option<TwoLevels>,
    kept: Vec<Arc<Kept>>,
    /// That of the increments among them, where they lie on the host.
    form: Option<Arc<Form>>,
    /// The entry that was put away last, until another is made or put away, or the backward pass begins.
    leaving: Option<InFlight>,
    /// The entry below that which was restored last.
    arriving: Option<Arc<InFlight>>,
    residual: Option<(State, Owned)>,
    /// The last state that was restored, from which the one below may have to be decoded.
    above: Option<(usize, State)>,
    /// By state, the linearisations of the step that led to it.
    linearized: BTreeMap<usize, Arc<Linearized>>,
}

impl Slots {
    pub(crate) fn new(codec: Arc<dyn Codec>, accumulate: DType, levels: Option<TwoLevels>) -> Self {
        Self {
            codec,
            accumulate,
            levels,
            kept: vec![],
            form: None,
            leaving: None,
            arriving: None,
            residual: None,
            above: None,
            linearized: BTreeMap::new(),
        }
    }

    /// The same entries, for a walk that may drop them without taking them from others.
    pub(crate) fn share(&mut self) -> Self {
        self.leaving = None;
        Self { kept: self.kept.clone(), linearized: self.linearized.clone(), ..self.emptied() }
    }

    /// No entries, for a walk that starts over.
    pub(crate) fn emptied(&self) -> Self {
        Self::new(self.codec.clone(), self.accumulate, self.levels.clone())
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

    /// Bytes of all entries on the device.
    pub(crate) fn bytes(&self) -> usize {
        self.kept.iter().map(|kept| kept.bytes()).sum()
    }

    /// Bytes of those on the second level.
    pub(crate) fn bytes_away(&self) -> usize {
        self.kept.iter().map(|kept| kept.bytes_away()).sum()
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

    /// The step from `before` (state n − 1) has led to `after`: gives the state n to go on from, and keeps it if
    /// wanted. `exactly` sees whether its encoding is finite and may ask for one that rounds nothing.
    pub(crate) fn reach(
        &mut self,
        n: usize,
        before: &State,
        after: State,
        keep: bool,
        mut exactly: impl FnMut(&Finite) -> Result<bool>,
    ) -> Result<(State, Finite)> {
        if keep {
            self.leaving = None;
        }
        let follows = self.kept.last().is_some_and(|kept| kept.at + 1 == n && !kept.is_increment);
        if keep && follows && self.codec.encodes() == Encodes::Increments {
            let residual = self.residual.as_ref().map(|(residual, _)| residual);
            let followed = {
                let _span = tracing::trace_span!(target: "candle_ode", "encode").entered();
                let step = Increment { before, after: &after, residual, dtype: self.accumulate };
                let followed = self.codec.follow(&step)?;
                followed.check(&step)?;
                followed
            };
            let finite = followed.finite.clone();
            // Where no increment fits, the state is kept as it is.
            if !exactly(&finite)? {
                return Ok((self.follow(n, followed)?, finite));
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
        self.leaving = None;
        let codec = match self.codec.encodes() {
            Encodes::States => self.codec.clone(),
            Encodes::Increments => self.exact(),
        };
        let (entry, finite) = self.encode(&codec, y)?;
        if !exactly(&finite)? {
            self.push(n, codec, entry)?;
            return Ok(finite);
        }
        let exact = self.exact();
        let (entry, _) = self.encode(&exact, y)?;
        self.push(n, exact, entry)?;
        Ok(Finite::default())
    }

    /// State `n` for the backward pass, to be used as long as it is at hand. The entry below it begins to come back, if
    /// it is away and can do so beside what is computed.
    pub(crate) fn restore(&mut self, n: usize) -> Result<AtHand> {
        self.leaving = None;
        let mut at_hand = self.restored(n)?;
        let index = self.index_of(n);
        let next = index.and_then(|n| n.checked_sub(1)).and_then(|below| self.expected(&self.kept[below]));
        match (&mut at_hand, &next) {
            (AtHand::Kept(encoded), _) => {
                encoded._arriving = self.expected(&encoded.kept);
                encoded.next = next.clone();
            }
            (AtHand::State(_), Some(next)) => next.begin()?,
            (AtHand::State(_), None) => {}
        }
        self.arriving = next;
        Ok(at_hand)
    }

    fn expected(&self, kept: &Arc<Kept>) -> Option<Arc<InFlight>> {
        let arriving = self.arriving.as_ref().filter(|arriving| arriving.is(kept)).cloned();
        arriving.or_else(|| InFlight::of(kept).map(Arc::new))
    }

    fn restored(&mut self, n: usize) -> Result<AtHand> {
        self.residual = None;
        let missing = || OdeError::Unsupported {
            what: format!("a schedule that restores state {n}, which it has not kept or has dropped"),
            instead: "check it with candle_ode::schedule::simulate",
        };
        let index = self.index_of(n).ok_or_else(missing)?;
        if !self.kept[index].is_increment {
            let kept = self.kept[index].clone();
            if self.codec.encodes() == Encodes::States {
                return Ok(AtHand::Kept(Encoded { kept, dtype: self.accumulate, _arriving: None, next: None }));
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
        let Some(index) = self.index_of(n) else { return Ok(()) };
        let depends = index > 0 && self.kept[index - 1].is_increment;
        if depends && self.above.as_ref().is_none_or(|(above, _)| *above != n) {
            // A forward pass that thins its slots goes on from where it is.
            let residual = self.residual.take();
            let restored = self.restored(n - 1)?;
            self.residual = residual;
            let AtHand::State(state) = restored else { return Ok(()) };
            self.leaving = None;
            let codec = self.exact();
            let (entry, _) = codec.encode(&state)?;
            self.kept[index - 1] = Arc::new(Kept::new(n - 1, false, codec, entry));
            if self.levels.as_ref().is_some_and(|levels| index + levels.resident < self.kept.len()) {
                self.put_away(index - 1)?;
            }
            self.above = None;
        }
        self.kept.remove(index);
        Ok(())
    }

    /// The slot of state `n`. They ascend, unless a walk back has filled some before those that no output has asked
    /// for.
    fn index_of(&self, n: usize) -> Option<usize> {
        let found = self.kept.binary_search_by_key(&n, |kept| kept.at).ok();
        found.or_else(|| self.kept.iter().rposition(|kept| kept.at == n))
    }

    /// State n − 1, the last in a slot, is kept by its increment from now on, and state n beside it.
    fn follow(&mut self, n: usize, Followed { entry, next, residual, .. }: Followed) -> Result<State> {
        let owned = Owned::new(Category::Scratch, residual.bytes(self.accumulate));
        self.residual = Some((residual, owned));
        let kept = Kept::new(n - 1, true, self.codec.clone(), entry);
        // What may go to the second level goes there as it is.
        let stays = self.levels.as_ref().is_none_or(|levels| !levels.moves(next.device()));
        let kept = if stays { kept.without_tensors(&mut self.form)? } else { kept };
        self.kept.pop();
        self.kept.push(Arc::new(kept));
        let exact = self.exact();
        let (entry, _) = self.encode(&exact, &next)?;
        self.push(n, exact, entry)?;
        Ok(next)
    }

    fn encode(&self, codec: &Arc<dyn Codec>, values: &State) -> Result<(Entry, Finite)> {
        let _span = tracing::trace_span!(target: "candle_ode", "encode").entered();
        codec.encode(values)
    }

    /// A codec that rounds nothing.
    fn exact(&self) -> Arc<dyn Codec> {
        Arc::new(States(self.accumulate))
    }

    /// Keeps state `n`. What is then too much for the device goes to the second level, the earliest first: it is needed
    /// last.
    fn push(&mut self, n: usize, codec: Arc<dyn Codec>, entry: Entry) -> Result<()> {
        self.kept.push(Arc::new(Kept::new(n, false, codec, entry)));
        let Some(levels) = &self.levels else { return Ok(()) };
        let beyond = self.kept.len().saturating_sub(levels.resident);
        for index in (0..beyond).rev() {
            // Where one is away, so are those before it.
            if !self.put_away(index)? {
                break;
            }
        }
        Ok(())
    }

    /// Whether the entry had to go and has gone.
    fn put_away(&mut self, index: usize) -> Result<bool> {
        let Some(levels) = self.levels.as_ref().filter(|_| !self.kept[index].is_away()) else { return Ok(false) };
        self.leaving = None;
        let Some(away) = self.kept[index].put_away(levels)? else { return Ok(false) };
        self.leaving = InFlight::of(&away);
        self.kept[index] = away;
        Ok(true)
    }
}
