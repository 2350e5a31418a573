//! The optimisers: the update is right, and a saved state goes on to the same bits.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, VarBuilder, VarMap};
use candle_ode::OdeError;
use candle_ode::account::TARGET;
use candle_ode::optim::{Adam, AdamConfig, AdamW, AdamWConfig, clip_grad_norm};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// Two variables, `a` (3) and `b` (2, 2), with values far from 0 and from each other.
fn variables(dtype: DType) -> Result<VarMap> {
    let vars = VarMap::new();
    let values = [("a", vec![0.5, -2.0, 30.0], vec![3]), ("b", vec![1.0, -0.01, 7.0, -0.3], vec![2, 2])];
    for (name, values, shape) in values {
        let value = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?;
        vars.data().lock().unwrap().insert(name.into(), Var::from_tensor(&value)?);
    }
    Ok(vars)
}

fn variable(vars: &VarMap, name: &str) -> Var {
    vars.data().lock().unwrap()[name].clone()
}

/// A loss whose gradients differ from step to step and from entry to entry.
fn loss(vars: &VarMap, step: usize) -> Result<Tensor> {
    let (a, b) = (variable(vars, "a"), variable(vars, "b"));
    ((a.sin()? * (1.0 + step as f64))?.sum_all()? + (b.sqr()? - b.as_tensor() * 3.0)?.sum_all()?)?.to_dtype(DType::F64)
}

fn values(vars: &VarMap) -> Result<Vec<f64>> {
    let mut all = Vec::new();
    for name in ["a", "b"] {
        all.extend(variable(vars, name).flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?);
    }
    Ok(all)
}

fn bits(vars: &VarMap) -> Result<Vec<u64>> {
    Ok(values(vars)?.into_iter().map(f64::to_bits).collect())
}

fn agrees_with_candle(dtype: DType, tolerance: f64) -> Result<()> {
    let (ours, theirs) = (variables(dtype)?, variables(dtype)?);
    let adam = AdamConfig { lr: 0.05, ..AdamConfig::default() };
    let mut our_adam = AdamW::from_varmap(&ours, AdamWConfig { adam, weight_decay: 0.1 })?;
    let settings = candle_nn::ParamsAdamW { lr: 0.05, weight_decay: 0.1, ..Default::default() };
    let mut their_adam = candle_nn::AdamW::new(theirs.all_vars(), settings)?;
    for step in 0..20 {
        our_adam.backward_step(&loss(&ours, step)?)?;
        their_adam.backward_step(&loss(&theirs, step)?)?;
    }
    for (our, their) in values(&ours)?.into_iter().zip(values(&theirs)?) {
        assert!((our - their).abs() <= tolerance * their.abs(), "{dtype:?}: {our} against {their}");
    }
    Ok(())
}

#[test]
fn adamw_equals_candles_to_rounding() -> Result<()> {
    agrees_with_candle(DType::F64, 1e-14)?;
    agrees_with_candle(DType::F32, 1e-5)
}

#[test]
fn first_step_of_adam_is_the_learning_rate_against_the_sign() -> Result<()> {
    let vars = variables(DType::F64)?;
    let before = values(&vars)?;
    let mut adam = Adam::from_varmap(&vars, AdamConfig { lr: 0.01, eps: 0.0, ..Default::default() })?;
    let grads = loss(&vars, 0)?.backward()?;
    adam.step(&grads)?;
    let gradient = ["a", "b"].map(|name| grads.get(&variable(&vars, name)).unwrap().flatten_all().unwrap());
    let gradient = Tensor::cat(&gradient, 0)?.to_vec1::<f64>()?;
    for ((after, before), g) in values(&vars)?.into_iter().zip(before).zip(gradient) {
        assert!((after - (before - 0.01 * g.signum())).abs() < 1e-14);
    }
    Ok(())
}

#[test]
fn half_masters_have_f32_moments() -> Result<()> {
    let vars = variables(DType::BF16)?;
    let mut adam = Adam::from_varmap(&vars, AdamConfig::default())?;
    adam.backward_step(&loss(&vars, 0)?)?;
    assert_eq!(adam.first_moment("a").unwrap().dtype(), DType::F32);
    assert_eq!(adam.second_moment("b").unwrap().dtype(), DType::F32);
    assert_eq!(variable(&vars, "a").dtype(), DType::BF16);
    assert!(adam.names().eq(["a", "b"]));
    Ok(())
}

#[test]
fn variables_without_a_gradient_stay() -> Result<()> {
    let vars = variables(DType::F64)?;
    let before = values(&vars)?;
    let mut adam = AdamW::from_varmap(&vars, AdamWConfig::default())?;
    adam.backward_step(&variable(&vars, "b").sqr()?.sum_all()?)?;
    let after = values(&vars)?;
    assert_eq!(before[..3], after[..3]);
    assert!(before[3..].iter().zip(&after[3..]).all(|(before, after)| before != after));
    assert_eq!(adam.first_moment("a").unwrap().to_vec1::<f64>()?, [0.0; 3]);
    Ok(())
}

#[test]
fn gradient_of_another_shape_changes_nothing() -> Result<()> {
    let vars = variables(DType::F64)?;
    let before = bits(&vars)?;
    let mut adam = Adam::from_varmap(&vars, AdamConfig::default())?;
    let mut grads = loss(&vars, 0)?.backward()?;
    grads.insert(&variable(&vars, "b"), Tensor::ones(4, DType::F64, &Device::Cpu)?);
    let error = adam.step(&grads).unwrap_err().to_string();
    assert!(error.contains("`b`"), "{error}");
    assert_eq!((bits(&vars)?, adam.step_count()), (before, 0));
    Ok(())
}

fn resumes_to_the_same_bits(dtype: DType) -> candle_ode::Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.safetensors");
    let settings = AdamWConfig::default();
    let straight = variables(dtype)?;
    let mut adam = AdamW::from_varmap(&straight, settings.clone())?;
    for step in 0..5 {
        adam.backward_step(&loss(&straight, step)?)?;
    }
    adam.set_learning_rate(0.1 + 0.2);
    adam.set_extra("headroom", f64::INFINITY);
    adam.save(&path)?;
    let saved = std::fs::read(&path).unwrap();

    let resumed = variables(dtype)?;
    for name in ["a", "b"] {
        variable(&resumed, name).set(&variable(&straight, name))?;
    }
    let mut second = AdamW::from_varmap(&resumed, settings)?;
    second.load(&path)?;
    assert_eq!((second.step_count(), second.extra("headroom")), (5, Some(f64::INFINITY)));
    assert_eq!(second.learning_rate().to_bits(), (0.1f64 + 0.2).to_bits());
    second.save(&path)?;
    assert_eq!(std::fs::read(&path).unwrap(), saved, "saving what was loaded gives the same file");

    for step in 5..10 {
        adam.backward_step(&loss(&straight, step)?)?;
        second.backward_step(&loss(&resumed, step)?)?;
    }
    assert_eq!(bits(&straight)?, bits(&resumed)?);
    Ok(())
}

#[test]
fn saved_state_goes_on_to_the_same_bits() -> candle_ode::Result<()> {
    [DType::F64, DType::F32, DType::F16].into_iter().try_for_each(resumes_to_the_same_bits)
}

#[test]
fn loading_says_what_does_not_fit() -> candle_ode::Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.safetensors");
    let vars = variables(DType::F32)?;
    let mut adam = Adam::from_varmap(&vars, AdamConfig::default())?;
    adam.backward_step(&loss(&vars, 0)?)?;
    adam.save(&path)?;

    let against = |entries: &[(&str, &[usize], DType)]| -> candle_ode::Result<String> {
        let vars = VarMap::new();
        for (name, shape, dtype) in entries {
            VarBuilder::from_varmap(&vars, *dtype, &Device::Cpu).get(*shape, name)?;
        }
        let mut other = Adam::from_varmap(&vars, AdamConfig::default())?;
        let error = other.load(&path).unwrap_err();
        assert!(matches!(error, OdeError::Format { .. }));
        assert_eq!(other.step_count(), 0);
        Ok(error.to_string())
    };
    let f32 = DType::F32;
    let reshaped = against(&[("a", &[3], f32), ("b", &[4], f32)])?;
    assert!(reshaped.contains("`first.b` is F32 [2, 2], and F32 [4] is needed"), "{reshaped}");
    let retyped = against(&[("a", &[3], DType::F64), ("b", &[2, 2], f32)])?;
    assert!(retyped.contains("`first.a` is F32 [3], and F64 [3] is needed"), "{retyped}");
    let fewer = against(&[("a", &[3], f32)])?;
    assert!(fewer.contains("`first.b`") && fewer.contains("no such variable"), "{fewer}");
    let more = against(&[("a", &[3], f32), ("b", &[2, 2], f32), ("c", &[1], f32)])?;
    assert!(more.contains("has no `first.c`"), "{more}");

    std::fs::write(&path, b"not a safetensors file").unwrap();
    assert!(adam.load(&path).unwrap_err().to_string().contains("no safetensors file"));
    vars.save(&path)?;
    assert!(adam.load(&path).unwrap_err().to_string().contains("no state of an optimiser"));
    assert!(matches!(adam.load(dir.path().join("missing")), Err(OdeError::Io { .. })));
    Ok(())
}

#[test]
fn clipping_is_by_the_norm_of_all_gradients() -> Result<()> {
    let vars = variables(DType::F32)?;
    let (a, b) = (variable(&vars, "a"), variable(&vars, "b"));
    let both = [a.clone(), b.clone()];
    let mut grads = GradStore::default();
    // In F16 the sum of these squares overflows, and a mean in F16 would round.
    grads.insert(&a, Tensor::full(300f32, 3, &Device::Cpu)?.to_dtype(DType::F16)?);
    grads.insert(&b, Tensor::full(400f32, (2, 2), &Device::Cpu)?);
    let norm = (3.0 * 300f64.powi(2) + 4.0 * 400f64.powi(2)).sqrt();
    assert!((clip_grad_norm(&both, &mut grads, 1e4)? - norm).abs() < 1e-9);
    assert_eq!(grads.get(&b).unwrap().max_all()?.to_scalar::<f32>()?, 400.0);
    clip_grad_norm(&both, &mut grads, norm / 2.0)?;
    assert_eq!(grads.get(&a).unwrap().max_all()?.to_scalar::<half::f16>()?.to_f32(), 150.0);
    assert!((grads.get(&b).unwrap().max_all()?.to_scalar::<f32>()? - 200.0).abs() < 1e-4);
    grads.insert(&b, Tensor::full(f32::INFINITY, (2, 2), &Device::Cpu)?);
    assert_eq!(clip_grad_norm(&both, &mut grads, 1.0)?, f64::INFINITY);
    assert_eq!(grads.get(&a).unwrap().max_all()?.to_scalar::<half::f16>()?.to_f32(), 150.0);
    Ok(())
}

/// Adds up the `bytes` events of the category `optimizer`.
struct Sum(Arc<AtomicI64>);

#[derive(Default)]
struct Bytes {
    optimizer: bool,
    delta: i64,
}

impl Visit for Bytes {
    fn record_i64(&mut self, _: &Field, value: i64) {
        self.delta = value;
    }
    fn record_str(&mut self, _: &Field, value: &str) {
        self.optimizer = value == "optimizer";
    }
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: tracing::Subscriber> Layer<S> for Sum {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut bytes = Bytes::default();
        event.record(&mut bytes);
        if event.metadata().target() == TARGET && bytes.optimizer {
            self.0.fetch_add(bytes.delta, Ordering::Relaxed);
        }
    }
}

#[test]
fn moments_are_announced_as_long_as_they_live() -> Result<()> {
    let sum = Arc::new(AtomicI64::new(0));
    let live = || sum.load(Ordering::Relaxed);
    let _listening = tracing::subscriber::set_default(tracing_subscriber::registry().with(Sum(sum.clone())));
    for (dtype, bytes_each) in [(DType::F64, 8), (DType::F32, 4), (DType::F16, 4)] {
        let vars = variables(dtype)?;
        let mut adam = Adam::from_varmap(&vars, AdamConfig::default())?;
        adam.backward_step(&loss(&vars, 0)?)?;
        assert_eq!(live(), 2 * 7 * bytes_each, "{dtype:?}");
        drop(adam);
        assert_eq!(live(), 0);
    }
    Ok(())
}
