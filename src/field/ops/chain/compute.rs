//! The compute dtypes of a chain: what tensors store and what tiles hold of it.

use super::order::{Order, Ordered};
use crate::field::ops::cpu::Element;
use crate::field::ops::kernel::{View, ViewMut, transpose};
use crate::field::session::{Buffered, Matrix, Session};
use candle_core::{CpuStorage, WithDType};
use half::slice::HalfFloatSliceExt;
use std::marker::PhantomData;

/// A compute dtype.
pub(in crate::field::ops) trait Compute {
    /// What its tensors store.
    type Stored: Element<Wide = f32> + Buffered + Into<f32>;
    /// What tiles hold of it.
    type Held: Ordered;

    /// Stored rows as a tile holds them: where they lie, if they can be.
    fn held<'a>(session: &Session, order: Order, stored: &'a [Self::Stored], rows: usize) -> Input<'a, Self::Held> {
        Input::Here(Self::copied(session, order, &[stored], rows))
    }

    /// Stored rows, some behind others, `rows` in all, in a tile of their own.
    fn copied(session: &Session, order: Order, stored: &[&[Self::Stored]], rows: usize) -> Matrix<Self::Held> {
        let elements: usize = stored.iter().map(|stored| stored.len()).sum();
        let features = elements / rows.max(1);
        let (mut tile, mut begin) = (order.tile(session, rows, features), 0);
        for stored in stored {
            let end = begin + stored.len() / features.max(1);
            Self::copy(session, order, whole(stored, end - begin), order.part_mut(&mut tile, rows, begin..end));
            begin = end;
        }
        tile
    }

    /// Stored rows into as many of a tile.
    fn copy(session: &Session, order: Order, stored: View<'_, Self::Stored>, to: ViewMut<'_, Self::Held>);

    /// Stores the rows, so many, of a tile that `fill` fills.
    fn store(
        session: &Session,
        order: Order,
        rows: usize,
        to: &mut [Self::Stored],
        fill: impl FnOnce(&mut [Self::Held]),
    );

    /// Rows to be stored, of a tile of that shape (rows, features) that `fill` fills.
    fn stored(
        session: &Session,
        order: Order,
        [rows, features]: [usize; 2],
        fill: impl FnOnce(&mut [Self::Held]),
    ) -> Vec<Self::Stored> {
        let mut stored = vec![Self::Stored::default(); rows * features];
        Self::store(session, order, rows, &mut stored, fill);
        stored
    }

    /// As a storage of Candle's.
    fn storage(stored: Vec<Self::Stored>) -> CpuStorage {
        Self::Stored::to_cpu_storage_owned(stored)
    }
}

/// Runs `$body` with `$compute` standing for the compute dtype of tensors in `$dtype`. Tiles hold BF16 as it is where
/// layers are wide.
macro_rules! with_compute {
    ($dtype:expr, $is_narrow:expr, $compute:ident => $body:expr) => {{
        use crate::field::ops::chain::{AsStored, Widened};
        match ($dtype, $is_narrow) {
            (candle_core::DType::F32, _) => {
                type $compute = AsStored<f32>;
                $body
            }
            (candle_core::DType::F16, _) => {
                type $compute = Widened<half::f16>;
                $body
            }
            (candle_core::DType::BF16, true) => {
                type $compute = Widened<half::bf16>;
                $body
            }
            (candle_core::DType::BF16, false) => {
                type $compute = AsStored<half::bf16>;
                $body
            }
            (other, _) => Err(candle_core::Error::Msg(format!("no kernels for {other:?}"))),
        }
    }};
}
pub(in crate::field::ops) use with_compute;

/// A tile that may lie elsewhere.
pub(in crate::field::ops) enum Input<'a, T> {
    There(View<'a, T>),
    Here(Matrix<T>),
}

impl<T: Ordered> Input<'_, T> {
    pub(in crate::field::ops) fn view(&self) -> View<'_, T> {
        match self {
            Self::There(view) => *view,
            Self::Here(matrix) => matrix.view(),
        }
    }

    /// The tile in a buffer of the session.
    pub(super) fn own(self, session: &Session) -> Matrix<T> {
        match self {
            Self::Here(matrix) => matrix,
            Self::There(view) => {
                let mut own = T::spare(session).matrix(view.rows(), view.columns());
                own.copy_from_slice(view.slice());
                own
            }
        }
    }
}

fn whole<T>(stored: &[T], rows: usize) -> View<'_, T> {
    let columns = stored.len() / rows.max(1);
    View::new(stored, rows, columns, columns)
}

/// Tiles hold what tensors store.
pub(in crate::field::ops) struct AsStored<T>(PhantomData<T>);

impl<T: Ordered + Element<Wide = f32> + Into<f32>> Compute for AsStored<T> {
    type Stored = T;
    type Held = T;

    fn held<'a>(session: &Session, order: Order, stored: &'a [T], rows: usize) -> Input<'a, T> {
        match order {
            Order::Rows => Input::There(whole(stored, rows)),
            Order::Lanes => Input::Here(Self::copied(session, order, &[stored], rows)),
        }
    }

    fn copy(_: &Session, order: Order, stored: View<'_, T>, mut to: ViewMut<'_, T>) {
        match order {
            Order::Rows => to.slice_mut().copy_from_slice(stored.slice()),
            Order::Lanes => transpose(stored, to),
        }
    }

    fn store(session: &Session, order: Order, rows: usize, to: &mut [T], fill: impl FnOnce(&mut [T])) {
        match order {
            Order::Rows => fill(to),
            Order::Lanes => {
                let mut tile = order.tile(session, rows, to.len() / rows.max(1));
                fill(&mut tile);
                transpose(tile.view(), Order::Rows.write(to, rows));
            }
        }
    }
}

/// Tiles hold half precision in F32.
pub(in crate::field::ops) struct Widened<T>(PhantomData<T>);

impl<T: Element<Wide = f32> + Buffered + Into<f32>> Compute for Widened<T>
where
    [T]: HalfFloatSliceExt,
{
    type Stored = T;
    type Held = f32;

    fn copy(session: &Session, order: Order, stored: View<'_, T>, mut to: ViewMut<'_, f32>) {
        match order {
            Order::Rows => stored.slice().convert_to_f32_slice(to.slice_mut()),
            Order::Lanes => {
                let mut wide = Order::Rows.tile(session, stored.rows(), stored.columns());
                stored.slice().convert_to_f32_slice(&mut wide);
                transpose(wide.view(), to);
            }
        }
    }

    fn store(session: &Session, order: Order, rows: usize, to: &mut [T], fill: impl FnOnce(&mut [f32])) {
        let features = to.len() / rows.max(1);
        let mut wide = Order::Rows.tile(session, rows, features);
        match order {
            Order::Rows => fill(&mut wide),
            Order::Lanes => {
                let mut tile = order.tile(session, rows, features);
                fill(&mut tile);
                transpose(tile.view(), Order::Rows.write(&mut wide, rows));
            }
        }
        to.convert_from_f32_slice(&wide);
    }
}
