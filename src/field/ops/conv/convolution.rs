//! One convolution of a chain: its products, and the frames that they find their operands in.

use super::frame::Frame;
use super::method::{Convolved, Method};
use super::{Conv2d, windows};
use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use crate::field::ops::chain::Parameter;
use crate::field::ops::kernel::{Held, Packed, View, ViewMut, Windows, add_column_sums};
use crate::field::session::{Buffered, Current, Matrix, Session, Shared, Side, Tile};
use crate::field::sink;
use candle_core::{Result, Tensor};
use candle_nn::Conv2dConfig;
use std::sync::Arc;

/// A convolution of images of one size, and what is done with its result.
#[derive(Clone, Debug)]
pub(in crate::field::ops) struct Convolution {
    weight: Parameter,
    bias: Option<Parameter>,
    sizes: Sizes,
    /// The time, if that is the channel beyond those of x.
    pub(super) time: Option<f64>,
    pub(super) then: Activation,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Channels of x.
    inputs: usize,
    /// Channels of w: one more where the time is the last.
    depth: usize,
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

impl Convolution {
    /// The convolution of images `(channels, height, width)`, perhaps with a time on the channel beyond, if kernels of
    /// ours do it: with stride 1 or 2, without dilation and groups. `x` is what the chain begins with.
    pub(in crate::field::ops) fn new(
        current: &Current,
        x: &Tensor,
        [inputs, height, width]: [usize; 3],
        layer: &Conv2d,
        time: Option<f64>,
    ) -> Option<Self> {
        let (weight, config) = (layer.weight(), layer.config());
        let Conv2dConfig { padding, stride, dilation, groups, .. } = *config;
        let of_weight @ [outputs, depth, kernel_height, kernel_width] = weight.dims4().ok()?.into();
        let (size, kernel) = ([height, width], [kernel_height, kernel_width]);
        let has_kernels = x.device().is_cpu() && matches!((stride, dilation, groups), (1 | 2, 1, 1));
        if !has_kernels || depth != inputs + usize::from(time.is_some()) || weight.elem_count() == 0 {
            return None;
        }
        let result = windows([x.dim(0).ok()?, depth, height, width], of_weight, config)?;
        let sizes = Sizes { inputs, depth, outputs, size, result, kernel, stride, padding };
        let (weight, bias) = Parameter::of_layer(current, x, weight, layer.bias())?;
        Some(Self { weight, bias, sizes, time, then: Activation::Identity })
    }

    /// Channels, height and width of the images it is given.
    pub(super) fn given(&self) -> [usize; 3] {
        let Sizes { inputs, size: [height, width], .. } = self.sizes;
        [inputs, height, width]
    }

    /// Channels, height and width of those it makes.
    pub(super) fn made(&self) -> [usize; 3] {
        let Sizes { outputs, result: [height, width], .. } = self.sizes;
        [outputs, height, width]
    }

    /// So many images in the frames that it looks at.
    pub(super) fn frame<T: Held>(&self, images: usize) -> Frame {
        self.sizes.frame::<T>(images)
    }

    pub(super) fn parameters(&self) -> [Option<&Parameter>; 2] {
        [Some(&self.weight), self.bias.as_ref()]
    }

    /// Its pixels, and what was activated where f′ is a function of that and `saves` says that it is wanted.
    pub(super) fn value<T: Convolved>(
        &self,
        session: &Session,
        (images, framed): (usize, &[T]),
        saves: bool,
    ) -> Result<(Matrix<T>, Option<Matrix<T>>)> {
        let Sizes { outputs, result: [height, width], .. } = self.sizes;
        let packed = self.packed::<T>(session, Side::Forward)?;
        let bias = self.bias.as_ref().map(|bias| bias.in_f32(session)).transpose()?;
        let mut y = T::spare(session).matrix(images * height * width, outputs);
        let to = ViewMut::new(&mut y, images * height * width, outputs, outputs);
        let (windows, is_apart) = (self.sizes.windows(images, framed), self.then.keeps() == Keeps::Input);
        let then = if is_apart { Activation::Identity } else { self.then };
        T::convolve(self.sizes.method::<T>(), session, windows, &packed, (bias.as_deref(), then), to);
        if !is_apart {
            return Ok((y, None));
        }
        let kept = saves.then(|| {
            let mut kept = T::spare(session).matrix(images * height * width, outputs);
            kept.copy_from_slice(&y);
            kept
        });
        self.then.value_of_held(&mut y);
        Ok((y, kept))
    }

    /// From the cotangent of its pixels before they were activated, which is not scaled, to that of x.
    pub(super) fn pull<T: Convolved>(
        &self,
        session: &Session,
        g: Matrix<T>,
        (images, framed): (usize, &[T]),
    ) -> Result<Matrix<T>> {
        let Sizes { inputs, size: [height, width], .. } = self.sizes;
        let g = self.sizes.filled(session, images, g);
        self.add_gradients(session, g.view(), (images, framed))?;
        let frame = self.sizes.frame_back::<T>(images);
        let spread = self.sizes.spread(session, g.view(), &frame);
        drop(g);
        let packed = self.packed::<T>(session, Side::Backward)?;
        let mut dx = T::spare(session).matrix(images * height * width, inputs);
        let to = ViewMut::new(&mut dx, images * height * width, inputs, inputs);
        let windows = Windows::new(&spread, frame.looks(self.sizes.kernel, 1, self.sizes.size));
        T::convolve(self.sizes.method::<T>(), session, windows, &packed, (None, Activation::Identity), to);
        Ok(dx)
    }

    /// dw += gᵀ windows and db += Σ g, for those of the two that are tracked.
    fn add_gradients<T: Convolved>(
        &self,
        session: &Session,
        g: View<'_, T>,
        (images, framed): (usize, &[T]),
    ) -> Result<()> {
        let tracked = |parameter: &&Parameter| parameter.is_tracked();
        let (weight, bias) = (Some(&self.weight).filter(tracked), self.bias.as_ref().filter(tracked));
        if weight.is_none() && bias.is_none() {
            return Ok(());
        }
        let Sizes { depth, outputs, .. } = self.sizes;
        let mut sums = f32::spare(session).matrix(1, outputs);
        sums.fill(0.0);
        add_column_sums(g, &mut sums);
        // A cotangent that is not finite shows in its sums.
        sink::note(sums.iter().all(|sum| sum.is_finite()));
        if let Some(weight) = weight {
            let (windows, taps) = (self.sizes.windows(images, framed), self.sizes.taps());
            let channels = windows.looks().channels;
            let columns = taps * channels;
            let mut dw = f32::spare(session).matrix(outputs, columns);
            dw.fill(0.0);
            let to = ViewMut::new(&mut dw, outputs, columns, columns);
            T::add_outer(self.sizes.method::<T>(), session, g, windows, to);
            sink::add_in_place(&weight.leaf, |sum| {
                for (sum, dw) in sum.chunks_exact_mut(depth * taps).zip(dw.chunks_exact(columns)) {
                    for (tap, dw) in dw.chunks_exact(channels).enumerate() {
                        let sum = sum[tap..].iter_mut().step_by(taps);
                        sum.zip(dw).for_each(|(sum, dw)| *sum += dw);
                    }
                }
            })?;
        }
        bias.map_or(Ok(()), |bias| bias.add(&sums))
    }

    /// w as the right-hand operand of the products on one side: by row and column of the kernel, or point, and by
    /// channel.
    fn packed<T: Convolved>(&self, session: &Session, side: Side) -> Result<Arc<Shared<T>>> {
        let Sizes { inputs, depth, outputs, .. } = self.sizes;
        let (taps, slot, method) = (self.sizes.taps(), self.weight.slot, self.sizes.method::<T>());
        let points = method.points(taps);
        // The same weight may be packed for both methods: the number of points tells them apart.
        let key = (slot, points * inputs, side);
        if let Some(seen) = session.seen(key) {
            return Ok(seen);
        }
        self.weight.with_floats(|w| {
            let at = |output: usize, input: usize, tap: usize| w((output * depth + input) * taps + tap);
            session.packed(key, |side| match side {
                Side::Forward => {
                    let channels = self.sizes.frame::<T>(1).channels;
                    Packed::pack(points * channels, outputs, |k, output| {
                        let (point, input) = (k / channels, k % channels);
                        if input < depth { method.of_kernel(point, |tap| at(output, input, tap)) } else { 0.0 }
                    })
                }
                Side::Backward => {
                    let channels = self.sizes.frame_back::<T>(1).channels;
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
        T::method(&self.frame::<T>(1).looks(self.kernel, self.stride, self.result), self.outputs)
    }

    /// Elements of the kernel in one channel.
    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// x in its frame.
    fn frame<T: Held>(&self, images: usize) -> Frame {
        let Self { inputs, depth, size: [height, width], padding, .. } = *self;
        let size = self.size.map(|n| n + 2 * padding);
        let channels = depth.next_multiple_of(T::DEPTH);
        Frame { images, size, channels, at: [padding; 2], inner: [height, width, inputs], beyond: None }
    }

    /// The windows of x in its frame.
    fn windows<'a, T: Held>(&self, images: usize, framed: &'a [T]) -> Windows<'a, T> {
        Windows::new(framed, self.frame::<T>(images).looks(self.kernel, self.stride, self.result))
    }

    /// dL/dy in its frame, if it need not be spread.
    fn frame_back<T: Held>(&self, images: usize) -> Frame {
        let Self { outputs, size, result: [height, width], kernel, padding, .. } = *self;
        let channels = outputs.next_multiple_of(T::DEPTH);
        let size = [size[0] + kernel[0] - 1, size[1] + kernel[1] - 1];
        let at = kernel.map(|n| (n - 1).saturating_sub(padding));
        Frame { images, size, channels, at, inner: [height, width, outputs], beyond: None }
    }

    /// The pixels of dL/dy, each line filled up with zeros as kernels want them.
    fn filled<T: Tile>(&self, session: &Session, images: usize, pixels: Matrix<T>) -> Matrix<T> {
        let Self { outputs, result: [height, width], .. } = *self;
        let filled = width.next_multiple_of(T::DEPTH);
        if filled == width {
            return pixels;
        }
        let mut lines = T::spare(session).matrix(images * height * filled, outputs);
        lines.fill(T::default());
        let count = width * outputs;
        for (to, from) in lines.chunks_exact_mut(filled * outputs).zip(pixels.chunks_exact(count)) {
            to[..count].copy_from_slice(from);
        }
        lines
    }

    /// The [`filled`](Self::filled) pixels of dL/dy in their frame, as far apart as the windows of x were.
    fn spread<T: Tile>(&self, session: &Session, pixels: View<'_, T>, frame: &Frame) -> Matrix<T> {
        let Self { outputs, result: [height, width], kernel, stride, padding, .. } = *self;
        if stride == 1 && kernel.iter().all(|&n| padding < n) {
            return frame.of_pixels(session, pixels);
        }
        let Frame { images, size, channels, .. } = *frame;
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
