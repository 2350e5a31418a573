//! A training step of a flow with its log-density, whose layers run as one op with their tangents, beside the same layers
//! one by one in the same run. `cargo bench --bench flows`
#![allow(missing_docs)]

use candle_core::{Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::ops::{Activation, ConcatLinear, Mlp, concat_linear};
use candle_ode::prelude::*;
use candle_ode::{State, Tangent};
use std::time::Instant;

const ROWS: usize = 256;
const STEPS: usize = 4;
const HIDDEN: usize = 128;

/// The layers of an [`Mlp`] in time, which know nothing of each other.
struct OneByOne([ConcatLinear; 3]);

impl OneByOne {
    fn new(dim: usize, vb: VarBuilder) -> Result<Self> {
        let layer = |n: usize, input, output| concat_linear(input, output, vb.pp(n));
        Ok(Self([layer(0, dim, HIDDEN)?, layer(1, HIDDEN, HIDDEN)?, layer(2, HIDDEN, dim)?]))
    }
}

impl Tangent for OneByOne {
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let [first, second, last] = &self.0;
        let (y, v) = first.tangent(t, y, v)?;
        let (y, v) = Activation::Softplus.tangent(t, &y, &v)?;
        let (y, v) = second.tangent(t, &y, &v)?;
        let (y, v) = Activation::Softplus.tangent(t, &y, &v)?;
        last.tangent(t, &y, &v)
    }
}

/// Milliseconds of the fastest of a few training steps over (z, log p), on one thread.
fn milliseconds<M: Tangent + Send + Sync + 'static>(
    build: impl Fn(VarBuilder<'static>) -> Result<M> + Send + Sync + 'static,
    (dim, trace, precision): (usize, Trace, Precision),
) -> candle_ode::Result<f64> {
    let vars = VarMap::new();
    let build = move |vb| Ok(LogDensity::new(build(vb)?, trace));
    let field = ModelField::with_state(&vars, &Device::Cpu, build, |flow, t, state| flow.eval(t, state))?.row_wise();
    let z = Tensor::randn(0f32, 1.0, (ROWS, dim), &Device::Cpu)?;
    let start = State::from([z, Tensor::zeros(ROWS, candle_core::DType::F32, &Device::Cpu)?]);
    let ode = Ode::new(&field).solver(Rk4).span(1.0, 0.0).steps(STEPS).precision(precision).threads(1);
    let mut fastest = f64::INFINITY;
    for _ in 0..12 {
        let begin = Instant::now();
        let solution = ode.solve(start.clone())?;
        let [z, log_p] = solution.last_state().tensors() else { unreachable!("a state of two tensors") };
        drop((z.sqr()?.sum_all()? + log_p.sum_all()?)?.backward()?);
        fastest = fastest.min(1e3 * begin.elapsed().as_secs_f64());
    }
    Ok(fastest)
}

fn main() -> candle_ode::Result<()> {
    println!("{ROWS} rows, MLP dim–{HIDDEN}–{HIDDEN}–dim in time with softplus, RK4, {STEPS} steps, one thread");
    for (dim, trace) in [(2, Trace::Exact), (64, Trace::Rademacher)] {
        for precision in [Precision::F32, Precision::BF16, Precision::F16] {
            let case = (dim, trace, precision);
            let alone = milliseconds(move |vb| OneByOne::new(dim, vb), case)?;
            let sizes = [dim, HIDDEN, HIDDEN, dim];
            let build = move |vb: VarBuilder<'static>| Mlp::builder(&sizes, Activation::Softplus).in_time().build(vb);
            let fused = milliseconds(build, case)?;
            println!(
                "  dim {dim}, {trace:?}, {:?}: one by one {alone:.1} ms, as one op {fused:.1} ms, {:.2} ×",
                precision.compute_dtype(),
                fused / alone,
            );
        }
    }
    Ok(())
}
