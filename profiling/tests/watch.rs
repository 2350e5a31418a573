//! `memory-report watch` follows a program that records.

use std::process::{Command, Output, Stdio};

const TOOL: &str = env!("CARGO_BIN_EXE_memory-report");

fn watch(command: &[&str]) -> Output {
    Command::new(TOOL).args(["watch", "--"]).args(command).output().unwrap()
}

#[test]
fn the_curve_of_a_recording_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let output =
        watch(&[TOOL, "run", "--in-process", "--steps", "64", "--batch", "512", "--repeat", "1", "--out", out]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The feed's last word is the report's: 64 steps of 512 × 64 numbers and more.
    let report = candle_ode::memory::MemoryReport::load(folder.path().join("report.json")).unwrap();
    let peak = (report.peak() - report.baseline()) as f64 / f64::from(1 << 20);
    assert!(text.starts_with(&format!("heap: peak {peak:.2} MiB above baseline")), "{peak}: {text}");
    assert_eq!(text.lines().count(), 9, "{text}");
}

#[test]
fn a_program_that_records_nothing_is_told_how() {
    let output = watch(&[TOOL, "completions", "bash"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("have it install a candle_ode::memory::MemoryProfiler"));
}

#[test]
fn the_programs_exit_code_is_handed_on() {
    let output = watch(&[TOOL, "show", "/no/such/file.json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("/no/such/file.json"));
    let output = watch(&["/no/such/program"]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("`/no/such/program`"));
}

#[cfg(unix)]
#[test]
fn an_interrupt_leaves_no_file_behind() {
    use std::time::Duration;
    let folder = tempfile::tempdir().unwrap();
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    let command = ["watch", "--", "sleep", "60"];
    let mut watching = Command::new(TOOL).args(command).env("TMPDIR", folder.path()).spawn().unwrap();
    let wait = || std::thread::sleep(Duration::from_millis(50));
    while files() == 0 {
        assert!(watching.try_wait().unwrap().is_none(), "it ended before it began");
        wait();
    }
    let pid = watching.id().to_string();
    let status = loop {
        if let Some(status) = watching.try_wait().unwrap() {
            break status;
        }
        Command::new("kill").args(["-INT", &pid]).status().unwrap();
        wait();
    };
    // By its own end, not by the signal.
    assert_eq!((status.code(), files()), (Some(1), 0));
}

#[cfg(unix)]
#[test]
fn what_ends_the_watch_ends_the_program() {
    use std::time::Duration;
    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("ready");
    // Says that it has recorded, and saves before it ends.
    let program = format!(
        "trap 'exit 7' TERM; printf 'recording heap\\n100 4096 4096\\n' >> \"${}\"; touch {}; while :; do sleep 0.1; done",
        candle_ode::memory::FEED,
        ready.display()
    );
    let mut watching =
        Command::new(TOOL).args(["watch", "--", "sh", "-c", &program]).stdout(Stdio::piped()).spawn().unwrap();
    while !ready.exists() {
        assert!(watching.try_wait().unwrap().is_none(), "it ended before it began");
        std::thread::sleep(Duration::from_millis(50));
    }
    Command::new("kill").args(["-TERM", &watching.id().to_string()]).status().unwrap();
    let output = watching.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(7), "{text}");
    assert!(text.starts_with("heap: peak 4.00 KiB"), "{text}");
}
