//! The whole solve, put together of its tiles.
//!
//! Tiles of as many rows are alike: each is walked through once, and what it does to what is live happens as often as
//! there are such tiles. On one thread that is one after another, and exact. Several threads may be anywhere in their
//! tiles: then the peak is a bound, all of them at their highest.

use super::ghost::Heap;
use super::probe::Costs;
use super::session::Session;
use super::tally::{Stretch, Tally};
use super::undone::Way;
use super::walk::{ClockBytes, Counts, Keeps, Levels, Sizes, Solve};
use super::{MemoryPlan, Planned, PlannedAdjoint};
use crate::State;
use crate::account::Category;
use crate::error::Result;
use crate::memory::composition::Part;
use crate::memory::meter::{TrackingAllocator, held};
use crate::solver::{Clock, StageMemory};
use crate::trajectory::{Codec, Encodes, Entry, Image, Increment, Keeping, Kept, States};
use candle_core::{Shape, Tensor};
use std::any::Any;
use std::sync::Arc;

/// What a tile has of its own beside its states (settings, lists), and all of them together: where a backward pass
/// follows, and where none does.
const BESIDE: [usize; 2] = [1024, 4608];
const BESIDE_INFERENCE: [usize; 2] = [352, 1600];

/// A tile that was walked through.
struct Tile {
    costs: Costs,
    check: Stretch,
    forward: Stretch,
    /// Each of the outputs is let go.
    releases: Vec<Stretch>,
    backward: Stretch,
    counts: Counts,
    trajectory: usize,
}

impl Planned<'_> {
    /// The plan of a solve from `y0`.
    pub(crate) fn plan(&self, y0: &State) -> Result<MemoryPlan> {
        let accumulate = self.precision.accumulate_dtype();
        let (start, widened) = held(|| crate::graph::widen(&y0.detach(), accumulate))?;
        let (clock, clocked) = held(|| Ok(Clock::new(self.grid, self.solver.nodes(), y0.device())))?;
        let (kinds, order) = self.walk_tiles(&start, &clock)?;
        let (count, first) = (order.len(), &kinds[0]);
        let threads = self.tiles.as_ref().map_or(1, |tiles| tiles.on_threads());
        let (keeps, costs) = (self.keeps(), first.costs);
        let handed = start.bytes(accumulate) + costs.state_beside;
        let clock = ClockBytes { host: clocked.kept + 8 * self.grid.times().len(), device: clock.len() * costs.time };

        let mut total = Tally::default();
        total.rename(Part::Baseline, Part::Owned(Category::Parameters), self.field.params().bytes());
        total.take(Part::Other, costs.casts_beside);
        total.take(Part::Owned(Category::Casts), costs.casts);
        total.take(Part::Other, clock.host);
        total.take(Part::Owned(Category::Scratch), clock.device);
        // y0 is the caller's, or a copy.
        let copied = crate::graph::widened(y0, accumulate).bytes();
        total.take(Part::Owned(Category::Scratch), copied);
        total.take(Part::Other, widened.kept.saturating_sub(copied));
        // Linearisations that are kept keep the weights that were packed for them.
        let packed = if keeps.linearizes() { costs.layers.packed_back } else { costs.layers.packed };
        total.take(Part::Owned(Category::Scratch), packed);

        let of = |stretch: fn(&Tile) -> Stretch| order.iter().map(|n| stretch(&kinds[*n])).collect::<Vec<_>>();
        if count > 1 {
            total.take(Part::Other, beside_tiles(keeps)[1]);
            total.go(&first.check);
        }
        total.go_on(&of(|tile| tile.forward), threads);
        if count > 1 {
            // Joined, output by output.
            self.outputs.iter().for_each(|_| total.take(Part::Other, handed));
            order.iter().flat_map(|n| &kinds[*n].releases).for_each(|release| total.go(release));
        }
        for output in 0..self.outputs.len() {
            let follows = !matches!(keeps, Keeps::Nothing);
            // Handed out as copies, one after another.
            total.take(Part::Outside, if follows { handed } else { 0 });
            match count > 1 {
                true => total.give(Part::Other, if follows { handed } else { 0 }),
                false => total.go(&first.releases[output]),
            }
        }
        if !matches!(keeps, Keeps::Nothing) {
            if matches!(self.adjoint, PlannedAdjoint::Backwards(_)) {
                // The times of the forward pass are not needed any more.
                total.give(Part::Other, clock.host);
                total.give(Part::Owned(Category::Scratch), clock.device);
            }
            total.take(Part::Outside, self.used.len() * handed);
            let shared = if self.shares_packed() && !keeps.linearizes() { costs.layers.packed_back } else { 0 };
            total.take(Part::Owned(Category::Scratch), shared);
            let backward = of(|tile| tile.backward);
            // Sums that outlive the tiles.
            let sums = if threads > 1 {
                // Those of the tiles so far, and as many that wait for a tile before theirs as other threads can bring.
                total.take(Part::Owned(Category::Gradients), threads * costs.sums);
                total.go_on(&backward, threads);
                threads * costs.sums
            } else {
                let sums = if count > 1 { costs.sums } else { 0 };
                total.go_on(&backward[..1], 1);
                total.take(Part::Owned(Category::Gradients), sums);
                total.go_on(&backward[1..], 1);
                sums
            };
            if count > 1 {
                // dL/dy0 is joined.
                total.take(Part::Other, handed);
                let beside: usize = order.iter().map(|n| kinds[*n].costs.state_beside).sum();
                total.give(Part::Other, start.bytes(accumulate) + beside);
            }
            total.give(Part::Owned(Category::Gradients), sums);
            total.give(Part::Owned(Category::Scratch), shared);
            total.give(Part::Outside, self.used.len() * handed);
            self.hand_to_candle(y0, &costs, &mut total);
        }
        let counts_heap = TrackingAllocator::is_installed() && y0.device().is_cpu();
        let counts = kinds.iter().map(|tile| tile.counts).reduce(Counts::largest).unwrap_or_default();
        Ok(MemoryPlan {
            peak: counts_heap.then_some(total.highest().total() as u64),
            at_peak: total.highest(),
            owned_peak: total.owned_total_peak(),
            trajectory: order.iter().map(|n| kinds[*n].trajectory as u64).sum(),
            evaluations: counts.evaluations + if count > 1 { self.checks } else { 0 },
            linearizations: counts.linearizations,
            pullbacks: counts.pullbacks,
            recomputed_steps: counts.recomputed_steps,
            tiles: count,
            threads,
            owned: Category::ALL.map(|category| total.owned_peak(category)),
        })
    }

    /// Candle is handed dL/dθ and dL/dy0, in the dtype of what they belong to: it adds each to zeros of its own, one
    /// after another.
    fn hand_to_candle(&self, y0: &State, costs: &Costs, total: &mut Tally) {
        let accumulate = self.precision.accumulate_dtype().size_in_bytes();
        let three = |x: &Tensor, size: usize| x.elem_count() * (3 * size).saturating_sub(accumulate).max(size);
        let trainable = self.field.params().trainable(self.inputs);
        let of_trainable = trainable.iter().flatten().map(|x| three(x, x.dtype().size_in_bytes()));
        let of_start = y0.tensors().iter().filter(|x| x.track_op()).map(|x| three(x, accumulate));
        total.take(Part::Outside, costs.sums);
        total.pass(Part::Outside, of_trainable.chain(of_start).max().unwrap_or(0));
    }

    /// The kinds of tiles, and the kind of each.
    fn walk_tiles(&self, start: &State, clock: &Clock) -> Result<(Vec<Tile>, Vec<usize>)> {
        let Some(tiles) = &self.tiles else { return Ok((vec![self.walk(start, clock)?], vec![0])) };
        let shapes = |state: &State| state.tensors().iter().map(|x| x.shape().clone()).collect::<Vec<Shape>>();
        let (mut known, mut kinds, mut order) = (vec![], vec![], vec![]);
        for n in 0..tiles.count() {
            let tile = tiles.of(start, n)?;
            let of_tile = shapes(&tile);
            let kind = match known.iter().position(|known| *known == of_tile) {
                Some(kind) => kind,
                None => {
                    known.push(of_tile);
                    kinds.push(self.walk(&tile, clock)?);
                    kinds.len() - 1
                }
            };
            order.push(kind);
        }
        Ok((kinds, order))
    }

    /// Walks through a tile that starts at `start`, or the whole batch.
    fn walk(&self, start: &State, clock: &Clock) -> Result<Tile> {
        let (tableau, coupled) = self.made_of()?;
        let costs = self.costs(start, clock)?;
        let sizes = self.sizes(start)?;
        let (keeps, is_tile) = (self.keeps(), self.tiles.is_some());
        let mut solve = Solve {
            tableau,
            coupled,
            memory: self.memory,
            keeps,
            costs,
            sizes,
            steps: self.grid.steps(),
            heap: Heap::default(),
            counts: Counts::default(),
            sums: None,
            of_step: None,
            pulls_on_buffers: self.memory == StageMemory::All && !self.times,
            tries_again: self.scaling.tries_again(self.precision.compute_dtype()),
            session: Session::default(),
            packed_elsewhere: self.shares_packed(),
        };
        let (checks, within) = if is_tile { (self.checks, 0) } else { (0, self.checks) };
        solve.check(checks);
        solve.counts = Counts::default();
        let check = solve.heap.stretch();
        let mut walked = solve.forward(&self.outputs, within);
        let times = if matches!(keeps, Keeps::Nothing) { 0 } else { 17 * self.grid.times().len() };
        let beside = is_tile.then(|| solve.heap.buffer(Part::Other, beside_tiles(keeps)[0] + times));
        let trajectory = walked.trajectory();
        let forward = solve.heap.stretch();
        let release = |state| {
            drop(state);
            solve.heap.stretch()
        };
        let releases = std::mem::take(&mut walked.reached).into_iter().map(release).collect();
        let left = match (keeps, &self.adjoint) {
            (Keeps::Nothing, _) => (None, None),
            (Keeps::States(schedule, consume), _) => solve.backward(&mut walked, &self.used, (schedule, consume))?,
            (_, PlannedAdjoint::Backwards(back)) => {
                let way: Way<'_> = self.way(back, start.device(), costs.time)?;
                solve.solve_backwards(&self.used, &way)
            }
            _ => solve.undo_all(&walked, &self.used),
        };
        let backward = solve.heap.stretch();
        drop((left, beside));
        Ok(Tile { costs, check, forward, releases, backward, counts: solve.counts, trajectory })
    }

    /// What the forward pass keeps.
    pub(super) fn keeps(&self) -> Keeps<'_> {
        match &self.adjoint {
            _ if !self.tracked => Keeps::Nothing,
            PlannedAdjoint::Kept(keeping) => Keeps::States(keeping.schedule.as_ref(), keeping.consume),
            PlannedAdjoint::Undone(every) => Keeps::Anchors(*every),
            PlannedAdjoint::Backwards(_) => Keeps::Anchors(usize::MAX),
        }
    }

    /// Whether several sessions that linearise share what they have packed: kept linearisations, or tiles.
    fn shares_packed(&self) -> bool {
        self.keeps().linearizes() || self.tiles.is_some()
    }

    /// The states of a solve from `start`, in bytes.
    fn sizes(&self, start: &State) -> Result<Sizes> {
        let (compute, accumulate) = (self.precision.compute_dtype(), self.precision.accumulate_dtype());
        let shapes: Vec<Shape> = start.tensors().iter().map(|x| x.shape().clone()).collect();
        let exact: Arc<dyn Codec> = Arc::new(States(accumulate));
        let codec = match &self.adjoint {
            PlannedAdjoint::Kept(keeping) => &keeping.codec,
            PlannedAdjoint::Undone(_) | PlannedAdjoint::Backwards(_) => &exact,
        };
        let entry = codec.bytes(&shapes);
        let ((kept, _), encoded) = held(|| codec.encode(start))?;
        let (decoded, decoding) = held(|| codec.decode(&kept, accumulate))?;
        let levels = self.levels(&kept)?;
        let encodes = codec.encodes();
        let following = match encodes {
            Encodes::States => 0,
            Encodes::Increments => {
                let y = &start.detach();
                held(|| codec.follow(&Increment { before: y, after: y, residual: Some(y), dtype: accumulate }))?.1.most
            }
        };
        let image = match encodes {
            Encodes::Increments if levels.is_none() => image(&kept)?,
            _ => None,
        };
        drop((kept, decoded));
        // A state that is kept as it is has a handle of its own.
        let (_, handle) = held(|| exact.encode(start))?;
        // Anything else makes an entry of its own.
        let entry_is_state =
            encodes == Encodes::States && codec.dtype() == accumulate && entry == start.bytes(accumulate);
        Ok(Sizes {
            accumulate: start.bytes(accumulate),
            compute: start.bytes(compute),
            entry,
            entry_beside: encoded.kept.saturating_sub(entry) + Kept::BESIDE,
            image,
            handle: handle.kept + Kept::BESIDE,
            encoding: encoded.most,
            decoding: decoding.most,
            following,
            encodes,
            entry_is_state,
            same_dtype: compute == accumulate,
            levels,
        })
    }

    /// What it takes to put `entry` on the second level, if there is one.
    fn levels(&self, entry: &Entry) -> Result<Option<Levels>> {
        let PlannedAdjoint::Kept(Keeping { levels: Some(levels), .. }) = &self.adjoint else { return Ok(None) };
        if !entry.tensors.first().is_some_and(|x| levels.moves(x.device())) {
            return Ok(None);
        }
        let (owner, codec): (Arc<dyn Any + Send + Sync>, _) = (Arc::new(()), "planned");
        // The first makes the file.
        drop(levels.put(entry, owner.clone())?);
        let (away, putting) = held(|| levels.put(entry, owner))?;
        let (_, fetching) = held(|| away.fetch(codec))?;
        let beside = putting.kept + Kept::BESIDE;
        let (putting, fetching, overlaps) = (putting.most, fetching.most, away.moves_beside());
        Ok(Some(Levels { resident: levels.resident, beside, putting, fetching, overlaps }))
    }
}

/// What `entry` takes beside its elements where it lies without tensors, and as an entry once more.
fn image(entry: &Entry) -> Result<Option<[usize; 2]>> {
    let mut form = None;
    if Image::of(entry, &mut form)?.is_none() {
        return Ok(None);
    }
    let (image, lies) = held(|| Image::of(entry, &mut form))?;
    let again = image.map(|image| held(|| image.entry())).transpose()?.map_or(0, |(_, again)| again.kept);
    Ok(Some([lies.kept.saturating_sub(entry.bytes()) + Kept::BESIDE, again]))
}

fn beside_tiles(keeps: Keeps<'_>) -> [usize; 2] {
    if matches!(keeps, Keeps::Nothing) { BESIDE_INFERENCE } else { BESIDE }
}

impl Counts {
    /// Count by count.
    fn largest(self, other: Self) -> Self {
        Self {
            evaluations: self.evaluations.max(other.evaluations),
            linearizations: self.linearizations.max(other.linearizations),
            pullbacks: self.pullbacks.max(other.pullbacks),
            recomputed_steps: self.recomputed_steps.max(other.recomputed_steps),
        }
    }
}
