//! The arguments of the kernels, field by field as the structs of the `.cu` files, and in what blocks they run.
//!
//! Addresses are those of contiguous tensors on the device; 0 stands for what is left out.

use crate::field::ops::Activation;
use crate::field::ops::norm::Norm;
use crate::field::ops::rows::{Code, rows};
use candle_core::{DType, Shape};

/// A dtype with kernels; the numbers are those of `Element` in `element.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F32,
    F16,
    BF16,
}

impl Element {
    pub(super) fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }

    /// Bytes of an element.
    pub(super) fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "_f32",
            Self::F16 => "_f16",
            Self::BF16 => "_bf16",
        }
    }
}

/// The file a kernel is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Module {
    Activation,
    Sums,
    Combine,
    Convolution,
    Planar,
    Norm,
    Rows,
}

/// A kernel and all that it is started with.
#[derive(Clone, Debug)]
pub(super) struct Launch<A> {
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) module: Module,
    pub(super) kernel: String,
    pub(super) blocks: [u32; 3],
    pub(super) threads: [u32; 3],
    pub(super) arguments: A,
}

impl<A> Launch<A> {
    fn new(module: Module, kernel: &str, element: Option<Element>, arguments: A) -> Self {
        let kernel = format!("{kernel}{}", element.map_or("", Element::suffix));
        Self { module, kernel, blocks: [1; 3], threads: [256, 1, 1], arguments }
    }

    /// A thread for each of `count` elements, up to so many that each takes several.
    fn over(mut self, count: u32) -> Self {
        self.blocks[0] = count.div_ceil(256).clamp(1, 1 << 16);
        self
    }
}

/// A struct that a kernel takes as its only argument.
///
/// # Safety
/// It must be laid out as the struct that its kernels are declared with.
pub(super) unsafe trait Arguments: Copy {}

macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub(super) struct $name { $(pub(super) $field: $type),* }

        // SAFETY: `repr(C)`, with the fields of the struct of the same name in the `.cu` files, in their order; the
        // tests run every kernel on the host with it.
        unsafe impl Arguments for $name {}
    )*};
}

arguments! {
    /// y = f⁽ⁿ⁾(z) · v · w, z = x + b + t · beyond.
    Activate {
        x: u64, bias: u64, beyond: u64, v: u64, w: u64, z: u64, y: u64,
        count: u32, channels: u32, inner: u32, pitch: u32,
        function: i32, order: i32, bias_is_f32: i32, alpha: f32, t: f32,
    }
    /// pulled = grad · f′, and its sums over chunks of rows.
    PullColumns {
        grad: u64, kept: u64, pulled: u64, partial: u64,
        rows: u32, columns: u32, chunk: u32, function: i32, alpha: f32,
    }
    /// The sums of the channels of images, over chunks of images.
    SumChannels { x: u64, partial: u64, rows: u32, channels: u32, inner: u32, chunk: u32 }
    /// sum += factor · by · also · Σ rows of x.
    AddRows {
        x: u64, by: u64, also: u64, sum: u64, flag: u64,
        rows: u32, count: u32, width: u32, pitch: u32, factor: f32,
    }
    /// c · x
    Term { x: u64, element: i32, c: f32 }
    /// y = base + by · Σ terms.
    Combine {
        terms: [Term; Combine::TERMS], base: u64, by: u64, y: u64, flag: u64,
        count: u32, length: i32, base_element: i32, element: i32,
    }
    /// What is looked for in x.
    Look { x: u64, result: u64, count: u32, element: i32 }
    /// The scale that brings the largest number into (½, 1].
    PowerOfTwo { largest: u64, scale: u64, inverse: u64, headroom: i32, lowest: i32, highest: i32 }
    /// Images and the columns of their windows.
    Windows {
        from: u64, to: u64,
        images: u32, channels: u32, height: u32, width: u32, kernel_height: u32, kernel_width: u32,
        out_height: u32, out_width: u32, step: u32, padding: u32, dilation: u32,
    }
    /// Planar units and their pullback.
    PlanarUnits {
        z: u64, units: u64, grad: u64, both: u64, of_z: u64, partial: u64,
        rows: u32, dim: u32, count: u32, chunk: u32, function: i32, alpha: f32,
    }
    /// Normalised groups and their pullback.
    NormGroups {
        x: u64, weight: u64, bias: u64, grad: u64, y: u64, of_x: u64, standards: u64, partial: u64,
        samples: u32, per_sample: u32, channels: u32, inner: u32, chunk: u32,
        remove_mean: i32, weight_is_f32: i32, bias_is_f32: i32, eps: f32,
    }
    /// Rows in few bits, and increments that are kept so.
    CodedRows {
        before: u64, after: u64, left: u64, sums: u64, largest: u64, codes: u64, scales: u64, next: u64, left_over: u64,
        flag: u64, rows: u32, width: u32, chunk: u32, code: i32, most: f32,
    }
}

impl Activate {
    /// y = f⁽ⁿ⁾(x) for `count` elements.
    pub(super) fn new((activation, order): (Activation, u32), x: u64, y: u64, count: u32) -> Self {
        let (function, alpha) = function(activation);
        Self {
            x,
            bias: 0,
            beyond: 0,
            v: 0,
            w: 0,
            z: 0,
            y,
            count,
            channels: 1,
            inner: 1,
            pitch: 1,
            function,
            order: order as i32,
            bias_is_f32: 0,
            alpha,
            t: 0.0,
        }
    }

    pub(super) fn launch(self, element: Element) -> Launch<Self> {
        Launch::new(Module::Activation, "activate", Some(element), self).over(self.count)
    }
}

/// Rows of a chunk, so that there are not too few blocks for a GPU nor too many partial sums.
fn chunk(rows: u32) -> u32 {
    rows.div_ceil(64).max(32)
}

/// The same for rows that have `inner` elements for a block.
fn chunk_of_images(rows: u32, inner: u32) -> u32 {
    // A thread should find several elements in its chunk.
    rows.div_ceil(64).max(2048_u32.div_ceil(inner))
}

impl PullColumns {
    pub(super) fn new(grad: u64, (rows, columns): (u32, u32), activation: Activation) -> Self {
        let (function, alpha) = function(activation);
        Self { grad, kept: 0, pulled: 0, partial: 0, rows, columns, chunk: chunk(rows), function, alpha }
    }

    /// How many rows of partial sums there are.
    pub(super) fn chunks(&self) -> u32 {
        self.rows.div_ceil(self.chunk)
    }

    pub(super) fn launch(self, element: Element) -> Launch<Self> {
        let blocks = [self.columns.div_ceil(32), self.chunks(), 1];
        Launch { blocks, threads: [32, 8, 1], ..Launch::new(Module::Sums, "pull_columns", Some(element), self) }
    }
}

impl SumChannels {
    pub(super) fn new(x: u64, (rows, channels, inner): (u32, u32, u32)) -> Self {
        Self { x, partial: 0, rows, channels, inner, chunk: chunk_of_images(rows, inner) }
    }

    /// How many rows of partial sums there are.
    pub(super) fn chunks(&self) -> u32 {
        self.rows.div_ceil(self.chunk)
    }

    pub(super) fn launch(self, element: Element) -> Launch<Self> {
        let blocks = [self.channels, self.chunks(), 1];
        Launch { blocks, ..Launch::new(Module::Sums, "sum_channels", Some(element), self) }
    }
}

impl AddRows {
    /// sum += Σ rows of x, both dense.
    pub(super) fn new(x: u64, sum: u64, (rows, count): (u32, u32)) -> Self {
        Self { x, by: 0, also: 0, sum, flag: 0, rows, count, width: count, pitch: count, factor: 1.0 }
    }

    pub(super) fn launch(self, element: Element) -> Launch<Self> {
        Launch::new(Module::Sums, "add_rows", Some(element), self).over(self.count)
    }
}

impl Combine {
    /// The most terms of one launch.
    pub(super) const TERMS: usize = 16;

    pub(super) fn launch(self) -> Launch<Self> {
        Launch::new(Module::Combine, "combine", None, self).over(self.count)
    }
}

impl Look {
    pub(super) fn find_non_finite(self) -> Launch<Self> {
        Launch::new(Module::Combine, "find_non_finite", None, self).over(self.count)
    }

    pub(super) fn max_abs(self) -> Launch<Self> {
        let launch = Launch::new(Module::Combine, "max_abs", None, self).over(self.count);
        // Each block ends with an atomic operation on the one result.
        Launch { blocks: [launch.blocks[0].min(1024), 1, 1], ..launch }
    }
}

impl PowerOfTwo {
    pub(super) fn launch(self) -> Launch<Self> {
        Launch { threads: [1; 3], ..Launch::new(Module::Combine, "power_of_two", None, self) }
    }
}

impl Windows {
    fn places(&self) -> u32 {
        self.out_height * self.out_width
    }

    /// Rows of the columns of an image.
    pub(super) fn depth(&self) -> u32 {
        self.channels * self.kernel_height * self.kernel_width
    }

    /// Elements of the columns of an image.
    pub(super) fn column_elements(&self) -> u32 {
        self.depth() * self.places()
    }

    pub(super) fn to_columns(self, element: Element) -> Launch<Self> {
        let count = self.images * self.column_elements();
        Launch::new(Module::Convolution, "to_columns", Some(element), self).over(count)
    }

    pub(super) fn to_images(self, element: Element) -> Launch<Self> {
        let count = self.images * self.channels * self.height * self.width;
        Launch::new(Module::Convolution, "from_columns", Some(element), self).over(count)
    }
}

impl PlanarUnits {
    /// Dimensions up to which there are kernels.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) const MOST: usize = 8;

    /// Units at points, of sizes (rows, dim, count).
    pub(super) fn new((rows, dim, count): (u32, u32, u32), activation: Activation) -> Self {
        let (function, alpha) = function(activation);
        let chunk = chunk(rows);
        Self { z: 0, units: 0, grad: 0, both: 0, of_z: 0, partial: 0, rows, dim, count, chunk, function, alpha }
    }

    /// How many rows of partial sums there are.
    pub(super) fn chunks(&self) -> u32 {
        self.rows.div_ceil(self.chunk)
    }

    pub(super) fn value(self, element: Element) -> Launch<Self> {
        self.over("planar", element, [self.rows.div_ceil(8), 1, 1])
    }

    pub(super) fn pull_points(self, element: Element) -> Launch<Self> {
        self.over("pull_points", element, [self.rows.div_ceil(8), 1, 1])
    }

    pub(super) fn pull_units(self, element: Element) -> Launch<Self> {
        self.over("pull_units", element, [self.count.div_ceil(32), self.chunks(), 1])
    }

    fn over(self, kernel: &str, element: Element, blocks: [u32; 3]) -> Launch<Self> {
        Launch { blocks, threads: [32, 8, 1], ..Launch::new(Module::Planar, kernel, Some(element), self) }
    }
}

impl NormGroups {
    /// Bytes of what a group is normalised with.
    pub(super) const STANDARD: usize = 12;

    /// The groups of an x of so many elements.
    pub(super) fn new(norm: &Norm, elements: usize) -> Self {
        let samples = elements / (norm.groups.per_sample * norm.groups.size());
        let [samples, per_sample, channels, inner] =
            [samples, norm.groups.per_sample, norm.groups.channels, norm.groups.inner].map(|size| size as u32);
        Self {
            x: 0,
            weight: 0,
            bias: 0,
            grad: 0,
            y: 0,
            of_x: 0,
            standards: 0,
            partial: 0,
            samples,
            per_sample,
            channels,
            inner,
            chunk: if inner == 1 { chunk(samples) } else { chunk_of_images(samples, inner) },
            remove_mean: i32::from(norm.remove_mean),
            weight_is_f32: 0,
            bias_is_f32: 0,
            eps: norm.eps as f32,
        }
    }

    pub(super) fn groups(&self) -> u32 {
        self.samples * self.per_sample
    }

    /// Elements of the weight.
    pub(super) fn parameters(&self) -> u32 {
        self.per_sample * self.channels
    }

    /// How many rows of partial sums there are.
    pub(super) fn chunks(&self) -> u32 {
        self.samples.div_ceil(self.chunk)
    }

    pub(super) fn value(self, element: Element) -> Launch<Self> {
        self.over_groups("normalise", element)
    }

    pub(super) fn pull_groups(self, element: Element) -> Launch<Self> {
        self.over_groups("pull_groups", element)
    }

    fn over_groups(self, kernel: &str, element: Element) -> Launch<Self> {
        let (threads, blocks) = rows_of_threads(self.channels * self.inner, self.groups());
        Launch { blocks: [blocks, 1, 1], threads, ..Launch::new(Module::Norm, kernel, Some(element), self) }
    }

    /// Threads beside each other read elements beside each other: of several parameters, or of one.
    pub(super) fn sum_parameters(self, element: Element) -> Launch<Self> {
        let width = if self.inner == 1 { 32 } else { 1 };
        let blocks = [self.parameters().div_ceil(width), self.chunks(), 1];
        let launch = Launch::new(Module::Norm, "sum_parameters", Some(element), self);
        Launch { blocks, threads: [width, 256 / width, 1], ..launch }
    }
}

impl CodedRows {
    /// The rows of a tensor of that shape.
    pub(super) fn new(code: Code, shape: &Shape) -> Self {
        let (rows, width) = rows(shape);
        let (rows, width) = (rows as u32, width as u32);
        Self {
            before: 0,
            after: 0,
            left: 0,
            sums: 0,
            largest: 0,
            codes: 0,
            scales: 0,
            next: 0,
            left_over: 0,
            flag: 0,
            rows,
            width,
            // No more blocks than a grid is high.
            chunk: width.div_ceil(1 << 15).max(4096),
            code: code as i32,
            most: code.largest() as f32,
        }
    }

    /// What is encoded is x.
    pub(super) fn of(self, x: u64) -> Self {
        Self { after: x, ..self }
    }

    /// What is encoded is what leads from `before` to `after`, and what is `left`, if anything is. It leads on to `next`
    /// with something `left_over`.
    pub(super) fn following(self, [before, after]: [u64; 2], left: Option<u64>, [next, left_over]: [u64; 2]) -> Self {
        Self { before, after, left: left.unwrap_or(0), sums: left_over, next, left_over, ..self }
    }

    pub(super) fn sum(self) -> Launch<Self> {
        self.over_rows("sum_rows", self.width)
    }

    pub(super) fn encode(self) -> Launch<Self> {
        let columns = if self.code == Code::Nibble as i32 { self.width.div_ceil(2) } else { self.width };
        self.over_rows("encode_rows", columns)
    }

    pub(super) fn decode(self) -> Launch<Self> {
        self.over_rows("decode_rows", self.width)
    }

    /// A thread for each of so many things in a row.
    fn over_rows(self, kernel: &str, count: u32) -> Launch<Self> {
        let (threads, rows) = rows_of_threads(count, self.rows);
        let blocks = [rows, count.div_ceil(self.chunk), 1];
        Launch { blocks, threads, ..Launch::new(Module::Rows, kernel, None, self) }
    }
}

/// Rows of threads for so many rows of elements, and how many blocks that is: short rows, of which a thread would find
/// few elements, share a block.
fn rows_of_threads(width: u32, rows: u32) -> ([u32; 3], u32) {
    let wide = if width <= 512 { 32 } else { 256 };
    ([wide, 256 / wide, 1], rows.div_ceil(256 / wide))
}

/// An activation as the kernels know it, with its parameter; the numbers are those of `Function` in `functions.cuh`.
fn function(activation: Activation) -> (i32, f32) {
    match activation {
        Activation::Tanh => (0, 0.0),
        Activation::Sigmoid => (1, 0.0),
        Activation::Softplus => (2, 0.0),
        Activation::Silu => (3, 0.0),
        Activation::Gelu => (4, 0.0),
        Activation::Relu => (5, 0.0),
        Activation::Elu(alpha) => (6, alpha as f32),
        Activation::Sin => (7, 0.0),
        Activation::Cos => (8, 0.0),
        Activation::LogCosh => (9, 0.0),
        Activation::Identity => (10, 0.0),
    }
}
