//! Joins a finished solve to Candle's own graph, so that `loss.backward()` just works.
//!
//! A custom op takes at most three tensors, so y0 and the parameters are collected by a tree of token ops, whose values
//! are 0-d zeros. The solve node takes the root of the tree, and each state that is handed out is a node of its own on
//! top of the solve node, so that a loss over many of them costs no more than they do. On its way down Candle's
//! backward meets the outputs, which leave their cotangents in cells of that backward; then the solve node, which runs
//! the whole reverse pass and leaves dL/dy0 and each dL/dθᵢ there; then the tokens, which hand those out. Backward
//! passes on different threads have cells of their own.

use crate::State;
use crate::account::{Category, Owned};
use crate::adjoint::{Reverse, Reversed};
use crate::error::{OdeError, Result};
use crate::field::Finite;
use crate::field::ops::combine::{self, zero_beside};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, MetalStorage, Shape, Storage, Tensor,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

/// The forward pass of an op whose value is a 0-d zero.
macro_rules! zero_forward {
    ($name:literal $($argument:ident)*) => {
        fn name(&self) -> &'static str {
            $name
        }

        fn cpu_fwd(&self, first: &CpuStorage, _: &Layout $(, $argument: &CpuStorage, _: &Layout)*)
            -> candle_core::Result<(CpuStorage, Shape)> {
            $(let _ = $argument;)*
            zero_beside(first)
        }

        fn cuda_fwd(&self, first: &CudaStorage, _: &Layout $(, $argument: &CudaStorage, _: &Layout)*)
            -> candle_core::Result<(CudaStorage, Shape)> {
            $(let _ = $argument;)*
            zero_beside(first)
        }

        fn metal_fwd(&self, first: &MetalStorage, _: &Layout $(, $argument: &MetalStorage, _: &Layout)*)
            -> candle_core::Result<(MetalStorage, Shape)> {
            $(let _ = $argument;)*
            zero_beside(first)
        }
    };
}

/// y0 in the accumulate dtype, tracked if y0 is: its gradient is checked when it is rounded back to y0's dtype.
pub(crate) fn widen(y0: &State, accumulate: DType) -> Result<State> {
    let mut tensor = 0;
    Ok(y0.try_map(|x| {
        tensor += 1;
        match x.dtype() == accumulate {
            true => Ok(x.clone()),
            false => x.contiguous()?.apply_op1(Widen { accumulate, tensor: tensor - 1 }),
        }
    })?)
}

/// Announces those tensors of y0 in the accumulate dtype that [`widen`] has copied.
pub(crate) fn widened(y0: &State, accumulate: DType) -> Owned {
    let copied = y0.tensors().iter().filter(|x| x.dtype() != accumulate);
    let bytes = copied.map(|x| x.elem_count() * accumulate.size_in_bytes()).sum();
    Owned::new(Category::Scratch, bytes)
}

/// Ties `outputs` (grid index, state) to `y0` (accumulate dtype; `copy` if it is one) and the trainable tensors, by
/// slot.
pub(crate) fn attach(
    outputs: Vec<(usize, State)>,
    y0: &State,
    trainable: Vec<Option<Tensor>>,
    recorded: Box<dyn Reverse>,
    copy: Owned,
) -> Result<Vec<State>> {
    let cells = Arc::new(Cells::default());
    let tracked = y0.tensors().iter().map(Tensor::track_op).collect();
    let start = y0.tensors().iter().enumerate().filter(|(_, x)| x.track_op());
    let start = start.map(|(tensor, x)| (Arg::Start(tensor), x.clone()));
    let slots = trainable.into_iter().enumerate().filter_map(|(slot, tensor)| tensor.map(|x| (Arg::Slot(slot), x)));
    let (at, states): (Vec<usize>, Vec<State>) = outputs.into_iter().unzip();
    let Some(root) = token_tree(start.chain(slots).collect(), &cells)? else { return Ok(states) };
    let node = SolveNode { at, like: y0.detach(), tracked, recorded, cells: cells.clone(), _copy: copy };
    let solve = root.apply_op1(node)?;
    let attached = states.into_iter().enumerate().map(|(output, state)| {
        let mut tensor = 0;
        state.try_map(|x| {
            let value = Mutex::new(Some(x.contiguous()?));
            let node = OutputNode { value, output, tensor, cells: cells.clone() };
            tensor += 1;
            solve.apply_op1(node)
        })
    });
    Ok(attached.collect::<candle_core::Result<_>>()?)
}

/// What the nodes of one backward leave for each other.
#[derive(Debug, Default)]
struct Left {
    /// (output, tensor of its state, cotangent), in the order they came.
    cotangents: Vec<(usize, usize, Tensor)>,
    /// dL/dy0, by tensor.
    start: Vec<Option<Tensor>>,
    /// dL/dθ, by slot.
    sums: Vec<Option<Tensor>>,
}

/// What has been left, per thread that runs a backward.
#[derive(Debug, Default)]
struct Cells(Mutex<HashMap<ThreadId, Left>>);

impl Cells {
    fn leave_cotangent(&self, output: usize, tensor: usize, cotangent: Tensor) {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cells.entry(std::thread::current().id()).or_default().cotangents.push((output, tensor, cotangent));
    }

    /// The last `count` cotangents. A backward that failed half way may have left others before them.
    fn take_cotangents(&self, count: usize) -> Vec<(usize, usize, Tensor)> {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut left) = cells.remove(&std::thread::current().id()) else { return vec![] };
        left.cotangents.split_off(left.cotangents.len().saturating_sub(count))
    }

    /// Leaves what will be asked for: of y0 the tensors with a token.
    fn leave(&self, Reversed { y0, sums }: Reversed, tracked: &[bool]) {
        let start = y0.into_tensors().into_iter().zip(tracked).map(|(y0, tracked)| tracked.then_some(y0)).collect();
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cells.insert(std::thread::current().id(), Left { cotangents: vec![], start, sums });
    }

    /// Takes one out; the last one out clears up.
    fn take(&self, arg: Arg) -> Option<Tensor> {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = std::thread::current().id();
        let mine = cells.get_mut(&id)?;
        let taken = match arg {
            Arg::Start(tensor) => mine.start.get_mut(tensor),
            Arg::Slot(slot) => mine.sums.get_mut(slot),
            Arg::Token => None,
        };
        let taken = taken.and_then(Option::take);
        if mine.start.iter().chain(&mine.sums).all(Option::is_none) {
            cells.remove(&id);
        }
        taken
    }
}

/// The whole solve as one op of Candle's graph. Its value is a 0-d zero, its cotangent the number of tensors whose
/// cotangents have been left.
struct SolveNode {
    at: Vec<usize>,
    /// A state of the right shapes.
    like: State,
    /// Which tensors of y0 have a gradient.
    tracked: Vec<bool>,
    recorded: Box<dyn Reverse>,
    cells: Arc<Cells>,
    /// Of y0 in another dtype.
    _copy: Owned,
}

impl SolveNode {
    fn reverse(&self, count: usize) -> Result<Reversed> {
        let mut states: Vec<Option<Vec<Option<Tensor>>>> = vec![None; self.at.len()];
        for (output, tensor, cotangent) in self.cells.take_cotangents(count) {
            states[output].get_or_insert_with(|| vec![None; self.like.len()])[tensor] = Some(cotangent);
        }
        let known = self.at.iter().zip(states).filter_map(|(at, state)| state.map(|state| (*at, state)));
        let cotangents = known.map(|(at, state)| {
            let tensors = state.into_iter().zip(self.like.tensors());
            let tensors = tensors.map(|(cotangent, like)| cotangent.map_or_else(|| like.zeros_like(), Ok));
            Ok((at, State::from(tensors.collect::<candle_core::Result<Vec<_>>>()?)))
        });
        self.recorded.reverse(&cotangents.collect::<Result<Vec<_>>>()?)
    }
}

impl CustomOp1 for SolveNode {
    zero_forward!("ode-solve");

    fn bwd(&self, root: &Tensor, _: &Tensor, count: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let count = count.detach().to_scalar::<f32>()?;
        self.cells.leave(self.reverse(count as usize)?, &self.tracked);
        root.zeros_like().map(Some)
    }
}

/// One tensor of a state that is handed out.
struct OutputNode {
    /// Its value, until the op has run.
    value: Mutex<Option<Tensor>>,
    output: usize,
    tensor: usize,
    cells: Arc<Cells>,
}

impl OutputNode {
    /// A copy of the value, made by `copy` from the storage of the device and the layout in it.
    fn value<S>(
        &self,
        copy: impl Fn(&Storage, &Layout) -> Option<candle_core::Result<S>>,
    ) -> candle_core::Result<(S, Shape)> {
        let taken = self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(value) = taken else { candle_core::bail!("an output of a solve is evaluated once") };
        let (storage, layout) = value.storage_and_layout();
        match copy(&storage, layout) {
            Some(copy) => Ok((copy?, value.shape().clone())),
            None => candle_core::bail!("a solve's states left the device of y0"),
        }
    }
}

impl CustomOp1 for OutputNode {
    fn name(&self) -> &'static str {
        "ode-output"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.value(|storage, layout| match storage {
            Storage::Cpu(own) => Some(own.to_dtype(layout, own.dtype())),
            _ => None,
        })
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.value(|storage, layout| match storage {
            Storage::Cuda(own) => Some(own.to_dtype(layout, own.dtype())),
            _ => None,
        })
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        self.value(|storage, layout| match storage {
            Storage::Metal(own) => Some(combine::copy_on_metal(own, layout, own.dtype())),
            _ => None,
        })
    }

    fn bwd(&self, solve: &Tensor, _: &Tensor, cotangent: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.cells.leave_cotangent(self.output, self.tensor, cotangent.detach());
        solve.ones_like().map(Some)
    }
}

/// What an argument of a token op is.
#[derive(Clone, Copy, Debug)]
enum Arg {
    /// A tensor of y0.
    Start(usize),
    /// A parameter or input.
    Slot(usize),
    /// A token below.
    Token,
}

/// Collects tensors under one token, three at a time.
fn token_tree(mut level: Vec<(Arg, Tensor)>, cells: &Arc<Cells>) -> candle_core::Result<Option<Tensor>> {
    loop {
        match level.as_slice() {
            [] => return Ok(None),
            [(Arg::Token, root)] => return Ok(Some(root.clone())),
            _ => {}
        }
        let above = level.chunks(3).map(|args| {
            let token = Token { args: args.iter().map(|(arg, _)| *arg).collect(), cells: cells.clone() };
            let made = match args {
                [(_, a), (_, b), (_, c)] => a.apply_op3(b, c, token),
                [(_, a), (_, b)] => a.apply_op2(b, token),
                args => args[0].1.apply_op1(token),
            };
            made.map(|made| (Arg::Token, made))
        });
        level = above.collect::<candle_core::Result<_>>()?;
    }
}

/// Hands out gradients that the solve node has left.
struct Token {
    args: Vec<Arg>,
    cells: Arc<Cells>,
}

impl Token {
    fn gradient(&self, n: usize, of: &Tensor) -> candle_core::Result<Option<Tensor>> {
        match self.args[n] {
            Arg::Token => Ok(Some(of.zeros_like()?)),
            arg => match self.cells.take(arg) {
                Some(sum) if sum.dtype() == of.dtype() => Ok(Some(sum)),
                Some(sum) => {
                    let narrow = sum.to_dtype(of.dtype())?;
                    if Finite::read(&[combine::finite(&narrow)?])? != [true] {
                        return Err(OdeError::SumOverflow { shape: of.shape().clone(), dtype: of.dtype() }.into());
                    }
                    Ok(Some(narrow))
                }
                // Candle wants a gradient for every tracked node that is not a variable.
                None if !of.is_variable() => Ok(Some(of.zeros_like()?)),
                None => Ok(None),
            },
        }
    }
}

impl CustomOp1 for Token {
    zero_forward!("ode-token");

    fn bwd(&self, a: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.gradient(0, a)
    }
}

impl CustomOp2 for Token {
    zero_forward!("ode-token" second);

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.gradient(0, a)?, self.gradient(1, b)?))
    }
}

impl CustomOp3 for Token {
    zero_forward!("ode-token" second third);

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((self.gradient(0, a)?, self.gradient(1, b)?, self.gradient(2, c)?))
    }
}

/// A cast to the accumulate dtype whose gradient is checked on its way back.
struct Widen {
    accumulate: DType,
    tensor: usize,
}

impl CustomOp1 for Widen {
    fn name(&self) -> &'static str {
        "ode-widen"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((storage.to_dtype(layout, self.accumulate)?, layout.shape().clone()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((storage.to_dtype(layout, self.accumulate)?, layout.shape().clone()))
    }

    fn metal_fwd(&self, storage: &MetalStorage, layout: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        Ok((storage.to_dtype(layout, self.accumulate)?, layout.shape().clone()))
    }

    fn bwd(&self, y0: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let narrow = gradient.detach().to_dtype(y0.dtype())?;
        if Finite::read(&[combine::finite(&narrow)?])? != [true] {
            return Err(OdeError::GradientOverflow { tensor: self.tensor, dtype: y0.dtype() }.into());
        }
        Ok(Some(narrow))
    }
}
