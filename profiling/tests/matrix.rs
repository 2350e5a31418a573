//! `memory-report run` measures a matrix, and `compare` puts it side by side.

use candle_ode::account::Category;
use candle_ode::memory::MemoryReport;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn memory_report(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_memory-report")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The cells of a matrix, in order.
fn cells(folder: &Path) -> Vec<PathBuf> {
    let mut cells: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    cells.sort();
    cells
}

/// Runs a matrix into a folder of its own.
fn run(name: &str, flags: &[&str]) -> (PathBuf, Output) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    let output = memory_report(&[&["run", "--out", folder.to_str().unwrap(), "--repeat", "1"], flags].concat());
    (folder, output)
}

#[test]
fn every_cell_has_its_files_and_its_figures() {
    let (folder, output) = run("files", &["--field", "mlp,conv", "--solver", "heun", "--steps", "4", "--batch", "8"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let cells = cells(&folder);
    assert_eq!(cells.len(), 2);
    for (cell, field) in cells.iter().zip(["mlp", "conv"]) {
        assert!(cell.ends_with(format!("00{}-{field}-heun-4-f32-storage-discrete-8-cpu", u8::from(field == "conv"))));
        for file in ["report.json", "report.csv", "trace.json", "report.html"] {
            assert!(cell.join(file).is_file(), "{field}: {file}");
        }
        let report = MemoryReport::load(cell.join("report.json")).unwrap();
        let setting = |name: &str| &report.environment.settings[name];
        assert_eq!((setting("field").as_str(), setting("steps").as_u64()), (Some(field), Some(4)));
        assert_eq!(setting("pullbacks"), 2 * 4);
        assert!(setting("gradient_error").as_f64().unwrap() < 1e-5);
        assert!(setting("time_ns").as_u64().unwrap() >= setting("time_least_ns").as_u64().unwrap());
        assert!(report.peak() > report.baseline());
    }
}

#[test]
fn half_precision_halves_the_trajectory_of_the_flow() {
    let (folder, output) =
        run("flow", &["--field", "cnf", "--precision", "f32,bf16,f16", "--steps", "8", "--batch", "64"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let reports: Vec<_> =
        cells(&folder).iter().map(|cell| MemoryReport::load(cell.join("report.json")).unwrap()).collect();
    let trajectory: Vec<_> = reports.iter().map(|report| report.owned(Category::Trajectory).unwrap().peak).collect();
    // 7 states of 64 × (2 + 1) numbers; the last is not kept.
    assert_eq!(trajectory, [7 * 64 * 3 * 4, 7 * 64 * 3 * 2, 7 * 64 * 3 * 2]);

    let out = |name: &str| folder.with_file_name(name);
    let (markdown, csv, html) = (out("flow.md"), out("flow.csv"), out("flow.html"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_memory-report"));
    command
        .arg("compare")
        .arg(&folder)
        .arg("--markdown")
        .arg(&markdown)
        .arg("--csv")
        .arg(&csv)
        .arg("--html")
        .arg(&html);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    let words: Vec<Vec<_>> =
        table.lines().map(|line| line.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect()).collect();
    assert_eq!(words[0][..5], ["report", "peak above baseline", "ratio", "trajectory", "ratio"]);
    assert_eq!((words[1][0], words[1][3], words[1][4]), ("f32", "5.25 KiB", "1.000"));
    assert_eq!((words[2][0], words[2][3], words[2][4]), ("bf16", "2.62 KiB", "0.500"));
    assert_eq!((words[3][0], words[3][3], words[3][4]), ("f16", "2.62 KiB", "0.500"));
    assert!(std::fs::read_to_string(&markdown).unwrap().contains("| 5.25 KiB | 1.000 |"));
    let mut reader = csv::Reader::from_path(&csv).unwrap();
    let rows: Vec<_> = reader.records().map(Result::unwrap).collect();
    assert_eq!((&rows[1][0], &rows[1][3], &rows[1][4]), ("bf16", "2688", "0.5"));
    assert!(std::fs::read_to_string(&html).unwrap().contains("bf16"));
}

#[test]
fn a_condition_that_is_met_fails_with_the_line_that_broke_it() {
    let (folder, output) = run("condition", &["--precision", "f32,f16", "--steps", "8", "--batch", "16"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let only = folder.join(&cells(&folder)[0]);
    let alone = memory_report(&["compare", only.to_str().unwrap(), "--fail-if", "peak > 1.02"]);
    assert_eq!(alone.status.code(), Some(1), "nothing was compared");
    assert!(text(&alone.stderr).contains("is the only one"), "{}", text(&alone.stderr));
    let folder = folder.to_str().unwrap();
    let compare = |condition: &str| memory_report(&["compare", folder, "--fail-if", condition]);
    assert_eq!(compare("trajectory > 0.5").status.code(), Some(0));
    let broken = compare("trajectory <= 0.5");
    assert_eq!(broken.status.code(), Some(1));
    let stderr = text(&broken.stderr);
    assert!(
        stderr.contains("f16: trajectory is 0.500 of the first") && stderr.contains("'trajectory <= 0.5'"),
        "{stderr}"
    );
    assert_eq!(compare("peek > 1").status.code(), Some(2), "a mistake on the command line");
}

#[test]
fn a_cell_that_cannot_be_says_why_and_the_others_are_there() {
    let (folder, output) = run("broken", &["--device", "cpu,cuda:0", "--steps", "2", "--batch", "4"]);
    if candle_ode::memory::cuda_device(0).is_ok() {
        return println!("skipped: there is a GPU, so both cells can be");
    }
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("001-") && stderr.contains("1 of 2 cells failed"), "{stderr}");
    assert_eq!(cells(&folder).len(), 1);
    assert!(text(&output.stdout).contains("1 of 2 cells are in"));
}

#[test]
fn codecs_and_checkpoints_keep_less() {
    let flags =
        ["--codec", "storage,increments8", "--adjoint", "discrete,checkpoints:3", "--steps", "16", "--batch", "32"];
    let (folder, output) = run("keeping", &flags);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let reports = cells(&folder).into_iter().map(|cell| MemoryReport::load(cell.join("report.json")).unwrap());
    // At the end of the forward pass.
    let kept = reports.map(|report| report.environment.settings["trajectory_bytes"].as_u64().unwrap());
    let kept: Vec<_> = kept.collect();
    let state = 32 * 64 * 4;
    // Storage, increments8, and both with three checkpoints and the start of the last step.
    assert_eq!((kept[0], kept[2]), (15 * state, 4 * state));
    assert!(kept[1] < kept[0] / 2 && kept[3] <= kept[2], "{kept:?}");
}

#[test]
fn cells_of_another_matrix_are_not_mixed_in() {
    let flags = ["--steps", "2", "--batch", "4"];
    let (folder, output) = run("twice", &flags);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let again = |more: &[&str]| {
        let folder = folder.to_str().unwrap();
        memory_report(&[&["run", "--out", folder, "--repeat", "1", "--steps", "3", "--batch", "4"], more].concat())
    };
    let refused = again(&[]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("holds 1 cells already"), "{}", text(&refused.stderr));
    assert!(again(&["--replace"]).status.success());
    let names: Vec<_> = cells(&folder).iter().map(|cell| cell.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["000-mlp-rk4-3-f32-storage-discrete-4-cpu"]);
}

#[test]
fn peaks_against_steps_are_drawn() {
    let (folder, output) = run("steps", &["--adjoint", "discrete,unrolled", "--steps", "4,16", "--batch", "16"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let picture = folder.with_file_name("steps.svg");
    let output = memory_report(&["compare", folder.to_str().unwrap(), "--svg", picture.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let svg = std::fs::read_to_string(picture).unwrap();
    assert!(svg.contains("discrete") && svg.contains("unrolled") && svg.matches("<circle").count() == 4, "{svg}");
}

#[test]
fn a_plan_of_the_same_flags_is_what_is_measured() {
    let flags = ["--field", "mlp", "--solver", "euler", "--precision", "f32,f16", "--steps", "16", "--batch", "128"];
    let output = memory_report(&[&["plan"], &flags[..]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let planned = text(&output.stdout);
    let (folder, output) = run("planned", &flags);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for (line, cell) in planned.lines().skip(1).zip(cells(&folder)) {
        let words: Vec<_> = line.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect();
        let report = MemoryReport::load(cell.join("report.json")).unwrap();
        let kibibytes = |bytes: u64| format!("{:.2} KiB", bytes as f64 / 1024.0);
        assert_eq!(words[3], kibibytes(report.owned(Category::Trajectory).unwrap().peak), "{planned}");
        assert_eq!(words[5].parse::<u64>().unwrap(), report.environment.settings["pullbacks"].as_u64().unwrap());
    }
    assert_eq!(planned.lines().count(), 3, "{planned}");
    let refused = memory_report(&["plan", "--adjoint", "unrolled"]);
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn mistakes_are_told_with_what_to_write() {
    let complaint = |arguments: &[&str]| {
        let output = memory_report(arguments);
        assert!(!output.status.success());
        text(&output.stderr)
    };
    let stderr = complaint(&["run", "--solver", "rk5", "--out", "nowhere"]);
    assert!(stderr.contains("'rk5'") && stderr.contains("dopri5"), "{stderr}");
    for (word, says) in
        [("checkpoints", "needs a number"), ("discrete:3", "takes no number"), ("checkpoints:0", "from 1 on")]
    {
        let stderr = complaint(&["run", "--adjoint", word, "--out", "nowhere"]);
        assert!(stderr.contains(says), "{stderr}");
    }
    let stderr = complaint(&["run", "--in-process", "--steps", "1,2", "--out", "nowhere"]);
    assert!(stderr.contains("measures one cell, and these flags make 2"), "{stderr}");
    let stderr = complaint(&["run", "--in-process", "--device", "gpu", "--out", "nowhere"]);
    assert!(stderr.contains("take cpu or cuda:0"), "{stderr}");
    for rows in ["10000000000000", "1000000000000000000"] {
        let stderr = complaint(&["run", "--in-process", "--batch", rows, "--out", "nowhere"]);
        assert!(stderr.contains(&format!("[{rows}, 64]")) && stderr.contains("a smaller --batch"), "{stderr}");
    }
    let stderr = complaint(&["compare", env!("CARGO_TARGET_TMPDIR"), "/no/such"]);
    assert!(stderr.contains("holds no report.json") || stderr.contains("/no/such"), "{stderr}");
}

#[test]
fn every_verb_has_examples() {
    for verb in ["run", "plan", "compare", "show", "watch", "study", "bench-peer", "completions"] {
        let help = text(&memory_report(&[verb, "--help"]).stdout);
        assert!(help.contains(&format!("Examples:\n  memory-report {verb} ")), "{help}");
    }
}

#[test]
fn shells_can_complete_verbs() {
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&memory_report(&["completions", shell]).stdout);
        assert!(["run", "plan", "compare", "show", "watch"].iter().all(|verb| script.contains(verb)), "{shell}");
    }
}
