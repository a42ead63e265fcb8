//! Compiles the CUDA kernels if a build needs them: for devices (feature `cuda`), and for the host (feature `emulator`).
//! Without these features, no compiler but Rust's is needed.

#[path = "build/emulator.rs"]
mod emulator;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/sources.rs"]
mod sources;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=cuda");
    if has_feature("CUDA") {
        nvcc::compile_kernels();
    }
    if has_feature("EMULATOR") {
        emulator::compile_kernels();
    }
}

fn has_feature(name: &str) -> bool {
    std::env::var_os(format!("CARGO_FEATURE_{name}")).is_some()
}
