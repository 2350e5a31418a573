//! A field declared to be layers and nothing else: what it gives is what a closure that calls them gives, to the bit.
#![allow(missing_docs)]

mod common;
#[path = "common/declared.rs"]
mod declared;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Conv2dConfig;
use candle_nn::{VarBuilder, VarMap};
use candle_ode::Increments8;
use candle_ode::ops::{
    Activation, Mlp, Sequential, concat_conv2d, concat_linear, concat_squash_linear, conv2d, conv2d_no_bias,
    group_norm, linear, linear_no_bias, seq,
};
use candle_ode::prelude::*;
use candle_ode::schedule::Checkpoints;
use common::{bits, fill, normal, sorted, variable};
use declared::Ran::{Both, Buffers, Tensors};
use declared::{BUFFERS, TENSORS, Way, alone, are_the_same, both, way_in};

const PRECISIONS: [Precision; 4] = [Precision::F64, Precision::F32, Precision::F16, Precision::BF16];

fn narrow(vb: VarBuilder) -> candle_core::Result<Mlp> {
    Mlp::new(&[2, 24, 2], Activation::Tanh, vb)
}

fn wide(vb: VarBuilder) -> candle_core::Result<Mlp> {
    Mlp::new(&[32, 40, 48, 32], Activation::Silu, vb)
}

/// The last result passes through an activation, one of the biases is missing.
fn activated(vb: VarBuilder, last: Activation) -> candle_core::Result<Sequential> {
    let layers = seq().add(linear_no_bias(3, 20, vb.pp(0))?).add(Activation::Gelu).add(linear(20, 3, vb.pp(1))?);
    Ok(layers.add(last))
}

/// Three convolutions, the first without a bias.
fn images(vb: VarBuilder, [outer, inner]: [usize; 2], last: Option<Activation>) -> candle_core::Result<Sequential> {
    let same = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
    let layers = seq().add(conv2d_no_bias(outer, inner, 3, same, vb.pp(0))?).add(Activation::Gelu);
    let layers = layers.add(conv2d(inner, inner, 3, same, vb.pp(1))?).add(Activation::Relu);
    let layers = layers.add(conv2d(inner, outer, 3, same, vb.pp(2))?);
    Ok(match last {
        Some(last) => layers.add(last),
        None => layers,
    })
}

/// An ODE net's: norm, activation, convolution, norm, activation, convolution, norm, perhaps activated. The convolutions
/// see the time.
fn block(vb: VarBuilder, [outer, inner]: [usize; 2], [then, last]: [Activation; 2]) -> candle_core::Result<Sequential> {
    let same = Conv2dConfig { padding: 1, ..Conv2dConfig::default() };
    let layers = seq().add(group_norm(1, outer, 1e-5, vb.pp(0))?).add(then);
    let layers = layers.add_timed(concat_conv2d(outer, inner, 3, same, vb.pp(1))?);
    let layers = layers.add(group_norm(inner / 2, inner, 1e-5, vb.pp(2))?).add(then);
    let layers = layers.add_timed(concat_conv2d(inner, outer, 3, same, vb.pp(3))?);
    Ok(layers.add(group_norm(outer, outer, 1e-5, vb.pp(4))?).add(last))
}

/// Fields of them that do not grow fast.
fn of_images(vars: &VarMap, channels: [usize; 2], last: Option<Activation>) -> [ModelField; 2] {
    let fields = both(vars, move |vb| images(vb, channels, last));
    fill(vars, 1, 0.3);
    fields
}

#[test]
fn every_precision_and_width() {
    let _turn = alone();
    let shapes: [&[usize]; 3] = [&[70, 2], &[5, 2], &[2, 3, 11, 2]];
    for precision in PRECISIONS {
        let steps = |ode: Ode| ode.span(0.0, 1.0).steps(6).precision(precision);
        for shape in shapes {
            let vars = VarMap::new();
            let fields = both(&vars, |vb| narrow(vb));
            let (what, y0) = (format!("{precision:?} {shape:?}"), variable(9, shape, DType::F32));
            are_the_same(&what, &fields, &vars, &y0, way_in(precision), steps);
        }
        let vars = VarMap::new();
        let fields = both(&vars, |vb| wide(vb));
        let (what, y0) = (format!("{precision:?} wide"), variable(9, &[70, 32], DType::F32));
        are_the_same(&what, &fields, &vars, &y0, way_in(precision), steps);
    }
}

#[test]
fn every_end_of_the_layers() {
    let _turn = alone();
    for precision in PRECISIONS {
        let steps = |ode: Ode| ode.span(1.0, 0.0).steps(5).precision(precision);
        macro_rules! ends_in {
            ($($last:ident),*) => {$(
                let vars = VarMap::new();
                let fields = both(&vars, |vb| activated(vb, Activation::$last));
                let what = format!("{} {precision:?}", stringify!($last));
                let y0 = variable(9, &[33, 3], DType::F32);
                are_the_same(&what, &fields, &vars, &y0, way_in(precision), steps);
            )*};
        }
        ends_in!(Tanh, Gelu, Relu, Identity, Sin);
    }
}

#[test]
fn every_explicit_method() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let y0 = variable(9, &[40, 2], DType::F32);
    for precision in [Precision::F32, Precision::F16] {
        macro_rules! methods {
            ($way:expr => $($method:expr),* $(,)?) => {$(
                let steps = |ode: Ode| ode.solver($method).span(0.0, 1.0).steps(4).precision(precision);
                are_the_same(&format!("{} {precision:?}", stringify!($method)), &fields, &vars, &y0, $way, steps);
            )*};
        }
        methods!(BUFFERS => Euler, Midpoint, Heun, Ralston, Rk3, Rk4, ThreeEighths, Bosh3, Dopri5, Tsit5);
        // One of the stages does not matter.
        methods!(BUFFERS => Tableau::new("idle", 1, &[&[0.5], &[0.3, 0.2]], &[0.25, 0.0, 0.75]).unwrap());
        methods!(TENSORS => Reversible::new(Rk4), ReversibleHeun);
        // A step as long as the coefficient of λ is one.
        let long = |ode: Ode| ode.solver(Euler).span(0.0, 3.0).steps(3).precision(precision);
        are_the_same("steps of one", &fields, &vars, &y0, BUFFERS, long);
    }
}

#[test]
fn every_way_back() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| wide(vb));
    let y0 = variable(9, &[40, 32], DType::F32);
    for precision in PRECISIONS {
        let steps = |ode: Ode| ode.span(0.0, 1.0).steps(8).precision(precision);
        let same = |what: &str, way: Way, settings: &dyn Fn(Ode) -> Ode| {
            let way = if precision == Precision::F64 { TENSORS } else { way };
            are_the_same(&format!("{what} {precision:?}"), &fields, &vars, &y0, way, |ode| settings(steps(ode)));
        };
        // What is said of fields that are layers of where steps run on buffers, and where not.
        let forwards = [Buffers, Tensors];
        same("one at a time", forwards, &|ode| ode.adjoint(Discrete::default().stage_memory(StageMemory::One)));
        same("checkpoints", BUFFERS, &|ode| ode.adjoint(Discrete::default().schedule(Checkpoints::new(2))));
        let one_at_a_time = Discrete::default().schedule(Checkpoints::new(2)).stage_memory(StageMemory::One);
        same("checkpoints, one at a time", forwards, &|ode| ode.adjoint(one_at_a_time.clone()));
        let kept = Discrete::default().schedule(Checkpoints::new(2).with_stages());
        same("linearisations", TENSORS, &|ode| ode.adjoint(kept.clone()));
        same("all linearisations", TENSORS, &|ode| ode.adjoint(Discrete::default().keep_linearizations()));
        same("increments", BUFFERS, &|ode| ode.adjoint(Discrete::default().codec(Increments8)));
        same("unrolled", TENSORS, &|ode| ode.adjoint(Unrolled));
        same("backsolve", forwards, &|ode| ode.adjoint(Backsolve::default()));
        same("several outputs", BUFFERS, &|ode| ode.save_at(&[0.0, 0.25, 0.5, 1.0]));
        let times = [0.0f32, 1.0].map(|t| Var::new(t, &Device::Cpu).unwrap());
        same("gradients of times", forwards, &|ode| ode.span_tensors(times[0].as_tensor(), times[1].as_tensor()));
        // Steps that are taken again are those of such a pass, too.
        same("gradients of times, checkpoints", forwards, &|ode| {
            let ode = ode.adjoint(Discrete::default().schedule(Checkpoints::new(2)));
            ode.span_tensors(times[0].as_tensor(), times[1].as_tensor())
        });
        let times = times.map(|t| t.as_detached_tensor());
        same("times without gradients", BUFFERS, &|ode| ode.span_tensors(&times[0], &times[1]));
        same("consumed", BUFFERS, &|ode| ode.adjoint(Discrete::default().consume()));
        same("no scale", BUFFERS, &|ode| ode.scaling(AdjointScaling::none()));
        same("a fixed scale", BUFFERS, &|ode| ode.scaling(AdjointScaling::fixed(8.0).unwrap()));
        same("the dynamic scale", BUFFERS, &|ode| ode.scaling(AdjointScaling::dynamic()));
        // Steps that are chosen are fixed on the way back.
        let adaptive = |ode: Ode| ode.solver(Dopri5).span(0.0, 1.0).tolerances(1e-2, 1e-2).precision(precision);
        let backwards = if precision == Precision::F64 { TENSORS } else { [Tensors, Buffers] };
        are_the_same(&format!("adaptive {precision:?}"), &fields, &vars, &y0, backwards, adaptive);
        let recomputed = |ode: Ode| adaptive(ode).tolerances(1e-4, 1e-4).adjoint(Discrete::default().checkpoints(2));
        are_the_same(&format!("adaptive, checkpoints {precision:?}"), &fields, &vars, &y0, backwards, recomputed);
    }
}

#[test]
fn tiles_threads_and_frozen_parameters() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb)).map(ModelField::row_wise);
    let y0 = variable(9, &[150, 2], DType::F32);
    for threads in [1, 2] {
        let steps = |ode: Ode| ode.span(0.0, 1.0).steps(6).tile(32).threads(threads);
        are_the_same(&format!("{threads} threads"), &fields, &vars, &y0, BUFFERS, steps);
    }
    for frozen in ["0.", "1.weight", "bias"] {
        // What stops gradients on purpose is taken as it is.
        let stopped = fields.clone().map(|field| field.freeze(|name| name.contains(frozen)).stops_gradients());
        are_the_same(frozen, &stopped, &vars, &y0, TENSORS, |ode: Ode| ode.span(0.0, 1.0).steps(6));
        let fields = fields.clone().map(|field| field.freeze(|name| name.contains(frozen)));
        are_the_same(frozen, &fields, &vars, &y0, BUFFERS, |ode: Ode| ode.span(0.0, 1.0).steps(6));
    }
}

/// Convolutions with activations between them, summed directly and by minimal filtering, on images of even and odd
/// sides; the last result as it is, or activated.
#[test]
fn convolutions() {
    let _turn = alone();
    for precision in PRECISIONS {
        let steps = |ode: Ode| ode.span(0.0, 1.0).steps(4).precision(precision);
        for (channels, size) in [([3, 5], [7, 9]), ([3, 4], [4, 6]), ([16, 20], [8, 10])] {
            let vars = VarMap::new();
            let fields = of_images(&vars, channels, None);
            let (what, shape) = (format!("{precision:?} {channels:?}"), [5, channels[0], size[0], size[1]]);
            are_the_same(&what, &fields, &vars, &variable(9, &shape, DType::F32), way_in(precision), steps);
        }
        for last in [Activation::Tanh, Activation::Silu, Activation::Sin, Activation::Elu(0.5)] {
            let vars = VarMap::new();
            let fields = of_images(&vars, [3, 5], Some(last));
            let y0 = variable(9, &[5, 3, 7, 5], DType::F32);
            are_the_same(&format!("{precision:?} {last:?}"), &fields, &vars, &y0, way_in(precision), steps);
            let one = |ode: Ode| steps(ode).adjoint(Discrete::default().stage_memory(StageMemory::One));
            let way = if precision == Precision::F64 { TENSORS } else { [Buffers, Tensors] };
            are_the_same(&format!("one at a time {precision:?} {last:?}"), &fields, &vars, &y0, way, one);
            let kept = |ode: Ode| steps(ode).adjoint(Discrete::default().keep_linearizations());
            are_the_same(&format!("kept {precision:?} {last:?}"), &fields, &vars, &y0, TENSORS, kept);
        }
    }
    let vars = VarMap::new();
    let fields = of_images(&vars, [16, 20], None).map(ModelField::row_wise);
    let y0 = variable(9, &[7, 16, 8, 10], DType::F32);
    for threads in [1, 2] {
        let steps = |ode: Ode| ode.span(0.0, 1.0).steps(3).tile(3).threads(threads);
        are_the_same(&format!("{threads} threads"), &fields, &vars, &y0, BUFFERS, steps);
    }
    for frozen in ["0.", "1.weight", "bias"] {
        let fields = fields.clone().map(|field| field.freeze(|name| name.contains(frozen)));
        are_the_same(frozen, &fields, &vars, &y0, BUFFERS, |ode: Ode| ode.span(0.0, 1.0).steps(3));
    }
}

/// Norms before convolutions, between and behind them.
#[test]
fn norms_of_images() {
    let _turn = alone();
    for precision in PRECISIONS {
        let steps = |ode: Ode| ode.span(0.0, 1.0).steps(3).precision(precision);
        for activations in [
            [Activation::Relu, Activation::Identity],
            [Activation::Silu, Activation::Tanh],
            [Activation::Tanh, Activation::Sin],
        ] {
            for (channels, size) in [([3, 6], [7, 5]), ([16, 20], [8, 10])] {
                let vars = VarMap::new();
                let fields = both(&vars, move |vb| block(vb, channels, activations));
                fill(&vars, 1, 0.3);
                let what = format!("{precision:?} {channels:?} {activations:?}");
                let y0 = variable(9, &[5, channels[0], size[0], size[1]], DType::F32);
                are_the_same(&what, &fields, &vars, &y0, way_in(precision), steps);
                let tiles = fields.map(ModelField::row_wise);
                let tiled = |ode: Ode| steps(ode).tile(2).threads(2);
                are_the_same(&format!("{what} in tiles"), &tiles, &vars, &y0, way_in(precision), tiled);
                // The parameters of norms alone.
                let wide =
                    tiles.map(|field| field.keep_f32(|name| ["0.", "2.", "4."].iter().any(|n| name.starts_with(n))));
                are_the_same(&format!("{what} with F32"), &wide, &vars, &y0, way_in(precision), steps);
            }
        }
    }
}

/// Images of other sizes are other rows; what makes fewer pixels than it is given, and what has no image, is no field.
#[test]
fn images_of_many_shapes() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = of_images(&vars, [3, 5], None);
    for shape in [[4, 3, 6, 6], [4, 3, 5, 6], [1, 3, 6, 5], [2, 3, 1, 1]] {
        let y0 = variable(9, &shape, DType::F32);
        are_the_same(&format!("{shape:?}"), &fields, &vars, &y0, BUFFERS, |ode: Ode| ode.span(0.0, 1.0).steps(3));
    }
    let shrinks = |vb: VarBuilder<'static>| Ok(seq().add(conv2d(3, 3, 3, Conv2dConfig::default(), vb)?));
    let vars = VarMap::new();
    for field in both(&vars, shrinks) {
        for shape in [&[4, 3, 6, 6][..], &[3, 6, 6], &[6]] {
            let error = Ode::new(&field).span(0.0, 1.0).steps(2).solve(normal(9, shape, DType::F32)).unwrap_err();
            assert!(matches!(error, OdeError::ShapeChanged { .. } | OdeError::Field { .. }), "{shape:?} {error:?}");
        }
    }
}

/// Layers that no chain takes run as they do in a closure.
#[test]
fn layers_of_every_kind() {
    let _turn = alone();
    let in_time = |vb: VarBuilder<'static>| Mlp::builder(&[3, 20, 3], Activation::Tanh).in_time().build(vb);
    let mixed = |vb: VarBuilder<'static>| {
        let layers = seq().add(linear(3, 20, vb.pp(0))?).add_fn(|x| x.sin()).add(linear(20, 20, vb.pp(1))?);
        Ok(layers.add_timed(concat_linear(20, 3, vb.pp(2))?))
    };
    let steps = |ode: Ode| ode.span(0.0, 0.5).steps(5);
    let y0 = variable(9, &[33, 3], DType::F32);
    let (first, second) = (VarMap::new(), VarMap::new());
    are_the_same("in time", &both(&first, in_time), &first, &y0, BUFFERS, steps);
    are_the_same("mixed", &both(&second, mixed), &second, &y0, TENSORS, steps);
    let gated = |vb: VarBuilder<'static>| {
        let layers = seq().add_timed(concat_squash_linear(3, 20, vb.pp(0))?).add(Activation::Tanh);
        Ok(layers.add_timed(concat_squash_linear(20, 3, vb.pp(1))?))
    };
    let third = VarMap::new();
    are_the_same("gated", &both(&third, gated), &third, &y0, TENSORS, steps);
}

/// Every stage has a time of its own, forwards and back.
#[test]
fn layers_in_time() {
    let _turn = alone();
    for precision in PRECISIONS {
        for sizes in [[2, 24, 2], [24, 40, 24]] {
            let build = move |vb: VarBuilder<'static>| Mlp::builder(&sizes, Activation::Tanh).in_time().build(vb);
            let vars = VarMap::new();
            let (fields, y0) = (both(&vars, build), variable(9, &[40, sizes[0]], DType::F32));
            let steps = |ode: Ode| ode.solver(ThreeEighths).span(0.3, 2.0).steps(5).precision(precision);
            let (way, what) = (way_in(precision), format!("{precision:?} {sizes:?}"));
            are_the_same(&what, &fields, &vars, &y0, way, steps);
            let checkpoints = |ode: Ode| steps(ode).adjoint(Discrete::default().checkpoints(2));
            are_the_same(&format!("{what}, checkpoints"), &fields, &vars, &y0, way, checkpoints);
        }
    }
}

#[test]
fn cotangents_with_gaps_and_states_that_are_views() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| narrow(vb));
    let wide = variable(9, &[2, 40], DType::F32);
    let found = fields.map(|field| {
        let y0 = wide.as_tensor().t().unwrap();
        let last = Ode::new(&field).span(0.0, 1.0).steps(4).solve(&y0).unwrap().last().clone();
        // Its cotangent is one number, broadcast.
        let grads = last.sum_all().unwrap().backward().unwrap();
        [bits(&last), bits(grads.get(&wide).unwrap())]
    });
    assert!(found[0] == found[1]);
}

/// relu(y)·10⁴ overflows in F16 once y > 6.6, beyond all bounds in F32 soon after.
fn growing(vb: VarBuilder) -> candle_core::Result<Sequential> {
    Ok(seq().add(linear_no_bias(2, 4, vb.pp(0))?).add(Activation::Relu).add(linear_no_bias(4, 2, vb.pp(1))?))
}

#[test]
fn what_overflows_is_found_at_the_same_place() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| growing(vb));
    for (gain, precision) in [(60.0, Precision::F16), (1e18, Precision::F32), (1e18, Precision::BF16)] {
        for (name, var) in sorted(&vars) {
            let ones = Tensor::ones(var.shape(), DType::F32, &Device::Cpu).unwrap();
            var.set(&(ones * if name.starts_with('0') { gain } else { 1.0 }).unwrap()).unwrap();
        }
        let y0 = Var::from_tensor(&(normal(3, &[20, 2], DType::F32).abs().unwrap() + 0.1).unwrap()).unwrap();
        for solver in [Tableau::clone(Rk4.tableau().unwrap()), Tableau::clone(Midpoint.tableau().unwrap())] {
            let steps = |field| Ode::new(field).solver(solver.clone()).span(0.0, 0.5).steps(8).precision(precision);
            let errors = fields.each_ref().map(|field| steps(field).solve(y0.as_tensor()).unwrap_err());
            let [OdeError::Overflow { place, .. }, OdeError::Overflow { place: expected, .. }] = &errors else {
                panic!("{errors:?}")
            };
            assert_eq!(place, expected);
            assert!(place.stage > 0 || place.step > 0, "{place}");
            if precision.compute_dtype() == DType::F16 {
                let retried = |ode: Ode| {
                    let ode = ode.solver(solver.clone()).span(0.0, 0.05).steps(3).precision(precision);
                    ode.on_overflow(OnOverflow::Retry)
                };
                // What has overflown is looked at on tensors, and goes on from there in F32.
                are_the_same("retried", &fields, &vars, &y0, [Both, Buffers], retried);
            }
        }
    }
}

/// Backwards F16 overflows with a scale that is too large: a pass is done again, with the steps at fault in F32.
#[test]
fn pullbacks_that_overflow_are_done_again_in_the_same_way() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| wide(vb));
    let y0 = variable(9, &[40, 32], DType::F32);
    let steps = |ode: Ode| {
        let scaling = AdjointScaling::fixed(2f64.powi(18)).unwrap();
        ode.span(0.0, 1.0).steps(7).precision(Precision::F16).scaling(scaling)
    };
    are_the_same("overflowing", &fields, &vars, &y0, BUFFERS, steps);
    let solution = steps(Ode::new(&fields[0])).solve(y0.as_tensor()).unwrap();
    solution.last().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(solution.stats().redone_passes > 0);
}

/// Near the largest number of F32 a cotangent may be finite in half precision, times its scale, and not without it.
#[test]
fn cotangents_near_the_largest_number_overflow_at_the_same_place() {
    let _turn = alone();
    let vars = VarMap::new();
    let fields = both(&vars, |vb| growing(vb));
    for (_, var) in sorted(&vars) {
        var.set(&Tensor::full(4f32, var.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    let y0 = Var::from_tensor(&Tensor::full(1e-3f32, (20, 2), &Device::Cpu).unwrap()).unwrap();
    let mut overflows = 0;
    for precision in [Precision::F32, Precision::F16, Precision::BF16] {
        for exponent in [30, 34, 35, 36, 37, 38] {
            let found = fields.each_ref().map(|field| {
                let ode = Ode::new(field).span(0.0, 0.05).steps(3).precision(precision);
                let loss = (ode.solve(y0.as_tensor()).unwrap().last() * 10f64.powi(exponent)).unwrap();
                let grads = loss.sum_all().unwrap().backward();
                grads.map(|grads| bits(grads.get(&y0).unwrap())).map_err(|error| error.to_string())
            });
            overflows += usize::from(found[0].is_err());
            assert!(
                found[0] == found[1],
                "{precision:?} 1e{exponent}: {:?}, {:?}",
                found[0].is_err(),
                found[1].is_err()
            );
        }
    }
    assert!((1..18).contains(&overflows), "{overflows}");
}
