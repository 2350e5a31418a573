//! A convolution as one op of Candle's graph, on a tile of images.
//!
//! Inside a solve on the CPU, in F32, F16 and BF16, directly or by minimal filtering ([`Method`]). Pixels are turned
//! channel by channel into a frame of zeros `(images, height, width, channels)`; the windows of a frame are then rows of
//! a matrix that is never made, since the kernels find them where they lie:
//!
//! | product | windows | by |
//! |---|---|---|
//! | y = x ∗ w + b | of x in a frame as wide as the padding | w, packed once per solve |
//! | dL/dx | of dL/dy, spread by the stride, in a frame of kernel − 1 − padding | w turned round, packed once per solve |
//! | dL/dw, added in place to the F32 sums | of x, kept from the forward pass | dL/dy |

use super::super::chain::{Compute, Order, Parameter, with_compute, with_elements};
use super::method::{Convolved, Method};
use crate::field::ops::kernel::{Held, Looks, Packed, View, ViewMut, Windows, add_column_sums, transpose};
use crate::field::session::{Buffered, Matrix, Session, Shared, Side, Tile};
use crate::field::sink;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use candle_nn::Conv2dConfig;
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

/// A convolution of images of one size.
pub(super) struct Fused {
    session: Arc<Session>,
    weight: Parameter,
    bias: Option<Parameter>,
    sizes: Sizes,
    /// The framed x, a matrix of what tiles hold; from the forward pass on.
    framed: Mutex<Option<Box<dyn Any + Send + Sync>>>,
    tracked: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    images: usize,
    /// Channels of x.
    inputs: usize,
    /// Channels of y.
    outputs: usize,
    /// Height and width of x.
    size: [usize; 2],
    /// Height and width of y.
    result: [usize; 2],
    kernel: [usize; 2],
    stride: usize,
    padding: usize,
}

impl Fused {
    /// The convolution of `x`, if kernels of ours do it: inside a solve, on the CPU, in a dtype with kernels, with stride 1
    /// or 2, without dilation and groups.
    pub(super) fn new(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, config: &Conv2dConfig) -> Option<Self> {
        let Conv2dConfig { padding, stride, dilation, groups, .. } = *config;
        let has_kernels = matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
        if !x.device().is_cpu() || !has_kernels || !matches!((stride, dilation, groups), (1 | 2, 1, 1)) {
            return None;
        }
        let (images, inputs, height, width) = x.dims4().ok()?;
        let (outputs, channels, kernel_height, kernel_width) = weight.dims4().ok()?;
        let (size, kernel) = ([height, width], [kernel_height, kernel_width]);
        let windows = |n: usize| Some((size[n] + 2 * padding).checked_sub(kernel[n])? / stride + 1);
        let sizes =
            Sizes { images, inputs, outputs, size, result: [windows(0)?, windows(1)?], kernel, stride, padding };
        if channels != inputs || x.elem_count() == 0 || weight.elem_count() == 0 {
            return None;
        }
        let current = Session::current()?;
        let (weight, bias) = Parameter::of_layer(&current, x, weight, bias)?;
        let session = current.session;
        Some(Self { session, weight, bias, sizes, framed: Mutex::default(), tracked: x.track_op() })
    }

    /// Its value.
    pub(super) fn run(self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        if self.tracked { x.apply_op1(self) } else { x.apply_op1_no_bwd(&self) }
    }

    fn value<C: Compute<Held: Convolved>>(&self, x: &[C::Stored]) -> Result<(CpuStorage, Shape)> {
        let Sizes { images, inputs, outputs, result: [height, width], .. } = self.sizes;
        let x = C::held(&self.session, Order::Rows, x, images * inputs);
        let looks = self.sizes.looks::<C::Held>();
        let framed = self.sizes.framed(&self.session, x.view(), &looks);
        let packed = self.packed::<C::Held>(Side::Forward)?;
        let bias = self.bias.as_ref().map(|bias| bias.in_f32(&self.session)).transpose()?;
        let method = self.sizes.method::<C::Held>();
        let value = self.planes::<C>([outputs, height * width], 1.0, |y| {
            C::Held::convolve(method, &self.session, Windows::new(&framed, looks), &packed, bias.as_deref(), y);
        });
        if self.tracked {
            *self.framed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(framed));
        }
        Ok((C::storage(value), Shape::from((images, outputs, height, width))))
    }

    /// Adds dL/dw and dL/db to the open sums, and gives dL/dx.
    fn pull<C: Compute<Held: Convolved>>(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Sizes { images, inputs, outputs, size: [height, width], .. } = self.sizes;
        let framed = self.framed.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(framed) = framed.as_ref().and_then(|framed| framed.downcast_ref::<Matrix<C::Held>>()) else {
            bail!("a convolution pulls back what it has evaluated")
        };
        let scale = sink::scale()? as f32;
        let g = with_elements::<C::Stored, _>(grad, |grad| {
            let grad = C::held(&self.session, Order::Rows, grad, images * outputs);
            let mut g = self.sizes.pixels(&self.session, grad.view());
            multiply_by(&mut g, scale.recip());
            Ok(g)
        })?;
        self.add_gradients(g.view(), framed)?;
        let looks = self.sizes.looks_back::<C::Held>();
        let spread = self.sizes.spread(&self.session, g.view(), &looks);
        let packed = self.packed::<C::Held>(Side::Backward)?;
        let dx = self.planes::<C>([inputs, height * width], scale, |dx| {
            let (method, windows) = (self.sizes.method::<C::Held>(), Windows::new(&spread, looks));
            C::Held::convolve(method, &self.session, windows, &packed, None, dx);
        });
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }

    /// What `fill` writes pixel by pixel, `scale` times, as Candle stores it: channel by channel.
    fn planes<C: Compute>(
        &self,
        [channels, pixels]: [usize; 2],
        scale: f32,
        fill: impl FnOnce(ViewMut<'_, C::Held>),
    ) -> Vec<C::Stored> {
        let images = self.sizes.images;
        let mut tile = C::Held::spare(&self.session).matrix(images * pixels, channels);
        fill(ViewMut::new(&mut tile, images * pixels, channels, channels));
        multiply_by(&mut tile, scale);
        C::stored(&self.session, Order::Rows, [images * channels, pixels], |planes| {
            for (n, image) in planes.chunks_exact_mut(channels * pixels).enumerate() {
                let from = tile.view().part(n * pixels..(n + 1) * pixels, 0..channels);
                transpose(from, ViewMut::new(image, channels, pixels, pixels));
            }
        })
    }

    /// dw += gᵀ windows and db += Σ g, for those of the two that are tracked.
    fn add_gradients<T: Convolved>(&self, g: View<'_, T>, framed: &Matrix<T>) -> Result<()> {
        let tracked = |parameter: &&Parameter| parameter.is_tracked();
        let (weight, bias) = (Some(&self.weight).filter(tracked), self.bias.as_ref().filter(tracked));
        if weight.is_none() && bias.is_none() {
            return Ok(());
        }
        let Sizes { inputs, outputs, .. } = self.sizes;
        let mut sums = f32::spare(&self.session).matrix(1, outputs);
        sums.fill(0.0);
        add_column_sums(g, &mut sums);
        // A cotangent that is not finite shows in its sums.
        sink::note(sums.iter().all(|sum| sum.is_finite()));
        if let Some(weight) = weight {
            let (looks, taps) = (self.sizes.looks::<T>(), self.sizes.taps());
            let columns = taps * looks.channels;
            let mut dw = f32::spare(&self.session).matrix(outputs, columns);
            dw.fill(0.0);
            let to = ViewMut::new(&mut dw, outputs, columns, columns);
            let windows = Windows::new(framed, looks);
            T::add_outer(self.sizes.method::<T>(), &self.session, g, windows, to);
            sink::add_in_place(&weight.leaf, |sum| {
                for (sum, dw) in sum.chunks_exact_mut(inputs * taps).zip(dw.chunks_exact(columns)) {
                    for (channel, sum) in sum.chunks_exact_mut(taps).enumerate() {
                        let dw = dw[channel..].iter().step_by(looks.channels);
                        sum.iter_mut().zip(dw).for_each(|(sum, dw)| *sum += dw);
                    }
                }
            })?;
        }
        bias.map_or(Ok(()), |bias| bias.add(&sums))
    }

    /// w as the right-hand operand of the products on one side: by row and column of the kernel, or point, and by channel.
    fn packed<T: Convolved>(&self, side: Side) -> Result<Arc<Shared<T>>> {
        let Sizes { inputs, outputs, .. } = self.sizes;
        let (taps, slot, method) = (self.sizes.taps(), self.weight.slot, self.sizes.method::<T>());
        let points = method.points(taps);
        self.weight.with_floats(|w| {
            let at = |output: usize, input: usize, tap: usize| w((output * inputs + input) * taps + tap);
            // The same weight may be packed for both methods: the number of points tells them apart.
            self.session.packed((slot, points * inputs, side), |side| match side {
                Side::Forward => {
                    let channels = self.sizes.looks::<T>().channels;
                    Packed::pack(points * channels, outputs, |k, output| {
                        let (point, input) = (k / channels, k % channels);
                        if input < inputs { method.of_kernel(point, |tap| at(output, input, tap)) } else { 0.0 }
                    })
                }
                Side::Backward => {
                    let channels = self.sizes.looks_back::<T>().channels;
                    Packed::pack(points * channels, inputs, |k, input| {
                        let (point, output) = (k / channels, k % channels);
                        let turned = |tap: usize| at(output, input, taps - 1 - tap);
                        if output < outputs { method.of_kernel(point, turned) } else { 0.0 }
                    })
                }
            })
        })
    }
}

impl Sizes {
    /// How products are made, on the way forward and on the way back: with one pixel from window to window x and dL/dy
    /// have even sides both, or neither, whatever their sizes.
    fn method<T: Convolved>(&self) -> Method {
        T::method(&self.looks::<T>(), self.outputs)
    }

    /// Elements of the kernel in one channel.
    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// The windows of x in its frame.
    fn looks<T: Held>(&self) -> Looks {
        let Self { images, inputs, size, result, kernel, stride, padding, .. } = *self;
        let channels = inputs.next_multiple_of(T::DEPTH);
        Looks { images, size: size.map(|n| n + 2 * padding), channels, kernel, stride, windows: result }
    }

    /// The windows of dL/dy in its frame.
    fn looks_back<T: Held>(&self) -> Looks {
        let Self { images, outputs, size, kernel, .. } = *self;
        let channels = outputs.next_multiple_of(T::DEPTH);
        let framed = [size[0] + kernel[0] - 1, size[1] + kernel[1] - 1];
        Looks { images, size: framed, channels, kernel, stride: 1, windows: size }
    }

    /// x, whose planes are given, pixel by pixel in its frame of zeros.
    fn framed<T: Tile>(&self, session: &Session, planes: View<'_, T>, looks: &Looks) -> Matrix<T> {
        let Self { images, inputs, size: [height, width], padding, .. } = *self;
        let Looks { size, channels, .. } = *looks;
        let mut framed = T::spare(session).matrix(images * size[0] * size[1], channels);
        framed.fill(T::default());
        for image in 0..images {
            for y in 0..height {
                let line = planes.part(image * inputs..(image + 1) * inputs, y * width..(y + 1) * width);
                let start = (image * size[0] + y + padding) * size[1] + padding;
                transpose(line, ViewMut::new(&mut framed[start * channels..], width, inputs, channels));
            }
        }
        framed
    }

    /// dL/dy, whose planes are given, pixel by pixel; lines are filled up with zeros as kernels want them.
    fn pixels<T: Tile>(&self, session: &Session, planes: View<'_, T>) -> Matrix<T> {
        let Self { images, outputs, result: [height, width], .. } = *self;
        let filled = width.next_multiple_of(T::DEPTH);
        let mut pixels = T::spare(session).matrix(images * height * filled, outputs);
        if filled != width {
            pixels.fill(T::default());
        }
        // Lines without gaps are one line.
        let (lines, width) = if filled == width { (1, height * width) } else { (height, width) };
        let filled = filled * height / lines;
        for (n, to) in pixels.chunks_exact_mut(filled * outputs).enumerate() {
            let (image, y) = (n / lines, n % lines);
            let line = planes.part(image * outputs..(image + 1) * outputs, y * width..(y + 1) * width);
            transpose(line, ViewMut::new(to, width, outputs, outputs));
        }
        pixels
    }

    /// The [`pixels`](Self::pixels) of dL/dy in their frame, as far apart as the windows of x were.
    fn spread<T: Tile>(&self, session: &Session, pixels: View<'_, T>, looks: &Looks) -> Matrix<T> {
        let Self { images, outputs, result: [height, width], kernel, stride, padding, .. } = *self;
        let Looks { size, channels, .. } = *looks;
        let filled = width.next_multiple_of(T::DEPTH);
        let mut spread = T::spare(session).matrix(images * size[0] * size[1], channels);
        spread.fill(T::default());
        // Windows in the padding alone give x nothing.
        let place = |n: usize, at: usize| (at * stride + kernel[n] - 1).checked_sub(padding).filter(|&at| at < size[n]);
        for line in 0..images * height {
            let Some(y) = place(0, line % height) else { continue };
            for x in 0..width {
                let Some(to) = place(1, x) else { continue };
                let to = ((line / height * size[0] + y) * size[1] + to) * channels;
                spread[to..to + outputs].copy_from_slice(pixels.row(line * filled + x));
            }
        }
        spread
    }
}

fn multiply_by<T: Held>(values: &mut [T], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|value| *value = T::of(value.wide() * factor));
    }
}

impl CustomOp1 for Fused {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("kernels of conv2d take a contiguous tensor") };
        with_compute!(x.dtype(), false, C => {
            self.value::<C>(&<C as Compute>::Stored::cpu_storage_as_slice(x)?[from..to])
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.detach().contiguous()?;
        with_compute!(x.dtype(), false, C => self.pull::<C>(x, &grad))
    }
}
