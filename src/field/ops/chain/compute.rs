//! The compute dtypes of a chain: what tensors store and what tiles hold of it.

use super::Saving;
use crate::field::ops::kernel::View;
use crate::field::session::{Matrix, Session, Tile};
use candle_core::{CpuStorage, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A compute dtype.
pub(super) trait Compute {
    /// What its tensors store.
    type Stored: WithDType + Into<f32>;
    /// What tiles hold of it.
    type Held: Tile + Saving;

    /// Stored elements as a tile holds them: where they lie, if they can be.
    fn held<'a>(session: &Session, stored: &'a [Self::Stored], rows: usize) -> Input<'a, Self::Held>;
    /// Elements to be stored, made by `fill`, which is given a tile of that shape.
    fn stored(
        session: &Session,
        rows: usize,
        columns: usize,
        fill: impl FnOnce(&mut [Self::Held]),
    ) -> Vec<Self::Stored>;
    /// As a storage of Candle's.
    fn storage(stored: Vec<Self::Stored>) -> CpuStorage {
        Self::Stored::to_cpu_storage_owned(stored)
    }
}

/// A tile that may lie elsewhere.
pub(super) enum Input<'a, T> {
    There(View<'a, T>),
    Here(Matrix<T>),
}

impl<T: Tile> Input<'_, T> {
    pub(super) fn view(&self) -> View<'_, T> {
        match self {
            Self::There(view) => *view,
            Self::Here(matrix) => matrix.view(),
        }
    }
}

/// Where tiles hold what tensors store.
macro_rules! as_stored {
    ($name:ident, $element:ty, $zero:expr) => {
        pub(super) struct $name;

        impl Compute for $name {
            type Stored = $element;
            type Held = $element;

            fn held<'a>(_: &Session, stored: &'a [$element], rows: usize) -> Input<'a, $element> {
                let columns = stored.len() / rows.max(1);
                Input::There(View::new(stored, rows, columns, columns))
            }

            fn stored(_: &Session, rows: usize, columns: usize, fill: impl FnOnce(&mut [$element])) -> Vec<$element> {
                let mut stored = vec![$zero; rows * columns];
                fill(&mut stored);
                stored
            }
        }
    };
}

as_stored!(InSingle, f32, 0.0);
as_stored!(InBrain, bf16, bf16::ZERO);

/// F16, held in F32.
pub(super) struct InHalf;

impl Compute for InHalf {
    type Stored = f16;
    type Held = f32;

    fn held<'a>(session: &Session, stored: &'a [f16], rows: usize) -> Input<'a, f32> {
        let mut wide = f32::spare(session).matrix(rows, stored.len() / rows.max(1));
        stored.convert_to_f32_slice(&mut wide);
        Input::Here(wide)
    }

    fn stored(session: &Session, rows: usize, columns: usize, fill: impl FnOnce(&mut [f32])) -> Vec<f16> {
        let mut wide = f32::spare(session).matrix(rows, columns);
        fill(&mut wide);
        let mut stored = vec![f16::ZERO; wide.len()];
        stored.convert_from_f32_slice(&wide);
        stored
    }
}
