//! The names that the command line knows, and what each makes: to add a solver, a codec or an adjoint is to add a row.

use candle_core::DType;
use candle_ode::prelude::*;
use candle_ode::{Checkpoints, Increments4, Increments8, Increments16, InputOnly, SecondLevel, StageMemory, States};

/// What a name stands for.
pub(crate) struct Named<T: 'static> {
    pub(crate) name: &'static str,
    /// For `--help`.
    pub(crate) says: &'static str,
    pub(crate) makes: T,
}

const fn named<T>(name: &'static str, says: &'static str, makes: T) -> Named<T> {
    Named { name, says, makes }
}

pub(crate) type WithSolver = fn(Ode) -> Ode;

pub(crate) const SOLVERS: &[Named<WithSolver>] = &[
    named("euler", "order 1", |ode| ode.solver(Euler)),
    named("midpoint", "order 2", |ode| ode.solver(Midpoint)),
    named("heun", "order 2", |ode| ode.solver(Heun)),
    named("ralston", "order 2", |ode| ode.solver(Ralston)),
    named("rk3", "order 3", |ode| ode.solver(Rk3)),
    named("rk4", "order 4", |ode| ode.solver(Rk4)),
    named("rk38", "order 4, the 3/8 rule", |ode| ode.solver(ThreeEighths)),
    named("bosh3", "order 3", |ode| ode.solver(Bosh3)),
    named("dopri5", "order 5", |ode| ode.solver(Dopri5)),
    named("tsit5", "order 5", |ode| ode.solver(Tsit5)),
    named("reversible-heun", "order 2, can be undone", |ode| ode.solver(ReversibleHeun)),
    named("reversible-midpoint", "order 2, can be undone", |ode| ode.solver(Reversible::new(Midpoint))),
    named("reversible-rk4", "order 4, can be undone", |ode| ode.solver(Reversible::new(Rk4))),
];

pub(crate) const PRECISIONS: &[Named<Precision>] = &[
    named("f64", "everything in F64", Precision::F64),
    named("f32", "everything in F32", Precision::F32),
    named("bf16", "field and trajectory in BF16, sums in F32", Precision::BF16),
    named("f16", "field and trajectory in F16, sums in F32", Precision::F16),
];

pub(crate) type WithCodec = fn(Discrete) -> Discrete;

pub(crate) const CODECS: &[Named<WithCodec>] = &[
    named("storage", "states in the storage dtype of the precision", |discrete| discrete),
    named("f32", "states in F32", |discrete| discrete.codec(States(DType::F32))),
    named("bf16", "states in BF16", |discrete| discrete.codec(States(DType::BF16))),
    named("f16", "states in F16", |discrete| discrete.codec(States(DType::F16))),
    named("increments16", "increments in F16", |discrete| discrete.codec(Increments16)),
    named("increments8", "increments in 8 bits", |discrete| discrete.codec(Increments8)),
    named("increments4", "increments in 4 bits", |discrete| discrete.codec(Increments4)),
];

/// Makes an adjoint of a codec, and of the number behind the name for those that take one.
#[derive(Clone, Copy)]
pub(crate) enum WithAdjoint {
    Plain(fn(WithCodec) -> Adjoint),
    Numbered(fn(WithCodec, usize) -> Adjoint),
}

use WithAdjoint::{Numbered, Plain};

pub(crate) const ADJOINTS: &[Named<WithAdjoint>] = &[
    named(
        "discrete",
        "every step's start is kept, all stages of a step live",
        Plain(|codec| codec(Discrete::default()).into()),
    ),
    named(
        "discrete-one-stage",
        "every step's start is kept, one stage of a step lives",
        Plain(|codec| codec(Discrete::default().stage_memory(StageMemory::One)).into()),
    ),
    named(
        "consume",
        "every step's start is kept until it has been used",
        Plain(|codec| codec(Discrete::default()).consume().into()),
    ),
    named(
        "checkpoints",
        "at most so many states are kept (checkpoints:8), the other steps are done again",
        Numbered(|codec, slots| codec(Discrete::default()).checkpoints(slots).into()),
    ),
    named(
        "file",
        "every step's start is kept, the latest so many in memory (file:8) and the others in a temporary file",
        Numbered(|codec, resident| {
            codec(Discrete::default()).two_levels(resident, SecondLevel::temporary_file()).into()
        }),
    ),
    named(
        "linearizations",
        "every stage's linearisation is kept, nothing is evaluated again",
        Plain(|codec| codec(Discrete::default()).keep_linearizations().consume().into()),
    ),
    named(
        "linearized-checkpoints",
        "at most so many states are kept with the linearised step that led to them (linearized-checkpoints:8)",
        Numbered(|codec, slots| codec(Discrete::default()).schedule(Checkpoints::new(slots).with_stages()).into()),
    ),
    named(
        "input-only",
        "y0 is kept, all steps are done again",
        Plain(|codec| codec(Discrete::default()).schedule(InputOnly).into()),
    ),
    named(
        "reconstruct",
        "steps of a reversible solver are undone: nothing is kept",
        Plain(|_| Reconstruct::default().into()),
    ),
    named(
        "backsolve",
        "the ODE is solved backwards from its end: nothing is kept, y drifts",
        Plain(|_| Backsolve::default().into()),
    ),
    named("unrolled", "Candle's own graph through every step", Plain(|_| Unrolled.into())),
];

/// The adjoint of a word such as `discrete` or `checkpoints:8`.
pub(crate) fn adjoint(word: &str, codec: WithCodec) -> Result<Adjoint, String> {
    let (name, number) = word.split_once(':').map_or((word, None), |(name, number)| (name, Some(number)));
    match (find(ADJOINTS, name)?, number) {
        (Plain(makes), None) => Ok(makes(codec)),
        (Plain(_), Some(_)) => Err(format!("`{name}` takes no number")),
        (Numbered(_), None) => Err(format!("`{name}` needs a number, as in `{name}:8`")),
        (Numbered(makes), Some(number)) => match number.parse() {
            Ok(number) if number > 0 => Ok(makes(codec, number)),
            _ => Err(format!("`{word}`: behind the colon belongs a number from 1 on, as in `{name}:8`")),
        },
    }
}

/// For clap: a word that makes an adjoint.
pub(crate) fn adjoint_word(word: &str) -> Result<String, String> {
    adjoint(word, |discrete| discrete).map(|_| word.to_owned())
}

/// What the row of that name makes.
pub(crate) fn find<T: Copy>(rows: &'static [Named<T>], name: &str) -> Result<T, String> {
    let known = || rows.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
    let row = rows.iter().find(|row| row.name == name);
    row.map(|row| row.makes).ok_or_else(|| format!("`{name}` is not known; take one of {}", known()))
}

/// For clap: the names of a table, each with its help.
pub(crate) fn parser<T: Sync>(rows: &'static [Named<T>]) -> clap::builder::PossibleValuesParser {
    rows.iter().map(|row| clap::builder::PossibleValue::new(row.name).help(row.says)).collect::<Vec<_>>().into()
}
