//! Time: f64 arithmetic on the host, tensors for the vector field.

use crate::account::{Category, Owned};
use crate::error::{OdeError, Result};
use candle_core::{DType, Device, Tensor, Var};
use std::sync::{Arc, Mutex, OnceLock};

/// The time at which a vector field is evaluated.
///
/// [`value`](Self::value) is exact (f64, on the host); [`tensor`](Self::tensor) and [`like`](Self::like) are on the
/// device, rounded once from the f64 and uploaded in bulk for a whole pass.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_ode::Time;
///
/// let t = Time::new(0.1, &Device::Cpu);
/// let y = Tensor::zeros((4, 3), DType::F16, &Device::Cpu)?;
/// let like = t.like(&y)?;                        // (1, 1), F16, broadcasts against y
/// assert_eq!((like.dims(), like.dtype()), (&[1, 1][..], DType::F16));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Time {
    value: f64,
    row: usize,
    table: Arc<TimeTable>,
    leaves: Option<TimeLeaves>,
}

impl Time {
    /// A time on its own, outside a solve.
    pub fn new(value: f64, device: &Device) -> Self {
        Self { value, row: 0, table: Arc::new(TimeTable::new(vec![value], device)), leaves: None }
    }

    /// The time itself.
    pub fn value(&self) -> f64 {
        self.value
    }

    /// A 0-d F32 tensor.
    ///
    /// # Errors
    /// When the device fails to hold it.
    pub fn tensor(&self) -> candle_core::Result<Tensor> {
        self.in_dtype(DType::F32, 0)
    }

    /// The time in the dtype of `y`, with as many dimensions (all 1), so that it broadcasts against it.
    ///
    /// # Errors
    /// When the device fails to hold it, or `y` is an integer tensor.
    pub fn like(&self, y: &Tensor) -> candle_core::Result<Tensor> {
        self.in_dtype(y.dtype(), y.rank())
    }

    /// Whether its cotangent is wanted.
    pub(crate) fn is_tracked(&self) -> bool {
        self.leaves.is_some()
    }

    /// This time as a differentiable leaf: a linearisation made at it also gives the cotangent of t.
    pub fn tracked(&self) -> Self {
        Self { leaves: Some(TimeLeaves::default()), ..self.clone() }
    }

    /// The leaves through which a vector field has seen this time, if it is tracked.
    pub(crate) fn leaves(&self) -> Vec<Tensor> {
        self.leaves.as_ref().map_or_else(Vec::new, TimeLeaves::all)
    }

    fn in_dtype(&self, dtype: DType, rank: usize) -> candle_core::Result<Tensor> {
        let plain = self.table.column(dtype)?.narrow(0, self.row, 1)?.reshape(vec![1; rank])?;
        match &self.leaves {
            None => Ok(plain),
            Some(leaves) => leaves.leaf(&plain),
        }
    }
}

/// The leaves through which one linearisation saw the time.
#[derive(Clone, Debug, Default)]
struct TimeLeaves(Arc<Mutex<Vec<Tensor>>>);

impl TimeLeaves {
    /// Every leaf handed out so far.
    fn all(&self) -> Vec<Tensor> {
        self.lock().clone()
    }

    fn leaf(&self, plain: &Tensor) -> candle_core::Result<Tensor> {
        let mut leaves = self.lock();
        if let Some(known) = leaves.iter().find(|leaf| leaf.dtype() == plain.dtype() && leaf.rank() == plain.rank()) {
            return Ok(known.clone());
        }
        let leaf = Var::from_tensor(plain)?.into_inner();
        leaves.push(leaf.clone());
        Ok(leaf)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Tensor>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Many times on one device, one column per dtype, uploaded when first asked for.
#[derive(Debug)]
pub(crate) struct TimeTable {
    values: Vec<f64>,
    device: Device,
    f64: OnceLock<Column>,
    f32: OnceLock<Column>,
    f16: OnceLock<Column>,
    bf16: OnceLock<Column>,
}

/// The times in one dtype, on the device.
#[derive(Debug)]
struct Column {
    times: Tensor,
    owned: Owned,
}

impl TimeTable {
    pub(crate) fn new(values: Vec<f64>, device: &Device) -> Self {
        let device = device.clone();
        Self { values, device, f64: OnceLock::new(), f32: OnceLock::new(), f16: OnceLock::new(), bf16: OnceLock::new() }
    }

    /// The time in row `row`.
    pub(crate) fn time(self: &Arc<Self>, row: usize) -> Time {
        Time { value: self.values[row], row, table: self.clone(), leaves: None }
    }

    fn column(&self, dtype: DType) -> candle_core::Result<&Tensor> {
        let cell = match dtype {
            DType::F64 => &self.f64,
            DType::F32 => &self.f32,
            DType::F16 => &self.f16,
            DType::BF16 => &self.bf16,
            other => {
                candle_core::bail!("a time cannot be expressed in {other:?}; the state must be F16, BF16, F32 or F64")
            }
        };
        if let Some(column) = cell.get() {
            return Ok(&column.times);
        }
        let (values, device) = (self.values.iter(), &self.device);
        let times = match dtype {
            DType::F64 => Tensor::from_iter(values.copied(), device),
            DType::F32 => Tensor::from_iter(values.map(|&v| v as f32), device),
            DType::F16 => Tensor::from_iter(values.map(|&v| half::f16::from_f64(v)), device),
            _ => Tensor::from_iter(values.map(|&v| half::bf16::from_f64(v)), device),
        }?;
        let owned = Owned::new(Category::Scratch, self.values.len() * dtype.size_in_bytes());
        Ok(&cell.get_or_init(|| Column { times, owned }).times)
    }

    /// Bytes of the columns that have been asked for.
    pub(crate) fn bytes(&self) -> usize {
        let columns = [&self.f64, &self.f32, &self.f16, &self.bf16];
        columns.into_iter().filter_map(OnceLock::get).map(|column| column.owned.bytes()).sum()
    }
}

/// Strictly monotone times: the ends of the steps of a fixed-step solve.
#[derive(Clone, Debug, PartialEq)]
pub struct TimeGrid(Vec<f64>);

impl TimeGrid {
    /// `steps` equal steps from `t0` to `t1`, which may lie before `t0`. Point n is t0 + (t1 − t0)·n/steps, so that
    /// no rounding accumulates.
    ///
    /// # Errors
    /// Non-finite or equal ends, or zero steps.
    pub fn uniform(t0: f64, t1: f64, steps: usize) -> Result<Self> {
        for (index, value) in [t0, t1].into_iter().enumerate() {
            if !value.is_finite() {
                return Err(OdeError::NonFiniteTime { index, value });
            }
        }
        if t0 == t1 {
            return Err(OdeError::EmptySpan { time: t0 });
        }
        if steps == 0 {
            return Err(OdeError::NoSteps);
        }
        let point = |n: usize| if n == steps { t1 } else { t0 + (t1 - t0) * (n as f64 / steps as f64) };
        let mut times = Vec::new();
        if times.try_reserve_exact(steps.saturating_add(1)).is_err() {
            let hint = "so many times do not fit into memory";
            return Err(OdeError::Setting { setting: "steps", value: steps.to_string(), hint });
        }
        times.extend((0..=steps).map(point));
        Self::new(times)
    }

    /// Steps between given times.
    ///
    /// # Errors
    /// Fewer than two times, a non-finite one, equal ends, or times out of order.
    pub fn new(times: Vec<f64>) -> Result<Self> {
        if let Some((index, &value)) = times.iter().enumerate().find(|(_, t)| !t.is_finite()) {
            return Err(OdeError::NonFiniteTime { index, value });
        }
        let [first, .., last] = times.as_slice() else { return Err(OdeError::NoSteps) };
        if times.len() == 2 && first == last {
            return Err(OdeError::EmptySpan { time: *first });
        }
        let forward = last > first;
        let wrong = times.windows(2).position(|pair| if forward { pair[1] <= pair[0] } else { pair[1] >= pair[0] });
        match wrong {
            Some(n) => Err(OdeError::UnsortedTimes { index: n + 1, before: times[n], value: times[n + 1] }),
            None => Ok(Self(times)),
        }
    }

    /// How many steps.
    pub fn steps(&self) -> usize {
        self.0.len() - 1
    }

    /// All times, the first and the last included.
    pub fn times(&self) -> &[f64] {
        &self.0
    }

    /// The index of `time` on the grid.
    ///
    /// # Errors
    /// [`OdeError::OutputOffGrid`] names the nearest point. Times within a few ulp of a point count as that point.
    pub fn index_of(&self, time: f64) -> Result<usize> {
        let distance = |t: f64| (t - time).abs();
        let last = self.steps();
        let after = before(&self.0, time).min(last);
        let nearest = match after.checked_sub(1) {
            Some(n) if distance(self.0[n]) <= distance(self.0[after]) => n,
            _ => after,
        };
        let tolerance = 8.0 * f64::EPSILON * self.0[0].abs().max(self.0[last].abs());
        if distance(self.0[nearest]) <= tolerance {
            Ok(nearest)
        } else {
            Err(OdeError::OutputOffGrid { time, nearest: self.0[nearest] })
        }
    }
}

/// How many of strictly monotone `times` come before `t`, in their own direction.
pub(crate) fn before(times: &[f64], t: f64) -> usize {
    let forwards = times.last() > times.first();
    times.partition_point(|time| if forwards { *time < t } else { *time > t })
}

/// Where `t` is among strictly monotone `times`.
pub(crate) fn position(times: &[f64], t: f64) -> Option<usize> {
    let n = before(times, t);
    (times.get(n) == Some(&t)).then_some(n)
}
