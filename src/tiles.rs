//! Tiles: rows of the batch that go through a pass together, on a thread of their own.
//!
//! A field that treats the rows of a batch independently is solved tile by tile: what lives at once of its evaluations,
//! linearisations and stages belongs to one tile a thread and stays in that core's cache. Tiles are as
//! even as can be. What they add up to, dL/dθ, is summed in the order of the tiles, so that the bits depend on the tile
//! and not on the number of threads. A batch that is not cut is solved whole; its kernels share their work.

mod folding;

use crate::State;
use crate::adjoint::{Reverse, Reversed};
use crate::error::{OdeError, Result};
use crate::field::{Fallback, draw};
use crate::forward::{Finished, Forward, Wanted};
use crate::scaling::AdjointScaling;
use crate::stats::Counters;
use crate::workers;
use candle_core::Tensor;
use folding::Folding;
use std::ops::Range;
use std::sync::Arc;

/// How a batch is cut.
#[derive(Clone, Debug)]
pub(crate) struct Tiles {
    tiles: Vec<Range<usize>>,
    threads: usize,
}

impl Tiles {
    /// Elements of the state in a tile by default: the stage linearisations of a field a few times as wide as its state
    /// then fit in a core's own cache.
    const ELEMENTS: usize = 8192;

    /// Rows in a tile by default, at most: with few elements a row it is the field that is wide. More rows would take
    /// more memory and hardly less time.
    const ROWS: usize = 256;

    /// So many tiles of a batch, on `threads` threads. `None` if one holds it all.
    pub(crate) fn new(batch: usize, count: usize, threads: usize) -> Option<Self> {
        let tiles = (0..count).map(|n| batch * n / count..batch * (n + 1) / count).collect();
        (count > 1).then_some(Self { tiles, threads: threads.clamp(1, count) })
    }

    /// The rows of a batch, if all tensors of the state have the same.
    pub(crate) fn batch(state: &State) -> Option<usize> {
        let rows = *state.tensors().first()?.dims().first()?;
        state.tensors().iter().all(|x| x.dims().first() == Some(&rows)).then_some(rows)
    }

    /// How many tiles where no rows are asked for; the same on every machine, since it decides the order of sums. A
    /// power of two, if there are so many rows: two threads, or four, then have as many each.
    pub(crate) fn default_count(state: &State, batch: usize) -> usize {
        let rows = (Self::ELEMENTS * batch / state.numel().max(1)).clamp(1, Self::ROWS);
        batch.div_ceil(rows).next_power_of_two().min(batch)
    }

    /// Threads that can run at once.
    pub(crate) fn threads() -> usize {
        workers::most()
    }

    /// How many threads take them.
    pub(crate) fn on_threads(&self) -> usize {
        self.threads
    }

    /// How many.
    pub(crate) fn count(&self) -> usize {
        self.tiles.len()
    }

    /// The rows of the largest.
    pub(crate) fn rows(&self) -> usize {
        self.tiles.iter().map(Range::len).max().unwrap_or(0)
    }

    /// The rows of tile `n`: a view.
    pub(crate) fn of(&self, state: &State, n: usize) -> Result<State> {
        let Range { start, end } = self.tiles[n];
        Ok(state.try_map(|x| x.narrow(0, start, end - start))?)
    }

    /// Does `job` for every tile, on the threads.
    fn each<T: Send>(&self, job: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
        let solve = tracing::Span::current();
        let job = |n: usize| {
            let Range { start, end } = self.tiles[n];
            let (index, first, rows) = (n as u64, start as u64, (end - start) as u64);
            let _span =
                tracing::debug_span!(target: "candle_ode", parent: &solve, "tile", index, first, rows).entered();
            draw::from_row(start, || job(n))
        };
        workers::each(self.threads, self.count(), job).into_iter().collect()
    }

    /// The forward passes over all tiles, as one. The first evaluation of the first tile is checked for all of them.
    pub(crate) fn forward(
        self,
        forward: &Forward<'_>,
        start: &State,
        outputs: &[f64],
        wanted: Option<Wanted<'_>>,
    ) -> Result<(Finished, Vec<Arc<Counters>>)> {
        let start = start.detach();
        workers::sharing(Some(1), || forward.check_tile(&self.of(&start, 0)?, &start))?;
        let counters: Vec<Arc<Counters>> =
            (0..self.count()).map(|n| if n == 0 { forward.counters.clone() } else { Arc::default() }).collect();
        let scalings: Vec<Option<AdjointScaling>> =
            (0..self.count()).map(|_| wanted.as_ref().map(|wanted| wanted.scaling.apart())).collect();
        let parts = self.each(|n| {
            let wanted = wanted.as_ref().zip(scalings[n].clone());
            let wanted = wanted.map(|(wanted, scaling)| Wanted { scaling, ..wanted.clone() });
            forward.checked_already(counters[n].clone()).solve(&self.of(&start, n)?, outputs, wanted)
        })?;
        let (mut times, mut reached, mut backs) = (vec![], Vec::<Vec<(usize, State)>>::new(), vec![]);
        for Finished { times: own, outputs, back } in parts {
            times = own;
            reached.push(outputs);
            backs.extend(back);
        }
        let outputs = (0..reached[0].len()).map(|output| {
            let states: Vec<&State> = reached.iter().map(|tile| &tile[output].1).collect();
            Ok((reached[0][output].0, join(&states)?))
        });
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        let back = wanted.map(|wanted| {
            let scalings = scalings.into_iter().flatten().collect();
            let casts = forward.casts.clone();
            Box::new(Tiled { tiles: self, casts, backs, scaling: wanted.scaling, scalings }) as Box<dyn Reverse>
        });
        Ok((Finished { times, outputs, back }, counters))
    }
}

/// One batch of the tiles.
fn join(tiles: &[&State]) -> Result<State> {
    let tensors = (0..tiles[0].len()).map(|n| {
        let parts: Vec<&Tensor> = tiles.iter().map(|tile| &tile[n]).collect();
        Tensor::cat(&parts, 0)
    });
    Ok(State::from(tensors.collect::<candle_core::Result<Vec<_>>>()?))
}

/// The backward passes over all tiles, as one.
struct Tiled {
    tiles: Tiles,
    casts: Arc<Fallback>,
    backs: Vec<Box<dyn Reverse>>,
    scaling: AdjointScaling,
    /// What overflows teach a tile reaches the others after the pass: the bits shall not depend on who was first.
    scalings: Vec<AdjointScaling>,
}

impl Reverse for Tiled {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        let folding = Folding::new(self.tiles.threads);
        let _packed = self.casts.casts.pack_once();
        let starts = self.tiles.each(|n| {
            let turn = folding.turn();
            let own = cotangents.iter().map(|(at, state)| Ok((*at, self.tiles.of(state, n)?)));
            let Reversed { y0, sums } = self.backs[n].reverse(&own.collect::<Result<Vec<_>>>()?)?;
            turn.add(n, sums)?;
            Ok(y0)
        })?;
        self.scalings.iter().for_each(|scaling| self.scaling.learn(scaling.headroom()));
        let sums = folding.into_sums();
        Ok(Reversed { y0: join(&starts.iter().collect::<Vec<_>>())?, sums })
    }

    fn bytes(&self) -> usize {
        self.backs.iter().map(|back| back.bytes()).sum()
    }

    fn bytes_away(&self) -> usize {
        self.backs.iter().map(|back| back.bytes_away()).sum()
    }
}

/// The passes over a batch that is not cut, whose kernels share their work among `threads`, if it says how many.
pub(crate) fn whole(
    threads: Option<usize>,
    forward: Forward<'_>,
    start: &State,
    outputs: &[f64],
    wanted: Option<Wanted<'_>>,
) -> Result<Finished> {
    let Finished { times, outputs, back } = workers::sharing(threads, || forward.solve(start, outputs, wanted))?;
    let back = match (threads, back) {
        (Some(threads), Some(back)) => Some(Box::new(Sharing { threads, back }) as Box<dyn Reverse>),
        (_, back) => back,
    };
    Ok(Finished { times, outputs, back })
}

/// A reverse pass whose kernels share their work among so many threads.
struct Sharing {
    threads: usize,
    back: Box<dyn Reverse>,
}

impl Reverse for Sharing {
    fn reverse(&self, cotangents: &[(usize, State)]) -> Result<Reversed> {
        workers::sharing(Some(self.threads), || self.back.reverse(cotangents))
    }

    fn bytes(&self) -> usize {
        self.back.bytes()
    }

    fn bytes_away(&self) -> usize {
        self.back.bytes_away()
    }
}

/// How a solve is to be cut, as far as its settings say.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cut {
    pub(crate) rows: Option<usize>,
    pub(crate) threads: Option<usize>,
}

impl Cut {
    /// The tiles of a solve from `start`; `against` says what of the other settings rules them out.
    pub(crate) fn tiles(&self, start: &State, row_wise: bool, against: Option<&'static str>) -> Result<Option<Tiles>> {
        let batch = Tiles::batch(start);
        let on_cpu = start.device().is_cpu();
        let refuse = |what: &str, instead| Err(OdeError::Unsupported { what: format!("tiles {what}"), instead });
        if self.threads == Some(0) {
            let hint = "tiles need at least one thread";
            return Err(OdeError::Setting { setting: "threads", value: "0".into(), hint });
        }
        let (batch, count) = match (self.rows, batch) {
            (Some(0), _) => {
                let hint = "a tile has at least one row";
                return Err(OdeError::Setting { setting: "tile", value: "0".into(), hint });
            }
            (Some(usize::MAX), None) => return Ok(None),
            (Some(_), None) => return refuse("of a state whose tensors have no common rows", NO_TILE),
            (Some(rows), Some(batch)) => (batch, batch.div_ceil(rows)),
            (None, Some(batch)) if row_wise && on_cpu => (batch, Tiles::default_count(start, batch)),
            (None, _) => return Ok(None),
        };
        if self.rows.is_some() && !row_wise && count > 1 {
            return refuse("of a field that is not declared row-wise", "declare it with .row_wise(), if it is");
        }
        match against {
            Some(_) if self.rows.is_none() || count <= 1 => Ok(None),
            Some(what) => refuse(what, NO_TILE),
            None => {
                let threads = if on_cpu { self.threads.unwrap_or_else(Tiles::threads) } else { 1 };
                Ok(Tiles::new(batch, count, threads))
            }
        }
    }
}

const NO_TILE: &str = "leave out .tile(..): the solve then runs on the whole batch";

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn tiles_are_even_and_cover_the_batch() {
        for (batch, count) in [(1024, 8), (130, 2), (7, 3), (5, 5)] {
            let tiles = Tiles::new(batch, count, 2).unwrap();
            assert_eq!(tiles.count(), count);
            assert_eq!((tiles.tiles[0].start, tiles.tiles[count - 1].end), (0, batch));
            assert!(tiles.tiles.windows(2).all(|pair| pair[0].end == pair[1].start));
            let sizes: Vec<usize> = tiles.tiles.iter().map(Range::len).collect();
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
        }
        assert!(Tiles::new(128, 1, 2).is_none());
    }

    #[test]
    fn the_default_depends_on_the_state_alone() {
        let state = |shape: &[usize]| State::from(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
        let cases: [(&[usize], usize); 11] = [
            (&[1024, 64], 8),
            (&[256, 2], 1),
            (&[257, 2], 2),
            (&[2000, 2], 8),
            (&[16, 32, 16, 16], 16),
            (&[4, 100_000], 4),
            (&[256, 65], 4),
            (&[100, 1024], 16),
            (&[5, 8192], 5),
            (&[5, 2], 1),
            (&[0, 2], 0),
        ];
        for (shape, count) in cases {
            assert_eq!(Tiles::default_count(&state(shape), shape[0]), count, "{shape:?}");
        }
    }
}
