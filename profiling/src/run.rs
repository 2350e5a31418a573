//! `memory-report run`: the matrix of what was listed, each cell measured in a fresh process, a folder a cell.

use crate::cell::{Cell, Lists};
use crate::failure::Result;
use crate::measure::measure;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) const EXAMPLES: &str = "\
Examples:
  memory-report run --field cnf --precision f32,bf16,f16 --out out/precisions
  memory-report run --adjoint discrete,unrolled --steps 16,64,256 --out out/steps
  memory-report compare out/precisions";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Run {
    #[command(flatten)]
    lists: Lists,
    /// Memory runs (the lowest peak is reported) and timing runs (the median is) of each cell.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    repeat: u16,
    /// The folder that gets a folder for each cell, with report.json, report.csv, ledger.csv, trace.json and
    /// report.html.
    #[arg(long)]
    out: PathBuf,
    /// Removes the cells that the folder holds already.
    #[arg(long)]
    replace: bool,
    /// Measures the only cell here, and writes its files into the folder itself.
    #[arg(long)]
    in_process: bool,
}

impl Run {
    pub(crate) fn run(&self) -> Result<()> {
        if self.in_process {
            let report = measure(&self.lists.only()?, usize::from(self.repeat))?;
            return Ok(report.save_all(&self.out)?);
        }
        self.make_room()?;
        let cells = self.lists.cells();
        let progress = ProgressBar::new(cells.len() as u64);
        // The template is a constant that indicatif knows.
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").unwrap_or(ProgressStyle::default_bar());
        progress.set_style(style);
        let mut failed = 0;
        for (number, cell) in cells.iter().enumerate() {
            let name = cell.folder(number);
            progress.set_message(name.clone());
            if let Err(error) = self.in_a_fresh_process(cell, &self.out.join(&name)) {
                failed += 1;
                progress.suspend(|| eprintln!("memory-report: {name}: {error}"));
            }
            progress.inc(1);
        }
        progress.finish_and_clear();
        let done = format!("{} of {} cells are in {}\n", cells.len() - failed, cells.len(), self.out.display());
        crate::print(done.as_bytes())?;
        match failed {
            0 => Ok(()),
            _ => Err(format!("{failed} of {} cells failed; the reasons are above", cells.len()).into()),
        }
    }

    /// Cells of another matrix would be compared with ours.
    fn make_room(&self) -> Result<()> {
        std::fs::create_dir_all(&self.out).map_err(|error| format!("{}: {error}", self.out.display()))?;
        let cells = cells_in(&self.out)?;
        if !cells.is_empty() && !self.replace {
            let out = self.out.display();
            return Err(format!("{out} holds {} cells already; take another --out, or --replace", cells.len()).into());
        }
        Ok(cells.iter().try_for_each(std::fs::remove_dir_all)?)
    }

    fn in_a_fresh_process(&self, cell: &Cell, folder: &Path) -> Result<()> {
        let mut child = Command::new(std::env::current_exe()?);
        child.args(["run", "--in-process", "--repeat", &self.repeat.to_string()]).args(cell.flags());
        let output = child.arg("--out").arg(folder).stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().trim_start_matches("memory-report: ");
        Err(if said.is_empty() { output.status.to_string() } else { said.to_owned() }.into())
    }
}

/// The folders in `folder` that hold a report, in order of their names.
pub(crate) fn cells_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    let mut cells: Vec<_> = paths.into_iter().filter(|path| path.join("report.json").is_file()).collect();
    cells.sort();
    Ok(cells)
}
