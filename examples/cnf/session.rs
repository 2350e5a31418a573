//! What the program does, from its flags to the files it leaves: one run, a resumed one, or several to compare.

use crate::cli::{AdjointName, Cli, Config};
use crate::compare::Table;
use crate::stop::Stop;
use crate::train::{JUDGES, Outcome, Run};
use crate::{checkpoint, pictures};
use candle_core::Device;
use candle_ode::file::write_bytes_atomically;
use candle_ode::memory::{MemoryProfiler, cuda_device};
use candle_ode::{OdeError, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::thread;

/// How a session ended, unless by an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With everything done.
    Finished,
    /// By Ctrl-C, with everything saved.
    Interrupted,
}

/// Does what the flags ask for.
///
/// # Errors
/// Every mistake in the flags or the data, and every failure, says what to do.
pub fn run(cli: &Cli, stop: &Stop) -> Result<End> {
    cli.check()?;
    let device = if cli.cpu || !cfg!(feature = "cuda") { Device::Cpu } else { cuda_device(0)? };
    // Ends at once; from here on the account of owned bytes is kept, which a report at the end will show.
    drop(MemoryProfiler::new(&device).install()?);
    let out = cli.out();
    let runs = cli.compared();
    if !runs.is_empty() {
        return compare(runs, out, &device, stop);
    }
    let run = match &cli.resume {
        Some(dir) => resume(cli, dir, &device)?,
        None => Run::fresh(cli.config(), &device)?,
    };
    let source = run.source();
    println!("{}: {} columns, {} on {:?}", source.title(), source.dim(), run.config().precision, device.location());
    let (run, outcome) = train(run, out, stop)?;
    if outcome.stopped {
        return Ok(interrupted(out, &run));
    }
    pictures::losses(out, run.source(), &[(run.config().precision.to_string(), out)])?;
    println!("\n{}", Table::of(&[(run.config().clone(), outcome.clone())]));
    describe(&run, &outcome);
    println!("Weights, metrics, memory report and pictures are in {}", out.display());
    Ok(End::Finished)
}

fn resume(cli: &Cli, dir: &Path, device: &Device) -> Result<Run> {
    let wrong = |setting, value, hint| Err(OdeError::Setting { setting, value, hint });
    let saved = match checkpoint::state(dir) {
        Err(OdeError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            let hint = "there is no checkpoint in that folder; give the --out of an earlier run";
            return wrong("--resume", dir.display().to_string(), hint);
        }
        saved => saved?,
    };
    let config = cli.resumed(&saved.config)?;
    if config.iters < saved.iteration {
        let hint = "the checkpoint is further on already; give more, or leave the flag out";
        return wrong("--iters", config.iters.to_string(), hint);
    }
    let run = Run::resumed(dir, &saved, config, device)?;
    let (from, to) = (dir.join("metrics.csv"), cli.out().join("metrics.csv"));
    if from != to {
        fs::create_dir_all(cli.out()).map_err(|source| OdeError::Io { path: cli.out().to_owned(), source })?;
        let rows = fs::read(&from).map_err(|source| OdeError::Io { path: from, source })?;
        write_bytes_atomically(&to, &rows)?;
    }
    println!("Going on after iteration {} of {}", run.iteration(), dir.display());
    Ok(run)
}

fn compare(runs: Vec<Config>, out: &Path, device: &Device, stop: &Stop) -> Result<End> {
    let several = runs.iter().any(|run| run.data != runs[0].data);
    let mut finished = Vec::new();
    let mut folders = Vec::new();
    for config in runs {
        let data = if several { format!("{}-", stem(&config.data)) } else { String::new() };
        let name = format!("{data}{}-{}", config.precision, config.seed);
        let dir = out.join(&name);
        println!("{}: {}, seed {}", config.data, config.precision, config.seed);
        let (run, outcome) = train(Run::fresh(config, device)?, &dir, stop)?;
        if outcome.stopped {
            return Ok(interrupted(&dir, &run));
        }
        folders.push((name, dir));
        let curves: Vec<(String, &Path)> = folders.iter().map(|(name, dir)| (name.clone(), dir.as_path())).collect();
        pictures::losses(out, run.source(), &curves)?;
        finished.push((run.config().clone(), outcome));
        Table::of(&finished).save(&out.join("compare.csv"))?;
    }
    println!("\n{}", Table::of(&finished));
    println!("NLL of the same {JUDGES} validation points (tables: all held-out rows), each in its own precision;");
    println!(
        "the spread is the largest less the smallest of the seeds. Saved in {}",
        out.join("compare.csv").display()
    );
    Ok(End::Finished)
}

/// The name of a density, or of a file without its folder.
fn stem(data: &str) -> &str {
    Path::new(data).file_stem().and_then(|stem| stem.to_str()).unwrap_or(data)
}

fn describe(run: &Run, outcome: &Outcome) {
    let stats = outcome.last;
    if outcome.iterations == 0 {
        println!("There was nothing left to train.");
        return;
    }
    println!(
        "Validated in {} on {} points. A training step: {} evaluations, {} linearisations, {} pullbacks, {} casts, {} builds.",
        run.config().precision,
        run.judges(),
        stats.evaluations,
        stats.linearizations,
        stats.pullbacks,
        stats.casts,
        stats.builds,
    );
    let (steps, passes) = outcome.redone;
    let rate = outcome.iterations as f64 / outcome.seconds.max(f64::MIN_POSITIVE);
    println!(
        "{rate:.1} iterations a second; {steps} solver steps and {passes} backward passes done again after overflow."
    );
}

fn interrupted(out: &Path, run: &Run) -> End {
    let (dir, done) = (out.display(), run.iteration());
    println!("\nInterrupted: the state after iteration {done} is saved in {dir}; go on with --resume {dir}");
    End::Interrupted
}

/// Trains and, unless it was stopped, leaves the memory report and the picture of the density.
fn work(run: &mut Run, out: &Path, stop: &Stop) -> Result<Outcome> {
    let outcome = run.train(out, stop).inspect_err(|_| {
        eprintln!("The state after iteration {} is saved in {}", run.iteration(), out.display());
    })?;
    if !outcome.stopped {
        run.profile()?.save(out.join("memory.json"))?;
        pictures::density(out, run)?;
    }
    Ok(outcome)
}

/// Does the work, on a thread whose stack is deep enough: Candle's backward recurses through an unrolled graph.
fn train(mut run: Run, out: &Path, stop: &Stop) -> Result<(Run, Outcome)> {
    let Config { adjoint, steps, .. } = *run.config();
    if adjoint != AdjointName::Unrolled {
        let outcome = work(&mut run, out, stop)?;
        return Ok((run, outcome));
    }
    // Seven stages at most, some sixty ops each, and up to 2 KiB of stack for each op in a debug build.
    let stack = (steps as usize).saturating_mul(7 * 60 * 2048).max(8 << 20);
    let outcome = thread::scope(|scope| {
        let spawned = thread::Builder::new().stack_size(stack).spawn_scoped(scope, || work(&mut run, out, stop));
        match spawned.map(thread::ScopedJoinHandle::join) {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(error) => Err(OdeError::Setting {
                setting: "--steps",
                value: format!("{steps} ({error} at a stack of {} MiB)", stack >> 20),
                hint: "an unrolled graph of that length does not fit; take fewer, or --adjoint discrete",
            }),
        }
    })?;
    Ok((run, outcome))
}
