//! A 2-d convolution and its pullbacks as products with columns of windows, some images at a time.
//!
//! Shapes: x `(images, channels, height, width)`, W `(outputs, channels / groups, kernel, kernel)`,
//! y `(images, outputs, out_height, out_width)`.

use super::arguments::{Element, Windows};
use super::machine::{Machine, Matrix, Product};
use super::sums::Sum;
use candle_core::Result;

/// What the columns of windows may take, unless one image needs more.
const WORKSPACE: usize = if cfg!(test) { 4096 } else { 32 << 20 };

/// The convolution; the addresses in `windows` are not used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Convolution {
    pub(super) element: Element,
    pub(super) windows: Windows,
    pub(super) outputs: usize,
    pub(super) groups: usize,
}

impl Convolution {
    fn places(&self) -> usize {
        self.windows.out_height as usize * self.windows.out_width as usize
    }

    /// Rows of the columns that a group of outputs meets.
    fn depth(&self) -> usize {
        self.windows.depth() as usize / self.groups
    }

    fn pixels(&self) -> usize {
        (self.windows.channels * self.windows.height * self.windows.width) as usize
    }

    /// Elements of W of one group.
    fn weights(&self) -> usize {
        self.outputs / self.groups * self.depth()
    }

    /// Chunks of images, the first of each and how many, of which each takes `bytes` of workspace.
    fn chunks(&self, bytes: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let images = self.windows.images as usize;
        let size = self.chunk(bytes);
        (0..images).step_by(size).map(move |from| (from, size.min(images - from)))
    }

    fn chunk(&self, bytes: usize) -> usize {
        (WORKSPACE / bytes.max(1)).clamp(1, self.windows.images as usize)
    }

    fn columns(&self, from: u64, to: u64, images: usize) -> Windows {
        Windows { from, to, images: images as u32, ..self.windows }
    }

    /// Address of image `image` of x.
    fn image(&self, x: u64, image: usize) -> u64 {
        x + (image * self.pixels() * self.element.size()) as u64
    }

    /// Columns of a group: `(depth, places)` for each image.
    fn columns_of(&self, columns: u64, group: usize) -> Matrix {
        let stride = self.windows.column_elements() as usize;
        Matrix::new(columns, self.element, self.places()).every(stride).skip(group * self.depth() * self.places())
    }

    /// Outputs of a group from an image on: `(outputs / groups, places)` for each image.
    fn outputs_of(&self, y: u64, image: usize, group: usize) -> Matrix {
        let stride = self.outputs * self.places();
        let skipped = image * stride + group * (self.outputs / self.groups) * self.places();
        Matrix::new(y, self.element, self.places()).every(stride).skip(skipped)
    }

    /// W of a group: `(outputs / groups, depth)`.
    fn weight_of(&self, weight: u64, group: usize) -> Matrix {
        Matrix::new(weight, self.element, self.depth()).skip(group * self.weights())
    }

    /// y = x ∗ W
    ///
    /// # Safety
    /// As for [`Machine::launch`]: memory of the shapes above.
    pub(super) unsafe fn value<M: Machine>(&self, machine: &M, x: u64, weight: u64, y: u64) -> Result<()> {
        let bytes = self.windows.column_elements() as usize * self.element.size();
        let columns = machine.allocate(self.chunk(bytes) * bytes)?;
        let columns = M::address(&columns);
        for (from, images) in self.chunks(bytes) {
            let windows = self.columns(self.image(x, from), columns, images);
            // SAFETY: the caller's; the columns of so many images fit.
            unsafe { machine.launch(&windows.to_columns(self.element))? };
            for group in 0..self.groups {
                let (a, b) = (self.weight_of(weight, group), self.columns_of(columns, group));
                let sizes = (self.outputs / self.groups, self.places(), self.depth());
                let product = Product::new(a, b, self.outputs_of(y, from, group), sizes);
                let product = Product { batch: images, ..product };
                // SAFETY: as above.
                unsafe { machine.multiply(&product.column_major()?)? };
            }
        }
        Ok(())
    }

    /// dL/dx
    ///
    /// # Safety
    /// As for [`value`](Self::value), grad being of y's shape.
    pub(super) unsafe fn pull_input<M: Machine>(&self, machine: &M, grad: u64, weight: u64, for_x: u64) -> Result<()> {
        let bytes = self.windows.column_elements() as usize * self.element.size();
        let columns = machine.allocate(self.chunk(bytes) * bytes)?;
        let columns = M::address(&columns);
        for (from, images) in self.chunks(bytes) {
            for group in 0..self.groups {
                let (a, b) = (self.weight_of(weight, group).t(), self.outputs_of(grad, from, group));
                let sizes = (self.depth(), self.places(), self.outputs / self.groups);
                let product = Product { batch: images, ..Product::new(a, b, self.columns_of(columns, group), sizes) };
                // SAFETY: the caller's; the columns of so many images fit.
                unsafe { machine.multiply(&product.column_major()?)? };
            }
            let windows = self.columns(columns, self.image(for_x, from), images);
            // SAFETY: as above.
            unsafe { machine.launch(&windows.to_images(self.element))? };
        }
        Ok(())
    }

    /// dL/dW, added to its sum: products image by image in F32, added up in their order.
    ///
    /// # Safety
    /// As for [`value`](Self::value), grad being of y's shape and the sum of W's.
    pub(super) unsafe fn pull_weight<M: Machine>(&self, machine: &M, x: u64, grad: u64, sum: Sum) -> Result<()> {
        let weights = self.weights() * self.groups;
        let bytes = self.windows.column_elements() as usize * self.element.size();
        let columns = machine.allocate(self.chunk(bytes + 4 * weights) * bytes)?;
        let partial = machine.allocate(self.chunk(bytes + 4 * weights) * weights * 4)?;
        let (columns, partial) = (M::address(&columns), M::address(&partial));
        for (from, images) in self.chunks(bytes + 4 * weights) {
            let windows = self.columns(self.image(x, from), columns, images);
            // SAFETY: the caller's; the columns of so many images fit.
            unsafe { machine.launch(&windows.to_columns(self.element))? };
            for group in 0..self.groups {
                let (a, b) = (self.outputs_of(grad, from, group), self.columns_of(columns, group).t());
                let c = Matrix::new(partial, Element::F32, self.depth()).every(weights).skip(group * self.weights());
                let sizes = (self.outputs / self.groups, self.depth(), self.places());
                let product = Product { batch: images, ..Product::new(a, b, c, sizes) };
                // SAFETY: as above.
                unsafe { machine.multiply(&product.column_major()?)? };
            }
            let rows = sum.add_rows(partial, images as u32, weights as u32);
            // SAFETY: as above.
            unsafe { machine.launch(&rows.launch(Element::F32))? };
        }
        Ok(())
    }
}
