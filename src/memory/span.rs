//! The spans of a solve, in words: what the crate opens, with which fields, and what they mean.
//!
//! All have the target [`TARGET`](crate::account::TARGET) and nest like this:
//!
//! | span | level | fields | one per |
//! |---|---|---|---|
//! | [`solve`](SOLVE) | `DEBUG` | | solve, from the casts to the final state |
//! | [`forward`](FORWARD), [`backward`](BACKWARD) | `DEBUG` | | pass over the steps (a tile of the batch has its own) |
//! | [`step`](STEP) | `DEBUG` | `index: u64`, `t: f64`, `h: f64` | step; `index` counts from 0 in forward direction in both passes |
//! | [`stage`](STAGE) | `TRACE` | `index: u64` | stage of a step |
//! | [`field`](FIELD) | `TRACE` | | evaluation of the vector field |
//! | [`linearise`](LINEARISE) | `TRACE` | | evaluation that keeps what its pullback needs |
//! | [`pullback`](PULLBACK) | `TRACE` | | vector–Jacobian product |
//! | [`cast`](CAST) | `TRACE` | | parameters into the compute dtype |
//! | [`encode`](ENCODE), [`decode`](DECODE) | `TRACE` | | trajectory entry into and out of the storage dtype |
//! | [`put_away`](PUT_AWAY), [`fetch`](FETCH) | `TRACE` | `bytes: u64` | trajectory entry to and from the second level of storage; beside what is computed they last until the copy is asked for |
//! | [`recompute`](RECOMPUTE) | `TRACE` | | stretch of steps done again for the backward pass |
//!
//! `backward` is not inside `solve`: it opens when Candle's own backward pass reaches the solve. Beside the spans there
//! is one event, [`bytes`](BYTES) (`TRACE`; `category: &str`, `delta: i64`, and of an entry of the trajectory
//! `codec: &str`), for every buffer of ours that is born or dies; [`Owned`](crate::account::Owned) emits it.

/// A whole forward solve.
pub const SOLVE: &str = "solve";
/// The pass from the first time to the last.
pub const FORWARD: &str = "forward";
/// The pass from the last time to the first.
pub const BACKWARD: &str = "backward";
/// One step of a pass.
pub const STEP: &str = "step";
/// One stage of a step.
pub const STAGE: &str = "stage";
/// One evaluation of the vector field.
pub const FIELD: &str = "field";
/// One linearisation of the vector field.
pub const LINEARISE: &str = "linearise";
/// One pullback of a linearisation.
pub const PULLBACK: &str = "pullback";
/// Parameters cast into the compute dtype.
pub const CAST: &str = "cast";
/// A trajectory entry encoded.
pub const ENCODE: &str = "encode";
/// A trajectory entry decoded.
pub const DECODE: &str = "decode";
/// A trajectory entry moved to the second level of storage.
pub const PUT_AWAY: &str = "put_away";
/// A trajectory entry brought back from there.
pub const FETCH: &str = "fetch";
/// Steps done again for the backward pass.
pub const RECOMPUTE: &str = "recompute";
/// The event that tells of owned bytes.
pub const BYTES: &str = "bytes";

/// Field of `step` and `stage`: which one, from 0.
pub const INDEX: &str = "index";
/// Field of `step`: model time where the step starts.
pub const T: &str = "t";
/// Field of `step`: its size in model time.
pub const H: &str = "h";
/// Field of `bytes`: [`Category::name`](crate::account::Category::name).
pub const CATEGORY: &str = "category";
/// Field of `bytes`, of entries of the trajectory: [`Codec::name`](crate::Codec::name).
pub const CODEC: &str = "codec";
/// Field of `bytes`: bytes gained, or lost if negative.
pub const DELTA: &str = "delta";
