//! Has the CUDA kernels compiled to PTX, by the `nvcc` and for the GPU that Candle's build script finds; does nothing
//! without the feature `cuda`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    const FOLDER: &str = "src/field/ops/cuda";
    println!("cargo::rerun-if-changed={FOLDER}");
    let built = cudaforge::KernelBuilder::new()
        .source_glob(&format!("{FOLDER}/*.cu"))
        .watch([format!("{FOLDER}/element.cuh"), format!("{FOLDER}/functions.cuh")])
        .arg("-std=c++17")
        .arg("-O3")
        // What they give is told to the bit: these are nvcc's own.
        .arg("--prec-div=true")
        .arg("--ftz=false")
        .build_ptx();
    if let Err(error) = built {
        println!("cargo::error=the CUDA kernels of candle-ode could not be compiled: {error}");
    }
}
