//! The memory pool of a GPU: it is metered, and a solve takes what it should.

use super::gpu;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{DType, Tensor, Var};
use candle_ode::memory::{MemoryProfiler, meter_for};
use candle_ode::prelude::*;

#[cfg(feature = "cuda")]
#[test]
fn the_pool_counts_tensors() {
    use candle_ode::memory::{CudaPoolMeter, Meter};

    const BYTES: u64 = 64 << 20;
    let Some(gpu) = gpu() else { return };
    let device: &Device = &gpu;
    let tensor = |bytes: u64| Tensor::zeros(bytes as usize, DType::U8, device).unwrap();
    let used = meter_for(device).unwrap();
    let reserved = CudaPoolMeter::reserved(device).unwrap();
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

#[test]
fn the_pool_meter_sees_the_trajectory() {
    let Some(gpu) = gpu() else { return };
    let field = FnField::new(|_: &Time, y: &Tensor| y.neg());
    let y0 = Var::from_tensor(&Tensor::ones((1 << 20,), DType::F32, &gpu).unwrap()).unwrap();
    let ode = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(33);
    let meter = meter_for(&gpu).unwrap();
    drop(ode.solve(y0.as_tensor()).unwrap());
    let before = meter.live().unwrap();
    let solution = ode.solve(y0.as_tensor()).unwrap();
    let kept = meter.live().unwrap() - before;
    assert!(kept >= solution.trajectory_bytes() as u64, "{kept} bytes live");
    drop(solution);
    assert!(meter.live().unwrap() <= before, "a dropped solution gives its bytes back");
}

/// Peaks of a training step of an MLP above what was live before: in F16 little more than half of what they are in F32.
#[test]
fn peaks_of_steps_in_f16_are_about_half_of_those_in_f32() {
    let Some(gpu) = gpu() else { return };
    let peak = |precision: Precision| {
        let vars = candle_nn::VarMap::new();
        let build = |vb| candle_ode::ops::Mlp::new(&[64, 256, 256, 64], candle_ode::ops::Activation::Tanh, vb);
        let field = ModelField::new(&vars, &gpu, build, |m, _: &Time, y| candle_core::Module::forward(m, y)).unwrap();
        let y0 = Var::from_tensor(&Tensor::ones((16_384, 64), DType::F32, &gpu).unwrap()).unwrap();
        let ode = Ode::new(&field).solver(Rk4).span(0.0, 1.0).steps(8).precision(precision);
        let step = || ode.solve(y0.as_tensor()).unwrap().last().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        drop(step());
        let recording = MemoryProfiler::new(&gpu).install().unwrap();
        drop(step());
        let report = recording.finish().unwrap();
        let peaks: Vec<u64> = report.spans.iter().filter(|span| *span.name == *"step").map(|span| span.peak).collect();
        println!("{precision:?}: peak {} above {}, steps {peaks:?}", report.peak(), report.baseline());
        report.peak() - report.baseline()
    };
    let (half, single) = (peak(Precision::F16), peak(Precision::F32));
    assert!(half as f64 <= 0.7 * single as f64, "{half} bytes in F16, {single} in F32");
}
