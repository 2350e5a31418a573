//! Every kernel, and what is launched for layers, convolutions and sums, on the host against the loops of the CPU.

mod activations;
mod combined;
mod convolutions;
mod layers;
mod norms;
mod planar;
mod rows;

use super::arguments::{Arguments, Element, Launch};
use super::host::Host;
use super::machine::Machine;
use candle_core::{DType, Device, Tensor};

/// Dtypes with kernels, and how far values in them may be off.
const DTYPES: [(DType, f64); 3] = [(DType::F32, 2e-6), (DType::F16, 2e-3), (DType::BF16, 1.5e-2)];

fn element(dtype: DType) -> Element {
    Element::of(dtype).unwrap()
}

fn run<A: Arguments>(host: &Host, launch: &Launch<A>) {
    // SAFETY: the tests hand over buffers of the shapes that they say.
    unsafe { host.launch(launch) }.unwrap();
}

fn cast(x: &Tensor, dtype: DType) -> Tensor {
    x.to_dtype(dtype).unwrap()
}

/// `count` numbers in F32: those of `pattern`, again and again.
fn single(pattern: &[f64], count: usize) -> Tensor {
    let values: Vec<f32> = pattern.iter().cycle().take(count).map(|x| *x as f32).collect();
    Tensor::new(values, &Device::Cpu).unwrap()
}
