//! Every failure is an error of its own, with its values, and leaves the parameters as they were.
#![allow(missing_docs)]

mod common;

use candle_core::{Context, DType, Device, DeviceLocation, Shape, Tensor, Var};
use candle_nn::{Init, ModuleT, VarMap};
use candle_ode::field::ops::combine::Finite;
use candle_ode::prelude::*;
use candle_ode::{Codec, Encodes, Entry, Followed, Increment, Increments8, PassKind, Place, States};
use common::*;
use std::sync::atomic::{AtomicUsize, Ordering};

const CPU: Device = Device::Cpu;

fn decay() -> FnField {
    FnField::new(|_, y| y.neg())
}

fn ones() -> Tensor {
    Tensor::ones((2, 3), DType::F32, &CPU).unwrap()
}

/// What solving from `y0` over four steps of [0, 1] says.
fn fails(field: &(impl Field + Clone), y0: impl Into<State>) -> OdeError {
    Ode::new(field).span(0.0, 1.0).steps(4).solve(y0).expect_err("the solve should have failed")
}

/// Asserts the variant and its values, and that the error survives as one of Candle's, whatever is wrapped around it.
macro_rules! says {
    ($error:expr, $pattern:pat $(if $guard:expr)? $(,)?) => {{
        let error: OdeError = $error;
        let text = error.to_string();
        assert!(matches!(&error, $pattern $(if $guard)?), "{text}");
        let error = OdeError::from(candle_core::Error::from(error));
        assert!(matches!(&error, $pattern $(if $guard)?), "through Candle: {error}");
        let error = OdeError::from(candle_core::Error::from(error).context("outer").with_path("a/file").bt());
        assert!(matches!(&error, $pattern $(if $guard)?), "through contexts: {error}");
        assert_eq!(error.to_string(), text);
    }};
}

#[test]
fn of_a_y0_that_is_not_finite() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let y0 = Tensor::new(&[[1f32, 2.0], [bad, 3.0]], &CPU).unwrap();
        let same = |value: f64| value == f64::from(bad) || value.is_nan() && bad.is_nan();
        says!(fails(&decay(), &y0), OdeError::NonFiniteState { tensor: 0, index: 2, value } if same(*value));
        // The index is that of the view.
        let (half, view) = (y0.to_dtype(DType::F16).unwrap(), y0.t().unwrap());
        let state = State::from([ones(), half]);
        let both = FnField::with_state(|_, y| y.try_map(Tensor::neg));
        says!(fails(&both, state), OdeError::NonFiniteState { tensor: 1, index: 2, value } if same(*value));
        says!(fails(&decay(), &view), OdeError::NonFiniteState { tensor: 0, index: 1, value } if same(*value));
    }
}

#[test]
fn of_a_parameter_or_input_that_is_not_finite() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 3, 4);
    let bias = Tensor::new(&[0f32, 1.0, f32::NAN, f32::INFINITY], &CPU).unwrap();
    sorted(&vars)["in.bias"].set(&bias).unwrap();
    let before = snapshot(&vars);
    says!(
        fails(&field, ones()),
        OdeError::NonFiniteParameter { name, index: 2, value } if name == "in.bias" && value.is_nan(),
    );
    assert_eq!(snapshot(&vars), before);
    let scaled = FnField::with_inputs(|_, y, inputs| Ok(State::from(y[0].broadcast_mul(&inputs[1])?)));
    let inputs = [ones(), Tensor::new(&[1f32, f32::INFINITY, 0.0], &CPU).unwrap()];
    says!(
        Ode::new(&scaled).span(0.0, 1.0).steps(4).inputs(&inputs).solve(ones()).unwrap_err(),
        OdeError::NonFiniteParameter { name, index: 1, .. } if name == "input 1",
    );
}

#[test]
fn of_a_parameter_or_input_that_its_cast_cannot_hold() {
    let vars = VarMap::new();
    let field = mlp_field(&vars, DType::F32, 3, 4);
    let bias = Tensor::new(&[0f32, 1.0, -1e5, 3.0], &CPU).unwrap();
    sorted(&vars)["in.bias"].set(&bias).unwrap();
    let solve = |precision| Ode::new(&field).span(0.0, 1.0).steps(4).precision(precision).solve(ones());
    says!(
        solve(Precision::F16).unwrap_err(),
        OdeError::CastOverflow { name, index: 2, value: -1e5, dtype: DType::F16, largest: 65504.0 } if name == "in.bias",
    );
    assert!(solve(Precision::BF16).is_ok());
    let scaled = FnField::with_inputs(|_, y, inputs| Ok(State::from(y[0].broadcast_mul(&inputs[0])?)));
    let inputs = [Tensor::new(&[1f32, 7e4, 0.0], &CPU).unwrap()];
    says!(
        Ode::new(&scaled).span(0.0, 1.0).steps(4).precision(Precision::F16).inputs(&inputs).solve(ones()).unwrap_err(),
        OdeError::CastOverflow { name, index: 1, value: 7e4, .. } if name == "input 0",
    );
}

#[test]
fn of_times_that_make_no_grid() {
    let ode = || Ode::new(&decay());
    let solve = |ode: Ode| ode.solve(ones()).unwrap_err();
    let nan = f64::NAN;
    says!(solve(ode().span(0.0, 1.0)), OdeError::NoSteps);
    says!(solve(ode().span(0.0, 1.0).steps(0)), OdeError::NoSteps);
    says!(solve(ode().grid(&[])), OdeError::NoSteps);
    says!(solve(ode().grid(&[0.5])), OdeError::NoSteps);
    says!(solve(ode().steps(3)), OdeError::Setting { setting: "span", .. });
    says!(solve(ode().span(0.5, 0.5).steps(3)), OdeError::EmptySpan { time } if *time == 0.5);
    says!(solve(ode().grid(&[2.0, 2.0])), OdeError::EmptySpan { time } if *time == 2.0);
    says!(solve(ode().grid(&[0.0, 0.5, 0.4, 1.0])),
        OdeError::UnsortedTimes { index: 2, before, value } if (*before, *value) == (0.5, 0.4));
    says!(solve(ode().grid(&[1.0, 0.5, 0.5, 0.0])), OdeError::UnsortedTimes { index: 2, .. });
    says!(solve(ode().grid(&[0.0, 1.0, 0.0])), OdeError::UnsortedTimes { .. });
    says!(solve(ode().span(nan, 1.0).steps(3)), OdeError::NonFiniteTime { index: 0, value } if value.is_nan());
    says!(solve(ode().span(0.0, f64::INFINITY).steps(3)), OdeError::NonFiniteTime { index: 1, .. });
    says!(solve(ode().grid(&[0.0, 0.5, nan, 1.0])), OdeError::NonFiniteTime { index: 2, value } if value.is_nan());
    says!(solve(ode().span(0.0, 1.0).steps(4).save_at(&[0.5, nan])), OdeError::NonFiniteTime { index: 1, .. });
    says!(solve(ode().span(0.0, 1.0).steps(4).save_at(&[0.5, 0.6])),
        OdeError::OutputOffGrid { time, nearest } if (*time, *nearest) == (0.6, 0.5));
    says!(solve(ode().span(0.0, 1.0).steps(4).save_at(&[2.0])), OdeError::OutputOffGrid { .. });
    says!(solve(ode().span(1.0, 0.0).steps(4).save_at(&[0.4])),
        OdeError::OutputOffGrid { time, nearest } if (*time, *nearest) == (0.4, 0.5));
}

#[test]
fn of_discontinuities_that_no_step_ends_at() {
    let fixed = Ode::new(&decay()).solver(Dopri5).span(0.0, 1.0).steps(4);
    let adaptive = Ode::new(&decay()).solver(Dopri5).span(0.0, 1.0).tolerances(1e-3, 1e-3);
    says!(fixed.clone().discontinuities(&[0.5, 0.3]).solve(ones()).unwrap_err(),
        OdeError::Setting { setting: "discontinuities", value, .. } if value.contains("0.3") && value.contains("0.25"));
    for ode in [fixed, adaptive] {
        says!(
            ode.clone().discontinuities(&[0.5, f64::NAN]).solve(ones()).unwrap_err(),
            OdeError::NonFiniteTime { index: 1, .. }
        );
        // What lies outside of the span does not matter.
        assert!(ode.discontinuities(&[-1.0, 0.5, 1.3]).solve(ones()).is_ok());
    }
}

#[test]
fn of_more_steps_back_than_fit_into_memory() {
    let y0 = Var::from_tensor(&ones()).unwrap();
    for substeps in [usize::MAX, usize::MAX / 8, 1 << 61] {
        let ode = Ode::new(&decay()).span(0.0, 1.0).steps(4).adjoint(Backsolve::default().substeps(substeps));
        says!(ode.solve(y0.as_tensor()).unwrap_err(),
            OdeError::Setting { setting: "Backsolve::substeps", value, .. } if *value == substeps.to_string());
    }
}

#[test]
fn of_a_budget_for_what_cannot_be_planned() {
    let y0 = Var::from_tensor(&ones()).unwrap();
    let ode = || Ode::new(&decay()).solver(Dopri5).span(0.0, 1.0).adjoint(Discrete::default().budget(1 << 20));
    for (ode, of) in [
        (ode().tolerances(1e-3, 1e-3), "adaptive steps"),
        (ode().steps(4).dense(), "dense output"),
        (ode().steps(4).save_at(&[0.3]).interpolate(), "dense output"),
    ] {
        says!(ode.solve(y0.as_tensor()).unwrap_err(), OdeError::Unsupported { what, instead }
            if what.contains("1048576 bytes") && what.contains(of) && instead.contains(".checkpoints("));
        // What it says to do can be done.
        assert!(ode.adjoint(Discrete::default().checkpoints(2)).solve(y0.as_tensor()).is_ok());
    }
}

/// Gives every tensor back transposed.
#[derive(Debug)]
struct Transposed;

impl Codec for Transposed {
    fn encode(&self, state: &State) -> Result<(Entry, Finite), OdeError> {
        Ok((Entry::new(state.tensors().to_vec(), state), Finite::default()))
    }

    fn decode(&self, entry: &Entry, _: DType) -> Result<State, OdeError> {
        Ok(State::from(entry.tensors.clone()).try_map(Tensor::t)?)
    }

    fn bytes(&self, shapes: &[Shape]) -> usize {
        States(DType::F32).bytes(shapes)
    }

    fn dtype(&self) -> DType {
        DType::F32
    }
}

#[test]
fn of_a_codec_that_decodes_another_shape() {
    let y0 = Var::from_tensor(&ones()).unwrap();
    let ode = Ode::new(&decay()).span(0.0, 1.0).steps(4).adjoint(Discrete::default().codec(Transposed));
    let loss = ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap();
    says!(OdeError::from(loss.backward().unwrap_err()), OdeError::Unsupported { what, instead }
        if what.contains("[[3, 2]]") && what.contains("[[2, 3]]") && instead.contains("Codec::decode"));
}

/// Increments in 8 bits that lead elsewhere.
#[derive(Debug)]
struct Misled(fn(&mut Followed));

impl Codec for Misled {
    fn encodes(&self) -> Encodes {
        Encodes::Increments
    }

    fn encode(&self, increment: &State) -> Result<(Entry, Finite), OdeError> {
        Increments8.encode(increment)
    }

    fn decode(&self, entry: &Entry, dtype: DType) -> Result<State, OdeError> {
        Increments8.decode(entry, dtype)
    }

    fn follow(&self, step: &Increment<'_>) -> Result<Followed, OdeError> {
        let mut followed = Increments8.follow(step)?;
        (self.0)(&mut followed);
        Ok(followed)
    }

    fn bytes(&self, shapes: &[Shape]) -> usize {
        Increments8.bytes(shapes)
    }

    fn dtype(&self) -> DType {
        DType::U8
    }
}

#[test]
fn of_a_codec_that_follows_increments_elsewhere() {
    let field = FnField::with_state(|_, y| y.try_map(Tensor::neg));
    let y0 = State::from([Var::from_tensor(&ones()).unwrap().as_tensor().clone(), ones()]);
    let solve = |misled: fn(&mut Followed)| {
        let ode = Ode::new(&field).span(0.0, 1.0).steps(4).adjoint(Discrete::default().codec(Misled(misled)));
        ode.solve(&y0)
    };
    assert!(solve(|_| {}).is_ok());
    let fewer = |state: &State| State::from(state[0].clone());
    macro_rules! elsewhere {
        ($word:literal, $misled:expr) => {
            says!(solve($misled).unwrap_err(), OdeError::Unsupported { what, instead }
                if what.contains($word) && instead.contains("Codec::follow"));
        };
    }
    elsewhere!("next", |led| led.next = State::from(led.next[0].clone()));
    elsewhere!("residual", |led| led.residual = State::from(led.residual[0].clone()));
    elsewhere!("F64", |led| led.next = led.next.try_map(|x| x.to_dtype(DType::F64)).unwrap());
    elsewhere!("[[6], [6]]", |led| led.residual = led.residual.try_map(Tensor::flatten_all).unwrap());
    says!(solve(|led| drop(led.entry.shapes.pop())).unwrap_err(), OdeError::Unsupported { what, instead }
        if what.contains("an entry of [[2, 3]]") && instead.contains("Entry::new"));

    // Whoever asks for the next state by himself is told as well.
    let (two, one) = (y0.clone(), fewer(&y0));
    let flat = two.try_map(Tensor::flatten_all).unwrap();
    for (before, after, residual) in
        [(&two, &one, None), (&one, &two, None), (&two, &two, Some(&one)), (&two, &flat, None)]
    {
        let step = Increment { before, after, residual, dtype: DType::F32 };
        let wrong = |error: OdeError| {
            says!(error, OdeError::Unsupported { what, instead }
                if what.contains("an increment of shapes") && instead.contains("the same shapes"));
        };
        wrong(step.sum().unwrap_err());
        wrong(Increments8.follow(&step).unwrap_err());
    }
}

#[test]
fn of_dtypes_that_cannot_be() {
    let integers = Tensor::new(&[1i64, 2], &CPU).unwrap();
    says!(fails(&decay(), &integers),
        OdeError::UnsupportedDType { what, dtype: DType::I64, .. } if what == "tensor 0 of y0");
    let ode = Ode::new(&decay()).span(0.0, 1.0).steps(4);
    let with = |precision| ode.clone().precision(precision).solve(ones()).unwrap_err();
    let new = Precision::new;
    says!(with(new().accumulate(DType::F16)), OdeError::UnsupportedDType { what, dtype: DType::F16, .. }
        if what == "the accumulate dtype");
    says!(with(new().compute(DType::F64)), OdeError::UnsupportedDType { dtype: DType::F32, .. });
    says!(with(new().compute(DType::U8)), OdeError::UnsupportedDType { what, dtype: DType::U8, .. }
        if what == "the compute dtype");
    says!(with(new().storage(DType::I64)), OdeError::UnsupportedDType { what, dtype: DType::I64, .. }
        if what == "the storage dtype");
    says!(ode.clone().inputs(&[integers]).solve(ones()).unwrap_err(),
        OdeError::UnsupportedDType { what, dtype: DType::I64, .. } if what == "input 0");
}

/// Candle's second devices are GPUs, so a solve over two devices cannot be set up on a CPU: what can be tested here is
/// that the error names both and survives Candle.
#[test]
fn of_tensors_on_different_devices() {
    let found = DeviceLocation::Cuda { gpu_id: 1 };
    let error = OdeError::DeviceMismatch { what: "parameter `w`".into(), expected: DeviceLocation::Cpu, found };
    assert!(error.to_string().contains("parameter `w` is on Cuda { gpu_id: 1 }, the solve runs on Cpu"), "{error}");
    says!(error, OdeError::DeviceMismatch { what, expected: DeviceLocation::Cpu, found }
        if what == "parameter `w`" && *found == DeviceLocation::Cuda { gpu_id: 1 });
}

#[test]
fn of_states_without_elements() {
    let empty = Tensor::zeros((0, 3), DType::F32, &CPU).unwrap();
    says!(fails(&decay(), State::from([ones(), empty])),
        OdeError::EmptyState { tensor: 1, shape } if *shape == Shape::from((0, 3)));
    says!(fails(&decay(), State::from(vec![])), OdeError::Setting { setting: "y0", .. });
}

/// The third evaluation of a step of four (the midpoint of step 2), in F32.
fn is_late(place: &Place) -> bool {
    *place == Place { step: 2, stage: 1, time: 0.625, dtype: DType::F32 }
}

/// Before t = 0.6 a decay, from there on what `then` makes of y.
fn later(then: impl Fn(&Tensor) -> candle_core::Result<State> + Send + Sync + 'static) -> FnField {
    FnField::with_state(move |t, y| if t.value() < 0.6 { Ok(State::from(y[0].neg()?)) } else { then(&y[0]) })
}

#[test]
fn of_a_field_that_returns_something_else() {
    says!(fails(&later(|y| Ok(State::from(y.sum_keepdim(1)?))), ones()),
        OdeError::ShapeChanged { tensor: 0, expected, found, place }
        if is_late(place) && expected.dims() == [2, 3] && found.dims() == [2, 1]);
    says!(fails(&later(|y| Ok(State::from(y.to_dtype(DType::F64)?))), ones()),
        OdeError::DTypeChanged { tensor: 0, expected: DType::F32, found: DType::F64, place } if is_late(place));
    says!(fails(&later(|y| Ok(State::from([y.clone(), y.clone()]))), ones()),
        OdeError::StateLength { expected: 1, found: 2, place } if is_late(place));
    says!(fails(&later(|_| Ok(State::from(vec![]))), ones()),
        OdeError::StateLength { expected: 1, found: 0, place } if is_late(place));
    let two = FnField::new(|_, y| y.neg());
    says!(fails(&two, State::from([ones(), ones()])), OdeError::Unsupported { .. });
}

#[test]
fn of_a_field_that_fails() {
    says!(fails(&later(|_| candle_core::bail!("out of cheese")), ones()),
        OdeError::Field { place, source } if is_late(place) && source.to_string().contains("out of cheese"));
    // Ours stay what they are, also under a context.
    says!(fails(&later(|_| Err(OdeError::NoSteps).context("while solving inside")?), ones()), OdeError::NoSteps);
    // And so in the backward pass: this field fails once the forward pass is over.
    let count = std::sync::Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let field = FnField::new(move |_, y| match seen.fetch_add(1, Ordering::Relaxed) {
        0..6 => y.neg(),
        n => candle_core::bail!("evaluation {n}"),
    });
    // The look at the pullback before the first linearisation, which takes no failure for an answer, would count too.
    let field = field.stops_gradients();
    let y0 = Var::from_tensor(&ones()).unwrap();
    let solution = Ode::new(&field).solver(Euler).span(0.0, 1.0).steps(4).solve(y0.as_tensor()).unwrap();
    let error = solution.last().sum_all().unwrap().backward().unwrap_err();
    says!(OdeError::from(error), OdeError::Field { place, source }
        if (place.step, place.stage, place.time) == (3, 0, 0.75) && source.to_string().contains("evaluation 6"));
    assert_eq!(count.load(Ordering::Relaxed), 7);
}

#[test]
fn of_a_model_that_cannot_be_built() {
    let vars = VarMap::new();
    let built = AtomicUsize::new(0);
    let build = move |vb: candle_nn::VarBuilder<'static>| match built.fetch_add(1, Ordering::Relaxed) {
        0 => vb.get(3, "first"),
        _ => vb.get(3, "second"),
    };
    let field = ModelField::new(&vars, &CPU, build, |p: &Tensor, _: &Time, y| y.broadcast_mul(p)).unwrap();
    says!(fails(&field, ones()), OdeError::Build { dtype: DType::F32, source }
        if source.to_string().contains("`second`"));
    let refused = ModelField::new(&vars, &CPU, |vb| vb.get(4, "first"), |_, _: &Time, y| y.neg());
    says!(refused.err().unwrap(), OdeError::Build { dtype: DType::F32, .. });
}

#[test]
fn of_a_random_field() {
    let noise = FnField::new(|_, y| y + Tensor::randn(0f32, 1.0, y.shape(), y.device())?);
    says!(fails(&noise, ones()), OdeError::NotDeterministic { time, tensor: 0, index: 0, first, second }
        if *time == 0.0 && first != second);
    let checked = Ode::new(&noise).span(0.0, 1.0).steps(4).check_determinism(false).solve(ones());
    assert_eq!(checked.unwrap().stats().determinism_checks, 0);
}

#[test]
fn of_a_model_built_at_random() {
    let vars = VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'static>| Ok((vb.get(3, "p")?, Tensor::randn(0f32, 1.0, 3, &CPU)?));
    let eval = |(p, noise): &(Tensor, Tensor), _: &Time, y: &Tensor| y.broadcast_mul(&(p + noise)?);
    let field = ModelField::new(&vars, &CPU, build, eval).unwrap();
    says!(fails(&field, ones()), OdeError::NotDeterministic { .. });
}

#[test]
fn of_a_captured_tensor() {
    let w = Var::new(&[1f32, 2.0, 3.0], &CPU).unwrap();
    for captured in [w.as_tensor().clone(), w.sqr().unwrap()] {
        for from in [0.0, 0.6] {
            let captured = captured.clone();
            let field = FnField::new(move |t: &Time, y: &Tensor| match t.value() < from {
                true => y.neg(),
                false => y.broadcast_mul(&captured),
            });
            says!(fails(&field, ones()), OdeError::Captured { shape, dtype: DType::F32 } if shape.dims() == [3]);
            let unchecked = Ode::new(&field).span(0.0, 1.0).steps(4).check_determinism(false);
            says!(unchecked.solve(ones()).unwrap_err(), OdeError::Captured { .. });
        }
        // Detached, it is a constant.
        let constant = captured.detach();
        let field = FnField::new(move |_, y: &Tensor| y.broadcast_mul(&constant));
        assert!(Ode::new(&field).span(0.0, 1.0).steps(4).solve(ones()).is_ok());
    }
    // Late in the first solve of a model, too.
    let vars = VarMap::new();
    let eval = move |p: &Tensor, t: &Time, y: &Tensor| y.broadcast_mul(if t.value() < 0.6 { p } else { w.as_tensor() });
    let field = ModelField::new(&vars, &CPU, |vb| vb.get(3, "p"), eval).unwrap();
    says!(fails(&field, ones()), OdeError::Captured { .. });
    // A model that captures one of its own masters behind the VarBuilder's back.
    let vars = VarMap::new();
    let master = vars.get(3, "p", Init::Const(0.5), DType::F32, &CPU).unwrap();
    let eval = move |p: &Tensor, _: &Time, y: &Tensor| y.broadcast_mul(&(p + &master)?);
    let field = ModelField::new(&vars, &CPU, |vb| vb.get(3, "p"), eval).unwrap();
    says!(fails(&field, ones()), OdeError::Captured { .. });
    says!(fails(&field, ones()), OdeError::Captured { .. });
}

#[test]
fn of_a_model_that_writes_to_its_parameters() {
    let normed = |train: bool| {
        let vars = VarMap::new();
        let build = |vb: candle_nn::VarBuilder<'static>| candle_nn::batch_norm(3, 1e-5, vb);
        let field = ModelField::new(&vars, &CPU, build, move |norm, _: &Time, y| norm.forward_t(y, train)).unwrap();
        (vars, field)
    };
    let y0 = Var::from_tensor(&normal(1, &[4, 3], DType::F32)).unwrap();
    for precision in [Precision::F32, Precision::F64] {
        for adjoint in [Adjoint::from(Discrete::default()), Unrolled.into()] {
            let (vars, field) = normed(true);
            let before = snapshot(&vars);
            let ode = Ode::new(&field).span(0.0, 1.0).steps(4).precision(precision).adjoint(adjoint);
            // However often it is tried, and whatever is switched off.
            for ode in [ode.clone(), ode.clone(), ode.check_determinism(false)] {
                says!(ode.solve(y0.as_tensor()).unwrap_err(), OdeError::ParameterChanged { name }
                    if name.starts_with("running_"));
                assert_eq!(snapshot(&vars), before);
            }
        }
    }
    let (vars, field) = normed(false);
    let before = snapshot(&vars);
    let solution = Ode::new(&field).span(0.0, 1.0).steps(4).solve(y0.as_tensor()).unwrap();
    solution.last().sum_all().unwrap().backward().unwrap();
    assert_eq!(snapshot(&vars), before);
}

/// A field over rows of three.
fn over_rows(f: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static) -> FnField {
    FnField::new(move |_, y| f(y, &Tensor::ones(3, y.dtype(), y.device())?))
}

#[test]
fn of_ops_that_cut_the_graph_without_a_word() {
    use candle_nn::ops::{layer_norm, rms_norm, softmax_last_dim};
    for field in [
        over_rows(|y, _| softmax_last_dim(y)),
        over_rows(|y, one| layer_norm(y, one, &one.zeros_like()?, 1e-5)? * 0.5),
        over_rows(|y, one| rms_norm(&y.tanh()?, one, 1e-5)),
    ] {
        let y0 = Var::from_tensor(&normal(1, &[4, 3], DType::F32)).unwrap();
        let solution = Ode::new(&field).span(0.0, 1.0).steps(4).solve(y0.as_tensor()).unwrap();
        let loss = solution.last().sum_all().unwrap();
        let cut = |error| {
            says!(error, OdeError::NoBackward { op, instead } if op.contains("tensor 0 of the state")
                && instead.contains("candle_ode::ops::softmax") && instead.contains("candle_ode::ops::layer_norm"));
        };
        cut(OdeError::from(loss.backward().unwrap_err()));
        // `.context` on a result, as applications write it.
        cut(OdeError::from(loss.backward().context("training step 7").unwrap_err()));
    }
    // A way around the cut hides nothing of the parameters behind it.
    let vars = VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'static>| candle_nn::linear(3, 3, vb);
    let eval = |m: &candle_nn::Linear, _: &Time, y: &Tensor| y + softmax_last_dim(&m.forward_t(y, true)?)?;
    let field = ModelField::new(&vars, &CPU, build, eval).unwrap();
    fill(&vars, 3, 1.0);
    for _ in 0..2 {
        let solution = Ode::new(&field).span(0.0, 1.0).steps(4).solve(ones()).unwrap();
        let error = OdeError::from(solution.last().sum_all().unwrap().backward().unwrap_err());
        says!(error, OdeError::NoBackward { op, .. }
            if op.contains("tensor 0 of the state or `bias` or `weight`"));
    }
    // A parameter of a later layer is tracked all the same: it hides nothing.
    let vars = VarMap::new();
    let build = |vb: candle_nn::VarBuilder<'static>| candle_nn::linear(3, 3, vb);
    let eval = |m: &candle_nn::Linear, _: &Time, y: &Tensor| m.forward_t(&softmax_last_dim(y)?, true);
    let field = ModelField::new(&vars, &CPU, build, eval).unwrap();
    let solution = Ode::new(&field).span(0.0, 1.0).steps(4).solve(ones()).unwrap();
    says!(OdeError::from(solution.last().sum_all().unwrap().backward().unwrap_err()), OdeError::NoBackward { .. });
    // A field that does not depend on the state is no error.
    let clock = FnField::new(|t: &Time, y| y.zeros_like()?.broadcast_add(&t.like(y)?));
    let y0 = Var::from_tensor(&ones()).unwrap();
    let solution = Ode::new(&clock).span(0.0, 1.0).steps(4).solve(y0.as_tensor()).unwrap();
    let grads = solution.last().sum_all().unwrap().backward().unwrap();
    assert!(values(grads.get(&y0).unwrap()).iter().all(|g| *g == 1.0));
}

/// y + s(y) reaches y in spite of the cut, and has a gradient: the wrong one.
#[test]
fn of_ops_that_cut_the_graph_beside_a_way_around_them() {
    use candle_nn::ops::{layer_norm, rms_norm, softmax_last_dim};
    for precision in [Precision::F64, Precision::F32, Precision::BF16, Precision::F16] {
        let fused = [
            over_rows(|y, _| y.neg()? + softmax_last_dim(y)?),
            over_rows(|y, _| y * softmax_last_dim(y)?),
            over_rows(|y, one| y + layer_norm(y, one, &one.zeros_like()?, 1e-5)?),
            over_rows(|y, one| y.sqr()? + rms_norm(y, one, 1e-5)?),
        ];
        // Candle's fused norms do not run in F64, and are looked at in F32.
        let runs = if precision == Precision::F64 { 2 } else { fused.len() };
        for field in fused.into_iter().take(runs).chain([over_rows(|y, _| y + y.detach().sin()?)]) {
            // From a point at which much is zero, and from one at which nothing is.
            for y0 in [Tensor::zeros((4, 3), DType::F32, &CPU).unwrap(), normal(1, &[4, 3], DType::F32)] {
                let y0 = Var::from_tensor(&y0).unwrap();
                let solve = |field: &FnField| {
                    let ode = Ode::new(field).span(0.0, 0.1).steps(2).precision(precision);
                    ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward()
                };
                let error = OdeError::from(solve(&field).expect_err("a wrong gradient has been handed out"));
                says!(error, OdeError::NoBackward { op, .. } if op.contains("tensor 0 of the state"));
                // Whoever means it says so.
                solve(&field.clone().stops_gradients()).unwrap();
            }
        }
    }
}

/// Kinks, flat pieces, gates, products of zeros: whatever has a right gradient is let through, wherever it starts.
#[test]
fn of_no_op_whose_gradient_is_right() {
    let dims = [4, 6];
    for precision in [Precision::F64, Precision::F32, Precision::BF16, Precision::F16] {
        for (name, field) in [
            ("relu", FnField::new(|_, y| y.relu())),
            ("abs", FnField::new(|_, y| y.abs()? + 1.0)),
            ("gelu", FnField::new(|_, y| y.gelu()? + y.gelu_erf()?)),
            ("silu", FnField::new(|_, y| y.silu()? * y.tanh()?)),
            ("stiff", FnField::new(|_, y| y.sin()? * -1e3)),
            ("clamp", FnField::new(|_, y| y.clamp(-0.5, 0.5))),
            ("cubic", FnField::new(|_, y| y.powf(3.0)?.neg())),
            ("mask", FnField::new(|_, y| y.gt(&y.zeros_like()?)?.where_cond(y, &(y * 0.1)?))),
            ("roots", FnField::new(|_, y| (y.sqr()? + 1e-3)?.sqrt())),
            ("max", FnField::new(|_, y| y.broadcast_sub(&y.max_keepdim(1)?))),
            ("time", FnField::new(|t, y| y.broadcast_mul(&t.like(y)?)?.cos())),
            ("constant", FnField::new(|_, y| y.ones_like())),
            ("norm", FnField::new(|_, y| candle_ode::ops::softmax(y, 1))),
            ("pair", FnField::new(|_, y| Tensor::cat(&[y.narrow(1, 3, 3)?, y.narrow(1, 0, 3)?.neg()?], 1))),
        ] {
            let start = |x: f64| Tensor::full(x as f32, &dims, &CPU).unwrap();
            for y0 in [start(0.0), start(0.5), start(30.0), normal(3, &dims, DType::F32)] {
                let y0 = Var::from_tensor(&y0).unwrap();
                let ode = Ode::new(&field).span(0.0, 1e-3).steps(1).precision(precision);
                let loss = ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap();
                let told = loss.backward().map(|_| ());
                assert!(told.is_ok(), "{name} in {:?}: {told:?}", precision.compute_dtype());
            }
        }
    }
}

/// Where f changes by few ulp, or by less than its parts are rounded by, nothing is known against its graph.
#[test]
fn of_no_op_that_is_saturated() {
    type Op = fn(&Tensor) -> candle_core::Result<Tensor>;
    let saturated: [(&str, Op); 5] = [
        ("tanh", Tensor::tanh),
        ("sigmoid", candle_ode::ops::sigmoid),
        ("gelu", Tensor::gelu_erf),
        ("gauss", |y| y.sqr()?.neg()?.exp()),
        ("silu", Tensor::silu),
    ];
    for (name, f) in saturated {
        for dtype in [DType::F64, DType::F32] {
            for y0 in (-600..=600).map(|n| f64::from(n) * 0.05) {
                let y0 = Var::from_tensor(&Tensor::full(y0, (1, 1), &CPU).unwrap().to_dtype(dtype).unwrap()).unwrap();
                let ode = Ode::new(&FnField::new(move |_, y| f(y))).solver(Euler).span(0.0, 0.1).steps(1);
                let told = ode.solve(y0.as_tensor()).unwrap().last().sum_all().unwrap().backward().map(|_| ());
                assert!(told.is_ok(), "{name} in {dtype:?} at {y0}: {told:?}");
            }
        }
    }
    // A cut is a cut, even if rounding hides how f changes.
    let field = over_rows(|y, one| candle_nn::ops::layer_norm(y, one, &one.zeros_like()?, 1e-5));
    let y0 = Var::from_tensor(&(normal(1, &[4, 3], DType::F32) * 1e6).unwrap()).unwrap();
    let loss = Ode::new(&field).span(0.0, 1.0).steps(4).solve(y0.as_tensor()).unwrap().last().sum_all().unwrap();
    says!(OdeError::from(loss.backward().unwrap_err()), OdeError::NoBackward { .. });
}

#[test]
fn of_ops_without_a_backward_pass() {
    let ceiling = over_rows(|y, _| y.ceil());
    let upsampled = over_rows(|y, _| {
        let square = y.reshape((1, 1, 4, 3))?;
        square.upsample_bilinear2d(4, 3, false)?.reshape((4, 3))
    });
    for field in [ceiling, upsampled] {
        let y0 = Var::from_tensor(&normal(1, &[4, 3], DType::F32)).unwrap();
        let solution = Ode::new(&field).span(0.0, 1.0).steps(4).solve(y0.as_tensor()).unwrap();
        let loss = solution.last().sum_all().unwrap();
        says!(OdeError::from(loss.backward().unwrap_err()), OdeError::NoBackward { op, .. } if !op.is_empty());
    }
}

#[test]
fn of_a_tableau_that_contradicts_itself() {
    let tableau = |order, rows: &[&[f64]], b: &[f64]| Tableau::new("mine", order, rows, b).unwrap_err();
    says!(tableau(2, &[&[0.5]], &[0.5, 0.6]), OdeError::Tableau { name, reason }
        if name == "mine" && reason.contains("Σ b = 1.1"));
    says!(tableau(2, &[&[0.5, 0.5]], &[0.0, 1.0]), OdeError::Tableau { reason, .. } if reason.contains("stage 1"));
    says!(tableau(2, &[], &[0.5, 0.5]), OdeError::Tableau { reason, .. } if reason.contains("rows"));
    says!(tableau(0, &[], &[1.0]), OdeError::Tableau { reason, .. } if reason.contains("order 0"));
    says!(tableau(1, &[], &[]), OdeError::Tableau { reason, .. } if reason.contains("no stages"));
    let heun = Tableau::new("mine", 2, &[&[1.0]], &[0.5, 0.5]).unwrap();
    says!(heun.clone().with_embedded(&[1.0]).unwrap_err(), OdeError::Tableau { .. });
    says!(heun.with_embedded(&[1.0, 0.5]).unwrap_err(), OdeError::Tableau { .. });
}

#[test]
fn of_a_second_kind_that_candle_alone_reports() {
    // What is not ours stays Candle's.
    let theirs = ones().matmul(&ones()).unwrap_err();
    let text = theirs.to_string();
    match OdeError::from(theirs) {
        OdeError::Candle(error) => assert_eq!(error.to_string(), text),
        other => panic!("{other}"),
    }
    let wrapped: candle_core::Result<Tensor> = ones().matmul(&ones()).context("in a model");
    assert!(matches!(OdeError::from(wrapped.unwrap_err()), OdeError::Candle(_)));
    assert_eq!(PassKind::Backward.to_string(), "backward");
}
