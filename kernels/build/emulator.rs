//! Compiles the kernels for the host, for the emulation in `cuda/emulation`.
//!
//! Each source is included by a small generated file, inside an unnamed namespace, so that two sources may use the same name
//! for different things. Kernels register themselves when the program starts. A generated table names a function of every
//! source, so that the linker drops none.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::sources::{self, Source};

/// Checks for errors that a device would report, or silently ignore. The functions in `cuda/emulation/traps.cpp` are then
/// called.
const CHECKS: &str = "-fsanitize=bounds,alignment,shift-exponent,integer-divide-by-zero";

pub fn compile_kernels() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo tells the crate's folder"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo tells where outputs go"));
    let cuda = manifest.join("cuda");
    let machine = cuda.join("emulation");
    let mut kernels = sources::all(&cuda);
    kernels.extend(sources::all(&machine));
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .include(&cuda)
        .warnings(true)
        .extra_warnings(true)
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        .flag_if_supported("-Wno-unknown-pragmas");
    build.file(write_table(&out, &kernels));
    let mut checked = build.clone();
    checked.flag(CHECKS).flag("-fno-sanitize-recover=all");
    checked.files(kernels.iter().map(|kernel| write_wrapper(&out, kernel)));
    checked.compile("outrigger_emulated_kernels");
    build.files(machine_files(&machine));
    build.compile("outrigger_emulation");
}

/// The files of the emulation itself.
fn machine_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("the emulation's folder can be read").path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|it| it == "cpp")).collect();
    files.sort();
    files
}

fn write_wrapper(out: &Path, kernel: &Source) -> PathBuf {
    let (name, path) = (&kernel.name, kernel.path.display());
    write(
        &out.join(format!("emulated_{name}.cpp")),
        &format!(
            "#include \"prelude.cuh\"\n\
             namespace {{\n\
             #include \"{path}\"\n\
             }}\n\
             extern \"C\" void outrigger_emulated_{name}() {{}}\n"
        ),
    )
}

fn write_table(out: &Path, kernels: &[Source]) -> PathBuf {
    let all = |line: fn(&str) -> String| kernels.iter().map(|kernel| line(&kernel.name)).collect::<String>();
    let declarations = all(|name| format!("void outrigger_emulated_{name}();\n"));
    let calls = all(|name| format!("    outrigger_emulated_{name}();\n"));
    write(
        &out.join("emulated_table.cpp"),
        &format!("extern \"C\" {{\n{declarations}void outrigger_emulator_link() {{\n{calls}}}\n}}\n"),
    )
}

/// Writes a file, unless it already has this content.
fn write(path: &Path, text: &str) -> PathBuf {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    path.to_owned()
}
