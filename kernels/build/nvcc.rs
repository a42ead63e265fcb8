//! Compiles the kernels for devices. Each source becomes one compressed fatbin, with machine code for each generation that we
//! tune for and PTX for later ones. The library embeds a table of them.

use std::env;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, io};

use crate::sources::{self, Source};

/// Machine code runs only on its own generation, at the same or a later minor version: sm_80 also serves 8.6. `90a` has
/// Hopper's own instructions (wgmma) and runs on 9.0 alone, so later generations compile the PTX of 9.0. The PTX must not be
/// older than that: launches overlap from 9.0 on, and in older PTX a kernel's wait for its predecessor does nothing.
const TARGETS: &[&str] = &[
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_89,code=sm_89",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
];
const HOPPER: &[&str] = &["-gencode=arch=compute_90a,code=sm_90a"];

/// Multiplication and addition are not fused (`-fmad=false`), so that results do not depend on the compiler's choices.
const FLAGS: &[&str] =
    &["-std=c++17", "-O3", "-fmad=false", "-fatbin", "--compress-mode=size", "-Werror=all-warnings", "-lineinfo"];

const NO_COMPILER: &str = "the feature `cuda` needs CUDA's compiler, nvcc 13.0 or later. It was looked for in $CUDA_HOME, \
    $CUDA_PATH, $PATH, /usr/local/cuda and target/cuda. Where there is none, `kernels/cuda/toolkit` installs it there, by \
    pip and without root; then build again.";

pub fn compile_kernels() {
    for variable in ["CUDA_HOME", "CUDA_PATH", "PATH", "NVCC_CCBIN"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo tells the crate's folder"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo tells where outputs go"));
    let Some(nvcc) = find_nvcc(&manifest, &out) else { fail(NO_COMPILER) };
    if let Some(home) = nvcc.parent().and_then(Path::parent) {
        // Tests compile a stand-in for the driver with this header.
        println!("cargo::rustc-env=OUTRIGGER_CUDA_INCLUDE={}", home.join("include").display());
    }
    let sources = sources::all(&manifest.join("cuda"));
    let compiler = Compiler { version: version(&nvcc), nvcc, cache: cache_folder(&out) };
    compiler.compile_all(&sources);
    let table = compiler.table(&sources);
    fs::write(out.join("images.rs"), table).expect("the output folder can be written");
}

struct Compiler {
    nvcc: PathBuf,
    /// The compiler's version text. Part of what decides whether an output is up to date.
    version: String,
    /// Where images are cached, by a name derived from their inputs, so that profiles, features and checks share them.
    cache: PathBuf,
}

impl Compiler {
    /// Compiles as many at a time as cargo allows.
    fn compile_all(&self, sources: &[Source]) {
        let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
        let next = AtomicUsize::new(0);
        let problems: Vec<String> = std::thread::scope(|scope| {
            let worker = || {
                let mut problems = Vec::new();
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    problems.extend(self.compile(source).err());
                }
                problems
            };
            let workers: Vec<_> = (0..jobs.clamp(1, sources.len().max(1))).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().flat_map(|worker| worker.join().expect("a worker does not panic")).collect()
        });
        if !problems.is_empty() {
            fail(&problems.join("\n"));
        }
    }

    /// Keeps existing images: cargo runs this when any kernel has changed, and compiling one can take a minute.
    fn compile(&self, source: &Source) -> Result<(), String> {
        let image = self.image(source);
        if image.exists() {
            return Ok(());
        }
        // Renamed when complete, since another build may be waiting for it.
        let unfinished = image.with_extension(format!("{}.unfinished", std::process::id()));
        let output = Command::new(&self.nvcc)
            .args(FLAGS)
            .args(targets(source))
            .arg("-o")
            .arg(&unfinished)
            .arg(&source.path)
            .output()
            .map_err(|error| format!("{} cannot be run: {error}", self.nvcc.display()))?;
        if !output.status.success() {
            let (said, also) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
            return Err(format!("{}: nvcc failed\n{also}{said}", source.path.display()));
        }
        keep_as_old_as(&unfinished, &source.path)
            .and_then(|()| fs::rename(&unfinished, &image))
            .map_err(|error| format!("{}: {error}", image.display()))
    }

    fn image(&self, source: &Source) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        (source.content_hash(), &self.version, FLAGS, targets(source)).hash(&mut hasher);
        self.cache.join(format!("{}-{:016x}.fatbin", source.name, hasher.finish()))
    }

    /// `gpu/cuda/modules.rs` includes it.
    fn table(&self, sources: &[Source]) -> String {
        let mut table = "&[\n".to_owned();
        for source in sources {
            // If the image is removed, this runs again.
            println!("cargo::rerun-if-changed={}", self.image(source).display());
            let (name, hopper_only, image) = (&source.name, source.is_hopper_only(), self.image(source));
            let bytes = format!("&Aligned(*include_bytes!({image:?})).0");
            let entry = format!("Image {{ name: {name:?}, hopper_only: {hopper_only}, bytes: {bytes} }}");
            writeln!(table, "    {entry},").expect("a string grows");
        }
        table.push(']');
        table
    }
}

/// Gives an output the age of its input: cargo would run this again for a file that has changed since this began.
fn keep_as_old_as(output: &Path, input: &Path) -> io::Result<()> {
    fs::File::options().write(true).open(output)?.set_modified(fs::metadata(input)?.modified()?)
}

fn targets(source: &Source) -> &'static [&'static str] {
    if source.is_hopper_only() { HOPPER } else { TARGETS }
}

/// OUT_DIR is target/[triple/]profile/build/package/out.
fn cache_folder(out: &Path) -> PathBuf {
    let target = out.ancestors().nth(4).expect("the output folder is inside the target folder");
    let cache = target.join("cuda-kernels");
    fs::create_dir_all(&cache).unwrap_or_else(|error| panic!("{}: {error}", cache.display()));
    cache
}

fn find_nvcc(manifest: &Path, out: &Path) -> Option<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    // The target folder may be elsewhere; OUT_DIR is inside it.
    let targets = out.ancestors().map(|folder| folder.join("cuda/home"));
    let workspace = manifest.parent().map(|folder| folder.join("target/cuda/home"));
    homes
        .map(|home| home.join("bin"))
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .chain(targets.chain(workspace).map(|home| home.join("bin")))
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

fn version(nvcc: &Path) -> String {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.unwrap_or_else(|error| fail(&format!("{} cannot be run: {error}", nvcc.display())));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = text.split("release ").nth(1).and_then(|rest| rest.split('.').next());
    match release.and_then(|major| major.trim().parse::<u32>().ok()) {
        Some(major) if major >= 13 => text,
        _ => fail(&format!("{} is too old or not CUDA's compiler. {NO_COMPILER}", nvcc.display())),
    }
}

#[expect(clippy::exit, reason = "a build script that cannot compile ends here")]
fn fail(reason: &str) -> ! {
    for line in reason.lines() {
        println!("cargo::error={line}");
    }
    std::process::exit(1)
}
