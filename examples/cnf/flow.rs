//! Velocity fields of flows: the reference flow with its hypernetwork, an MLP, and FFJORD's layers.
//!
//! All work in every dtype: what they are made of sums over the batch in F32.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::VarBuilder;
use candle_ode::ops::{self, Activation, Mlp, Planar, Sequential, concat_squash_linear};
use candle_ode::{Tangent, Time};

/// The reference flow: f(z, t) = mean over j of u_j tanh(w_j·z + b_j).
///
/// w_j, b_j and u_j = v_j σ(g_j) are functions of t, the output of a hypernetwork 1 → 32 → 32 → (3 dim + 1) width with
/// tanh between its layers. Its divergence is known: mean over j of (1 − tanh²) u_j·w_j.
///
/// Shapes: z and f are `(batch, dim)`; W, V and G `(width, dim)`, b `(width)`.
///
/// # Reference
/// The continuous normalizing flow of Celledoni, Owren, Ruthotto, Yang, arXiv 2510.23498.
#[derive(Clone, Debug)]
pub struct HyperFlow {
    hyper: Mlp,
    dim: usize,
    width: usize,
}

/// Units of each hidden layer of the hypernetwork.
const HIDDEN: usize = 32;

impl HyperFlow {
    /// A flow of `dim` dimensions that is `width` units wide; parameters `hyper.0.weight`, `hyper.0.bias` …
    ///
    /// # Errors
    /// Whatever the `VarBuilder` reports.
    pub fn new(dim: usize, width: usize, vb: VarBuilder) -> Result<Self> {
        let sizes = [1, HIDDEN, HIDDEN, (3 * dim + 1) * width];
        Ok(Self { hyper: Mlp::new(&sizes, Activation::Tanh, vb.pp("hyper"))?, dim, width })
    }

    /// The units at one time, with weights in the dtype of z.
    fn units(&self, t: &Time, z: &Tensor) -> Result<Planar> {
        let Self { dim, width, .. } = *self;
        let all = self.hyper.of_time(t, z)?;
        let block = |n: usize| all.narrow(0, n * dim * width, dim * width)?.reshape((width, dim));
        let u = (block(1)? * Activation::Sigmoid.forward(&block(2)?)?)?;
        Planar::new(&block(0)?, &all.narrow(0, 3 * dim * width, width)?, &u, Activation::Tanh)
    }
}

impl Tangent for HyperFlow {
    fn tangent(&self, t: &Time, z: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.units(t, z)?.tangent(t, z, v)
    }

    fn trace(&self, t: &Time, z: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        self.units(t, z)?.trace(t, z)
    }
}

/// A velocity field for points of `dim` columns.
#[derive(Debug)]
pub enum Velocity {
    /// See [`HyperFlow`].
    Hyper(HyperFlow),
    /// Two hidden layers with softplus, each seeing the time.
    Mlp(Mlp),
    /// The same of layers that the time opens and moves.
    Ffjord(Sequential),
}

impl Velocity {
    /// The reference flow for the plane; an MLP for other numbers of dimensions.
    ///
    /// # Errors
    /// Whatever the `VarBuilder` reports.
    pub fn new(dim: usize, vb: VarBuilder) -> Result<Self> {
        if dim == 2 { Self::reference(dim, vb) } else { Self::mlp(dim, vb) }
    }

    /// The reference flow, 128 units wide.
    ///
    /// # Errors
    /// Whatever the `VarBuilder` reports.
    pub fn reference(dim: usize, vb: VarBuilder) -> Result<Self> {
        HyperFlow::new(dim, 128, vb).map(Self::Hyper)
    }

    /// An MLP with the time beside the inputs of each layer.
    ///
    /// # Errors
    /// Whatever the `VarBuilder` reports.
    pub fn mlp(dim: usize, vb: VarBuilder) -> Result<Self> {
        let hidden = hidden(dim);
        Mlp::builder(&[dim, hidden, hidden, dim], Activation::Softplus).in_time().build(vb.pp("mlp")).map(Self::Mlp)
    }

    /// FFJORD's field: concat-squash layers.
    ///
    /// # Errors
    /// Whatever the `VarBuilder` reports.
    ///
    /// # Reference
    /// W. Grathwohl, R. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud, *FFJORD*, arXiv 1810.01367.
    pub fn ffjord(dim: usize, vb: VarBuilder) -> Result<Self> {
        let (hidden, vb) = (hidden(dim), vb.pp("ffjord"));
        let layers = ops::seq()
            .add_timed(concat_squash_linear(dim, hidden, vb.pp(0))?)
            .add(Activation::Softplus)
            .add_timed(concat_squash_linear(hidden, hidden, vb.pp(1))?)
            .add(Activation::Softplus)
            .add_timed(concat_squash_linear(hidden, dim, vb.pp(2))?);
        Ok(Self::Ffjord(layers))
    }

    fn field(&self) -> &dyn Tangent {
        match self {
            Self::Hyper(flow) => flow,
            Self::Mlp(mlp) => mlp,
            Self::Ffjord(layers) => layers,
        }
    }
}

/// Units of a hidden layer.
fn hidden(dim: usize) -> usize {
    (2 * dim).clamp(64, 1024)
}

impl Tangent for Velocity {
    fn tangent(&self, t: &Time, z: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.field().tangent(t, z, v)
    }

    fn tangents(&self, t: &Time, z: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.field().tangents(t, z, v)
    }

    fn trace(&self, t: &Time, z: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        self.field().trace(t, z)
    }
}

/// −log of the standard normal density at z `(batch, dim)`, in the dtype of z: ½|z|² + ½ dim ln 2π, shape `(batch,)`.
///
/// # Errors
/// A z of another shape or of integers.
pub fn base_nll(z: &Tensor) -> Result<Tensor> {
    let (_, dim) = z.dims2()?;
    debug_assert!(matches!(z.dtype(), DType::F32 | DType::F64), "solutions come in the accumulate dtype");
    (z.sqr()?.sum(1)? * 0.5)? + 0.5 * dim as f64 * std::f64::consts::TAU.ln()
}
