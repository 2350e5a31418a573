//! A chain with its tangents: f(x) and J v for several directions v, as one op of Candle's graph.
//!
//! A tile holds x and, behind it, the directions, in blocks of as many rows, whose products are made together (on the
//! way forward those of x by themselves, since the bias is theirs). With z = x Wᵀ + b and ż = v Wᵀ a layer gives y =
//! f(z) and ẏ = f′(z) ż for each direction, and pulls ȳ, ẏ̄ back by
//!
//! z̄ = f′(z) ȳ + f″(z) Σ ż ẏ̄,  ż̄ = f′(z) ẏ̄,  dW += z̄ᵀ x + Σ ż̄ᵀ v,  db += Σ z̄,  x̄ = z̄ W,  v̄ = ż̄ W

use super::compute::{Compute, with_compute};
use super::given::{Given, Way};
use super::order::{Order, Ordered};
use super::weights::noted_sums;
use super::{Chain, Link, Linked, elements, with_elements};
use crate::Time;
use crate::field::one_by_one;
use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::cpu::CHUNK;
use crate::field::ops::kernel::{Epilogue, Held, View};
use crate::field::session::{Current, Matrix, Session, Side};
use crate::field::sink;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// The value of the layers at x and their tangents along v `(k, …)`, `(k, …)` too: as one op if they are one chain,
/// else as `alone` makes them along each direction.
pub(in crate::field::ops) fn tangents<'a>(
    layers: impl IntoIterator<Item = &'a dyn Linked>,
    t: &Time,
    x: &Tensor,
    v: &Tensor,
    alone: impl Fn(&Tensor) -> Result<(Tensor, Tensor)>,
) -> Result<(Tensor, Tensor)> {
    match Along::chain(layers, t, x, v) {
        Some(chain) => Along::run(chain, x, v),
        None => one_by_one(v, alone),
    }
}

/// x and its directions.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Of x, and of each direction.
    rows: usize,
    /// x and the directions.
    blocks: usize,
}

impl Sizes {
    /// Rows of a tile.
    fn all(self) -> usize {
        self.rows * self.blocks
    }
}

struct Along {
    session: Arc<Session>,
    links: Vec<Link>,
    is_narrow: bool,
    sizes: Sizes,
    tracked: bool,
    /// What the pullback needs, a [`Passed`] for each layer; from the forward pass on.
    passed: Mutex<Option<Box<dyn Any + Send + Sync>>>,
}

/// What the pullback of a layer needs.
struct Passed<T> {
    /// x and v.
    input: Matrix<T>,
    /// What f′ and f″ are functions of, and ż; nothing where nothing is activated.
    activated: Option<Matrix<T>>,
}

impl Along {
    /// The layers, if they are one chain that kernels of ours run with its tangents.
    fn chain<'a>(layers: impl IntoIterator<Item = &'a dyn Linked>, t: &Time, x: &Tensor, v: &Tensor) -> Option<Chain> {
        let fits = v.dtype() == x.dtype() && v.elem_count() > 0 && v.dims().get(1..) == Some(x.dims());
        let mut chain = Chain::start(x).filter(|_| fits && x.device().is_cpu())?;
        let is_one = layers.into_iter().all(|layer| layer.link(Some(t), x, &mut chain));
        Some(chain).filter(|chain| is_one && !chain.links.is_empty())
    }

    fn run(mut chain: Chain, x: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let ((x, given), v, directions) = (chain.operands(x)?, v.contiguous()?, v.dims()[0]);
        let Chain { current: Current { session, .. }, links, .. } = chain;
        let sizes = Sizes { rows: x.elem_count() / links[0].inputs, blocks: 1 + directions };
        let tracked = [&x, &v].into_iter().chain(&given).any(Tensor::track_op);
        let is_narrow = Order::is_narrow(&links);
        let along = Self { session, links, is_narrow, sizes, tracked, passed: Mutex::default() };
        let all = match given {
            Some(given) if tracked => x.apply_op3(&v, &given, along),
            Some(given) => x.apply_op3_no_bwd(&v, &given, &along),
            None if tracked => x.apply_op2(&v, along),
            None => x.apply_op2_no_bwd(&v, &along),
        }?;
        let value = all.get(0)?;
        // A slope lives longer than the tangents: it is not to hold their memory.
        let value = if tracked { value } else { value.copy()? };
        Ok((value, all.narrow(0, 1, directions)?))
    }

    fn value<C: Compute>(&self, x: &[C::Stored], v: &[C::Stored], given: Option<&[C::Stored]>) -> Result<CpuStorage> {
        let Self { session, links, sizes, .. } = self;
        let (order, given) = (Order::of(links, sizes.all()), Given::new(session, given));
        let way = Way { session, order, given: &given, time: None };
        let mut input = C::copied(session, order, &[x, v], sizes.all());
        let Some((last, before)) = links.split_last() else { bail!("a chain of no layers") };
        let mut passed = vec![];
        for link in before {
            let mut out = order.tile(session, sizes.all(), link.outputs);
            let activated = link.push(way, *sizes, input.view(), &mut out)?;
            let input = std::mem::replace(&mut input, out);
            if self.tracked {
                passed.push(Passed { input, activated });
            }
        }
        let mut activated = Ok(None);
        let value = C::stored(session, order, [sizes.all(), last.outputs], |out| {
            activated = last.push(way, *sizes, input.view(), out);
        });
        let activated = activated?;
        if self.tracked {
            passed.push(Passed { input, activated });
            *self.passed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(passed));
        }
        Ok(C::storage(value))
    }

    /// dL/dx and, if it is wanted, dL/dv, one behind the other; dL/d(given), if there is such and it is wanted.
    fn pull<C: Compute>(&self, grad: &Tensor, of_directions: bool, given: Option<&Tensor>) -> Result<Pulled<C>> {
        let Self { session, links, sizes, .. } = self;
        let passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(passed) = passed.as_ref().and_then(|passed| passed.downcast_ref::<Vec<Passed<C::Held>>>()) else {
            bail!("a chain pulls back what it has evaluated")
        };
        let (order, scale) = (Order::of(links, sizes.all()), sink::scale()?);
        let given = Given::to_pull::<C::Stored>(session, given)?;
        let way = Way { session, order, given: &given, time: None };
        let mut g = with_elements::<C::Stored, _>(grad, |grad| Ok(C::copied(session, order, &[grad], sizes.all())))?;
        if scale != 1.0 {
            g.iter_mut().for_each(|g| *g = C::Held::of(g.wide() / scale as f32));
        }
        for (n, (link, passed)) in links.iter().zip(passed).enumerate().rev() {
            if let Some(activated) = &passed.activated {
                pull_activated(link.then, order, *sizes, activated, &mut g);
            }
            let of_value = order.part(g.view(), 0..sizes.rows);
            link.add_gradients(way, (g.view(), of_value), passed.input.view())?;
            if link.is_tracked(way) {
                // Directions are in no sum of the bias.
                noted_sums(session, order, order.part(g.view(), sizes.rows..sizes.all()), link.outputs);
            }
            link.times_gate(way, &mut g, sizes.all())?;
            if n > 0 {
                let mut out = order.tile(session, sizes.all(), link.inputs);
                let packed = link.packed::<C::Held>(way, Side::Backward)?;
                let to = order.write(&mut out, sizes.all());
                C::Held::multiply(order, g.view(), &packed, &Epilogue::default(), to);
                g = out;
            }
        }
        let (first, wanted) = (&links[0], if of_directions { sizes.all() } else { sizes.rows });
        let packed = first.packed::<C::Held>(way, Side::Backward)?;
        let pulled = C::stored(session, order, [wanted, first.inputs], |out| {
            let g = order.part(g.view(), 0..wanted);
            C::Held::multiply(order, g, &packed, &Epilogue::default(), order.write(out, wanted));
            if scale != 1.0 {
                out.iter_mut().for_each(|x| *x = C::Held::of(x.wide() * scale as f32));
            }
        });
        Ok((pulled, given.into_cotangent(scale)))
    }

    fn on_cpu(&self, x: Operand<'_>, v: Operand<'_>, given: Option<Operand<'_>>) -> Result<(CpuStorage, Shape)> {
        let mut dims = [&[self.sizes.blocks], x.1.dims()].concat();
        if let (Some(last), Some(link)) = (dims.last_mut(), self.links.last()) {
            *last = link.outputs;
        }
        let value = with_compute!(x.0.dtype(), self.is_narrow, C => {
            let given = given.map(|(given, layout)| elements(given, layout)).transpose()?;
            self.value::<C>(elements(x.0, x.1)?, elements(v.0, v.1)?, given)
        })?;
        Ok((value, Shape::from(dims)))
    }

    fn back(&self, x: &Tensor, v: &Tensor, given: Option<&Tensor>, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let grad = grad.detach().contiguous()?;
        with_compute!(x.dtype(), self.is_narrow, C => {
            let (mut pulled, of_given) = self.pull::<C>(&grad, v.track_op(), given)?;
            let of_v = pulled.split_off(x.elem_count());
            let of_v = v.track_op().then(|| Tensor::from_vec(of_v, v.shape(), v.device())).transpose()?;
            let of_x = x.track_op().then(|| Tensor::from_vec(pulled, x.shape(), x.device())).transpose()?;
            let of_given = of_given.zip(given).map(|(of, given)| Tensor::from_vec(of, given.shape(), given.device()));
            Ok([of_x, of_v, of_given.transpose()?])
        })
    }
}

/// An operand of an op on the CPU.
type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// What a pullback gives.
type Pulled<C> = (Vec<<C as Compute>::Stored>, Option<Vec<<C as Compute>::Stored>>);

impl CustomOp2 for Along {
    fn name(&self) -> &'static str {
        "layers-with-tangents"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, v: &CpuStorage, lv: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((x, lx), (v, lv), None)
    }

    fn bwd(&self, x: &Tensor, v: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.back(x, v, None, grad).map(|[of_x, of_v, _]| (of_x, of_v))
    }
}

/// With weights that it is given.
impl CustomOp3 for Along {
    fn name(&self) -> &'static str {
        CustomOp2::name(self)
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        v: &CpuStorage,
        lv: &Layout,
        given: &CpuStorage,
        lg: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu((x, lx), (v, lv), Some((given, lg)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        v: &Tensor,
        given: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        self.back(x, v, Some(given), grad).map(|[of_x, of_v, of_given]| (of_x, of_v, of_given))
    }
}

impl Link {
    /// y and ẏ; gives what their pullback needs.
    fn push<T: Ordered>(&self, way: Way<'_>, sizes: Sizes, x: View<'_, T>, out: &mut [T]) -> Result<Option<Matrix<T>>> {
        let Way { session, order, .. } = way;
        let packed = self.packed::<T>(way, Side::Forward)?;
        let (gate, bias) = (self.gate(way)?, self.bias_in_f32(way)?);
        let multiply = |rows: Range<usize>, bias: Option<&[f32]>, to: &mut [T]| {
            let (x, to) = (order.part(x, rows.clone()), order.part_mut(to, sizes.all(), rows));
            T::multiply(order, x, &packed, &Epilogue { gate, bias, ..Epilogue::default() }, to);
        };
        let multiply = |to: &mut [T]| {
            multiply(0..sizes.rows, bias.as_deref(), to);
            multiply(sizes.rows..sizes.all(), None, to);
        };
        if self.then == Activation::Identity {
            multiply(out);
            return Ok(None);
        }
        let mut z = order.tile(session, sizes.all(), self.outputs);
        multiply(&mut z);
        activate(self.then, order, sizes, &mut z, out);
        Ok(Some(z))
    }
}

/// Some elements of x; those of a direction are so many blocks behind.
struct Piece {
    at: Range<usize>,
    /// From a block to the next.
    apart: usize,
}

impl Piece {
    fn of_direction(&self, n: usize) -> Range<usize> {
        let behind = (1 + n) * self.apart;
        self.at.start + behind..self.at.end + behind
    }
}

/// The elements of a tile, piece by piece.
fn pieces(order: Order, sizes: Sizes, elements: usize) -> impl Iterator<Item = Piece> {
    let apart = match order {
        Order::Rows => elements / sizes.blocks,
        Order::Lanes => sizes.rows,
    };
    let line = apart * sizes.blocks;
    (0..elements).step_by(line.max(1)).flat_map(move |first| {
        (0..apart).step_by(CHUNK).map(move |at| Piece { at: first + at..first + apart.min(at + CHUNK), apart })
    })
}

/// y = f(z) and ẏ = f′(z) ż; leaves in place of z what f′ is a function of.
fn activate<T: Held>(then: Activation, order: Order, sizes: Sizes, z: &mut [T], out: &mut [T]) {
    let (mut wide, mut slopes) = ([0.0; CHUNK], [0.0; CHUNK]);
    for piece in pieces(order, sizes, z.len()) {
        let (wide, slopes) = (&mut wide[..piece.at.len()], &mut slopes[..piece.at.len()]);
        widen(&z[piece.at.clone()], wide);
        slopes.copy_from_slice(wide);
        then.value_in_place(wide);
        narrow(wide, &mut out[piece.at.clone()]);
        if then.keeps() == Keeps::Value {
            slopes.copy_from_slice(wide);
            z[piece.at.clone()].copy_from_slice(&out[piece.at.clone()]);
        }
        then.slope_in_place(slopes);
        for n in 0..sizes.blocks - 1 {
            let at = piece.of_direction(n);
            for ((out, z), slope) in out[at.clone()].iter_mut().zip(&z[at]).zip(&*slopes) {
                *out = T::of(slope * z.wide());
            }
        }
    }
}

/// From ȳ and ẏ̄ to z̄ and ż̄, in place.
fn pull_activated<T: Held>(then: Activation, order: Order, sizes: Sizes, z: &[T], g: &mut [T]) {
    let (mut slopes, mut curvatures, mut sums) = ([0.0; CHUNK], [0.0; CHUNK], [0.0; CHUNK]);
    for piece in pieces(order, sizes, z.len()) {
        let count = piece.at.len();
        let (slopes, curvatures, sums) = (&mut slopes[..count], &mut curvatures[..count], &mut sums[..count]);
        widen(&z[piece.at.clone()], slopes);
        curvatures.copy_from_slice(slopes);
        then.slope_in_place(slopes);
        then.curvature_in_place(curvatures);
        sums.fill(0.0);
        for n in 0..sizes.blocks - 1 {
            let at = piece.of_direction(n);
            for (((g, z), slope), sum) in g[at.clone()].iter_mut().zip(&z[at]).zip(&*slopes).zip(&mut *sums) {
                *sum += z.wide() * g.wide();
                *g = T::of(g.wide() * slope);
            }
        }
        let factors = slopes.iter().zip(&*curvatures).zip(&*sums);
        for (g, ((slope, curvature), sum)) in g[piece.at].iter_mut().zip(factors) {
            *g = T::of(g.wide() * slope + curvature * sum);
        }
    }
}

fn widen<T: Held>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.wide());
}

fn narrow<T: Held>(from: &[f32], to: &mut [T]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = T::of(*from));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::ops::{LayerNorm, Linear};
    use crate::field::session::Call;
    use candle_core::{DType, Device, Var};

    /// Whether layers on an x of that dtype, with a norm among them or not, are one op along v.
    fn fused(dtype: DType, t: &Time, v: &[usize], norm: bool) -> bool {
        let ones = |shape: &[usize]| Var::ones(shape, dtype, &Device::Cpu).unwrap();
        let (weight, x, v) = (ones(&[3, 3]), ones(&[5, 3]), Tensor::zeros(v, dtype, &Device::Cpu).unwrap());
        let linear = Linear::new(weight.as_tensor().clone(), None);
        let norm = norm.then(|| LayerNorm::new_no_bias(ones(&[3]).as_tensor().clone(), 1e-5));
        let layers = || -> Vec<&dyn Linked> { vec![&linear, &Activation::Tanh, &linear] };
        assert!(Along::chain(layers(), t, &x, &v).is_none(), "outside of a solve");
        let session = Session::new(&[weight.as_tensor().clone()], Arc::default(), true);
        let open = || match &norm {
            None => Along::chain(layers(), t, &x, &v).is_some(),
            Some(norm) => {
                let sequence = crate::ops::seq().add(linear.clone()).add(norm.clone());
                Along::chain(sequence.linked(), t, &x, &v).is_some()
            }
        };
        session.open(Call::Graph, open).0
    }

    #[test]
    fn a_chain_and_its_tangents_are_one_op() {
        let t = Time::new(0.5, &Device::Cpu);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert!(fused(dtype, &t, &[2, 5, 3], false) && fused(dtype, &t, &[1, 5, 3], false), "{dtype:?}");
            assert!(!fused(dtype, &t, &[2, 5, 3], true));
            assert!(!fused(dtype, &t, &[0, 5, 3], false) && !fused(dtype, &t, &[5, 3], false));
        }
        assert!(!fused(DType::F64, &t, &[2, 5, 3], false));
    }
}
