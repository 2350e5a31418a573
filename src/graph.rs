//! Joins a finished solve to Candle's own graph, so that `loss.backward()` just works.
//!
//! One node takes y0 and a token and has the states as its value; when Candle reaches it with their cotangents it runs
//! the whole reverse pass. A custom op takes at most three tensors, so the parameters are collected by a tree of token
//! ops; Candle reaches the node first, which leaves each dL/dθᵢ in a cell of that backward, and the tokens hand theirs
//! out. Backward passes on different threads have cells of their own.

use crate::State;
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

/// Ties `outputs` (grid index, state) to `y0` (accumulate dtype) and the trainable tensors, by slot.
pub(crate) fn attach(
    outputs: Vec<(usize, State)>,
    y0: &State,
    trainable: Vec<Option<Tensor>>,
    recorded: Box<dyn Reverse>,
) -> Result<Vec<State>> {
    let device = y0.device().clone();
    let shapes: Vec<Shape> = y0.tensors().iter().map(|x| x.shape().clone()).collect();
    let cells = Arc::new(Cells::default());
    let leaves = trainable.into_iter().enumerate().filter_map(|(slot, tensor)| tensor.map(|x| (Arg::Slot(slot), x)));
    let token = match token_tree(leaves.collect(), &cells)? {
        Some(token) => token,
        None => Tensor::zeros((), DType::F32, &device)?,
    };
    let (at, states): (Vec<usize>, Vec<State>) = outputs.into_iter().unzip();
    let value = pack(states.iter().flat_map(State::tensors))?;
    drop(states);
    let layout = Packing { outputs: at.len(), shapes };
    let node = SolveNode { value: Mutex::new(Some(value)), at, layout: layout.clone(), recorded, cells };
    let packed = pack(y0.tensors())?.apply_op2(&token, node)?;
    layout.unpack(&packed)
}

/// One tensor for all: itself if it is alone, else everything flattened in a row.
fn pack<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> candle_core::Result<Tensor> {
    let tensors: Vec<&Tensor> = tensors.into_iter().collect();
    match tensors.as_slice() {
        [only] => only.contiguous(),
        several => Tensor::cat(&several.iter().map(|x| x.flatten_all()).collect::<candle_core::Result<Vec<_>>>()?, 0),
    }
}

/// Where the tensors of several states lie in a packed one.
#[derive(Clone, Debug)]
struct Packing {
    outputs: usize,
    shapes: Vec<Shape>,
}

impl Packing {
    fn unpack(&self, packed: &Tensor) -> Result<Vec<State>> {
        if self.outputs == 1 && self.shapes.len() == 1 {
            return Ok(vec![packed.into()]);
        }
        let mut from = 0;
        let mut states = Vec::with_capacity(self.outputs);
        for _ in 0..self.outputs {
            let mut tensors = Vec::with_capacity(self.shapes.len());
            for shape in &self.shapes {
                tensors.push(packed.narrow(0, from, shape.elem_count())?.reshape(shape)?);
                from += shape.elem_count();
            }
            states.push(State::from(tensors));
        }
        Ok(states)
    }
}

/// The gradients that a reverse pass has left for the tokens, per thread that runs a backward.
#[derive(Debug, Default)]
struct Cells(Mutex<HashMap<ThreadId, Vec<Option<Tensor>>>>);

impl Cells {
    fn leave(&self, sums: Vec<Option<Tensor>>) {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cells.insert(std::thread::current().id(), sums);
    }

    /// Takes one out; the last one out clears up.
    fn take(&self, slot: usize) -> Option<Tensor> {
        let mut cells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = std::thread::current().id();
        let mine = cells.get_mut(&id)?;
        let taken = mine.get_mut(slot).and_then(Option::take);
        if mine.iter().all(Option::is_none) {
            cells.remove(&id);
        }
        taken
    }
}

/// The whole solve as one op of Candle's graph.
struct SolveNode {
    /// The packed states, until the op has run.
    value: Mutex<Option<Tensor>>,
    at: Vec<usize>,
    layout: Packing,
    recorded: Box<dyn Reverse>,
    cells: Arc<Cells>,
}

impl SolveNode {
    /// A copy of the packed states, made by `copy` from the storage of the device and the layout in it.
    fn value<S>(
        &self,
        copy: impl Fn(&Storage, &Layout) -> Option<candle_core::Result<S>>,
    ) -> candle_core::Result<(S, Shape)> {
        let taken = self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(value) = taken else { candle_core::bail!("a solve node is evaluated once") };
        let (storage, layout) = value.storage_and_layout();
        match copy(&storage, layout) {
            Some(copy) => Ok((copy?, value.shape().clone())),
            None => candle_core::bail!("a solve's states left the device of y0"),
        }
    }

    fn reverse(&self, cotangent: &Tensor) -> Result<Reversed> {
        let cotangents: Vec<(usize, State)> =
            self.at.iter().copied().zip(self.layout.unpack(&cotangent.detach())?).collect();
        self.recorded.reverse(&cotangents)
    }
}

impl CustomOp2 for SolveNode {
    fn name(&self) -> &'static str {
        "ode-solve"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.value(|storage, layout| match storage {
            Storage::Cpu(own) => Some(own.to_dtype(layout, own.dtype())),
            _ => None,
        })
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.value(|storage, layout| match storage {
            Storage::Cuda(own) => Some(own.to_dtype(layout, own.dtype())),
            _ => None,
        })
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        self.value(|storage, layout| match storage {
            Storage::Metal(own) => Some(combine::copy_on_metal(own, layout, own.dtype())),
            _ => None,
        })
    }

    fn bwd(
        &self,
        y0: &Tensor,
        token: &Tensor,
        _: &Tensor,
        cotangent: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let Reversed { y0: lambda, sums } = self.reverse(cotangent)?;
        let of_y0 = if y0.track_op() { Some(pack(lambda.tensors())?) } else { None };
        if !token.track_op() {
            return Ok((of_y0, None));
        }
        self.cells.leave(sums);
        Ok((of_y0, Some(token.zeros_like()?)))
    }
}

/// What an argument of a token op is.
#[derive(Clone, Copy, Debug)]
enum Arg {
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

/// Hands out gradients that the solve node has left. Its value is a 0-d zero.
struct Token {
    args: Vec<Arg>,
    cells: Arc<Cells>,
}

impl Token {
    fn gradient(&self, n: usize, of: &Tensor) -> candle_core::Result<Option<Tensor>> {
        match self.args[n] {
            Arg::Token => Ok(Some(of.zeros_like()?)),
            Arg::Slot(slot) => match self.cells.take(slot) {
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

macro_rules! token_forward {
    ($($argument:ident)*) => {
        fn name(&self) -> &'static str {
            "ode-token"
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

impl CustomOp1 for Token {
    token_forward!();

    fn bwd(&self, a: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.gradient(0, a)
    }
}

impl CustomOp2 for Token {
    token_forward!(second);

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
    token_forward!(second third);

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
