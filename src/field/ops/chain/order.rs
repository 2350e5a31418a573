//! How the tiles of a chain lie in memory, and the kernels for each way.

use super::Link;
use crate::field::ops::kernel::{
    Epilogue, Packed, Pullback, View, ViewMut, add_column_sums, add_column_sums_lanes, add_outer, add_outer_lanes,
    multiply, multiply_lanes, pull_lanes,
};
use crate::field::session::{Buffered, Matrix, Session, Tile};
use half::bf16;
use std::ops::Range;

/// What is contiguous in a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::field::ops) enum Order {
    /// The features of a row of the batch.
    Rows,
    /// A feature of all rows: the batch lies in the lanes of the vectors, which layers of few features would not fill.
    Lanes,
}

impl Order {
    /// Features that do not fill a vector.
    const FEW: usize = 16;

    /// Whether vectors of features would be half empty, or more so, in what is multiplied on the way forward and back.
    pub(super) fn is_narrow(links: &[Link]) -> bool {
        let filled = |features: usize| features.next_multiple_of(Self::FEW);
        let (needed, made) = links.iter().fold((0, 0), |(needed, made), Link { inputs, outputs, .. }| {
            (needed + 3 * inputs * outputs, made + inputs * filled(*outputs) + 2 * outputs * filled(*inputs))
        });
        made > 2 * needed
    }

    /// The faster order.
    pub(super) fn of(links: &[Link], rows: usize) -> Self {
        if rows >= Self::FEW && Self::is_narrow(links) { Self::Lanes } else { Self::Rows }
    }

    /// A tile with anything in it.
    pub(super) fn tile<T: Tile>(self, session: &Session, rows: usize, features: usize) -> Matrix<T> {
        match self {
            Self::Rows => T::spare(session).matrix(rows, features),
            Self::Lanes => T::spare(session).matrix(features, rows),
        }
    }

    /// The elements of a tile, to be written.
    pub(super) fn write<T>(self, values: &mut [T], rows: usize) -> ViewMut<'_, T> {
        self.part_mut(values, rows, 0..rows)
    }

    /// Some rows of the batch in a tile.
    pub(super) fn part<T>(self, tile: View<'_, T>, rows: Range<usize>) -> View<'_, T> {
        match self {
            Self::Rows => tile.part(rows, 0..tile.columns()),
            Self::Lanes => tile.part(0..tile.rows(), rows),
        }
    }

    /// Some rows of the batch in a tile of so many, to be written.
    pub(super) fn part_mut<T>(self, tile: &mut [T], all: usize, rows: Range<usize>) -> ViewMut<'_, T> {
        let features = tile.len() / all.max(1);
        match self {
            Self::Rows => {
                ViewMut::new(&mut tile[rows.start * features..rows.end * features], rows.len(), features, features)
            }
            Self::Lanes => ViewMut::new(&mut tile[rows.start..], features, rows.len(), all),
        }
    }
}

/// Elements with kernels for their orders. BF16 is multiplied in rows alone.
pub(in crate::field::ops) trait Ordered: Tile {
    /// f(x B + b)
    fn multiply(
        order: Order,
        x: View<'_, Self>,
        b: &Packed<Self>,
        epilogue: &Epilogue<'_, Self>,
        out: ViewMut<'_, Self>,
    );
    /// dW += gᵀ x
    fn add_outer(order: Order, session: &Session, g: View<'_, Self>, x: View<'_, Self>, dw: ViewMut<'_, f32>);
    /// db += Σ g
    fn add_sums(order: Order, g: View<'_, Self>, db: &mut [f32]);

    /// All of a pullback.
    fn pull(order: Order, session: &Session, pullback: Pullback<'_, Self>) {
        pull_one_by_one(order, session, pullback);
    }
}

fn pull_one_by_one<T: Ordered>(order: Order, session: &Session, pullback: Pullback<'_, T>) {
    let Pullback { g, x, b, then, db, dw, out } = pullback;
    T::add_sums(order, g, db);
    T::add_outer(order, session, g, x, dw);
    T::multiply(order, g, b, &Epilogue { then, ..Epilogue::default() }, out);
}

impl Ordered for f32 {
    fn multiply(order: Order, x: View<'_, f32>, b: &Packed<f32>, epilogue: &Epilogue<'_, f32>, out: ViewMut<'_, f32>) {
        match order {
            Order::Rows => multiply(x, b, epilogue, out),
            Order::Lanes => multiply_lanes(x, b, epilogue, out),
        }
    }

    fn add_outer(order: Order, session: &Session, g: View<'_, f32>, x: View<'_, f32>, dw: ViewMut<'_, f32>) {
        match order {
            Order::Rows => Self::spare(session).with_scratch(|scratch| add_outer(g, x, dw, scratch)),
            Order::Lanes => add_outer_lanes(g, x, dw),
        }
    }

    fn add_sums(order: Order, g: View<'_, f32>, db: &mut [f32]) {
        match order {
            Order::Rows => add_column_sums(g, db),
            Order::Lanes => add_column_sums_lanes(g, db),
        }
    }

    fn pull(order: Order, session: &Session, pullback: Pullback<'_, f32>) {
        match order {
            Order::Rows => pull_one_by_one(order, session, pullback),
            Order::Lanes => pull_lanes(pullback),
        }
    }
}

impl Ordered for bf16 {
    fn multiply(_: Order, x: View<'_, Self>, b: &Packed<Self>, epilogue: &Epilogue<'_, Self>, out: ViewMut<'_, Self>) {
        multiply(x, b, epilogue, out);
    }

    fn add_outer(_: Order, session: &Session, g: View<'_, Self>, x: View<'_, Self>, dw: ViewMut<'_, f32>) {
        Self::spare(session).with_scratch(|scratch| add_outer(g, x, dw, scratch));
    }

    fn add_sums(_: Order, g: View<'_, Self>, db: &mut [f32]) {
        add_column_sums(g, db);
    }
}
