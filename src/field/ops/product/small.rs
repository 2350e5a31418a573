//! Small products by the kernels of layers, which need neither threads nor Candle's BF16 matmul.

use crate::field::ops::cpu::{Kernel, sum, vectorised};
use crate::field::ops::kernel::{Epilogue, Held, Packed, Scratch, View, ViewMut, add_outer, multiply, transpose};
use candle_core::{CpuStorage, Layout, Result};
use half::f16;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;

/// Multiplications up to which a product is small: about 40 µs on one thread.
const MOST: usize = 1 << 21;

/// Columns of a result up to which they are dot products, one by one: they would leave most of a vector empty.
const FEW: usize = 4;

/// Rows from which on it pays to pack the right-hand side.
const ROWS: usize = 16;

/// a b for a `(m, k)` and b `(k, n)`, row-major, if it is small and lies so that there are kernels: the rows of a in
/// one piece, or, in F32, its columns and the rows of b.
pub(super) fn product(a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<Option<CpuStorage>> {
    let ((m, k), (_, n)) = (la.shape().dims2()?, lb.shape().dims2()?);
    if m * n * k > MOST {
        return Ok(None);
    }
    Ok(match (a, b) {
        (CpuStorage::F32(a), CpuStorage::F32(b)) if m >= ROWS => {
            by_rows(a, la, b, lb).or_else(|| by_columns(a, la, b, lb)).map(CpuStorage::F32)
        }
        (CpuStorage::F16(a), CpuStorage::F16(b)) if m >= ROWS => {
            let Some(a) = rows(a, la) else { return Ok(None) };
            let mut wide = vec![0.0; m * k];
            wide.chunks_exact_mut(k).enumerate().for_each(|(row, wide)| a.row(row).convert_to_f32_slice(wide));
            let product = dots_or_packed(View::new(&wide, m, k, k), n, |i, j| b[at(lb, i, j)].to_f32());
            Some(CpuStorage::F16(Vec::<f16>::from_f32_slice(&product)))
        }
        // Whatever the rows: Candle's looks up the machine's cores each time.
        (CpuStorage::BF16(a), CpuStorage::BF16(b)) => {
            let Some(a) = rows(a, la) else { return Ok(None) };
            Some(CpuStorage::BF16(packed(a, n, |i, j| b[at(lb, i, j)].to_f32())))
        }
        _ => None,
    })
}

/// A matrix whose rows are in one piece.
fn rows<'a, T>(a: &'a [T], la: &Layout) -> Option<View<'a, T>> {
    let (dims, stride) = (la.dims(), la.stride());
    let fits = stride[1] == 1 && (stride[0] >= dims[1] || dims[0] == 1);
    fits.then(|| View::new(&a[la.start_offset()..], dims[0], dims[1], stride[0].max(dims[1])))
}

fn at(layout: &Layout, i: usize, j: usize) -> usize {
    layout.start_offset() + i * layout.stride()[0] + j * layout.stride()[1]
}

fn by_rows(a: &[f32], la: &Layout, b: &[f32], lb: &Layout) -> Option<Vec<f32>> {
    Some(dots_or_packed(rows(a, la)?, lb.dims()[1], |i, j| b[at(lb, i, j)]))
}

/// a b for b `(k, n)` of those elements.
fn dots_or_packed(a: View<'_, f32>, n: usize, b: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    if n > FEW {
        return packed(a, n, b);
    }
    let columns: Vec<f32> = (0..n).flat_map(|j| (0..a.columns()).map(move |i| (i, j))).map(|(i, j)| b(i, j)).collect();
    vectorised(Dots { a, columns: &columns, n })
}

fn packed<T: Held>(a: View<'_, T>, n: usize, b: impl Fn(usize, usize) -> f32) -> Vec<T> {
    let (m, mut product) = (a.rows(), vec![T::default(); a.rows() * n]);
    let b = Packed::pack(a.columns(), n, b);
    multiply(a, &b, &Epilogue::default(), ViewMut::new(&mut product, m, n, n));
    product
}

/// The rows of a times `n` columns.
struct Dots<'a> {
    a: View<'a, f32>,
    columns: &'a [f32],
    n: usize,
}

impl Kernel for Dots<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run(self) -> Vec<f32> {
        let mut product = Vec::with_capacity(self.a.rows() * self.n);
        for row in 0..self.a.rows() {
            let row = self.a.row(row);
            for column in self.columns.chunks_exact(row.len()) {
                product.push(sum(row, column, |a, b| a * b));
            }
        }
        product
    }
}

/// gᵀ x, where a is gᵀ; x and g change places where x has fewer columns.
fn by_columns(a: &[f32], la: &Layout, b: &[f32], lb: &Layout) -> Option<Vec<f32>> {
    let (g, x) = (rows(a, &la.transpose(0, 1).ok()?)?, rows(b, lb)?);
    let (m, n) = (g.columns(), x.columns());
    let mut product = vec![0.0; m * n];
    if n >= m {
        add_outer(g, x, ViewMut::new(&mut product, m, n, n), &mut Scratch::default());
        return Some(product);
    }
    let mut turned = vec![0.0; n * m];
    add_outer(x, g, ViewMut::new(&mut turned, n, m, m), &mut Scratch::default());
    transpose(View::new(&turned, n, m, m), ViewMut::new(&mut product, m, n, n));
    Some(product)
}
