//! The slots of a trajectory, in bytes: what is kept when a state is reached, restored or dropped.

use super::ghost::{Announced, Ghost};
use super::session::Linearization;
use super::walk::{Levels, Solve};
use crate::account::Category;
use crate::memory::composition::Part;
use crate::trajectory::Encodes;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem;
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
    /// Bytes of the entry, wherever it is.
    bytes: usize,
    /// A copy that comes back from there.
    arriving: RefCell<Option<(Announced, Ghost)>>,
    /// Of a state that is kept as it is.
    _handle: Option<Ghost>,
}

impl Kept {
    fn is_away(&self) -> bool {
        self.owned.is_none()
    }

    /// A copy begins to come back, unless one does.
    fn begin(&self, solve: &Solve<'_>) {
        self.arriving.borrow_mut().get_or_insert_with(|| {
            let room = solve.heap.buffer(Part::Other, self.bytes);
            (room.announce(Category::Trajectory, self.bytes), room)
        });
    }
}

/// A copy that may be coming back, for as long as somebody waits for it.
#[derive(Debug)]
pub(super) struct Arriving(Rc<Kept>);

impl Drop for Arriving {
    fn drop(&mut self) {
        self.0.arriving.take();
    }
}

/// Kept states, earliest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots {
    kept: Vec<Rc<Kept>>,
    /// The entry that was put away last, if it leaves beside what is computed.
    leaving: Option<Rc<Kept>>,
    /// The entry below that which was restored last.
    arriving: Option<Rc<Arriving>>,
    residual: Option<Rc<(Ghost, Announced)>>,
    above: Option<(usize, Ghost)>,
    /// By state, the linearisations of the step that led to it.
    linearized: BTreeMap<usize, Rc<Vec<Linearization>>>,
}

/// A state that is at hand, or one to be decoded each time it is needed.
pub(super) enum AtHand {
    State(Ghost),
    /// With itself on its way, and what is needed next.
    Kept(Rc<Kept>, Option<Rc<Arriving>>, Option<Rc<Arriving>>),
}

impl AtHand {
    pub(super) fn state(&self, solve: &Solve<'_>) -> Ghost {
        match self {
            Self::State(state) => state.clone(),
            Self::Kept(kept, _, next) => {
                let state = solve.decoded(kept, solve.sizes.entry_is_state);
                next.iter().for_each(|next| next.0.begin(solve));
                state
            }
        }
    }
}

impl Slots {
    /// For a walk that may drop entries without taking them from others.
    pub(super) fn share(&mut self) -> Self {
        self.leaving = None;
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
        if keep {
            self.leaving = None;
        }
        let follows = self.kept.last().is_some_and(|kept| kept.at + 1 == n && !kept.is_increment);
        if keep && follows && solve.sizes.encodes == Encodes::Increments {
            solve.heap.pass(Part::Other, solve.sizes.following);
            let (y, residual) = (solve.state(), solve.state());
            let owned = residual.announce(Category::Scratch, solve.sizes.accumulate);
            self.residual = Some(Rc::new((residual, owned)));
            let entry = solve.without_tensors(solve.entry(n - 1));
            self.kept.pop();
            self.kept.push(Rc::new(entry.into()));
            self.keep_whole(solve, n, &y);
            drop(after);
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
        self.leaving = None;
        if solve.sizes.encodes == Encodes::Increments || solve.sizes.entry_is_state {
            self.keep_whole(solve, n, y);
        } else {
            let entry = Entry { is_increment: false, ..solve.entry(n) };
            self.push(solve, entry.into());
        }
    }

    pub(super) fn restore(&mut self, solve: &Solve<'_>, n: usize) -> Option<AtHand> {
        self.leaving = None;
        let mut at_hand = self.restored(solve, n)?;
        let index = self.kept.iter().position(|kept| kept.at == n);
        let below = index.and_then(|n| n.checked_sub(1)).map(|below| &self.kept[below]);
        let below = below.and_then(|below| self.expected(solve, below));
        match (&mut at_hand, &below) {
            (AtHand::Kept(kept, arriving, next), _) => {
                (*arriving, *next) = (self.expected(solve, kept), below.clone());
            }
            (AtHand::State(_), Some(below)) => below.0.begin(solve),
            (AtHand::State(_), None) => {}
        }
        self.arriving = below;
        Some(at_hand)
    }

    fn expected(&self, solve: &Solve<'_>, kept: &Rc<Kept>) -> Option<Rc<Arriving>> {
        if !kept.is_away() || !solve.sizes.levels.is_some_and(|levels| levels.overlaps) {
            return None;
        }
        let arriving = self.arriving.as_ref().filter(|arriving| Rc::ptr_eq(&arriving.0, kept)).cloned();
        Some(arriving.unwrap_or_else(|| Rc::new(Arriving(kept.clone()))))
    }

    fn restored(&mut self, solve: &Solve<'_>, n: usize) -> Option<AtHand> {
        self.residual = None;
        let index = self.kept.iter().position(|kept| kept.at == n)?;
        if !self.kept[index].is_increment {
            let kept = self.kept[index].clone();
            if solve.sizes.encodes == Encodes::States {
                return Some(AtHand::Kept(kept, None, None));
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
            let restored = self.restored(solve, n - 1);
            self.residual = residual;
            if let Some(AtHand::State(state)) = restored {
                self.leaving = None;
                self.kept[index - 1] = Rc::new(whole(solve, n - 1, &state));
                if let Some(levels) = solve.sizes.levels.filter(|levels| index + levels.resident < self.kept.len()) {
                    self.put_away(solve, levels, index - 1);
                }
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
        for index in (0..beyond).rev() {
            if self.kept[index].is_away() {
                break;
            }
            self.put_away(solve, levels, index);
        }
    }

    fn put_away(&mut self, solve: &Solve<'_>, levels: Levels, index: usize) {
        self.leaving = None;
        solve.heap.pass(Part::Other, levels.putting);
        let buffer = solve.heap.buffer(Part::Other, levels.beside);
        let kept = &self.kept[index];
        let (at, is_increment, bytes) = (kept.at, kept.is_increment, kept.bytes);
        let away = Kept { at, is_increment, buffer, owned: None, bytes, arriving: RefCell::default(), _handle: None };
        let kept = mem::replace(&mut self.kept[index], Rc::new(away));
        self.leaving = levels.overlaps.then_some(kept);
    }
}

/// The state itself, kept.
fn whole(solve: &Solve<'_>, at: usize, y: &Ghost) -> Kept {
    let owned = y.announce(Category::Trajectory, solve.sizes.accumulate);
    let _handle = Some(solve.heap.buffer(Part::Other, solve.sizes.handle));
    let (buffer, bytes) = (y.clone(), owned.bytes());
    Kept { at, is_increment: false, buffer, owned: Some(owned), bytes, arriving: RefCell::default(), _handle }
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
        let bytes = owned.bytes();
        Self { at, is_increment, buffer, owned: Some(owned), bytes, arriving: RefCell::default(), _handle: None }
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
            if is_state {
                return kept.buffer.clone();
            }
            let again = self.sizes.image.filter(|_| kept.is_increment);
            let _entry = again.map(|[_, bytes]| self.heap.buffer(Part::Other, bytes));
            return self.decode();
        };
        if levels.overlaps {
            kept.begin(self);
            kept.arriving.take();
        } else {
            self.heap.pass(Part::Other, levels.fetching);
        }
        if is_state {
            return self.state();
        }
        let _entry = self.heap.buffer(Part::Other, self.sizes.entry);
        self.decode()
    }

    /// The same entry where increments lie.
    fn without_tensors(&self, Entry { at, is_increment, buffer, owned }: Entry) -> Entry {
        let Some([beside, _]) = self.sizes.image else { return Entry { at, is_increment, buffer, owned } };
        let image = self.heap.buffer(Part::Other, self.sizes.entry + beside);
        drop((owned, buffer));
        let owned = image.announce(Category::Trajectory, self.sizes.entry);
        Entry { at, is_increment, buffer: image, owned }
    }

    fn decode(&self) -> Ghost {
        self.heap.pass(Part::Other, self.sizes.decoding);
        self.state()
    }
}
