//! Buffers that are not there: they take their bytes from a tally when they are made and give them back when they are
//! dropped, so that an imagined solve can be written as the real one is.

use super::tally::{Stretch, Tally};
use crate::account::Category;
use crate::memory::composition::Part;
use std::cell::RefCell;
use std::rc::Rc;

/// A tally that buffers share.
#[derive(Clone, Debug, Default)]
pub(super) struct Heap(Rc<RefCell<Tally>>);

impl Heap {
    /// A buffer that nobody announces.
    pub(super) fn buffer(&self, part: Part, bytes: usize) -> Ghost {
        self.0.borrow_mut().take(part, bytes);
        Ghost(Rc::new(Buffer { heap: self.clone(), part, bytes }))
    }

    /// A handle to what somebody else holds.
    pub(super) fn handle(&self, part: Part) -> Ghost {
        self.buffer(part, 0)
    }

    /// Something needs bytes for a moment.
    pub(super) fn pass(&self, part: Part, bytes: usize) {
        self.0.borrow_mut().pass(part, bytes);
    }

    /// What has happened since the last stretch ended.
    pub(super) fn stretch(&self) -> Stretch {
        self.0.borrow_mut().stretch()
    }
}

#[derive(Debug)]
struct Buffer {
    heap: Heap,
    part: Part,
    bytes: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.heap.0.borrow_mut().give(self.part, self.bytes);
    }
}

/// A buffer, or another handle to it.
#[derive(Clone, Debug)]
pub(super) struct Ghost(Rc<Buffer>);

impl Ghost {
    /// Announces `bytes` of it for as long as the answer lives.
    pub(super) fn announce(&self, category: Category, bytes: usize) -> Announced {
        let (heap, from) = (self.0.heap.clone(), self.0.part);
        heap.0.borrow_mut().rename(from, Part::Owned(category), bytes);
        Announced { heap, from, category, bytes }
    }
}

/// Bytes that are announced.
#[derive(Debug)]
pub(super) struct Announced {
    heap: Heap,
    from: Part,
    category: Category,
    bytes: usize,
}

impl Announced {
    /// How many.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        self.heap.0.borrow_mut().rename(Part::Owned(self.category), self.from, self.bytes);
    }
}
