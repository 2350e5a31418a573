//! What the layers of a field hold of their own during a session, in bytes: buffers that one call hands on to the next,
//! for as long as the session is open or a linearisation made in it lives.

use super::ghost::Ghost;
use super::probe::{BareSteps, Layers};
use super::step::Held;
use super::walk::Solve;
use crate::account::Category;
use crate::memory::composition::Part;
use std::cell::RefCell;
use std::rc::Rc;

/// A session of the field.
#[derive(Debug, Default)]
pub(super) struct Session(Rc<RefCell<Buffers>>);

#[derive(Debug, Default)]
struct Buffers {
    held: Vec<Held>,
    /// Linearisations that live.
    live: usize,
    /// Whether it has evaluated f since the last of them was made.
    evaluated: bool,
    /// What the last pullback needed beside them, and linearisations do not.
    pulled: usize,
    /// Whether it has taken a step on buffers.
    stepped: bool,
    /// Whether it is open for linearisations, and the weights it has packed for them.
    linearises: bool,
    packed: Option<Held>,
}

impl Session {
    pub(super) fn new(linearises: bool) -> Self {
        Self(Rc::new(RefCell::new(Buffers { linearises, ..Buffers::default() })))
    }
}

/// A linearisation, with the session that it was made in.
#[derive(Debug)]
pub(super) struct Linearization {
    _graph: Ghost,
    session: Rc<RefCell<Buffers>>,
}

impl Drop for Linearization {
    fn drop(&mut self) {
        self.session.borrow_mut().live -= 1;
    }
}

impl Buffers {
    fn bytes(&self) -> usize {
        self.held.iter().map(|(_, owned)| owned.bytes()).sum()
    }

    /// What the linearisations that live need.
    fn need(&self, layers: &Layers) -> usize {
        if self.live == 0 { 0 } else { layers.linearisation + (self.live - 1) * layers.further }
    }
}

impl Solve<'_> {
    /// The session that is open evaluates once more.
    pub(super) fn evaluate_layers(&self) {
        let layers = &self.costs.layers;
        let need = self.session.0.borrow().need(layers);
        self.session.0.borrow_mut().evaluated |= need > 0;
        self.grow(&self.session.0, if need == 0 { layers.evaluation } else { need + layers.beside });
    }

    /// One more linearisation in the session that is open.
    pub(super) fn linearize_layers(&self) {
        let layers = &self.costs.layers;
        let need = {
            let mut buffers = self.session.0.borrow_mut();
            buffers.live += 1;
            buffers.evaluated = false;
            // Buffers of other sizes wait for the next pullback.
            buffers.need(layers) + buffers.pulled
        };
        self.grow(&self.session.0, need);
    }

    /// The linearisation that was just made.
    pub(super) fn linearization(&self, graph: Ghost) -> Linearization {
        Linearization { _graph: graph, session: self.session.0.clone() }
    }

    /// A pullback through a linearisation.
    pub(super) fn pull_layers(&self, through: &Linearization) {
        let layers = &self.costs.layers;
        let (need, evaluated) = (through.session.borrow().need(layers), through.session.borrow().evaluated);
        let (more, reused) = match evaluated {
            true => (layers.beside + layers.pullback, layers.reused),
            false => (layers.pullback_alone, layers.reused_alone),
        };
        through.session.borrow_mut().pulled = more.saturating_sub(reused);
        self.grow(&through.session, need + more);
    }

    /// Whether the session that is open is one for linearisations.
    pub(super) fn linearises(&self) -> bool {
        self.session.0.borrow().linearises
    }

    /// The session that is open takes a step on buffers.
    pub(super) fn step_layers(&self, bare: &BareSteps) {
        self.session.0.borrow_mut().stepped = true;
        self.grow(&self.session.0, if self.linearises() { bare.advance } else { bare.step });
    }

    /// The session that is open pulls a step back on buffers.
    pub(super) fn pull_step_layers(&self, bare: &BareSteps) {
        let stepped = self.session.0.borrow().stepped;
        self.grow(&self.session.0, if stepped { bare.after_advance } else { bare.pullback });
    }

    /// The layers of a session need buffers of so many bytes at once; they keep them. What is linearised has packed
    /// weights of its own, unless another session holds them.
    fn grow(&self, session: &Rc<RefCell<Buffers>>, bytes: usize) {
        let mut buffers = session.borrow_mut();
        if buffers.linearises && buffers.packed.is_none() && !self.packed_elsewhere {
            buffers.packed = self.scratch(self.costs.layers.packed_back);
        }
        let grown = bytes.saturating_sub(buffers.bytes());
        let more = self.scratch(grown);
        buffers.held.extend(more);
    }

    fn scratch(&self, bytes: usize) -> Option<Held> {
        let buffer = (bytes > 0).then(|| self.heap.buffer(Part::Field, bytes))?;
        let owned = buffer.announce(Category::Scratch, bytes);
        Some((buffer, owned))
    }
}
