//! How a kept entry is encoded.
//!
//! A codec turns the tensors of a state into fewer bytes and back, and says what it is to be given: the states
//! themselves, or the increments between neighbouring ones. Of increments, with Δ = the step's increment and e = what
//! rounding has left over so far, it tells where they lead ([`Codec::follow`], which need not be written):
//!
//! q = Q(Δ + e), y⁺ = y + q, e⁺ = Δ + e − q
//!
//! so that the forward pass goes on from y⁺, what is handed out is y⁺ + e⁺, and backwards y = y⁺ − q, exact to the
//! rounding of the accumulate dtype. |e| stays below one quantum of Δ: rounding perturbs the solution by O(h·u_Q) and
//! does not add up. Of states that follow one another without a gap in what is kept, the latest is kept as it is. A
//! schedule that leaves gaps keeps whole states: it is for state codecs.

mod increments;
mod states;

pub use increments::{Increments4, Increments8, Increments16};
pub use states::States;

use crate::State;
use crate::error::{OdeError, Result};
use crate::field::{Finite, sum};
use crate::precision::largest_finite;
use candle_core::{DType, Shape, Tensor};
use std::fmt::Debug;

/// One kept state or increment, encoded.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The encoded tensors.
    pub tensors: Vec<Tensor>,
    /// The shapes of the tensors that were encoded.
    pub shapes: Vec<Shape>,
}

impl Entry {
    /// The encoded `tensors` of `state`.
    pub fn new(tensors: Vec<Tensor>, state: &State) -> Self {
        Self { tensors, shapes: state.tensors().iter().map(|x| x.shape().clone()).collect() }
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }
}

/// What a codec is given to encode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encodes {
    /// States: each entry can be decoded by itself.
    States,
    /// Increments between neighbouring states, with error feedback: entries are decoded last first.
    Increments,
}

/// A step whose increment is to be kept: Δ = `after` − `before`, and e.
#[derive(Clone, Copy, Debug)]
pub struct Increment<'a> {
    /// y, at which the step has begun.
    pub before: &'a State,
    /// y + Δ.
    pub after: &'a State,
    /// e, what rounding has left over so far; nothing before the first increment.
    pub residual: Option<&'a State>,
    /// The accumulate dtype, F32 or F64.
    pub dtype: DType,
}

impl Increment<'_> {
    /// Δ + e.
    ///
    /// # Errors
    /// States whose tensors differ in number or shape; when the device fails.
    pub fn sum(&self) -> Result<State> {
        self.check()?;
        match self.residual {
            None => sum(Some(self.after), &[(-1.0, self.before)], self.dtype),
            // What is small is added last, to a difference of neighbours.
            Some(residual) => sum(Some(residual), &[(1.0, self.after), (-1.0, self.before)], self.dtype),
        }
    }

    /// That its states have tensors of the same shapes.
    fn check(&self) -> Result<()> {
        for other in [Some(self.after), self.residual].into_iter().flatten() {
            if shapes(other) != shapes(self.before) {
                return Err(OdeError::Unsupported {
                    what: format!("an increment of shapes {:?} to {:?}", shapes(other), shapes(self.before)),
                    instead: "before, after and residual have tensors of the same shapes",
                });
            }
        }
        Ok(())
    }
}

fn shapes(state: &State) -> Vec<&Shape> {
    state.tensors().iter().map(Tensor::shape).collect()
}

/// An increment that is kept, and where it leads.
#[derive(Clone, Debug)]
pub struct Followed {
    /// q, encoded.
    pub entry: Entry,
    /// Whether all of it is finite. Where it is known not to be, nobody asks for what follows.
    pub finite: Finite,
    /// y⁺ = y + q.
    pub next: State,
    /// e⁺ = Δ + e − q.
    pub residual: State,
}

impl Followed {
    /// That a codec has led on from `step` to states like those it was given.
    pub(super) fn check(&self, step: &Increment<'_>) -> Result<()> {
        let wanted = shapes(step.before);
        for (name, state) in [("next", &self.next), ("residual", &self.residual)] {
            let dtypes: Vec<DType> = state.tensors().iter().map(Tensor::dtype).collect();
            if shapes(state) != wanted || dtypes.iter().any(|dtype| *dtype != step.dtype) {
                return Err(OdeError::Unsupported {
                    what: format!(
                        "a codec that follows an increment to a `{name}` of {:?} in {dtypes:?}",
                        shapes(state)
                    ),
                    instead: "Codec::follow gives states of the shapes it was given, in the accumulate dtype",
                });
            }
        }
        if self.entry.shapes.iter().ne(wanted.iter().copied()) {
            return Err(OdeError::Unsupported {
                what: format!("a codec that follows an increment of {wanted:?} by an entry of {:?}", self.entry.shapes),
                instead: "make it by Entry::new, of the state that was encoded",
            });
        }
        Ok(())
    }
}

/// [`Codec::follow`] of any codec, one operation after another.
fn followed(codec: &(impl Codec + ?Sized), step: &Increment<'_>) -> Result<Followed> {
    let increment = step.sum()?;
    let (entry, finite) = codec.encode(&increment)?;
    if finite.known_bad() {
        // Nobody goes on from there, and a codec may have no codes for what it cannot hold.
        return Ok(Followed { entry, finite, next: step.after.clone(), residual: increment });
    }
    let decoded = decoded(codec, &entry, step.dtype)?;
    let next = sum(Some(step.before), &[(1.0, &decoded)], step.dtype)?;
    let residual = sum(Some(&increment), &[(-1.0, &decoded)], step.dtype)?;
    Ok(Followed { entry, finite, next, residual })
}

/// What `entry` means to `codec`, of the shapes that were encoded.
pub(super) fn decoded(codec: &(impl Codec + ?Sized), entry: &Entry, dtype: DType) -> Result<State> {
    let _span = tracing::trace_span!(target: "candle_ode", "decode").entered();
    let state = codec.decode(entry, dtype)?;
    let found = shapes(&state);
    if found.iter().copied().ne(&entry.shapes) {
        return Err(OdeError::Unsupported {
            what: format!("a codec that decodes tensors of shapes {found:?} where it was given {:?}", entry.shapes),
            instead: "Codec::decode gives back the tensors that were encoded",
        });
    }
    Ok(state)
}

/// Encodes kept states, or the increments between them. Rounding to fewer bits happens here and nowhere else.
///
/// ```
/// use candle_core::{DType, Shape, Tensor};
/// use candle_ode::field::ops::combine::{self, Finite};
/// use candle_ode::prelude::*;
/// use candle_ode::{Codec, Encodes, Entry, Result};
///
/// /// Increments in BF16.
/// #[derive(Debug)]
/// struct Brief;
///
/// impl Codec for Brief {
///     fn encodes(&self) -> Encodes {
///         Encodes::Increments
///     }
///     fn encode(&self, values: &State) -> Result<(Entry, Finite)> {
///         let kept = values.try_map(|x| x.to_dtype(DType::BF16))?;
///         let finite = combine::all_finite(kept.tensors())?;
///         Ok((Entry::new(kept.into_tensors(), values), finite))
///     }
///     fn decode(&self, entry: &Entry, dtype: DType) -> Result<State> {
///         Ok(State::from(entry.tensors.clone()).try_map(|x| x.to_dtype(dtype))?)
///     }
///     fn bytes(&self, shapes: &[Shape]) -> usize {
///         shapes.iter().map(|shape| 2 * shape.elem_count()).sum()
///     }
///     fn dtype(&self) -> DType {
///         DType::BF16
///     }
/// }
///
/// let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
/// let y0 = candle_core::Var::ones(8, DType::F32, &candle_core::Device::Cpu)?;
/// let ode = Ode::new(&field).span(0.0, 1.0).steps(16).adjoint(Discrete::default().codec(Brief));
/// assert_eq!(ode.solve(y0.as_tensor())?.trajectory_bytes(), 14 * 8 * 2 + 8 * 4);
/// # Ok::<(), OdeError>(())
/// ```
pub trait Codec: Debug + Send + Sync + 'static {
    /// Its name in reports, which tell the bytes of the trajectory by it; that of the type by default.
    fn name(&self) -> &'static str {
        let path = std::any::type_name::<Self>();
        path.split('<').next().and_then(|path| path.rsplit("::").next()).unwrap_or(path)
    }

    /// What it is given.
    fn encodes(&self) -> Encodes {
        Encodes::States
    }

    /// Encodes a state or an increment (accumulate dtype), and says whether all of it came out finite.
    ///
    /// # Errors
    /// When the device fails.
    fn encode(&self, values: &State) -> Result<(Entry, Finite)>;

    /// The state or increment again, in `dtype` (F32 or F64). The same entry gives the same bits.
    ///
    /// # Errors
    /// When the device fails.
    fn decode(&self, entry: &Entry, dtype: DType) -> Result<State>;

    /// Encodes the increment of a step, and says where it leads as it is decoded. Nothing is to be done for a codec of
    /// one's own, but where sum and codes can be made in one pass. Asked of codecs of increments alone. `next` and
    /// `residual` have the shapes of the states that are given, in the accumulate dtype, or the solve is
    /// [`OdeError::Unsupported`].
    ///
    /// # Errors
    /// States whose tensors differ in number or shape; when the device fails.
    fn follow(&self, step: &Increment<'_>) -> Result<Followed> {
        followed(self, step)
    }

    /// Bytes of one entry for tensors of these shapes, to the byte.
    fn bytes(&self, shapes: &[Shape]) -> usize;

    /// The dtype of most of an entry.
    fn dtype(&self) -> DType;

    /// The largest number that it can encode, for an error to tell; that of the dtype by default, of F32 where that is
    /// no float.
    fn largest(&self) -> f64 {
        largest_finite(if self.dtype().is_float() { self.dtype() } else { DType::F32 })
    }
}
