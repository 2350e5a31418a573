//! The process as the system sees it: resident bytes, which is what counts against a machine's or a container's limit.
//!
//! Linux keeps the resident set and its high-water mark in `/proc/self/status` (`VmRSS`, `VmHWM`) and sets the mark to
//! what is resident now when a `5` is written to `/proc/self/clear_refs`. Freed heap stays resident as long as the
//! allocator keeps it, so the heap's own meter is the one to compare solves by.

use super::{Meter, Reading};
use crate::error::{OdeError, Result};
use std::fs::{File, OpenOptions};
use std::io::{Error, Read, Write};

/// Resident bytes of this process, and their peak. A reading takes about 20 µs and allocates nothing.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMeter(());

impl ProcessMeter {
    /// The process's meter; its peak begins now.
    ///
    /// # Errors
    ///
    /// [`OdeError::Meter`] where the system does not tell (other systems than Linux, a `/proc` that is not there or
    /// whose mark may not be reset).
    pub fn new() -> Result<Self> {
        let meter = Self(());
        meter.mark()?;
        Ok(meter)
    }

    fn read() -> Result<Reading> {
        let mut page = [0u8; 8192];
        let read = File::open("/proc/self/status").and_then(|mut file| file.read(&mut page)).map_err(|e| failed(&e))?;
        let text = std::str::from_utf8(&page[..read]).unwrap_or_default();
        let live = field(text, "VmRSS:")?;
        Ok(Reading { live, peak: field(text, "VmHWM:")?.max(live) })
    }
}

/// A line such as `VmRSS:      1234 kB`, in bytes.
fn field(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kibibytes = line.and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|number| number.trim().parse().ok());
    kibibytes
        .map(|kibibytes: u64| kibibytes * 1024)
        .ok_or_else(|| unreadable(format!("/proc/self/status has no {name}")))
}

fn failed(error: &Error) -> OdeError {
    unreadable(error.to_string())
}

fn unreadable(reason: String) -> OdeError {
    OdeError::Meter { counter: "process", reason, hint: "resident bytes are read on Linux, with /proc mounted" }
}

impl Meter for ProcessMeter {
    fn name(&self) -> &'static str {
        "process"
    }

    fn live(&self) -> Result<u64> {
        Ok(Self::read()?.live)
    }

    fn peak(&self) -> Result<u64> {
        Ok(Self::read()?.peak)
    }

    fn reset_peak(&self) -> Result<()> {
        let file = OpenOptions::new().write(true).open("/proc/self/clear_refs");
        file.and_then(|mut file| file.write_all(b"5")).map_err(|e| failed(&e))
    }

    fn mark(&self) -> Result<Reading> {
        let reading = Self::read()?;
        self.reset_peak()?;
        Ok(reading)
    }
}
