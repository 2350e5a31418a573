//! What the layers of an open field share during a pass on the CPU: which tensors stand for its parameters, their
//! packed forms, and buffers that serve one evaluation after another.

use super::ops::kernel::{Held, Packed, Scratch, View};
use crate::account::{Category, Owned};
use candle_core::{Tensor, TensorId};
use foldhash::HashMap;
use half::{bf16, f16};
use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

thread_local! {
    static OPEN: RefCell<Option<Current>> = const { RefCell::new(None) };
    static RAN: RefCell<Option<Ran>> = const { RefCell::new(None) };
}

/// The session that is open on a thread, during one call of the field.
#[derive(Clone, Debug)]
pub(crate) struct Current {
    pub(crate) session: Arc<Session>,
    pub(crate) call: Call,
}

/// What a field is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Its value.
    Value,
    /// A value that Candle's graph leads back from.
    Graph,
    /// A value that layers lead back from by themselves: nothing is tracked.
    Layers,
}

/// Layers that have run, from one tensor to another, and nothing beside them: that the field's result is the one and
/// its argument the other, by identity, is all that is asked.
pub(crate) struct Ran {
    pub(crate) from: TensorId,
    pub(crate) to: TensorId,
    pub(crate) way_back: Arc<dyn WayBack>,
}

/// Layers that pull cotangents back through themselves.
pub(crate) trait WayBack: Send + Sync {
    /// dL/dx from dL/d(value), both S times; dL/dθ goes to the open sums. x is not needed where nothing was tracked.
    ///
    /// # Errors
    /// When no sums are open for a parameter.
    fn pull(&self, x: Option<&Tensor>, value: &Tensor, cotangent: &Tensor) -> candle_core::Result<Tensor>;
}

/// The session of one pass on one thread.
#[derive(Debug)]
pub(crate) struct Session {
    slots: HashMap<TensorId, usize>,
    packed: Arc<PackedWeights>,
    /// What this session has asked for already: the shared ones are behind a lock that others hold while they pack.
    seen: Mutex<Packs>,
    linearises: bool,
    single: Spare<f32>,
    half: Spare<f16>,
    brain: Spare<bf16>,
}

impl Session {
    pub(super) fn new(leaves: &[Tensor], packed: Arc<PackedWeights>, linearises: bool) -> Arc<Self> {
        let slots = leaves.iter().enumerate().map(|(slot, leaf)| (leaf.id(), slot)).collect();
        Arc::new(Self {
            slots,
            packed,
            seen: Mutex::default(),
            linearises,
            single: Spare::default(),
            half: Spare::default(),
            brain: Spare::default(),
        })
    }

    /// Runs `eval` with the session open on this thread; gives the layers that ran last, too, if they can be pulled
    /// back.
    pub(super) fn open<T>(self: &Arc<Self>, call: Call, eval: impl FnOnce() -> T) -> (T, Option<Ran>) {
        let _outer = Outer(OPEN.replace(Some(Current { session: self.clone(), call })));
        let value = eval();
        (value, RAN.take())
    }

    /// Layers have run, in a call for more than a value.
    pub(crate) fn ran(layers: Ran) {
        RAN.set(Some(layers));
    }

    /// Runs `call` with no session open on this thread.
    pub(super) fn shut<T>(call: impl FnOnce() -> T) -> T {
        let _outer = Outer(OPEN.take());
        call()
    }

    /// The one that is open on this thread.
    pub(crate) fn current() -> Option<Current> {
        OPEN.with_borrow(Clone::clone)
    }

    /// Which parameter or input a tensor stands for.
    pub(crate) fn slot(&self, leaf: &Tensor) -> Option<usize> {
        self.slots.get(&leaf.id()).copied()
    }

    /// A weight that this session has asked for before.
    pub(crate) fn seen<T: Held>(&self, (slot, inputs, side): (usize, usize, Side)) -> Option<Arc<Shared<T>>> {
        find(&lock(&self.seen), &(slot, inputs, side, TypeId::of::<T>()))
    }

    /// The weight of a slot, `inputs` columns of it, on the side of a product; packed by `pack` when first asked for.
    /// Where it will be pulled back, both sides are packed at once, so that they are of the same values.
    pub(crate) fn packed<T: Held>(
        &self,
        (slot, inputs, side): (usize, usize, Side),
        pack: impl Fn(Side) -> Packed<T>,
    ) -> Arc<Shared<T>> {
        if let Some(found) = self.seen((slot, inputs, side)) {
            return found;
        }
        let key = |side| (slot, inputs, side, TypeId::of::<T>());
        let mut shared = lock(&self.packed.0);
        let found = find(&shared, &key(side)).unwrap_or_else(|| {
            let sides: &[Side] = if self.linearises { &[Side::Forward, Side::Backward] } else { &[side] };
            let mut made = sides.iter().map(|side| (*side, Shared::new(pack(*side)))).collect::<Vec<_>>();
            shared.extend(made.iter().map(|(side, made)| (key(*side), made.clone() as Arc<dyn Bytes>)));
            let wanted = made.iter().position(|(made, _)| *made == side).unwrap_or(0);
            made.swap_remove(wanted).1
        });
        lock(&self.seen).insert(key(side), found.clone());
        found
    }
}

fn find<T: Held>(packs: &Packs, key: &Key) -> Option<Arc<Shared<T>>> {
    (packs.get(key)?.clone() as Arc<dyn Any + Send + Sync>).downcast().ok()
}

/// What was open before, put back however the call ends.
struct Outer(Option<Current>);

impl Drop for Outer {
    fn drop(&mut self) {
        OPEN.set(self.0.take());
    }
}

/// On which side of a product a weight stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    /// y = x Wᵀ
    Forward,
    /// g W
    Backward,
}

/// Packed weights that the tiles and threads of a pass share.
#[derive(Default)]
pub(crate) struct PackedWeights(Mutex<Packs>);

impl PackedWeights {
    /// How much memory they take.
    pub(crate) fn bytes(&self) -> usize {
        lock(&self.0).values().map(|packed| packed.bytes()).sum()
    }
}

/// Packed weights of any element type.
trait Bytes: Any + fmt::Debug + Send + Sync {
    fn bytes(&self) -> usize;
}

impl<T: Held> Bytes for Shared<T> {
    fn bytes(&self) -> usize {
        self.packed.bytes()
    }
}

/// Slot, columns, side and element type.
type Key = (usize, usize, Side, TypeId);

type Packs = HashMap<Key, Arc<dyn Bytes>>;

impl fmt::Debug for PackedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packed weights", lock(&self.0).len())
    }
}

/// A packed weight and its announcement.
#[derive(Debug)]
pub(crate) struct Shared<T> {
    packed: Packed<T>,
    _owned: Owned,
}

impl<T: Held> Shared<T> {
    pub(crate) fn new(packed: Packed<T>) -> Arc<Self> {
        let owned = Owned::new(Category::Scratch, packed.bytes());
        Arc::new(Self { packed, _owned: owned })
    }
}

impl<T> Deref for Shared<T> {
    type Target = Packed<T>;

    fn deref(&self) -> &Packed<T> {
        &self.packed
    }
}

/// Elements with spare buffers of their own.
pub(crate) trait Buffered: Copy + Default {
    fn spare(session: &Session) -> &Spare<Self>;
}

impl Buffered for f32 {
    fn spare(session: &Session) -> &Spare<Self> {
        &session.single
    }
}

impl Buffered for f16 {
    fn spare(session: &Session) -> &Spare<Self> {
        &session.half
    }
}

impl Buffered for bf16 {
    fn spare(session: &Session) -> &Spare<Self> {
        &session.brain
    }
}

/// Elements that tiles hold.
pub(crate) trait Tile: Held + Buffered {}

impl<T: Held + Buffered> Tile for T {}

/// Buffers that nobody uses at the moment.
#[derive(Debug)]
pub(crate) struct Spare<T>(Arc<Mutex<Unused<T>>>);

#[derive(Debug)]
struct Unused<T> {
    buffers: Vec<(Vec<T>, Owned)>,
    scratch: Scratch<T>,
    /// Of the scratch, once it has grown.
    owned: Option<Owned>,
}

impl<T: Default> Default for Spare<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Unused { buffers: vec![], scratch: Scratch::default(), owned: None })))
    }
}

impl<T: Copy + Default> Spare<T> {
    /// A matrix with anything in it: a buffer of its size, or a new one.
    pub(crate) fn matrix(&self, rows: usize, columns: usize) -> Matrix<T> {
        let len = rows * columns;
        let mut unused = lock(&self.0);
        // The last one, which the cache may still hold. None of another size: how many there are of each would hang on
        // the order in which they were asked for, and no plan could tell.
        let found = unused.buffers.iter().rposition(|(buffer, _)| buffer.len() == len);
        let buffer = match found {
            Some(n) => unused.buffers.swap_remove(n),
            None => (vec![T::default(); len], Owned::new(Category::Scratch, len * size_of::<T>())),
        };
        Matrix { buffer: Some(buffer), rows, columns, home: self.0.clone() }
    }

    /// Runs `with` with the scratch of sums over rows.
    pub(crate) fn with_scratch<R>(&self, with: impl FnOnce(&mut Scratch<T>) -> R) -> R {
        let mut unused = lock(&self.0);
        let done = with(&mut unused.scratch);
        let bytes = unused.scratch.bytes();
        if bytes != unused.owned.as_ref().map_or(0, Owned::bytes) {
            // What it was is given back first.
            unused.owned = None;
            unused.owned = Some(Owned::new(Category::Scratch, bytes));
        }
        done
    }
}

/// A row-major matrix in a buffer that goes back to the spare ones.
#[derive(Debug)]
pub(crate) struct Matrix<T> {
    /// Nothing only while it is dropped.
    buffer: Option<(Vec<T>, Owned)>,
    rows: usize,
    columns: usize,
    home: Arc<Mutex<Unused<T>>>,
}

impl<T> Matrix<T> {
    pub(crate) fn view(&self) -> View<'_, T> {
        View::new(self, self.rows, self.columns, self.columns)
    }
}

impl<T> Deref for Matrix<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.buffer.as_ref().map_or(&[], |(values, _)| &values[..self.rows * self.columns])
    }
}

impl<T> DerefMut for Matrix<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.buffer.as_mut().map_or(&mut [], |(values, _)| &mut values[..self.rows * self.columns])
    }
}

impl<T> Drop for Matrix<T> {
    fn drop(&mut self) {
        lock(&self.home).buffers.extend(self.buffer.take());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
