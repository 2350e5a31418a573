//! A training step of a flow with its log-density, whose layers run as one op with their tangents, of plain layers and
//! of FFJORD's concat-squash layers, and of the reference flow, beside the same made of ops one by one in the same run.
//! `cargo bench --bench flows`
#![allow(missing_docs)]

use candle_core::{Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_ode::field::divergence::{LogDensity, Trace};
use candle_ode::ops::{self, Activation, Mlp, affine, concat_linear, concat_squash_linear};
use candle_ode::prelude::*;
use candle_ode::{State, Tangent};
use std::time::Instant;

#[path = "../examples/cnf/flow.rs"]
#[allow(dead_code, unreachable_pub)]
mod flow;

const ROWS: usize = 256;
const STEPS: usize = 4;
const HIDDEN: usize = 128;

/// Three layers in time, which know nothing of each other.
struct OneByOne<L>([L; 3]);

impl<L> OneByOne<L> {
    fn new(dim: usize, vb: VarBuilder, layer: impl Fn(usize, usize, VarBuilder) -> Result<L>) -> Result<Self> {
        let layer = |n: usize, input, output| layer(input, output, vb.pp(n));
        Ok(Self([layer(0, dim, HIDDEN)?, layer(1, HIDDEN, HIDDEN)?, layer(2, HIDDEN, dim)?]))
    }
}

impl<L: Tangent> Tangent for OneByOne<L> {
    fn tangent(&self, t: &Time, y: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let [first, second, last] = &self.0;
        let (y, v) = first.tangent(t, y, v)?;
        let (y, v) = Activation::Softplus.tangent(t, &y, &v)?;
        let (y, v) = second.tangent(t, &y, &v)?;
        let (y, v) = Activation::Softplus.tangent(t, &y, &v)?;
        last.tangent(t, &y, &v)
    }
}

/// The reference flow in the plane, its units made of ops that know nothing of each other.
struct Units(Mlp);

impl Units {
    const WIDTH: usize = 128;

    fn new(vb: VarBuilder) -> Result<Self> {
        Mlp::new(&[1, 32, 32, 7 * Self::WIDTH], Activation::Tanh, vb.pp("hyper")).map(Self)
    }

    fn mean(values: &Tensor, weights: &Tensor) -> Result<Tensor> {
        affine(values, weights, None)? / Self::WIDTH as f64
    }
}

impl Tangent for Units {
    fn tangent(&self, _: &Time, _: &Tensor, _: &Tensor) -> Result<(Tensor, Tensor)> {
        unreachable!("the trace is known")
    }

    fn trace(&self, t: &Time, z: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        let all = self.0.forward(&t.like(z)?)?.flatten_all()?;
        let block = |n: usize| all.narrow(0, 2 * n * Self::WIDTH, 2 * Self::WIDTH)?.reshape((Self::WIDTH, 2));
        let (w, u) = (block(0)?, (block(1)? * Activation::Sigmoid.forward(&block(2)?)?)?);
        let units = affine(z, &w, Some(&all.narrow(0, 6 * Self::WIDTH, Self::WIDTH)?))?;
        let f = Self::mean(&Activation::Tanh.forward(&units)?, &u.t()?)?;
        let along = (u * w)?.sum_keepdim(1)?;
        let trace = Self::mean(&Activation::Tanh.derivative(&units)?, &along.t()?)?;
        Ok(Some((f, trace.squeeze(1)?)))
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

fn print(what: &str, precision: Precision, alone: f64, (how, fused): (&str, f64)) {
    let (dtype, ratio) = (precision.compute_dtype(), fused / alone);
    println!("  {what}, {dtype:?}: one by one {alone:.1} ms, {how} {fused:.1} ms, {ratio:.2} ×");
}

fn main() -> candle_ode::Result<()> {
    let precisions = [Precision::F32, Precision::BF16, Precision::F16];
    println!("{ROWS} rows, MLP dim–{HIDDEN}–{HIDDEN}–dim in time with softplus, RK4, {STEPS} steps, one thread");
    for (dim, trace) in [(2, Trace::Exact), (64, Trace::Rademacher)] {
        for precision in precisions {
            let case = (dim, trace, precision);
            let alone = milliseconds(move |vb| OneByOne::new(dim, vb, concat_linear), case)?;
            let sizes = [dim, HIDDEN, HIDDEN, dim];
            let build = move |vb: VarBuilder<'static>| Mlp::builder(&sizes, Activation::Softplus).in_time().build(vb);
            print(&format!("dim {dim}, {trace:?}"), precision, alone, ("as one op", milliseconds(build, case)?));
        }
    }
    println!("the same of concat-squash layers");
    for (dim, trace) in [(2, Trace::Exact), (64, Trace::Rademacher)] {
        for precision in precisions {
            let case = (dim, trace, precision);
            let alone = milliseconds(move |vb| OneByOne::new(dim, vb, concat_squash_linear), case)?;
            let build = move |vb: VarBuilder<'static>| {
                Ok(ops::seq()
                    .add_timed(concat_squash_linear(dim, HIDDEN, vb.pp(0))?)
                    .add(Activation::Softplus)
                    .add_timed(concat_squash_linear(HIDDEN, HIDDEN, vb.pp(1))?)
                    .add(Activation::Softplus)
                    .add_timed(concat_squash_linear(HIDDEN, dim, vb.pp(2))?))
            };
            print(&format!("dim {dim}, {trace:?}"), precision, alone, ("as one op", milliseconds(build, case)?));
        }
    }
    println!("{ROWS} rows, the reference flow, {} planar units of a hypernetwork's weights", Units::WIDTH);
    for precision in precisions {
        let case = (2, Trace::Exact, precision);
        let alone = milliseconds(Units::new, case)?;
        let planar = milliseconds(|vb| flow::HyperFlow::new(2, Units::WIDTH, vb), case)?;
        print("dim 2", precision, alone, ("as planar units", planar));
    }
    Ok(())
}
