//! Copies to the host and back beside what is computed.
//!
//! A device computes in one order and copies in another. So that each sees what the other has made,
//!
//! - a copy waits for what was computed before it was asked for: the values of an entry, or the allocation of its room;
//! - what is computed after an entry has come back waits for its copy;
//! - no tensor is let go, and no room given up, before what is computed waits for the copy: memory is freed in the
//!   order of what is computed;
//! - buffers on the host are written and read in the order of the copies alone, one copy after another, so that one can
//!   be used again at once; they are freed when all copies are over.
//!
//! [`Flight`] keeps the third, [`Line`] the others, over a [`Lane`] that knows how a device does it.

use super::beside::{Moved, Moves, Owner};
use crate::account::Owned;
use crate::error::Result;
use candle_core::{DType, Device, Shape, Tensor};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How a device copies beside what it computes: one copy after another, as they are asked for.
pub(super) trait Lane: Debug + Send + Sync + 'static {
    /// Memory of the host.
    type Buffer: Debug + Send + Sync;
    /// Memory of the device that a copy may be writing to.
    type Room: Debug + Send;
    /// A point in the order of the copies.
    type Mark: Debug + Send;

    /// Whether it is that of `device`.
    fn serves(&self, device: &Device) -> bool;

    /// Whether it can copy `x` now.
    fn takes(&self, x: &Tensor) -> bool;

    /// New memory of the host.
    fn buffer(&self, bytes: usize) -> Result<Self::Buffer>;

    /// New memory of the device, in the order of what is computed.
    fn room(&self, like: &Like) -> Result<Self::Room>;

    /// The next copies wait for what has been computed so far.
    fn after_compute(&self) -> Result<()>;

    fn put(&self, from: &Tensor, to: &mut Self::Buffer) -> Result<()>;

    fn fetch(&self, from: &Self::Buffer, to: &mut Self::Room) -> Result<()>;

    /// The end of the copies so far.
    fn mark(&self) -> Result<Self::Mark>;

    /// What is computed next waits for the copies before `mark`.
    fn compute_waits(&self, mark: &Self::Mark) -> Result<()>;

    /// What has come back.
    fn arrived(&self, room: Self::Room, like: &Like) -> Tensor;

    /// Waits for all copies.
    fn finish(&self);
}

/// What a tensor is like.
#[derive(Clone, Debug)]
pub(super) struct Like {
    pub(super) dtype: DType,
    pub(super) shape: Shape,
}

impl Like {
    pub(super) fn bytes(&self) -> usize {
        self.shape.elem_count() * self.dtype.size_in_bytes()
    }
}

/// A lane, and the buffers that nothing is in: they are kept, since locking pages is slow.
#[derive(Debug)]
pub(super) struct Line<L: Lane> {
    lane: L,
    /// By their length: entries of a solve are as long as one another.
    free: Mutex<BTreeMap<usize, Vec<L::Buffer>>>,
}

impl<L: Lane> Line<L> {
    pub(super) fn new(lane: L) -> Self {
        Self { lane, free: Mutex::default() }
    }

    fn free(&self) -> MutexGuard<'_, BTreeMap<usize, Vec<L::Buffer>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn buffer(&self, bytes: usize) -> Result<L::Buffer> {
        let free = self.free().get_mut(&bytes).and_then(Vec::pop);
        free.map_or_else(|| self.lane.buffer(bytes), Ok)
    }
}

impl<L: Lane> Drop for Line<L> {
    fn drop(&mut self) {
        self.lane.finish();
    }
}

impl<L: Lane> Moves for Line<L> {
    fn serves(&self, device: &Device) -> bool {
        self.lane.serves(device)
    }

    fn takes(&self, tensors: &[Tensor]) -> bool {
        tensors.iter().all(|x| self.lane.takes(x))
    }

    fn put(self: Arc<Self>, tensors: &[Tensor], owner: Owner) -> Result<Box<dyn Moved>> {
        let mut leaving = Flight { line: self.clone(), held: tensors.to_vec(), mark: None, _owner: owner };
        let mut entry = OnHost { line: self, copies: vec![], in_flight: Mutex::new(InFlight::Nothing) };
        let lane = &entry.line.lane;
        lane.after_compute()?;
        for x in tensors {
            let like = Like { dtype: x.dtype(), shape: x.shape().clone() };
            let mut buffer = entry.line.buffer(like.bytes())?;
            let copying = lane.put(x, &mut buffer);
            entry.copies.push((buffer, like));
            copying?;
        }
        leaving.mark = Some(lane.mark()?);
        *entry.in_flight() = InFlight::Leaving(leaving);
        Ok(Box::new(entry))
    }
}

/// An entry whose copy lies, or will lie, on the host.
#[derive(Debug)]
struct OnHost<L: Lane> {
    line: Arc<Line<L>>,
    copies: Vec<(L::Buffer, Like)>,
    in_flight: Mutex<InFlight<L>>,
}

#[derive(Debug)]
enum InFlight<L: Lane> {
    Nothing,
    Leaving(Flight<L, Tensor>),
    Arriving(Flight<L, L::Room>),
}

impl<L: Lane> OnHost<L> {
    fn in_flight(&self) -> MutexGuard<'_, InFlight<L>> {
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrive(&self, codec: &'static str) -> Result<Flight<L, L::Room>> {
        let lane = &self.line.lane;
        let owner = Arc::new(Owned::entry(codec, self.copies.iter().map(|(_, like)| like.bytes()).sum()));
        let mut arriving = Flight { line: self.line.clone(), held: vec![], mark: None, _owner: owner };
        for (_, like) in &self.copies {
            arriving.held.push(lane.room(like)?);
        }
        lane.after_compute()?;
        for ((buffer, _), room) in self.copies.iter().zip(&mut arriving.held) {
            lane.fetch(buffer, room)?;
        }
        arriving.mark = Some(lane.mark()?);
        Ok(arriving)
    }
}

impl<L: Lane> Moved for OnHost<L> {
    fn begin(&self, codec: &'static str) -> Result<()> {
        let mut in_flight = self.in_flight();
        if !matches!(*in_flight, InFlight::Arriving(_)) {
            *in_flight = InFlight::Nothing;
            *in_flight = InFlight::Arriving(self.arrive(codec)?);
        }
        Ok(())
    }

    fn fetch(&self, codec: &'static str) -> Result<Vec<Tensor>> {
        let in_flight = mem::replace(&mut *self.in_flight(), InFlight::Nothing);
        let arriving = match in_flight {
            InFlight::Arriving(arriving) => arriving,
            leaving_or_nothing => {
                drop(leaving_or_nothing);
                self.arrive(codec)?
            }
        };
        let rooms = arriving.landed()?.into_iter().zip(&self.copies);
        Ok(rooms.map(|(room, (_, like))| self.line.lane.arrived(room, like)).collect())
    }

    fn settle(&self) {
        *self.in_flight() = InFlight::Nothing;
    }
}

impl<L: Lane> Drop for OnHost<L> {
    fn drop(&mut self) {
        // Whatever is copied into them next comes after what is copied from them now.
        for (buffer, like) in self.copies.drain(..) {
            self.line.free().entry(like.bytes()).or_default().push(buffer);
        }
    }
}

/// Memory of the device that copies may be reading or writing.
#[derive(Debug)]
struct Flight<L: Lane, M: Debug> {
    line: Arc<Line<L>>,
    held: Vec<M>,
    /// The end of the copies, if all of them were begun.
    mark: Option<L::Mark>,
    _owner: Owner,
}

impl<L: Lane, M: Debug> Flight<L, M> {
    /// What was held, for what is computed from here on.
    fn landed(mut self) -> Result<Vec<M>> {
        if let Some(mark) = &self.mark {
            self.line.lane.compute_waits(mark)?;
        }
        Ok(mem::take(&mut self.held))
    }
}

impl<L: Lane, M: Debug> Drop for Flight<L, M> {
    fn drop(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let waits = self.mark.as_ref().is_some_and(|mark| self.line.lane.compute_waits(mark).is_ok());
        if !waits {
            self.line.lane.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trajectory::second_level::Simulated;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    fn entry(value: u32) -> Vec<Tensor> {
        let x = Tensor::full(value as f32 + 0.5, (2, 3), &Device::Cpu).unwrap();
        vec![x.clone(), (x * 2.0).unwrap().to_dtype(DType::F16).unwrap()]
    }

    fn bits(tensors: &[Tensor]) -> Vec<Vec<u8>> {
        tensors.iter().map(|x| safetensors::View::data(&x).into_owned()).collect()
    }

    fn put(mover: &Arc<dyn Moves>, value: u32) -> Box<dyn Moved> {
        mover.clone().put(&entry(value), Arc::new(())).unwrap()
    }

    #[test]
    fn copies_and_what_is_computed_wait_for_one_another() {
        let device = Simulated::new(false);
        let mover = device.mover();
        let (a, b) = (put(&mover, 1), put(&mover, 2));
        let putting = ["after what is computed", "to buffer 1", "to buffer 2", "mark 2"];
        let again = ["after what is computed", "to buffer 3", "to buffer 4", "mark 4"];
        assert_eq!(device.log(), [putting, again].concat());
        a.settle();
        assert_eq!((device.log(), device.pending()), (vec!["what is computed waits for 2".to_owned()], 2));

        a.begin("f32").unwrap();
        a.begin("f32").unwrap();
        let to_rooms = ["from buffer 1 to room 1", "from buffer 2 to room 2", "mark 6"];
        assert_eq!(device.log(), [&["room 1", "room 2", "after what is computed"], &to_rooms[..]].concat());
        assert_eq!(bits(&a.fetch("f32").unwrap()), bits(&entry(1)));
        assert_eq!(device.log(), ["what is computed waits for 6"]);

        // What has not left is let go before a copy comes back.
        device.log();
        let (copied, before) = (put(&mover, 3), device.log().len());
        assert_eq!(bits(&copied.fetch("f32").unwrap()), bits(&entry(3)));
        let log = device.log();
        assert_eq!((before, &log[..2]), (4, &["what is computed waits for 8".to_owned(), "room 3".to_owned()][..]));

        // Given up.
        b.begin("f32").unwrap();
        drop((a, b, copied));
        assert_eq!((device.pending(), device.wrong()), (0, vec![]));
    }

    #[test]
    fn buffers_are_used_again() {
        let device = Simulated::new(false);
        let mover = device.mover();
        for round in 0..3 {
            let entries: Vec<_> = (0..4).map(|n| put(&mover, 10 * round + n)).collect();
            for (n, entry) in entries.iter().enumerate().rev() {
                assert_eq!(bits(&entry.fetch("f32").unwrap()), bits(&self::entry(10 * round + n as u32)));
            }
        }
        assert_eq!((device.buffers(), device.wrong()), (8, vec![]));
        drop(mover);
        assert_eq!((device.pending(), device.wrong()), (0, vec![]));
    }

    #[test]
    fn a_copy_that_fails_leaves_nothing_in_flight() {
        let device = Simulated::new(false);
        let mover = device.mover();
        device.fail_after(1);
        assert!(mover.clone().put(&entry(1), Arc::new(())).unwrap_err().to_string().contains("has failed"));
        assert_eq!(device.pending(), 0);
        let kept = put(&mover, 2);
        device.fail_after(1);
        assert!(kept.begin("f32").unwrap_err().to_string().contains("has failed"));
        assert_eq!((device.pending(), device.wrong()), (0, vec![]));
        assert_eq!(bits(&kept.fetch("f32").unwrap()), bits(&entry(2)));
    }

    /// Holds what leaves: it must be over when this is dropped.
    struct Holds(Simulated, Arc<AtomicUsize>);

    impl Drop for Holds {
        fn drop(&mut self) {
            assert!(self.0.made() >= self.1.load(Relaxed), "an entry is let go before it has left");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_for_comes_back_to_the_bit(
            eager: bool,
            asked in prop::collection::vec((0..6_usize, 0..6_u32), 0..80),
        ) {
            let device = Simulated::new(eager);
            let mover = device.mover();
            let mut kept: Vec<(u32, Box<dyn Moved>)> = vec![];
            for (n, (at, what)) in asked.into_iter().enumerate() {
                let at = if kept.is_empty() { 0 } else { at % kept.len() };
                match (what, kept.get(at)) {
                    (0 | 1, _) | (_, None) => {
                        let copies = Arc::new(AtomicUsize::new(usize::MAX));
                        let owner = Arc::new(Holds(device.clone(), copies.clone()));
                        let moved = mover.clone().put(&entry(n as u32), owner).unwrap();
                        copies.store(device.copies(), Relaxed);
                        kept.push((n as u32, moved));
                    }
                    (2, Some((_, moved))) => moved.begin("f32").unwrap(),
                    (3, Some((_, moved))) => moved.settle(),
                    (4, Some((value, moved))) => {
                        prop_assert_eq!(bits(&moved.fetch("f32").unwrap()), bits(&entry(*value)));
                    }
                    (_, Some(_)) => drop(kept.swap_remove(at)),
                }
            }
            drop((kept, mover));
            prop_assert_eq!((device.pending(), device.wrong()), (0, vec![]));
        }
    }
}
