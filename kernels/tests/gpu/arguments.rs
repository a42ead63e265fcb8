//! The program's arguments.

use std::path::PathBuf;

pub const USAGE: &str = "usage: gpu [checks|kernels|all] --device cuda[:N]|emulator [--seeds N] [--seconds N] [--only TEXT] \
    [--ceilings FILE] [--markdown FILE]";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Checks,
    Kernels,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// A GPU, else the emulator, else none: nothing was asked for.
    Any,
    Cuda(u32),
    Emulator,
}

#[derive(Debug)]
pub struct Arguments {
    pub part: Part,
    pub device: DeviceName,
    /// Each check runs once with every seed; fresh ones every time the program is started.
    pub seeds: u64,
    /// No check begins later than this.
    pub seconds: u64,
    /// Checks and kernels whose name contains this.
    pub only: String,
    /// What `ceilings.py` measured.
    pub ceilings: Option<PathBuf>,
    pub markdown: Option<PathBuf>,
}

impl Arguments {
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self {
            part: Part::All,
            device: DeviceName::Any,
            seeds: 1,
            seconds: u64::MAX,
            only: String::new(),
            ceilings: None,
            markdown: None,
        };
        let mut words = words;
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "checks" => parsed.part = Part::Checks,
                "kernels" => parsed.part = Part::Kernels,
                "all" => parsed.part = Part::All,
                "--device" => parsed.device = device(&value()?)?,
                "--seeds" => parsed.seeds = value()?.parse().map_err(|_| "--seeds needs a number".to_owned())?,
                "--seconds" => parsed.seconds = value()?.parse().map_err(|_| "--seconds needs a number".to_owned())?,
                "--only" => parsed.only = value()?,
                "--ceilings" => parsed.ceilings = Some(value()?.into()),
                "--markdown" => parsed.markdown = Some(value()?.into()),
                other => return Err(format!("unknown argument {other}")),
            }
        }
        Ok(parsed)
    }
}

fn device(name: &str) -> Result<DeviceName, String> {
    match name {
        "emulator" => Ok(DeviceName::Emulator),
        "cuda" => Ok(DeviceName::Cuda(0)),
        _ => match name.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => Ok(DeviceName::Cuda(index)),
            None => Err(format!("--device must be cuda, cuda:N or emulator, not {name}")),
        },
    }
}
