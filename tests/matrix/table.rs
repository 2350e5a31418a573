//! The rows and columns of the matrix of gradients, and the list of its cells that fail.

use super::*;
use candle_ode::schedule::{Schedule, Slot};
use candle_ode::{Checkpoints, Codec, Increments4, Increments8, Increments16, InputOnly, KeepAll, States};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A method over fixed or adaptive steps, and the reversible one that it is the base of.
#[derive(Clone, Copy)]
pub struct Method {
    pub name: &'static str,
    pub order: f64,
    pub is_adaptive: bool,
    solver: fn(Ode) -> Ode,
    reversible: fn(Ode) -> Ode,
}

macro_rules! method {
    ($solver:ident, $order:literal, $adaptive:literal, $name:literal) => {
        Method {
            name: $name,
            order: $order,
            is_adaptive: $adaptive,
            solver: |ode| ode.solver($solver),
            reversible: |ode| ode.solver(Reversible::new($solver)),
        }
    };
}

pub const EULER: Method = method!(Euler, 1.0, false, "Euler");
pub const HEUN: Method = method!(Heun, 2.0, false, "Heun");
pub const RK4: Method = method!(Rk4, 4.0, false, "Rk4");
pub const DOPRI5: Method = method!(Dopri5, 5.0, false, "Dopri5");
pub const DOPRI5_ADAPTIVE: Method = method!(Dopri5, 5.0, true, "adaptive Dopri5");

impl Method {
    pub fn over(&self, field: &ModelField) -> Ode {
        (self.solver)(Ode::new(field).check_determinism(false))
    }

    pub fn reversible(&self, field: &ModelField) -> Ode {
        (self.reversible)(Ode::new(field).check_determinism(false))
    }

    /// A solve from [`START`], of so many steps or with this tolerance.
    pub fn paced(&self, ode: Ode, length: f64, steps: usize, tolerance: f64) -> Ode {
        let ode = ode.span(START, START + length);
        if self.is_adaptive { ode.tolerances(tolerance, tolerance) } else { ode.steps(steps) }
    }
}

/// A codec, and how an adjoint is given it.
pub struct Coding {
    pub name: String,
    pub codec: Arc<dyn Codec>,
    pub with: fn(Discrete) -> Discrete,
    /// The rounding of its entries.
    pub rounding: f64,
}

pub fn codings() -> Vec<Coding> {
    macro_rules! all {
        ($($codec:expr, $rounding:expr;)*) => {
            vec![$(Coding {
                name: format!("{:?}", $codec),
                codec: Arc::new($codec),
                with: |discrete| discrete.codec($codec),
                rounding: $rounding,
            }),*]
        };
    }
    all! {
        States(DType::F64), 0.0;
        States(DType::F32), 6e-8;
        States(DType::F16), 4.9e-4;
        States(DType::BF16), 3.9e-3;
        Increments16, 4.9e-4;
        Increments8, 3.9e-3;
        Increments4, 7.1e-2;
    }
}

/// A schedule, and the adjoint that follows it.
pub struct Scheduled {
    pub name: String,
    pub schedule: Arc<dyn Schedule>,
    pub discrete: Discrete,
}

impl Scheduled {
    fn new(name: impl Into<String>, schedule: impl Schedule + Copy) -> Self {
        let discrete = Discrete::default().schedule(schedule);
        Self { name: name.into(), schedule: Arc::new(schedule), discrete }
    }

    pub fn with_stages(&self) -> bool {
        self.schedule.slot() == Slot::Stages
    }
}

pub fn schedules() -> Vec<Scheduled> {
    let mut all = vec![Scheduled::new("every state", KeepAll), Scheduled::new("the input only", InputOnly)];
    all.extend([0, 1, 3, 9].map(|slots| Scheduled::new(format!("{slots} states"), Checkpoints::new(slots))));
    for slots in [0, 1, 3, usize::MAX] {
        let name = if slots == usize::MAX { "every linearisation".into() } else { format!("{slots} linearisations") };
        all.push(Scheduled::new(name, Checkpoints::new(slots).with_stages()));
    }
    all
}

/// What went wrong, by cell.
#[derive(Default)]
pub struct Failures {
    cells: usize,
    failed: Vec<String>,
}

impl Failures {
    pub fn cell(&mut self, name: impl Into<String>, run: impl FnOnce() -> Result<Vec<String>, OdeError>) {
        self.cells += 1;
        let name = name.into();
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(wrong)) => self.failed.extend(wrong.into_iter().map(|wrong| format!("{name}: {wrong}"))),
            Ok(Err(error)) => self.failed.push(format!("{name}: {error}")),
            Err(_) => self.failed.push(format!("{name}: panic")),
        }
    }

    pub fn report(self, cells: usize) {
        assert_eq!(self.cells, cells, "cells of the table");
        assert!(self.failed.is_empty(), "{} wrong in {cells} cells:\n{}", self.failed.len(), self.failed.join("\n"));
    }
}
