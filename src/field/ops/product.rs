//! Matrix products on the CPU, for the many small ones of a vector field.
//!
//! Small ones in F32, F16 and BF16 are made by the kernels of layers, on one thread. The others have the kernels and
//! the bits of Candle's own matmul, which asks the system for the number of cores at every product: on Linux it reads
//! `/proc/cpuinfo`, for longer than a small product takes. Here the answer is kept.

mod small;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use gemm::Parallelism;
use half::f16;
use std::sync::OnceLock;

/// a·b for matrices `(m, k)` and `(k, n)` of one dtype, outside any graph.
pub(super) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() { a.apply_op2_no_bwd(b, &Product) } else { a.matmul(&b.contiguous()?) }
}

/// a·b for matrices `(m, k)` and `(k, n)` with any strides; row-major.
pub(super) fn multiply(a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<CpuStorage> {
    let ((m, k), (rows, n)) = (la.shape().dims2()?, lb.shape().dims2()?);
    if rows != k {
        bail!("a product of shapes {:?} and {:?}", la.shape(), lb.shape())
    }
    if m * n * k > 0 && cfg!(not(any(feature = "mkl", feature = "accelerate"))) {
        if let Some(product) = small::product(a, la, b, lb)? {
            return Ok(product);
        }
        match (a, b) {
            (CpuStorage::F16(a), CpuStorage::F16(b)) => {
                return run((f16::ZERO, f16::ONE), a, la, b, lb).map(CpuStorage::F16);
            }
            (CpuStorage::F32(a), CpuStorage::F32(b)) => return run((0.0, 1.0), a, la, b, lb).map(CpuStorage::F32),
            (CpuStorage::F64(a), CpuStorage::F64(b)) => return run((0.0, 1.0), a, la, b, lb).map(CpuStorage::F64),
            _ => {}
        }
    }
    use candle_core::backend::BackendStorage;
    a.matmul(b, (1, m, n, k), la, lb)
}

/// As [`multiply`]; the product is not empty, the inner dimensions agree.
fn run<T: Copy + 'static>((zero, one): (T, T), a: &[T], la: &Layout, b: &[T], lb: &Layout) -> Result<Vec<T>> {
    let ((m, k), (_, n)) = (la.shape().dims2()?, lb.shape().dims2()?);
    let (a, [a_row, a_column]) = (matrix(a, la)?, strides(la));
    let (b, [b_row, b_column]) = (matrix(b, lb)?, strides(lb));
    let mut product = vec![zero; m * n];
    // SAFETY: `product` has m·n elements, row-major. `matrix` has checked that every (row, column) of a and of b lies
    // in its slice. T is F16, F32 or F64, which gemm has kernels for. Nothing aliases: `product` is new.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            product.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            a_column,
            a_row,
            b.as_ptr(),
            b_column,
            b_row,
            zero,
            one,
            false,
            false,
            false,
            parallelism(),
        );
    }
    Ok(product)
}

/// The storage from the first element of the matrix on, with all of the matrix inside.
fn matrix<'a, T>(storage: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    let from_first: usize = layout.dims().iter().zip(layout.stride()).map(|(n, stride)| (n - 1) * stride).sum();
    match storage.get(layout.start_offset()..) {
        Some(rest) if from_first < rest.len() => Ok(rest),
        _ => bail!("a matrix of layout {layout:?} in a storage of {} elements", storage.len()),
    }
}

fn strides(layout: &Layout) -> [isize; 2] {
    [layout.stride()[0] as isize, layout.stride()[1] as isize]
}

/// Candle's choice, made once.
fn parallelism() -> Parallelism {
    static THREADS: OnceLock<usize> = OnceLock::new();
    match *THREADS.get_or_init(candle_core::utils::get_num_threads) {
        0 | 1 => Parallelism::None,
        threads => Parallelism::Rayon(threads),
    }
}

struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cpu_fwd(&self, a: &CpuStorage, la: &Layout, b: &CpuStorage, lb: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((multiply(a, la, b, lb)?, Shape::from((la.dims()[0], lb.dims()[1]))))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{distance, noise, values};
    use super::*;
    use candle_core::DType;

    #[test]
    fn it_is_right_for_any_strides() {
        for (m, k, n) in [(1, 9, 5), (5, 7, 3), (40, 7, 3), (20, 33, 130), (200, 100, 100), (300, 90, 100)] {
            let (a, b) = (noise(&[m, k], 1), noise(&[k, n], 2));
            let exact = a.matmul(&b).unwrap();
            for (dtype, bound) in [(DType::F16, 2e-3), (DType::BF16, 2e-2), (DType::F32, 1e-6), (DType::F64, 1e-15)] {
                let cast = |x: &Tensor| x.to_dtype(dtype).unwrap();
                let turned = |x: &Tensor| cast(x).t().unwrap().contiguous().unwrap().t().unwrap();
                let wider = |x: &Tensor| Tensor::cat(&[&cast(x); 2], 1).unwrap().narrow(1, 0, x.dims()[1]).unwrap();
                let forms = |x: &Tensor| [cast(x), turned(x), wider(x)];
                // What the kernels of layers leave to others has the bits of Candle's.
                let is_theirs = dtype == DType::F64 || dtype != DType::BF16 && m < 16;
                for (i, a) in forms(&a).iter().enumerate() {
                    for (j, b) in forms(&b).iter().enumerate() {
                        let product = matmul(a, b).unwrap();
                        let error = distance(&product, &exact);
                        assert!(error < bound, "{dtype:?} {m} × {k} × {n}: {error:e}");
                        if is_theirs && i.max(j) < 2 {
                            assert_eq!(values(&product), values(&a.matmul(b).unwrap()), "{dtype:?} {m} × {k} × {n}");
                        }
                    }
                }
            }
        }
        assert!(matmul(&noise(&[7, 3], 1), &noise(&[5, 7], 2)).is_err());
    }

    #[test]
    fn where_it_is_not_small_it_has_candles_bits() {
        let (a, b) = (noise(&[256, 200], 1), noise(&[200, 100], 2));
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let (a, b) = (a.to_dtype(dtype).unwrap(), b.to_dtype(dtype).unwrap());
            assert_eq!(values(&matmul(&a, &b).unwrap()), values(&a.matmul(&b).unwrap()), "{dtype:?}");
        }
    }
}
