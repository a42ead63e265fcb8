//! The configuration: gathers every module's section under flat keys, from a TOML file, the environment and the flags.
//!
//! The file gives way to `OUTRIGGER_<KEY>` variables, and these to `--flags`. All problems are reported at once, each with
//! the key's name and where its value came from. This is the only place that reads the process's arguments and
//! environment; what the keys mean, the modules that own them know.

mod arguments;
mod compute;
mod drill;
mod environment;
mod file;
mod keys;
mod process;
mod syntax;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

pub use compute::ComputeConfig;
pub use drill::{DrillArguments, DrillTarget};
pub use keys::{KEYS, Key, markdown_tables};
pub use process::{GenerationConfig, ProcessConfig};

use crate::observability::trace;
use crate::{admission, api, cluster, engine, health, hub, router};

/// Every section. Defaults are the sections' own.
#[derive(Clone, Debug)]
pub struct Config {
    pub process: ProcessConfig,
    /// Its `home` follows from `process.home` and the environment.
    pub hub: hub::Config,
    pub compute: ComputeConfig,
    pub engine: engine::Config,
    pub admission: admission::Config,
    pub health: health::Config,
    pub api: api::Config,
    pub cluster: cluster::Config,
    pub router: router::Config,
    pub trace: trace::Config,
}

impl Default for Config {
    /// Without a home: that takes an environment.
    fn default() -> Self {
        Self {
            process: ProcessConfig::default(),
            hub: hub::Config::new(""),
            compute: ComputeConfig::default(),
            engine: engine::Config::default(),
            admission: admission::Config::default(),
            health: health::Config::default(),
            api: api::Config::default(),
            cluster: cluster::Config::default(),
            router: router::Config::default(),
            trace: trace::Config::default(),
        }
    }
}

impl Config {
    /// Reports every problem, each with its key's name.
    pub fn validate(&self, problems: &mut Vec<String>) {
        self.process.validate(problems);
        self.hub.validate(problems);
        self.compute.validate(problems);
        self.validate_step(problems);
        self.admission.validate(problems);
        self.health.validate(problems);
        self.api.validate(problems);
        self.cluster.validate(problems);
        self.router.validate(problems);
        self.trace.validate(problems);
    }

    /// With the limits of a step that suit the device, where none are set.
    pub fn for_device(mut self, on_gpu: bool) -> Result<Self, ConfigError> {
        self.engine = self.engine_on(on_gpu);
        let mut problems = Vec::new();
        self.engine.validate(&mut problems);
        let (utilization, mark) = (self.compute.gpu_memory_utilization, self.health.memory_removal_mark);
        // The driver counts a little of its own as used.
        if on_gpu && utilization + 0.02 > mark {
            problems.push(format!(
                "gpu_memory_utilization ({utilization}) must be 0.02 or more below memory_removal_mark ({mark}), or a full KV pool \
                 makes the node unready"
            ));
        }
        match problems.is_empty() {
            true => Ok(self),
            false => Err(ConfigError::Problems(problems)),
        }
    }

    fn engine_on(&self, on_gpu: bool) -> engine::Config {
        let (max_num_seqs, max_num_batched_tokens) = self.compute.step_limits(on_gpu);
        engine::Config { max_num_seqs, max_num_batched_tokens, ..self.engine.clone() }
    }

    /// Limits that no device that may be chosen could keep.
    fn validate_step(&self, problems: &mut Vec<String>) {
        let on_device = |on_gpu: &bool| {
            let mut found = Vec::new();
            self.engine_on(*on_gpu).validate(&mut found);
            found
        };
        let found: Vec<_> = self.compute.possible_devices().iter().map(on_device).collect();
        if found.iter().all(|problems| !problems.is_empty()) {
            problems.extend(found.into_iter().next().unwrap_or_default());
        }
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    File(PathBuf),
    Variable(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Variable(name) => write!(f, "${name}"),
            Origin::Flag(name) => write!(f, "--{name}"),
        }
    }
}

/// A key's value as one source gives it.
struct Assignment {
    key: &'static Key,
    text: String,
    origin: Origin,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve the model: the default.
    Serve,
    /// Print the effective configuration and exit.
    ShowConfig,
    /// Ask the node of this configuration whether it is alive.
    CheckHealth,
    /// Print the cluster as the node of this configuration sees it.
    ShowStatus { as_json: bool },
    /// Make an API key for a user.
    NewKey { organization: String, user: String },
    /// List the keys of the tenants file.
    ListKeys,
    /// Run game days.
    Drill(DrillArguments),
}

/// What the process was asked to do.
#[derive(Debug)]
pub struct Invocation {
    pub command: Command,
    pub config: Config,
    /// The origin of each value that is not a default, by key.
    pub origins: BTreeMap<&'static str, Origin>,
    /// Worth a line in the log, not an end.
    pub warnings: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Wrong usage, or a request for help or the version: prints itself, with its own exit code.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    #[error("the configuration has {}:\n  {}", count(.0.len()), .0.join("\n  "))]
    Problems(Vec<String>),
}

/// The file that this process runs, to start it again.
pub fn this_program() -> std::io::Result<PathBuf> {
    std::env::current_exe()
}

/// Where files that nobody needs afterwards may lie.
pub fn temporary_folder() -> PathBuf {
    std::env::temp_dir()
}

fn count(problems: usize) -> String {
    if problems == 1 { "a problem".into() } else { format!("{problems} problems") }
}

impl Invocation {
    /// Reads this process's arguments, environment and file.
    pub fn from_process() -> Result<Self, ConfigError> {
        let variables = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let variables = variables.map(|(name, value)| (name, value.to_string_lossy().into_owned()));
        Self::read(std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()), variables)
    }

    /// Reads the given arguments (without the program's name) and variables, and the file that they name.
    pub fn read(
        arguments: impl IntoIterator<Item = String>,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let arguments = arguments::read(arguments)?;
        let mut problems = Vec::new();
        let variables = environment::read(variables, &mut problems);
        let mut assignments = variables.ambient;
        if let Some(file) = arguments.file.or(variables.file) {
            assignments.extend(file::read(&file, &mut problems));
        }
        assignments.extend(variables.own);
        assignments.extend(arguments.assignments);

        let mut config = Config::default();
        let origins = apply(assignments, &mut config, &mut problems);
        config.hub.home = config.process.home.clone().or(variables.default_home).unwrap_or_default();
        config.validate(&mut problems);
        match problems.is_empty() {
            true => Ok(Self { command: arguments.command, config, origins, warnings: variables.warnings }),
            false => Err(ConfigError::Problems(problems)),
        }
    }

    /// The effective configuration as a TOML file that can be given back with `--config`; secrets redacted and commented out.
    pub fn effective(&self) -> String {
        let mut text = String::new();
        let mut group = "";
        for key in KEYS {
            if key.group != group {
                group = key.group;
                text += &format!("{}# {group}\n", if text.is_empty() { "" } else { "\n" });
            }
            let value = key.value(&self.config);
            let comment = if value.to_string().contains(syntax::REDACTED) { "# " } else { "" };
            let origin = self.origins.get(key.name).map_or_else(String::new, |origin| format!("  # from {origin}"));
            text += &format!("{comment}{} = {value}{origin}\n", key.name);
        }
        text
    }
}

/// Applies the assignments, later ones over earlier ones.
fn apply(
    assignments: Vec<Assignment>,
    config: &mut Config,
    problems: &mut Vec<String>,
) -> BTreeMap<&'static str, Origin> {
    let mut origins = BTreeMap::new();
    for Assignment { key, text, origin } in assignments {
        match key.set(config, &text) {
            Ok(()) => {
                origins.insert(key.name, origin);
            }
            Err(error) => problems.push(format!("{} {error} (from {origin})", key.name)),
        }
    }
    origins
}

/// "unknown key `x`", with the nearest known name.
fn unknown(spelt: &str, name: &str, rewrite: impl Fn(&str) -> String) -> String {
    let help = keys::nearest(name).map_or_else(String::new, |known| format!("; did you mean `{}`?", rewrite(known)));
    format!("{spelt} is not a known key{help}")
}

#[cfg(test)]
mod tests;
