//! The kernels on the host: compiled by the C++ compiler at hand, with blocks of coroutines (`host.h`), and products
//! made as cuBLAS would make them.

use super::arguments::{Arguments, Element, Launch};
use super::machine::{ColumnMajor, Machine, Operand};
use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use std::process::Command;
use std::sync::OnceLock;

/// The host, with all kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Host(&'static libloading::Library);

impl Host {
    /// The kernels, compiled once; `None`, with the reason printed, where that cannot be tried.
    pub(super) fn new() -> Option<Self> {
        static KERNELS: OnceLock<Option<libloading::Library>> = OnceLock::new();
        let kernels = KERNELS.get_or_init(|| {
            if !cfg!(target_os = "linux") {
                println!("skipped: the kernels run on the host on Linux alone");
                return None;
            }
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/field/ops/cuda");
            let out = tempfile::tempdir().unwrap();
            let library = out.path().join("kernels.so");
            let mut command = Command::new(&compiler);
            command.args(["-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o"]);
            command.arg(&library).current_dir(folder);
            command.args([
                "activation.cu",
                "sums.cu",
                "combine.cu",
                "convolution.cu",
                "planar.cu",
                "norm.cu",
                "rows.cu",
            ]);
            let output = match command.output() {
                Ok(output) => output,
                Err(error) => {
                    println!("skipped: no C++ compiler `{compiler}` ({error})");
                    return None;
                }
            };
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            // SAFETY: what was compiled above, whose initialisers have no conditions.
            Some(unsafe { libloading::Library::new(&library) }.unwrap())
        });
        kernels.as_ref().map(Self)
    }
}

/// Memory that was nothing but NaN at first, with an end that must stay as it is.
#[derive(Debug)]
pub(super) struct Buffer(Vec<u64>);

const GUARD: [u64; 8] = [0xA5A5_A5A5_A5A5_A5A5; 8];

impl Buffer {
    pub(super) fn new(bytes: usize) -> Self {
        let mut words = vec![u64::MAX; bytes.div_ceil(8)];
        words.extend(GUARD);
        Self(words)
    }

    /// The elements of a tensor.
    pub(super) fn of(x: &Tensor) -> Self {
        let x = x.contiguous().unwrap().flatten_all().unwrap();
        let bytes: Vec<u8> = match x.dtype() {
            DType::F32 => x.to_vec1::<f32>().unwrap().into_iter().flat_map(f32::to_ne_bytes).collect(),
            DType::F16 => x.to_vec1::<f16>().unwrap().into_iter().flat_map(f16::to_ne_bytes).collect(),
            DType::U8 => x.to_vec1().unwrap(),
            _ => x.to_vec1::<bf16>().unwrap().into_iter().flat_map(bf16::to_ne_bytes).collect(),
        };
        let mut buffer = Self::new(bytes.len());
        for (word, bytes) in buffer.0.iter_mut().zip(bytes.chunks(8)) {
            let mut whole = word.to_ne_bytes();
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(whole);
        }
        buffer
    }

    pub(super) fn at(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Its first elements.
    pub(super) fn tensor(&self, dtype: DType, shape: &[usize]) -> Tensor {
        let bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let count = shape.iter().product::<usize>();
        Tensor::from_raw_buffer(&bytes[..count * dtype.size_in_bytes()], dtype, shape, &Device::Cpu).unwrap()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.0.ends_with(&GUARD), "a kernel has written beyond the end");
        }
    }
}

impl Machine for Host {
    type Memory = Buffer;

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        Ok(Buffer::new(bytes))
    }

    fn address(memory: &Buffer) -> u64 {
        memory.at()
    }

    unsafe fn launch<A: Arguments>(&self, launch: &Launch<A>) -> Result<()> {
        type Kernel<A> = unsafe extern "C" fn(*const A, *const u32, *const u32);
        // SAFETY: `host.h` declares every kernel so; the caller answers for the arguments.
        unsafe {
            let kernel = self.0.get::<Kernel<A>>(launch.kernel.as_bytes()).unwrap();
            kernel(&raw const launch.arguments, launch.blocks.as_ptr(), launch.threads.as_ptr());
        }
        Ok(())
    }

    unsafe fn multiply(&self, product: &ColumnMajor) -> Result<()> {
        let ColumnMajor { a, b, c, m, n, k, batch, alpha, beta } = *product;
        for batch in 0..i64::from(batch) {
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                // SAFETY: the caller's.
                unsafe {
                    let sum: f64 = (0..k).map(|l| element(&a, batch, i, l) * element(&b, batch, l, j)).sum();
                    let before = if beta == 0.0 { 0.0 } else { element(&c, batch, i, j) };
                    set(&c, batch, i, j, f64::from(alpha) * sum + f64::from(beta) * before);
                }
            }
        }
        Ok(())
    }
}

/// Where an element of a column-major matrix lies.
fn index(operand: &Operand, batch: i64, row: i32, column: i32) -> usize {
    let (row, column) = if operand.transposed { (column, row) } else { (row, column) };
    (batch * operand.stride + i64::from(row) + i64::from(column) * i64::from(operand.leading)) as usize
}

unsafe fn element(operand: &Operand, batch: i64, row: i32, column: i32) -> f64 {
    let index = index(operand, batch, row, column);
    // SAFETY: the caller of `multiply` answers for it.
    unsafe {
        match operand.element {
            Element::F32 => f64::from(*(operand.at as *const f32).add(index)),
            Element::F16 => (*(operand.at as *const f16).add(index)).to_f64(),
            Element::BF16 => (*(operand.at as *const bf16).add(index)).to_f64(),
        }
    }
}

unsafe fn set(operand: &Operand, batch: i64, row: i32, column: i32, value: f64) {
    let index = index(operand, batch, row, column);
    // SAFETY: the caller of `multiply` answers for it.
    unsafe {
        match operand.element {
            Element::F32 => *(operand.at as *mut f32).add(index) = value as f32,
            Element::F16 => *(operand.at as *mut f16).add(index) = f16::from_f64(value),
            Element::BF16 => *(operand.at as *mut bf16).add(index) = bf16::from_f64(value),
        }
    }
}
