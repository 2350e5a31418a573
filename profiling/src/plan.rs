//! `memory-report plan`: what the cells of a matrix will take, without solving any.

use crate::cell::{Cell, Lists, told_apart, word};
use crate::failure::Result;
use crate::measure::device;
use crate::names::find;
use crate::problem::FIELDS;
use crate::table::{Table, bytes};
use candle_ode::memory::MemoryPlan;
use clap::Args;

pub(crate) const EXAMPLES: &str = "\
Examples:
  memory-report plan --field cnf --precision f32,bf16,f16
  memory-report plan --solver euler,heun,rk4,dopri5 --steps 16,64,256 --batch 1024";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Plan {
    #[command(flatten)]
    lists: Lists,
}

impl Plan {
    pub(crate) fn run(&self) -> Result<()> {
        let cells = self.lists.cells();
        let choices: Vec<_> = cells.iter().map(|cell| cell.settings().map(|(_, value)| Some(word(&value)))).collect();
        let mut table = Table::new([
            "plan",
            "peak above baseline",
            "owned at most",
            "trajectory",
            "evaluations",
            "pullbacks",
            "recomputed steps",
        ]);
        let mut failed = Vec::new();
        for (cell, name) in cells.iter().zip(told_apart(&choices)) {
            let name = if name.is_empty() { cell.field.clone() } else { name };
            match plan(cell) {
                Ok(plan) => table.row([
                    name,
                    plan.peak.map_or("-".to_owned(), bytes),
                    bytes(plan.owned_peak),
                    bytes(plan.trajectory),
                    (plan.evaluations + plan.linearizations).to_string(),
                    plan.pullbacks.to_string(),
                    plan.recomputed_steps.to_string(),
                ]),
                Err(error) => failed.push(format!("{name}: {error}")),
            }
        }
        crate::print(table.text().as_bytes())?;
        if failed.is_empty() { Ok(()) } else { Err(failed.join("\nmemory-report: ").into()) }
    }
}

fn plan(cell: &Cell) -> Result<MemoryPlan> {
    let problem = find(FIELDS, &cell.field)?(cell.batch, &device(&cell.device)?)?;
    Ok(cell.ode(&problem)?.plan(problem.start())?)
}
