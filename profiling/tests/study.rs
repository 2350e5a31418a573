//! The study of codecs finds what the NumPy model of the same scheme found, within a factor of three, and in its order.

use std::process::Command;

/// By setting (T, N, f): F32 states, F16 states, 16-bit and 8-bit increments, 8-bit ones without feedback, 8-bit states
/// (at twice the steps).
const EXPECTED: [(&str, [f64; 6]); 7] = [
    ("1,32,f32", [1.4e-7, 2.0e-5, 3.5e-7, 6.5e-6, 1.8e-4, 4.0e-3]),
    ("1,128,f32", [3.0e-7, 1.1e-5, 2.7e-7, 9.7e-7, 1.2e-4, 4.0e-3]),
    ("4,32,f32", [2.3e-7, 8.8e-5, 2.4e-5, 3.7e-4, 3.1e-3, 1.2e-2]),
    ("4,128,f32", [5.8e-7, 5.3e-5, 2.7e-6, 6.2e-5, 2.7e-3, 1.0e-2]),
    ("1,128,f16", [3.4e-4, 3.4e-4, 3.4e-4, 3.4e-4, 3.5e-4, 4.0e-3]),
    ("4,128,f16", [1.2e-3, 1.2e-3, 1.2e-3, 1.3e-3, 3.1e-3, 1.0e-2]),
    ("10,128,f16", [2.1e-2, 2.1e-2, 2.1e-2, 1.9e-2, 3.2e-2, f64::NAN]),
];

const CODECS: [&str; 6] = [
    "F32 states",
    "F16 states",
    "16-bit increments",
    "8-bit increments",
    "8-bit increments without feedback",
    "8-bit states",
];

#[test]
fn errors_of_codecs_are_those_of_the_model() {
    let output = Command::new(env!("CARGO_BIN_EXE_memory-report")).args(["study", "codecs"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let table = String::from_utf8(output.stdout).unwrap();
    println!("{table}");
    let error = |setting: &str, codec: &str| -> f64 {
        let (setting, longer) = match codec == "8-bit states" {
            true => (setting.replace(",32,", ",64,").replace(",128,", ",256,"), true),
            false => (setting.to_owned(), false),
        };
        let start = format!("{setting},{codec},");
        let line = table.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{start} {longer}"));
        line.rsplit(',').next().unwrap().parse().unwrap()
    };
    let mut wrong = vec![];
    for (setting, expected) in EXPECTED {
        let found = CODECS.map(|codec| error(setting, codec));
        for ((codec, expected), found) in CODECS.iter().zip(expected).zip(found) {
            if expected.is_finite() && !(expected / 3.0..=expected * 3.0).contains(&found) {
                wrong.push(format!("{setting}, {codec}: {found:e}, expected {expected:e}"));
            }
        }
        // In the order of the model, where that tells them apart.
        for (a, b) in (0..6).flat_map(|a| (0..6).map(move |b| (a, b))) {
            if expected[a] * 1.5 < expected[b] && found[a] >= found[b] {
                wrong.push(format!("{setting}: {} is not below {}", CODECS[a], CODECS[b]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
