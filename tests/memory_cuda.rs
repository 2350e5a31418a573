//! CUDA that is not there is an error, and where it is, its pool is metered.

use candle_ode::OdeError;
use candle_ode::memory::{cuda_device, probe_cuda};

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

#[cfg(feature = "cuda")]
#[test]
fn the_pool_counts_tensors() {
    use candle_core::{DType, Tensor};
    use candle_ode::memory::{CudaPoolMeter, Meter, meter_for};

    const BYTES: u64 = 64 << 20;
    let device = match cuda_device(0) {
        Ok(device) => device,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let tensor = |bytes: u64| Tensor::zeros(bytes as usize, DType::U8, &device).unwrap();
    let used = meter_for(&device).unwrap();
    let reserved = CudaPoolMeter::reserved(&device).unwrap();
    assert_eq!(used.name(), "cuda pool used");
    drop(tensor(1));

    let before = used.mark().unwrap().live;
    let first = tensor(BYTES);
    drop(tensor(2 * BYTES));
    let reading = used.mark().unwrap();
    assert_eq!((reading.live - before, reading.peak - before), (BYTES, 3 * BYTES));
    assert!(reserved.live().unwrap() >= used.live().unwrap());

    // A window in which nothing is allocated: its peak is what was live at its start, though the driver says 0.
    drop(first);
    let reading = used.mark().unwrap();
    assert_eq!((reading.live, reading.peak - before), (before, BYTES));
    assert_eq!(used.peak().unwrap(), before);
}
