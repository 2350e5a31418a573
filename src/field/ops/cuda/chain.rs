//! Layers of a chain on CUDA as one op of Candle's graph: [`chain`](crate::field::ops::chain) with kernels for CUDA.
//!
//! Between layers values are held in the dtype of x. The cotangent keeps its scale on the way back, and what is added
//! to dL/dθ is divided by it: by a factor of the product where the scale is known on the host, from a number on the
//! device else. Nothing is read from the device.

use super::arguments::Element;
use super::device::{Gpu, Value, address};
use super::layer::{Layer, Pull};
use super::sums::Sum;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::chain::{Link, Parameter, Weights};
use crate::field::ops::precomputed::{Precomputed, hand_over};
use crate::field::sink;
use crate::scaling::Scale;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

/// The value of the links at a contiguous x.
pub(in crate::field::ops) fn run(links: Vec<Link>, x: &Tensor) -> Result<Tensor> {
    let (value, saved) = value(&links, &x.detach(), x.track_op())?;
    if !x.track_op() {
        return Ok(value.tensor());
    }
    x.apply_op1(OnDevice { links, saved, ready: Precomputed::on_device(value) })
}

/// By layer, its result unless it is the last, and what was activated where f′ is a function of that.
type Saved = Vec<(Option<Tensor>, Option<Tensor>)>;

struct OnDevice {
    links: Vec<Link>,
    saved: Saved,
    ready: Precomputed,
}

impl OnDevice {
    fn label(&self) -> &'static str {
        "layers"
    }
}

impl CustomOp1 for OnDevice {
    fn name(&self) -> &'static str {
        self.label()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("layers that were evaluated on CUDA")
    }

    hand_over!(ready, 1);

    fn bwd(&self, x: &Tensor, value: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        pull(&self.links, &self.saved, &x.detach(), &value.detach(), grad).map(Some)
    }
}

/// A layer with the tensors that its addresses are of.
struct Ready {
    layer: Layer,
    _tensors: [Option<Tensor>; 2],
}

impl Ready {
    fn of(link: &Link, element: Element, rows: usize) -> Result<Self> {
        let dense = |parameter: &Parameter| parameter.leaf.detach().contiguous();
        let (weight, bias, beyond) = parameters(link)?;
        let (weight, bias) = (dense(weight)?, bias.map(dense).transpose()?);
        let layer = Layer {
            element,
            rows,
            inputs: link.inputs,
            outputs: link.outputs,
            weight: address(&weight)?,
            pitch: weight.dim(1)?,
            bias: match &bias {
                Some(bias) => (address(bias)?, bias.dtype() == DType::F32),
                None => (0, false),
            },
            time: beyond.map(|t| t as f32),
            then: link.then,
        };
        Ok(Self { layer, _tensors: [Some(weight), bias] })
    }
}

/// Weight, bias and what multiplies the column beyond.
fn parameters(link: &Link) -> Result<(&Parameter, Option<&Parameter>, Option<f64>)> {
    match &link.weights {
        Weights::Parameters { weight, bias, beyond } => Ok((weight, bias.as_ref(), *beyond)),
        Weights::Gated { .. } | Weights::Given { .. } => bail!("layers with weights of the time are no chain on CUDA"),
    }
}

fn element_and_rows(links: &[Link], x: &Tensor) -> Result<(Element, usize)> {
    match (Element::of(x.dtype()), links.first()) {
        (Some(element), Some(first)) => Ok((element, x.elem_count() / first.inputs)),
        _ => bail!("no kernels for layers in {:?}", x.dtype()),
    }
}

fn value(links: &[Link], x: &Tensor, tracked: bool) -> Result<(Value, Saved)> {
    let (gpu, (element, rows)) = (Gpu::of(x)?, element_and_rows(links, x)?);
    let (mut saved, mut input) = (Saved::new(), x.clone());
    for (n, link) in links.iter().enumerate() {
        let ready = Ready::of(link, element, rows)?;
        let keeps_input = tracked && link.then.keeps() == Keeps::Input;
        let z = keeps_input.then(|| gpu.output(element, (rows, link.outputs))).transpose()?;
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = link.outputs;
        }
        let y = gpu.output(element, dims)?;
        // SAFETY: tensors of the layer's sizes on this device.
        unsafe { ready.layer.value(&gpu, address(&input)?, z.as_ref().map_or(0, Value::at), y.at())? };
        let z = z.map(Value::tensor);
        if n + 1 == links.len() {
            saved.push((None, z));
            return Ok((y, saved));
        }
        input = y.tensor();
        if tracked {
            saved.push((Some(input.clone()), z));
        }
    }
    bail!("a chain of no layers")
}

fn pull(links: &[Link], saved: &Saved, x: &Tensor, value: &Tensor, mut g: Tensor) -> Result<Tensor> {
    let (gpu, (element, rows)) = (Gpu::of(x)?, element_and_rows(links, x)?);
    let scale = sink::scale_of_cotangents();
    let (factor, inverse) = match &scale {
        Scale::Host(s) => ((1.0 / s) as f32, 0),
        Scale::Device { inverse, .. } => (1.0, address(inverse)?),
    };
    let flag = gpu.zeros(())?;
    for (n, link) in links.iter().enumerate().rev() {
        let ready = Ready::of(link, element, rows)?;
        let input = if n == 0 { x } else { saved[n - 1].0.as_ref().unwrap_or(x) };
        let kept = saved[n].1.as_ref().or(saved[n].0.as_ref()).unwrap_or(value);
        let sum_of = |parameter: &Parameter| match parameter.is_tracked() {
            true => sink::sum_of(&parameter.leaf),
            false => Ok(None),
        };
        let (weight, bias, _) = parameters(link)?;
        let (of_weight, of_bias) = (sum_of(weight)?, bias.map_or(Ok(None), sum_of)?);
        let flag_at = address(&flag)?;
        let sum = |sum: &Option<sink::Sum>| match sum {
            Some(sum) => Ok(Some(Sum { at: address(&sum.tensor)?, factor, by: inverse, flag: flag_at })),
            None => Ok::<_, candle_core::Error>(None),
        };
        let shape = if n == 0 { x.shape().clone() } else { Shape::from((rows, link.inputs)) };
        let for_x = gpu.output(element, shape)?;
        let pulled = Pull {
            x: address(input)?,
            grad: address(&g)?,
            kept: address(kept)?,
            for_x: for_x.at(),
            for_weight: sum(&of_weight)?,
            for_bias: sum(&of_bias)?,
        };
        // SAFETY: tensors of the layer's sizes on this device, and sums of those of its parameters.
        unsafe { ready.layer.pull(&gpu, &pulled)? };
        for (parameter, sum) in [(Some(weight), of_weight), (bias, of_bias)] {
            if let (Some(parameter), Some(sum)) = (parameter, sum) {
                sum.finish(&parameter.leaf)?;
            }
        }
        g = for_x.tensor();
    }
    sink::note_on_device(flag);
    Ok(g)
}
