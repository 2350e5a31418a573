//! What runs kernels and multiplies matrices: a GPU, or the host in tests.

use super::arguments::{Arguments, Element, Launch};
use candle_core::{Result, bail};

/// A GPU, or the host in tests.
pub(super) trait Machine {
    /// Memory for as long as an op runs.
    type Memory;

    /// So many bytes with anything in them.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Where it lies.
    fn address(memory: &Self::Memory) -> u64;

    /// Starts a kernel.
    ///
    /// # Safety
    /// The addresses among the arguments must be 0 where the kernel takes that for nothing, and else of memory of this
    /// machine that holds all elements which the kernel's comment speaks of.
    unsafe fn launch<A: Arguments>(&self, launch: &Launch<A>) -> Result<()>;

    /// Starts a product.
    ///
    /// # Safety
    /// The operands must be memory of this machine that holds all elements of the matrices.
    unsafe fn multiply(&self, product: &ColumnMajor) -> Result<()>;
}

/// A row-major matrix in a product, or the first of several.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub(super) at: u64,
    pub(super) element: Element,
    /// Elements from a row to the next.
    pub(super) pitch: usize,
    /// Elements from a matrix to the next; 0 for the same one in all products.
    pub(super) stride: usize,
    /// Whether the product takes its transpose.
    pub(super) transposed: bool,
}

impl Matrix {
    /// A dense matrix of rows as long as `pitch`.
    pub(super) fn new(at: u64, element: Element, pitch: usize) -> Self {
        Self { at, element, pitch, stride: 0, transposed: false }
    }

    /// Its transpose.
    pub(super) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// The first of several, so many elements apart.
    pub(super) fn every(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// What lies so many elements further on.
    pub(super) fn skip(self, elements: usize) -> Self {
        Self { at: self.at + (elements * self.element.size()) as u64, ..self }
    }
}

/// C ← α A B + β C with sums in F32, for `batch` matrices at once: A `(m, k)`, B `(k, n)`, C `(m, n)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) a: Matrix,
    pub(super) b: Matrix,
    /// In the dtype of A and B, or in F32.
    pub(super) c: Matrix,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) batch: usize,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

impl Product {
    /// C ← A B for matrices `(m, k)` and `(k, n)`.
    pub(super) fn new(a: Matrix, b: Matrix, c: Matrix, (m, n, k): (usize, usize, usize)) -> Self {
        Self { a, b, c, m, n, k, batch: 1, alpha: 1.0, beta: 0.0 }
    }

    /// The same as cuBLAS takes it, column by column: a row-major matrix is the transpose of a column-major one, and
    /// Cᵀ = Bᵀ Aᵀ.
    ///
    /// # Errors
    /// A size beyond 32 bits.
    pub(super) fn column_major(&self) -> Result<ColumnMajor> {
        let int = |size: usize| match i32::try_from(size) {
            Ok(size) => Ok(size),
            Err(_) => bail!("a product of {} × {} × {} is too large", self.m, self.n, self.k),
        };
        let operand = |matrix: &Matrix| {
            let (at, element, transposed) = (matrix.at, matrix.element, matrix.transposed);
            Ok::<_, candle_core::Error>(Operand {
                at,
                element,
                transposed,
                leading: int(matrix.pitch)?,
                stride: matrix.stride as i64,
            })
        };
        Ok(ColumnMajor {
            a: operand(&self.b)?,
            b: operand(&self.a)?,
            c: operand(&self.c)?,
            m: int(self.n)?,
            n: int(self.m)?,
            k: int(self.k)?,
            batch: int(self.batch)?,
            alpha: self.alpha,
            beta: self.beta,
        })
    }
}

/// A matrix as cuBLAS takes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) at: u64,
    pub(super) element: Element,
    pub(super) transposed: bool,
    /// Elements from a column to the next.
    pub(super) leading: i32,
    pub(super) stride: i64,
}

/// The arguments of `cublasGemmStridedBatchedEx`.
#[derive(Clone, Copy, Debug)]
pub(super) struct ColumnMajor {
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) c: Operand,
    pub(super) m: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    pub(super) batch: i32,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}
