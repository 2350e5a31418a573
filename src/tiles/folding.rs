//! The sums of dL/dθ over the tiles, added in the order of the tiles.
//!
//! A tile that is done before one of a smaller index waits with its sums. On W threads no more than W − 1 of them wait:
//! who is further ahead waits too.

use crate::account::{Category, Owned};
use crate::error::Result;
use crate::field::ops::combine;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Sums that several threads add to.
pub(super) struct Folding {
    folded: Mutex<Folded>,
    /// Something was added, or will never be.
    moved: Condvar,
    threads: usize,
}

impl Folding {
    pub(super) fn new(threads: usize) -> Self {
        Self { folded: Mutex::default(), moved: Condvar::new(), threads }
    }

    /// One tile's turn to add its sums; let go without, it tells the others not to wait for it.
    pub(super) fn turn(&self) -> Turn<'_> {
        Turn { folding: self, added: false }
    }

    /// All of them.
    pub(super) fn into_sums(self) -> Vec<Option<Tensor>> {
        self.folded.into_inner().unwrap_or_else(PoisonError::into_inner).sums
    }

    fn lock(&self) -> MutexGuard<'_, Folded> {
        self.folded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Turn<'a> {
    folding: &'a Folding,
    added: bool,
}

impl Turn<'_> {
    /// Adds the sums of a tile, once those of enough tiles before it have been.
    pub(super) fn add(mut self, tile: usize, sums: Vec<Option<Tensor>>) -> Result<()> {
        let Self { folding, .. } = self;
        let mut folded = folding.lock();
        while tile >= folded.next + folding.threads && !folded.failed {
            folded = folding.moved.wait(folded).unwrap_or_else(PoisonError::into_inner);
        }
        folded.add(tile, sums)?;
        drop(folded);
        self.added = true;
        folding.moved.notify_all();
        Ok(())
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.added {
            self.folding.lock().failed = true;
            self.folding.moved.notify_all();
        }
    }
}

/// The sums so far.
#[derive(Default)]
struct Folded {
    next: usize,
    /// Of tiles that were done before one of a smaller index.
    waiting: BTreeMap<usize, (Vec<Option<Tensor>>, Owned)>,
    sums: Vec<Option<Tensor>>,
    owned: Option<Owned>,
    /// Whether some tile will never be added.
    failed: bool,
}

impl Folded {
    fn add(&mut self, tile: usize, sums: Vec<Option<Tensor>>) -> Result<()> {
        let bytes = sums.iter().flatten().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum();
        self.waiting.insert(tile, (sums, Owned::new(Category::Gradients, bytes)));
        while let Some((sums, owned)) = self.waiting.remove(&self.next) {
            self.next += 1;
            if self.owned.is_none() {
                (self.sums, self.owned) = (sums, Some(owned));
                continue;
            }
            for (sum, of_tile) in self.sums.iter_mut().zip(sums) {
                match (sum, of_tile) {
                    (Some(sum), Some(of_tile)) => drop(combine::accumulate(sum, 1.0, &of_tile)?),
                    (sum @ None, of_tile) => *sum = of_tile,
                    (Some(_), None) => {}
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn of(x: f32) -> Vec<Option<Tensor>> {
        vec![Some(Tensor::new(x, &Device::Cpu).unwrap()), None]
    }

    #[test]
    fn sums_are_added_in_the_order_of_the_tiles() {
        // In F32 1e8 + 1 − 1e8 is 0 in this order, and 1 in another.
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut folded = Folded::default();
            for tile in order {
                folded.add(tile, of([1e8, 1.0, -1e8][tile])).unwrap();
            }
            assert_eq!(folded.sums[0].as_ref().unwrap().to_scalar::<f32>().unwrap(), 0.0, "{order:?}");
            assert!(folded.sums[1].is_none() && folded.waiting.is_empty());
        }
    }

    #[test]
    fn who_is_too_far_ahead_waits() {
        let folding = Folding::new(2);
        std::thread::scope(|scope| {
            let add = |tiles: [usize; 3]| tiles.into_iter().for_each(|tile| folding.turn().add(tile, of(1.0)).unwrap());
            scope.spawn(move || add([1, 3, 5]));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(folding.lock().waiting.keys().collect::<Vec<_>>(), [&1], "3 is more than a round ahead of 0");
            add([0, 2, 4]);
        });
        let sum = folding.into_sums().remove(0).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(sum, 6.0);
    }

    #[test]
    fn nobody_waits_for_a_tile_that_has_failed() {
        let folding = Folding::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| folding.turn().add(5, of(1.0)).unwrap());
            std::thread::sleep(std::time::Duration::from_millis(20));
            drop(folding.turn());
        });
        assert_eq!(folding.lock().waiting.len(), 1);
    }
}
