//! A linear layer with what is done with its result: y = f(z), z = x Wᵀ + b + t w, and its pullback.
//!
//! Shapes: x `(rows, inputs)`, W `(outputs, pitch)` of which the leading `inputs` columns meet x and the next one, w,
//! the time; y `(rows, outputs)`.

use super::arguments::{Activate, Element};
use super::machine::{Machine, Matrix, Product};
use super::sums::{Columns, Sum};
use crate::field::ops::Activation;
use crate::field::ops::activation::in_place::Keeps;
use candle_core::Result;

/// The layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layer {
    pub(super) element: Element,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) weight: u64,
    /// Columns of W.
    pub(super) pitch: usize,
    /// b, and whether it is in F32; 0 for none.
    pub(super) bias: (u64, bool),
    /// The time, where W has a column for it.
    pub(super) time: Option<f32>,
    pub(super) then: Activation,
}

/// What is pulled back, and where it goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pull {
    pub(super) x: u64,
    /// dL/dy.
    pub(super) grad: u64,
    /// What f′ is a function of, as [`Activation::keeps`] says.
    pub(super) kept: u64,
    /// dL/dx; 0 for nowhere.
    pub(super) for_x: u64,
    pub(super) for_weight: Option<Sum>,
    pub(super) for_bias: Option<Sum>,
}

impl Layer {
    fn matrix(&self, at: u64, pitch: usize) -> Matrix {
        Matrix::new(at, self.element, pitch)
    }

    /// y, and z where the activation keeps its input.
    ///
    /// # Safety
    /// As for [`Machine::launch`]: x, y and W of the shapes above, z of that of y.
    pub(super) unsafe fn value<M: Machine>(&self, machine: &M, x: u64, z: u64, y: u64) -> Result<()> {
        let &Self { rows, inputs, outputs, weight, pitch, .. } = self;
        let (a, b) = (self.matrix(x, inputs), self.matrix(weight, pitch).t());
        let product = Product::new(a, b, self.matrix(y, outputs), (rows, outputs, inputs));
        // SAFETY: the caller's.
        unsafe { machine.multiply(&product.column_major()?)? };
        let keeps_input = self.then.keeps() == Keeps::Input && z != 0;
        if self.bias.0 == 0 && self.time.is_none() && self.then == Activation::Identity {
            return Ok(());
        }
        let mut epilogue = Activate::new((self.then, 0), y, y, (rows * outputs) as u32);
        epilogue.channels = outputs as u32;
        (epilogue.bias, epilogue.bias_is_f32) = (self.bias.0, i32::from(self.bias.1));
        if let Some(t) = self.time {
            epilogue.t = t;
            (epilogue.beyond, epilogue.pitch) = (self.matrix(weight, pitch).skip(inputs).at, pitch as u32);
        }
        if keeps_input {
            epilogue.z = z;
        }
        // SAFETY: the caller's; y is as large as the epilogue takes it to be, and W has the column beyond.
        unsafe { machine.launch(&epilogue.launch(self.element)) }
    }

    /// dL/dx, and dL/dW and dL/db added to their sums.
    ///
    /// # Safety
    /// As for [`Machine::launch`]: x, grad and what was kept of the shapes above, the sums of those of W and b.
    pub(super) unsafe fn pull<M: Machine>(&self, machine: &M, pull: &Pull) -> Result<()> {
        let &Self { element, rows, inputs, outputs, weight, pitch, .. } = self;
        let activated = self.then != Activation::Identity;
        let pulled = activated.then(|| machine.allocate(rows * outputs * element.size())).transpose()?;
        let g = pulled.as_ref().map_or(pull.grad, M::address);
        let columns = Columns {
            grad: pull.grad,
            rows: rows as u32,
            columns: outputs as u32,
            activation: self.then,
            kept: if activated { pull.kept } else { 0 },
            pulled: if activated { g } else { 0 },
        };
        if activated || pull.for_weight.is_some() || pull.for_bias.is_some() {
            // SAFETY: the caller's; g is as large as grad.
            let (partial, chunks) = unsafe { columns.pull(machine, element)? };
            let partial = M::address(&partial);
            let beyond = pull.for_weight.zip(self.time).map(|(sum, t)| {
                let at = Matrix::new(sum.at, Element::F32, pitch).skip(inputs).at;
                let rows = sum.add_rows(partial, chunks, outputs as u32);
                super::arguments::AddRows { sum: at, factor: sum.factor * t, width: 1, pitch: pitch as u32, ..rows }
            });
            // A cotangent that is not finite shows in its sums, whether they are wanted or not.
            let flag_alone = pull.for_weight.map(|sum| Sum { at: 0, ..sum });
            let of_bias = pull.for_bias.or(flag_alone).map(|sum| sum.add_rows(partial, chunks, outputs as u32));
            for rows in of_bias.into_iter().chain(beyond) {
                // SAFETY: the caller's; the partial sums are as many.
                unsafe { machine.launch(&rows.launch(Element::F32))? };
            }
        }
        if let Some(sum) = pull.for_weight {
            // SAFETY: the caller's.
            unsafe { self.add_outer(machine, g, pull.x, sum)? };
        }
        if pull.for_x != 0 {
            let (a, b) = (self.matrix(g, outputs), self.matrix(weight, pitch));
            let product = Product::new(a, b, self.matrix(pull.for_x, inputs), (rows, inputs, outputs));
            // SAFETY: the caller's.
            unsafe { machine.multiply(&product.column_major()?)? };
        }
        Ok(())
    }

    /// dW += gᵀ x: straight into the sum where its factor is known on the host.
    unsafe fn add_outer<M: Machine>(&self, machine: &M, g: u64, x: u64, sum: Sum) -> Result<()> {
        let &Self { rows, inputs, outputs, pitch, .. } = self;
        let (a, b) = (self.matrix(g, outputs).t(), self.matrix(x, inputs));
        let into = |c| Product::new(a, b, c, (outputs, inputs, rows));
        if sum.by == 0 {
            let product = into(Matrix::new(sum.at, Element::F32, pitch));
            let product = Product { alpha: sum.factor, beta: 1.0, ..product };
            // SAFETY: the caller's.
            return unsafe { machine.multiply(&product.column_major()?) };
        }
        let made = machine.allocate(outputs * inputs * 4)?;
        let product = into(Matrix::new(M::address(&made), Element::F32, inputs));
        let added = sum.add_rows(M::address(&made), 1, (outputs * inputs) as u32);
        let added = super::arguments::AddRows { width: inputs as u32, pitch: pitch as u32, ..added };
        // SAFETY: the caller's; the product is as large as its memory.
        unsafe {
            machine.multiply(&product.column_major()?)?;
            machine.launch(&added.launch(Element::F32))
        }
    }
}
