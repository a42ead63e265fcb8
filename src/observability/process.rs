//! CPU time, memory and files of this process, read from `/proc` at each scrape. Empty on systems other than Linux.

use std::fs;

/// Clock ticks per second in `/proc`: fixed at 100 for user space on every architecture that Linux supports.
const TICKS_PER_SECOND: f64 = 100.0;
/// `VmRSS` is in kibibytes.
const KIBIBYTE: i64 = 1024;

pub(super) struct ProcessUsage {
    pub cpu_seconds: f64,
    pub resident_bytes: i64,
    pub start_time_seconds: f64,
    pub open_fds: i64,
}

pub(super) fn read() -> Option<ProcessUsage> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the name in parentheses, which may itself hold spaces and parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    let boot: f64 = line_value(&fs::read_to_string("/proc/stat").ok()?, "btime")?;
    let resident: f64 = line_value(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")?;
    Some(ProcessUsage {
        cpu_seconds: (ticks(14)? + ticks(15)?) / TICKS_PER_SECOND,
        resident_bytes: resident as i64 * KIBIBYTE,
        start_time_seconds: boot + ticks(22)? / TICKS_PER_SECOND,
        open_fds: i64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok()?,
    })
}

/// The first number on the line that starts with `key`.
fn line_value(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}
