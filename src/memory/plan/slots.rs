//! The slots of a trajectory, in bytes: what is kept when a state is reached, restored or dropped.

use super::ghost::{Announced, Ghost};
use super::session::Linearization;
use super::walk::{Levels, Solve};
use crate::account::Category;
use crate::memory::composition::Part;
use crate::trajectory::Encodes;
use std::collections::BTreeMap;
use std::rc::Rc;

/// One kept state.
#[derive(Debug)]
pub(super) struct Kept {
    at: usize,
    is_increment: bool,
    /// The entry, or what is told of one on the second level.
    buffer: Ghost,
    /// Nothing on the second level.
    owned: Option<Announced>,
    /// Of a state that is kept as it is.
    _handle: Option<Ghost>,
}

impl Kept {
    fn is_away(&self) -> bool {
        self.owned.is_none()
    }
}

/// Kept states, earliest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots {
    kept: Vec<Rc<Kept>>,
    residual: Option<Rc<(Ghost, Announced)>>,
    above: Option<(usize, Ghost)>,
    /// By state, the linearisations of the step that led to it.
    linearized: BTreeMap<usize, Rc<Vec<Linearization>>>,
}

/// A state that is at hand, or one to be decoded each time it is needed.
pub(super) enum AtHand {
    State(Ghost),
    Kept(Rc<Kept>),
}

impl AtHand {
    pub(super) fn state(&self, solve: &Solve<'_>) -> Ghost {
        match self {
            Self::State(state) => state.clone(),
            Self::Kept(kept) => solve.decoded(kept, solve.sizes.entry_is_state),
        }
    }
}

impl Slots {
    /// For a walk that may drop entries without taking them from others.
    pub(super) fn share(&self) -> Self {
        Self { kept: self.kept.clone(), linearized: self.linearized.clone(), ..Self::default() }
    }

    pub(super) fn keep_linearized(&mut self, n: usize, linearized: Rc<Vec<Linearization>>) {
        self.linearized.insert(n, linearized);
    }

    pub(super) fn linearized(&self, n: usize) -> Option<Rc<Vec<Linearization>>> {
        self.linearized.get(&n).cloned()
    }

    pub(super) fn states(&self) -> Vec<usize> {
        self.kept.iter().map(|kept| kept.at).collect()
    }

    pub(super) fn bytes(&self) -> usize {
        self.kept.iter().filter_map(|kept| kept.owned.as_ref()).map(Announced::bytes).sum()
    }

    /// What is handed out for a state that was reached.
    pub(super) fn whole(&self, solve: &Solve<'_>, after: &Ghost) -> Ghost {
        if self.residual.is_some() { solve.state() } else { after.clone() }
    }

    pub(super) fn reach(&mut self, solve: &Solve<'_>, n: usize, after: Ghost, keep: bool) -> Ghost {
        let follows = self.kept.last().is_some_and(|kept| kept.at + 1 == n && !kept.is_increment);
        if keep && follows && solve.sizes.encodes == Encodes::Increments {
            let increment = solve.state();
            let entry = solve.entry(n - 1);
            let decoded = solve.decode();
            let (y, residual) = (solve.state(), solve.state());
            let owned = residual.announce(Category::Scratch, solve.sizes.accumulate);
            self.residual = Some(Rc::new((residual, owned)));
            self.kept.pop();
            self.kept.push(Rc::new(entry.into()));
            self.keep_whole(solve, n, &y);
            drop((increment, decoded, after));
            return y;
        }
        let y = self.whole(solve, &after);
        self.residual = None;
        if keep {
            self.keep(solve, n, &y);
        }
        y
    }

    pub(super) fn keep(&mut self, solve: &Solve<'_>, n: usize, y: &Ghost) {
        if self.kept.last().is_some_and(|kept| kept.at == n) {
            return;
        }
        if solve.sizes.encodes == Encodes::Increments || solve.sizes.entry_is_state {
            self.keep_whole(solve, n, y);
        } else {
            let entry = Entry { is_increment: false, ..solve.entry(n) };
            self.push(solve, entry.into());
        }
    }

    pub(super) fn restore(&mut self, solve: &Solve<'_>, n: usize) -> Option<AtHand> {
        self.residual = None;
        let index = self.kept.iter().position(|kept| kept.at == n)?;
        if !self.kept[index].is_increment {
            let kept = self.kept[index].clone();
            if solve.sizes.encodes == Encodes::States {
                return Some(AtHand::Kept(kept));
            }
            let state = solve.decoded(&kept, true);
            self.above = Some((n, state.clone()));
            return Some(AtHand::State(state));
        }
        let known = |at: usize| self.above.as_ref().filter(|(above, _)| *above == at).map(|(_, state)| state.clone());
        let mut from = index;
        let mut state = loop {
            if let Some(state) = known(self.kept[from].at + 1) {
                break state;
            }
            from += 1;
            let kept = self.kept.get(from)?;
            if !kept.is_increment {
                break solve.decoded(kept, true);
            }
        };
        if !self.kept[from].is_increment {
            from -= 1;
        }
        for kept in self.kept[index..=from].iter().rev() {
            let decoded = solve.decoded(kept, false);
            state = solve.state();
            drop(decoded);
        }
        self.above = Some((n, state.clone()));
        Some(AtHand::State(state))
    }

    pub(super) fn drop_state(&mut self, solve: &Solve<'_>, n: usize) {
        self.linearized.remove(&n);
        let Some(index) = self.kept.iter().position(|kept| kept.at == n) else { return };
        let depends = index > 0 && self.kept[index - 1].is_increment;
        if depends && self.above.as_ref().is_none_or(|(above, _)| *above != n) {
            let residual = self.residual.take();
            let restored = self.restore(solve, n - 1);
            self.residual = residual;
            if let Some(AtHand::State(state)) = restored {
                let kept = whole(solve, n - 1, &state);
                let levels = solve.sizes.levels.filter(|levels| index + levels.resident < self.kept.len());
                self.kept[index - 1] = Rc::new(match levels {
                    Some(levels) => put_away(solve, levels, &kept),
                    None => kept,
                });
                self.above = None;
            }
        }
        self.kept.remove(index);
    }

    fn keep_whole(&mut self, solve: &Solve<'_>, n: usize, y: &Ghost) {
        self.push(solve, whole(solve, n, y));
    }

    fn push(&mut self, solve: &Solve<'_>, kept: Kept) {
        self.kept.push(Rc::new(kept));
        let Some(levels) = solve.sizes.levels else { return };
        let beyond = self.kept.len().saturating_sub(levels.resident);
        for kept in self.kept[..beyond].iter_mut().rev().take_while(|kept| !kept.is_away()) {
            *kept = Rc::new(put_away(solve, levels, kept));
        }
    }
}

/// The same on the second level.
fn put_away(solve: &Solve<'_>, levels: Levels, kept: &Kept) -> Kept {
    solve.heap.pass(Part::Other, levels.putting);
    let buffer = solve.heap.buffer(Part::Other, levels.beside);
    Kept { at: kept.at, is_increment: kept.is_increment, buffer, owned: None, _handle: None }
}

/// The state itself, kept.
fn whole(solve: &Solve<'_>, at: usize, y: &Ghost) -> Kept {
    let owned = y.announce(Category::Trajectory, solve.sizes.accumulate);
    let _handle = Some(solve.heap.buffer(Part::Other, solve.sizes.handle));
    Kept { at, is_increment: false, buffer: y.clone(), owned: Some(owned), _handle }
}

/// An encoded copy, about to be kept.
pub(super) struct Entry {
    pub(super) at: usize,
    pub(super) is_increment: bool,
    pub(super) buffer: Ghost,
    pub(super) owned: Announced,
}

impl From<Entry> for Kept {
    fn from(Entry { at, is_increment, buffer, owned }: Entry) -> Self {
        Self { at, is_increment, buffer, owned: Some(owned), _handle: None }
    }
}

impl Solve<'_> {
    /// A state or an increment encoded into a buffer of its own.
    fn entry(&self, at: usize) -> Entry {
        self.heap.pass(Part::Other, self.sizes.encoding);
        let buffer = self.heap.buffer(Part::Other, self.sizes.entry + self.sizes.entry_beside);
        let owned = buffer.announce(Category::Trajectory, self.sizes.entry);
        Entry { at, is_increment: true, buffer, owned }
    }

    /// An entry decoded; itself where it is the state.
    fn decoded(&self, kept: &Kept, is_state: bool) -> Ghost {
        let Some(levels) = self.sizes.levels.filter(|_| kept.is_away()) else {
            return if is_state { kept.buffer.clone() } else { self.decode() };
        };
        self.heap.pass(Part::Other, levels.fetching);
        if is_state {
            return self.state();
        }
        let _entry = self.heap.buffer(Part::Other, self.sizes.entry);
        self.decode()
    }

    fn decode(&self) -> Ghost {
        self.heap.pass(Part::Other, self.sizes.decoding);
        self.state()
    }
}
