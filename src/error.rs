//! Every failure a user can meet, as data: what was wrong, with its values, and what to do.
//!
//! [`OdeError`] converts to [`candle_core::Error`] and back without losing anything, so that it survives the way
//! through `loss.backward()`: `OdeError::from(candle_error)` finds the original again.

mod convert;
mod place;

pub use place::{Interrupted, PassKind, Place, Worst};

use candle_core::{DType, DeviceLocation, Shape};
use std::fmt;
use std::path::PathBuf;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, OdeError>;

/// What went wrong, with the values that show it and what to try.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum OdeError {
    /// The initial state holds a NaN or an infinity.
    #[error(
        "y0 is not finite: tensor {tensor} of the state holds {value} at flat index {index}; check the data that feeds the solve"
    )]
    NonFiniteState {
        /// Which tensor of the state.
        tensor: usize,
        /// Flat, row-major index of the first such value.
        index: usize,
        /// The value.
        value: f64,
    },
    /// A parameter holds a NaN or an infinity.
    #[error(
        "parameter `{name}` is not finite: {value} at flat index {index}; the weights were damaged before this solve (a diverged optimiser step, a bad file)"
    )]
    NonFiniteParameter {
        /// Name in the `VarMap`, or `input N` for a declared input.
        name: String,
        /// Flat, row-major index of the first such value.
        index: usize,
        /// The value.
        value: f64,
    },
    /// A finite parameter or input that its cast cannot hold.
    #[error(
        "`{name}` holds {value} at flat index {index}, which does not fit {dtype:?} (largest {largest:e}); keep a parameter in F32 with .keep_f32(..), or solve in Precision::BF16 or F32"
    )]
    CastOverflow {
        /// Name in the `VarMap`, or `input N` for a declared input.
        name: String,
        /// Flat, row-major index of the first such value.
        index: usize,
        /// The value before the cast.
        value: f64,
        /// The dtype of the cast.
        dtype: DType,
        /// The largest number of that dtype.
        largest: f64,
    },
    /// A fixed-step solve with no steps.
    #[error("the solve has no steps; call .steps(n) with n >= 1, or .grid(&[t0, .., t1]) with at least two times")]
    NoSteps,
    /// The span starts where it ends.
    #[error("the span is empty: it starts and ends at t = {time}; give two different end times")]
    EmptySpan {
        /// The time at both ends.
        time: f64,
    },
    /// A grid of times that is not strictly monotone.
    #[error("times must be strictly increasing or strictly decreasing: times[{index}] = {value} comes after {before}")]
    UnsortedTimes {
        /// Index of the offending time.
        index: usize,
        /// The time before it.
        before: f64,
        /// The offending time.
        value: f64,
    },
    /// A NaN or infinite time.
    #[error("time {index} is {value}; times must be finite")]
    NonFiniteTime {
        /// Index in the grid, span or list of output times.
        index: usize,
        /// The value.
        value: f64,
    },
    /// An output time that is not a point of the grid.
    #[error(
        "output time {time} is not a grid point (nearest: {nearest}); fixed-step solves hand out states at grid points: put it on the grid with .grid(..), or .interpolate()"
    )]
    OutputOffGrid {
        /// The requested time.
        time: f64,
        /// The nearest grid point.
        nearest: f64,
    },
    /// A dtype that does not fit its place.
    #[error("{what} has dtype {dtype:?}; {hint}")]
    UnsupportedDType {
        /// What has it.
        what: String,
        /// The dtype.
        dtype: DType,
        /// What would do.
        hint: &'static str,
    },
    /// Tensors on different devices.
    #[error("{what} is on {found:?}, the solve runs on {expected:?}; move it with .to_device(..)")]
    DeviceMismatch {
        /// What is elsewhere.
        what: String,
        /// The device of the solve.
        expected: DeviceLocation,
        /// The device found.
        found: DeviceLocation,
    },
    /// A state without elements.
    #[error("tensor {tensor} of the state has shape {shape:?} and no elements; skip empty batches before solving")]
    EmptyState {
        /// Which tensor of the state.
        tensor: usize,
        /// Its shape.
        shape: Shape,
    },
    /// The vector field returned another number of tensors than the state has.
    #[error("the vector field returned {found} tensors for a state of {expected} ({place})")]
    StateLength {
        /// Tensors in the state.
        expected: usize,
        /// Tensors returned.
        found: usize,
        /// Where.
        place: Place,
    },
    /// The vector field changed the shape of the state.
    #[error(
        "the vector field must return dy/dt with the shape of y: tensor {tensor} came in as {expected:?} and went out as {found:?} ({place})"
    )]
    ShapeChanged {
        /// Which tensor of the state.
        tensor: usize,
        /// Shape of y.
        expected: Shape,
        /// Shape of f(t, y).
        found: Shape,
        /// Where.
        place: Place,
    },
    /// The vector field changed the dtype of the state.
    #[error(
        "the vector field must return the dtype it was given: tensor {tensor} came in as {expected:?} and went out as {found:?} ({place}); use t.like(y), and constants in y.dtype()"
    )]
    DTypeChanged {
        /// Which tensor of the state.
        tensor: usize,
        /// Dtype of y.
        expected: DType,
        /// Dtype of f(t, y).
        found: DType,
        /// Where.
        place: Place,
    },
    /// The vector field itself failed.
    #[error("the vector field failed ({place}): {source}")]
    Field {
        /// Where.
        place: Place,
        /// What it said.
        source: candle_core::Error,
    },
    /// Building the model over its parameters failed.
    #[error("the model could not be built over its {dtype:?} parameters: {source}")]
    Build {
        /// Dtype of the `VarBuilder`.
        dtype: DType,
        /// What the constructor said.
        source: candle_core::Error,
    },
    /// Two evaluations at the same point gave different bits.
    #[error(
        "the vector field is not a pure function: two evaluations at t = {time} differ in tensor {tensor} at flat index {index} ({first} and {second}); fix its randomness per solve (candle_ode::ops::Dropout does), or call .check_determinism(false)"
    )]
    NotDeterministic {
        /// Model time of the evaluation.
        time: f64,
        /// Which tensor of the state.
        tensor: usize,
        /// Flat index of the first difference.
        index: usize,
        /// Value of the first evaluation.
        first: f64,
        /// Value of the second evaluation.
        second: f64,
    },
    /// A field that is declared row-wise is not.
    #[error(
        "the vector field is declared row-wise, but f of some rows alone differs from f of all of them in tensor {tensor} at flat index {index} ({alone} and {whole}): something couples the rows (a batch norm, a mean over the batch) or depends on their number (a dropout mask, noise, an input with a row for each); leave out .row_wise()"
    )]
    NotRowWise {
        /// Which tensor of the state.
        tensor: usize,
        /// Flat index of the first difference.
        index: usize,
        /// Value among all rows.
        whole: f64,
        /// Value among half of them.
        alone: f64,
    },
    /// The model wrote to its own parameters during a solve.
    #[error(
        "the vector field changed its parameter `{name}` while being evaluated (a BatchNorm in training mode does this); use its evaluation mode, or a norm without running statistics (candle_ode::ops::group_norm)"
    )]
    ParameterChanged {
        /// Name of the parameter.
        name: String,
    },
    /// The vector field's closure captured a tensor that needs a gradient.
    #[error(
        "the vector field captured a tensor that needs a gradient (shape {shape:?}, {dtype:?}), which a solve cannot see; declare it with .inputs(&[tensor]) and ModelField::with_inputs, or .detach() it"
    )]
    Captured {
        /// Shape of the captured tensor.
        shape: Shape,
        /// Its dtype.
        dtype: DType,
    },
    /// A schedule asked for something that cannot be done.
    #[error("action {index} of the schedule, `{action}`, is not legal: {why}")]
    IllegalAction {
        /// Where in the schedule.
        index: usize,
        /// What it asked for.
        action: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A backward pass over a trajectory that an earlier one has freed.
    #[error(
        "the trajectory of this solve ({steps} steps) was freed by its first backward pass; solve again, or leave out .consume() to go through it more than once"
    )]
    Consumed {
        /// Steps of the solve.
        steps: usize,
    },
    /// The divergence was asked of a field without a tangent.
    #[error(
        "{field} has no tangent (J·v), which {wanted} needs; build it from candle_ode::ops layers (Mlp, Sequential) or implement `Tangent` for it"
    )]
    NoTangent {
        /// The field or layer.
        field: String,
        /// What asked.
        wanted: &'static str,
    },
    /// A Candle op in the field has no backward pass.
    #[error("Candle has no backward pass for `{op}`; {instead}")]
    NoBackward {
        /// Candle's name of the op.
        op: String,
        /// What to use instead.
        instead: &'static str,
    },
    /// A non-finite value in a pass.
    #[error("{pass} pass: non-finite values, first at {place}; {hint}")]
    Overflow {
        /// Forward or backward.
        pass: PassKind,
        /// Where first.
        place: Place,
        /// What to try.
        hint: &'static str,
    },
    /// A state that was solved backwards is not finite.
    #[error("backward pass: the state reconstructed at the start of step {step} (t = {time}) is not finite; {hint}")]
    Reconstruction {
        /// The step.
        step: usize,
        /// Model time.
        time: f64,
        /// What to do.
        hint: &'static str,
    },
    /// A state, or the increment to it, does not fit the storage dtype or codec.
    #[error(
        "forward pass: the state after step {step} (t = {time}), or the increment to it, does not fit its storage in {dtype:?} (largest {largest:e}); use .on_overflow(OnOverflow::Retry), or another storage dtype or codec"
    )]
    StorageOverflow {
        /// The step after which.
        step: usize,
        /// Model time.
        time: f64,
        /// The dtype of what is stored.
        dtype: DType,
        /// The largest number that can be stored in it: increments have scales.
        largest: f64,
    },
    /// The gradient of y0 does not fit y0's dtype.
    #[error("dL/dy0 does not fit y0's dtype {dtype:?} (tensor {tensor}); keep y0 in F32, or scale the loss")]
    GradientOverflow {
        /// Which tensor of the state.
        tensor: usize,
        /// Dtype of y0.
        dtype: DType,
    },
    /// The gradient of a parameter, input or tensor of times does not fit its dtype.
    #[error(
        "the gradient of a parameter, input or tensor of times of shape {shape:?} does not fit its dtype {dtype:?}; keep masters in F32, or scale the loss"
    )]
    SumOverflow {
        /// Shape of the parameter, input or tensor of times.
        shape: Shape,
        /// Its dtype.
        dtype: DType,
    },
    /// Dynamic scaling gave up.
    #[error(
        "dynamic adjoint scaling: step {step} (t = {time}) still overflows at S = {scale:e} after {redone} attempts; use AdjointScaling::per_step(), or a wider compute dtype"
    )]
    ScalingExhausted {
        /// The step.
        step: usize,
        /// Model time.
        time: f64,
        /// The last scale tried.
        scale: f64,
        /// How often the step was done.
        redone: usize,
    },
    /// An adaptive solve has tried as many steps as it may.
    #[error(
        "the limit of {steps} steps is reached at {reached}; allow more (Controller::max_steps), loosen the tolerances, or look at f there: it may be stiff"
    )]
    StepLimit {
        /// Steps tried, rejected ones included.
        steps: usize,
        /// The partial solution.
        reached: Box<Interrupted>,
    },
    /// The shortest step that may be taken is rejected.
    #[error(
        "a step of length {h:e}, the shortest allowed, is rejected at {reached}; f or y may have a pole or jump there (.discontinuities(..)), or overflow in half precision (.on_overflow(OnOverflow::Retry)); else loosen the tolerances or Controller::min_step"
    )]
    StepTooSmall {
        /// Its length.
        h: f64,
        /// The partial solution.
        reached: Box<Interrupted>,
    },
    /// The tolerance lies below what the dtype of f can tell.
    #[error(
        "the tolerances lie below the rounding of f in {dtype:?}: a step of length {h:e} has an estimated error of {error:.3} tolerances, of which rounding alone explains {floor:.3}, and shorter steps gain nothing, at {reached}; loosen the tolerances, use a wider compute dtype, or accept such steps with Controller::at_floor(AtFloor::Accept)"
    )]
    ErrorFloor {
        /// Length of the step.
        h: f64,
        /// Norm of its scaled error.
        error: f64,
        /// The same norm of the estimate's rounding error.
        floor: f64,
        /// The dtype f ran in.
        dtype: DType,
        /// The partial solution.
        reached: Box<Interrupted>,
    },
    /// A solver without an error estimate cannot choose its steps.
    #[error(
        "{solver} has no error estimate, which adaptive steps need; Heun, Ralston, Bosh3, Dopri5, Tsit5 and tableaus with embedded weights (Tableau::with_embedded) have one; or take fixed steps, .steps(n)"
    )]
    NoErrorEstimate {
        /// The solver.
        solver: String,
    },
    /// A Butcher tableau that contradicts itself.
    #[error("Butcher tableau `{name}`: {reason}")]
    Tableau {
        /// Its name.
        name: String,
        /// What does not hold, with values.
        reason: String,
    },
    /// Nothing there is fits a memory budget.
    #[error(
        "no choice fits a budget of {budget} bytes: the least is {smallest} ({choice}); allow that much, keep increments (.codec(Increments8)), or take a smaller batch"
    )]
    Budget {
        /// The budget in bytes.
        budget: u64,
        /// The smallest that would do.
        smallest: u64,
        /// What it would do with it.
        choice: String,
    },
    /// A setting that makes no sense.
    #[error("{setting} = {value}: {hint}")]
    Setting {
        /// Which setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        hint: &'static str,
    },
    /// A combination that is not supported.
    #[error("{what} is not supported; {instead}")]
    Unsupported {
        /// What was asked.
        what: String,
        /// What to do instead.
        instead: &'static str,
    },
    /// A memory counter is not there.
    #[error("{counter} cannot be read: {reason}; {hint}")]
    Meter {
        /// Which counter.
        counter: &'static str,
        /// Why.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// Candle failed outside the vector field.
    #[error("{0}")]
    Candle(candle_core::Error),
}

/// As [`fmt::Display`]: Candle prints wrapped errors with `{:?}`, and users read them.
impl fmt::Debug for OdeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
