//! The bytes of a trajectory from shapes alone.

use super::Keeping;
use super::codec::{Codec, Encodes, States};
use super::schedule::{Slot, kept};
use candle_core::{DType, Shape};

/// Bytes that a forward pass over `steps` steps has kept at its end, for a state of these shapes. `known` says whether
/// it knew the number of steps ahead.
pub(crate) fn kept_bytes(keeping: &Keeping, shapes: &[Shape], steps: usize, known: bool, accumulate: DType) -> usize {
    let Keeping { codec, schedule, levels, .. } = keeping;
    let (mut states, _) = kept(schedule.as_ref(), steps, known.then_some(steps));
    let last = steps.saturating_sub(1);
    let scheduled = states.len();
    // Where stages are kept, those of the last step are, and no state is needed.
    let keeps_last = schedule.keeps_last() && schedule.slot() == Slot::State;
    if keeps_last && last > 0 && states.last() != Some(&last) {
        states.push(last);
    }
    let whole = States(accumulate).bytes(shapes);
    let bytes = states.iter().enumerate().map(|(n, state)| match codec.encodes() {
        Encodes::States => codec.bytes(shapes),
        // The start of the last step is not the next of the schedule: it is kept by itself.
        Encodes::Increments if n + 1 < scheduled && states[n + 1] == state + 1 => codec.bytes(shapes),
        Encodes::Increments => whole,
    });
    let away = levels.as_ref().map_or(0, |levels| states.len().saturating_sub(levels.resident));
    bytes.skip(away).sum()
}
