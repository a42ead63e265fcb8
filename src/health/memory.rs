//! How close the node is to running out of memory: the trait for memory sources, the source for the host, and the marks, which
//! apply to a device's memory as well.

use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tracing::warn;

use crate::types::with_causes;

/// A source of memory readings.
pub trait MemoryProbe: Send {
    /// The metric label: `cgroup` or `host`.
    fn source(&self) -> &'static str;

    fn read(&mut self) -> Result<MemoryReading, MemoryProbeError>;
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryReading {
    pub used_bytes: u64,
    pub total_bytes: u64,
}

impl MemoryReading {
    /// Used memory divided by total. The free part of a pool that is fully reserved counts as free.
    pub fn pressure(self, free_pool_bytes: u64) -> f64 {
        self.used_bytes.saturating_sub(free_pool_bytes) as f64 / self.total_bytes.max(1) as f64
    }
}

#[derive(Debug, Error)]
pub enum MemoryProbeError {
    #[error("cannot read {path}")]
    Unreadable { path: String, source: std::io::Error },
    #[error("{path} does not say {what}")]
    Malformed { path: String, what: &'static str },
    #[error("{source_name} has not answered for {seconds} s")]
    Silent { source_name: &'static str, seconds: u64 },
}

/// The memory of a process on the host: that of its control group (version 2, else 1), using the tightest limit of the group
/// and its ancestors; or the machine's if no group has a limit. Page cache that can be dropped (inactive files) does not count.
pub struct HostMemory {
    levels: Vec<Level>,
    meminfo: PathBuf,
}

/// One control group with a limit.
struct Level {
    usage: PathBuf,
    stat: PathBuf,
    /// The key in `stat` for the inactive page cache.
    inactive_key: &'static str,
    limit_bytes: u64,
}

/// Version 1 writes "no limit" as the largest multiple of the page size.
const NO_LIMIT_FROM: u64 = 1 << 60;

impl HostMemory {
    /// Finds the limits that apply to this process.
    pub fn detect() -> Self {
        Self::below(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
    }

    fn below(proc: &Path, cgroups: &Path) -> Self {
        let groups = fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
        let mut levels = Vec::new();
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
            if controllers.is_empty() {
                levels.extend(ancestors(cgroups, group).filter_map(|folder| Level::version_2(&folder)));
            } else if controllers.split(',').any(|controller| controller == "memory") {
                levels.extend(ancestors(&cgroups.join("memory"), group).filter_map(|folder| Level::version_1(&folder)));
            }
        }
        Self { levels, meminfo: proc.join("meminfo") }
    }

    fn read_machine(&self) -> Result<MemoryReading, MemoryProbeError> {
        let text = read(&self.meminfo)?;
        let kilobytes = |key: &'static str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            let value = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
            value.ok_or_else(|| malformed(&self.meminfo, key))
        };
        let (total, available) = (kilobytes("MemTotal")?, kilobytes("MemAvailable")?);
        Ok(MemoryReading { used_bytes: total.saturating_sub(available) << 10, total_bytes: total << 10 })
    }
}

/// The memory that this process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    pub bytes: u64,
    /// Names the source in messages.
    pub source_name: &'static str,
}

impl HostMemory {
    /// The machine's memory, or the lowest limit of the process's control group and its ancestors.
    pub fn limit(&self) -> Result<MemoryLimit, MemoryProbeError> {
        let machine = MemoryLimit { bytes: self.read_machine()?.total_bytes, source_name: "this machine" };
        let groups = self.levels.iter();
        let groups = groups.map(|level| MemoryLimit { bytes: level.limit_bytes, source_name: "the control group" });
        Ok(groups.fold(machine, |lowest, next| if next.bytes < lowest.bytes { next } else { lowest }))
    }
}

impl MemoryProbe for HostMemory {
    fn source(&self) -> &'static str {
        if self.levels.is_empty() { "host" } else { "cgroup" }
    }

    fn read(&mut self) -> Result<MemoryReading, MemoryProbeError> {
        let mut tightest: Option<MemoryReading> = None;
        for level in &self.levels {
            let reading = level.read()?;
            if tightest.is_none_or(|tightest| reading.pressure(0) > tightest.pressure(0)) {
                tightest = Some(reading);
            }
        }
        tightest.map_or_else(|| self.read_machine(), Ok)
    }
}

impl Level {
    fn version_2(folder: &Path) -> Option<Self> {
        Self::open(folder, "memory.current", "memory.max", "inactive_file")
    }

    fn version_1(folder: &Path) -> Option<Self> {
        Self::open(folder, "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file")
    }

    /// `None` if there is no such group, or it has no limit.
    fn open(folder: &Path, usage: &str, limit: &str, inactive_key: &'static str) -> Option<Self> {
        let limit_bytes = fs::read_to_string(folder.join(limit)).ok()?.trim().parse().ok()?;
        let is_limit = limit_bytes < NO_LIMIT_FROM;
        is_limit.then(|| Self {
            usage: folder.join(usage),
            stat: folder.join("memory.stat"),
            inactive_key,
            limit_bytes,
        })
    }

    fn read(&self) -> Result<MemoryReading, MemoryProbeError> {
        let usage: u64 = read(&self.usage)?.trim().parse().map_err(|_| malformed(&self.usage, "a number of bytes"))?;
        let stat = read(&self.stat)?;
        let inactive = stat.lines().find_map(|line| line.strip_prefix(self.inactive_key)?.strip_prefix(' '));
        let inactive: u64 = inactive
            .and_then(|text| text.trim().parse().ok())
            .ok_or_else(|| malformed(&self.stat, self.inactive_key))?;
        Ok(MemoryReading { used_bytes: usage.saturating_sub(inactive), total_bytes: self.limit_bytes })
    }
}

/// The folder of a group below the mount point, and those of its ancestors. In a container, the group's path may be the host's
/// and its folder may not exist; then the mount point is the container's own group.
fn ancestors(mount: &Path, group: &str) -> impl Iterator<Item = PathBuf> {
    let relative = Path::new(group.trim_start_matches('/')).to_path_buf();
    let inside = !relative.components().any(|part| part == std::path::Component::ParentDir);
    let folders: Vec<PathBuf> = relative.ancestors().filter(|_| inside).map(|part| mount.join(part)).collect();
    folders.into_iter().chain((!inside).then(|| mount.to_path_buf()))
}

fn read(path: &Path) -> Result<String, MemoryProbeError> {
    fs::read_to_string(path).map_err(|source| MemoryProbeError::Unreadable { path: path.display().to_string(), source })
}

fn malformed(path: &Path, what: &'static str) -> MemoryProbeError {
    MemoryProbeError::Malformed { path: path.display().to_string(), what }
}

/// Which memory. A node with a device can run out of either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum MemoryPlace {
    Host,
    Device,
}

/// The latest reading of one memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct MemoryState {
    /// Used divided by total; `None` while it cannot be read.
    pub(super) pressure: Option<f64>,
    pub(super) level: MemoryLevel,
    /// Reading failed, and that was logged.
    pub(super) is_unreadable: bool,
}

impl MemoryState {
    /// Reading failed. The pressure is then unknown, which does not make the node unready.
    pub(super) fn unreadable(&mut self, error: &MemoryProbeError) {
        if !self.is_unreadable {
            warn!(error = %with_causes(error), "cannot read the memory use");
        }
        *self = Self { is_unreadable: true, ..Self::default() };
    }
}

/// The consequence of the memory pressure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryLevel {
    #[default]
    Normal,
    /// Log a warning.
    Warn,
    /// Ask for less traffic.
    Shrink,
    /// Ask for no traffic.
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryMarks {
    pub warn: f64,
    pub shrink: f64,
    pub remove: f64,
}

impl MemoryMarks {
    /// A level ends only this far below its mark, so that the node does not flap.
    const HYSTERESIS: f64 = 0.02;

    /// The fraction of its normal share of requests that a node should get: all up to the shrink mark, none from the removal mark
    /// on.
    pub fn share(&self, pressure: f64) -> f64 {
        if pressure >= self.remove {
            return 0.0;
        }
        let above = (pressure - self.shrink).max(0.0);
        if above == 0.0 { 1.0 } else { 1.0 - above / (self.remove - self.shrink) }
    }

    pub fn level(&self, previous: MemoryLevel, pressure: f64) -> MemoryLevel {
        let levels =
            [(MemoryLevel::Remove, self.remove), (MemoryLevel::Shrink, self.shrink), (MemoryLevel::Warn, self.warn)];
        let holds = |(level, mark): &(MemoryLevel, f64)| {
            let mark = if previous >= *level { mark - Self::HYSTERESIS } else { *mark };
            pressure >= mark
        };
        levels.into_iter().find(holds).map_or(MemoryLevel::Normal, |(level, _)| level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: MemoryMarks = MemoryMarks { warn: 0.8, shrink: 0.9, remove: 0.95 };

    #[test]
    fn the_share_falls_from_the_shrink_mark_to_the_removal_mark() {
        for (pressure, share) in [(0.0, 1.0), (0.89, 1.0), (0.9, 1.0), (0.925, 0.5), (0.95, 0.0), (1.0, 0.0)] {
            assert!((MARKS.share(pressure) - share).abs() < 1e-9, "{pressure}: {}", MARKS.share(pressure));
        }
        let one = MemoryMarks { warn: 0.8, shrink: 0.9, remove: 0.9 };
        assert_eq!((one.share(0.899), one.share(0.9)), (1.0, 0.0), "marks at one place");
    }

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            files.iter().for_each(|(path, text)| tree.write(path, text));
            tree
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn probe(&self) -> HostMemory {
            HostMemory::below(&self.0.path().join("proc"), &self.0.path().join("cgroup"))
        }
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\n");

    #[test]
    fn version_2_takes_the_tightest_level_without_inactive_files() {
        let tree = Tree::new(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/app\n"),
            ("cgroup/pod/memory.max", "2000\n"),
            ("cgroup/pod/memory.current", "1800\n"),
            ("cgroup/pod/memory.stat", "anon 1\ninactive_file 100\nactive_file 3\n"),
            ("cgroup/pod/app/memory.max", "max\n"),
            ("cgroup/pod/app/memory.current", "900\n"),
            ("cgroup/memory.stat", "inactive_file 0\n"),
        ]);
        let mut probe = tree.probe();
        assert_eq!(probe.source(), "cgroup");
        assert_eq!(probe.read().unwrap(), MemoryReading { used_bytes: 1700, total_bytes: 2000 });
        tree.write("cgroup/pod/app/memory.max", "1000");
        tree.write("cgroup/pod/app/memory.stat", "inactive_file 0\n");
        assert_eq!(tree.probe().read().unwrap(), MemoryReading { used_bytes: 900, total_bytes: 1000 });
    }

    #[test]
    fn the_lowest_limit_counts_and_never_more_than_the_machine_has() {
        let tree = Tree::new(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/app\n"),
            ("cgroup/pod/memory.max", "2000\n"),
            ("cgroup/pod/app/memory.max", "3000\n"),
        ]);
        assert_eq!(tree.probe().limit().unwrap(), MemoryLimit { bytes: 2000, source_name: "the control group" });
        tree.write("cgroup/pod/memory.max", "9999999");
        tree.write("cgroup/pod/app/memory.max", "max");
        assert_eq!(tree.probe().limit().unwrap(), MemoryLimit { bytes: 1000 << 10, source_name: "this machine" });
    }

    #[test]
    fn version_1_reads_its_own_names() {
        let tree = Tree::new(&[
            MEMINFO,
            ("proc/self/cgroup", "4:cpu,memory:/app\n0::/\n"),
            ("cgroup/memory/app/memory.limit_in_bytes", "1000\n"),
            ("cgroup/memory/app/memory.usage_in_bytes", "500\n"),
            ("cgroup/memory/app/memory.stat", "inactive_file 1\ntotal_inactive_file 100\n"),
            ("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(tree.probe().read().unwrap(), MemoryReading { used_bytes: 400, total_bytes: 1000 });
    }

    #[test]
    fn a_group_of_the_host_s_name_space_falls_back_to_the_mount_point() {
        let tree = Tree::new(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/../../outside\n"),
            ("cgroup/memory.max", "1000\n"),
            ("cgroup/memory.current", "10\n"),
            ("cgroup/memory.stat", "inactive_file 0\n"),
        ]);
        assert_eq!(tree.probe().read().unwrap(), MemoryReading { used_bytes: 10, total_bytes: 1000 });
    }

    #[test]
    fn without_a_limit_the_machine_counts() {
        let tree = Tree::new(&[MEMINFO, ("proc/self/cgroup", "0::/\n"), ("cgroup/memory.max", "max\n")]);
        let mut probe = tree.probe();
        assert_eq!(probe.source(), "host");
        assert_eq!(probe.read().unwrap(), MemoryReading { used_bytes: 600 << 10, total_bytes: 1000 << 10 });
        tree.write("proc/meminfo", "MemTotal: 1000 kB\n");
        assert!(matches!(probe.read(), Err(MemoryProbeError::Malformed { what: "MemAvailable", .. })));
    }

    #[test]
    fn this_machine_can_be_read() {
        let reading = HostMemory::detect().read().unwrap();
        assert!(reading.used_bytes > 0 && reading.used_bytes <= reading.total_bytes, "{reading:?}");
    }

    #[test]
    fn a_reserved_pool_counts_by_its_used_part() {
        let reading = MemoryReading { used_bytes: 95, total_bytes: 100 };
        assert_eq!(reading.pressure(0), 0.95);
        assert_eq!(reading.pressure(60), 0.35);
        assert_eq!(reading.pressure(1000), 0.0);
    }

    #[test]
    fn marks_are_reached_upwards_and_left_with_a_margin() {
        use MemoryLevel::{Normal, Remove, Shrink, Warn};
        for (previous, pressure, expected) in [
            (Normal, 0.799, Normal),
            (Normal, 0.8, Warn),
            (Normal, 0.9, Shrink),
            (Normal, 0.95, Remove),
            (Remove, 0.94, Remove),
            (Remove, 0.92, Shrink),
            (Shrink, 0.885, Shrink),
            (Shrink, 0.87, Warn),
            (Warn, 0.79, Warn),
            (Warn, 0.77, Normal),
            (Warn, 0.89, Warn),
        ] {
            assert_eq!(MARKS.level(previous, pressure), expected, "{previous:?} at {pressure}");
        }
    }
}
