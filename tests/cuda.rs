//! What must hold on a GPU. Without the feature `cuda`, or without a device, each test says so and passes.
#![allow(missing_docs)]

mod common;
#[path = "cuda/kernels.rs"]
mod kernels;
#[path = "cuda/memory.rs"]
mod memory;
#[path = "cuda/second_level.rs"]
mod second_level;
#[path = "cuda/solves.rs"]
mod solves;

use candle_core::Device;
use candle_ode::OdeError;
use candle_ode::memory::{cuda_device, probe_cuda};
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The first GPU, for one test at a time: its memory pool is shared.
struct Gpu {
    device: Device,
    _alone: MutexGuard<'static, ()>,
}

impl Deref for Gpu {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

/// The first GPU, or `None` with the reason printed.
fn gpu() -> Option<Gpu> {
    static ALONE: Mutex<()> = Mutex::new(());
    static DEVICE: OnceLock<Result<Device, String>> = OnceLock::new();
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match DEVICE.get_or_init(|| cuda_device(0).map_err(|error| error.to_string())) {
        Ok(device) => Some(Gpu { device: device.clone(), _alone: alone }),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn a_missing_device_is_an_error() {
    let error = cuda_device(4096).unwrap_err();
    match error {
        OdeError::Unsupported { .. } if !cfg!(feature = "cuda") => {}
        OdeError::Meter { counter: "cuda", .. } => assert!(probe_cuda().is_err(), "{error}"),
        OdeError::Candle(_) => {}
        other => panic!("{other}"),
    }
}

#[test]
fn kernels_are_part_of_the_feature() {
    let off = std::env::var_os("CANDLE_ODE_CUDA_KERNELS").is_some_and(|value| value == "0");
    assert_eq!(candle_ode::ops::cuda_kernels(), cfg!(feature = "cuda") && !off);
}
