//! Measures how long work takes on a device, for the GPU suite.

use super::{Device, DeviceBuffer, DeviceError, GraphId};

/// Number of timed replays; the median counts.
const REPLAYS: usize = 7;
/// Minimum duration of a replay, unless that takes more than `MAX_RUNS` runs. Events have a resolution of half a microsecond.
const REPLAY_SECONDS: f64 = 2e-3;
const MAX_RUNS: usize = 400;

/// Seconds of one run of `work` in steady state: runs are recorded into a graph and follow one another on the device without
/// the host. `work` is given the number of the run, by which it chooses among `rotations` sets of buffers, so that the cache
/// holds no more than it would in a model. It must not allocate.
pub fn seconds(
    device: &Device,
    rotations: usize,
    mut work: impl FnMut(usize) -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    let rotations = rotations.max(1);
    // The first runs load the kernels; the second round tells how many runs make a replay.
    (0..rotations).try_for_each(&mut work)?;
    let round = once(device, || (0..rotations).try_for_each(&mut work))?;
    let rounds = (REPLAY_SECONDS / round.max(1e-9)).ceil().min((MAX_RUNS / rotations) as f64).max(1.0) as usize;
    let runs = rounds * rotations;
    let graph = record(device, || (0..runs).try_for_each(|run| work(run % rotations)))?;
    let replays: Result<Vec<f64>, DeviceError> =
        (0..=REPLAYS).map(|_| once(device, || device.driver().launch_graph(graph))).collect();
    device.driver().drop_graph(graph);
    // The first replay warms up.
    let mut replays = replays?.split_off(1);
    replays.sort_by(f64::total_cmp);
    Ok(replays[REPLAYS / 2] / runs as f64)
}

/// Bytes a second that a copy within the device's memory moves, counting what it reads and what it writes: the ceiling of
/// everything that is bound by memory.
pub fn copy_bandwidth(device: &Device, bytes: usize) -> Result<f64, DeviceError> {
    let from = DeviceBuffer::<u8>::zeroed(device, bytes)?;
    let to = DeviceBuffer::<u8>::new(device, bytes)?;
    // SAFETY: two whole buffers of this size.
    let seconds = seconds(device, 1, |_| unsafe { device.driver().copy(to.address(), from.address(), bytes) })?;
    Ok(2.0 * bytes as f64 / seconds)
}

/// Seconds on the device of what `queue` queues.
fn once(device: &Device, queue: impl FnOnce() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
    let driver = device.driver();
    let (before, after) = (driver.new_event()?, driver.new_event()?);
    driver.record(before)?;
    queue()?;
    driver.record(after)?;
    driver.wait(after)?;
    driver.elapsed(before, after)
}

fn record(device: &Device, queue: impl FnOnce() -> Result<(), DeviceError>) -> Result<GraphId, DeviceError> {
    device.driver().begin_capture()?;
    let queued = queue();
    // The recording must be ended in any case, since a recording stream runs nothing.
    let graph = device.driver().end_capture();
    if queued.is_err()
        && let Ok(graph) = graph
    {
        device.driver().drop_graph(graph);
    }
    queued.and(graph)
}
