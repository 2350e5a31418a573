//! Is CUDA there at all? Asked before anything else, since a missing library panics further down.

use crate::error::{OdeError, Result};
use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};

/// What a CUDA device of Candle opens: the driver, matrix products, random numbers.
const LIBRARIES: [&str; 3] = [if cfg!(windows) { "nvcuda" } else { "cuda" }, "cublas", "curand"];
/// Versions that the libraries' file names end in.
const VERSIONS: [&str; 6] = ["", ".1", ".13", ".12", ".11", ".10"];

/// Whether the libraries behind a CUDA device can be opened.
///
/// Touches no device and works in builds without the `cuda` feature.
///
/// # Errors
///
/// [`OdeError::Meter`] that names the missing library.
pub fn probe_cuda() -> Result<()> {
    LIBRARIES.into_iter().try_for_each(probe)
}

fn probe(library: &str) -> Result<()> {
    let mut reason = String::new();
    for version in VERSIONS {
        let name = format!("{DLL_PREFIX}{library}{DLL_SUFFIX}{version}");
        // SAFETY: these are NVIDIA's libraries, which any CUDA program loads; their initialisers have no conditions.
        match unsafe { libloading::Library::new(&name) } {
            Ok(_) => return Ok(()),
            Err(error) if reason.is_empty() => reason = format!("{name} does not open ({error})"),
            Err(_) => {}
        }
    }
    let hint = "install the NVIDIA driver and the CUDA libraries and put them on the loader's path, or run on the CPU";
    Err(OdeError::Meter { counter: "cuda", reason, hint })
}
