//! Graphs of decode steps, one for each number of rows in a short list.
//!
//! A step of a few rows is hundreds of launches of a few microseconds each; replayed as one graph, the host queues it in
//! one call and the device starts each kernel as the one before ends.

use outrigger_kernels::gpu::{Device, DeviceError, GraphId, View};

/// Every size up to eight, then steps of an eighth at most of the next power of two.
const SIZES: &[usize] = &[
    1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320,
    384, 448, 512,
];

pub(super) struct Graphs {
    device: Device,
    captured: Vec<Captured>,
}

struct Captured {
    num_rows: usize,
    graph: GraphId,
    logits: View<f32>,
}

impl Graphs {
    pub fn none(device: &Device) -> Self {
        Self { device: device.clone(), captured: Vec::new() }
    }

    /// The rows of the graph that a step of so many rows would be replayed from.
    pub fn padded(num_rows: usize) -> usize {
        SIZES.iter().copied().find(|size| *size >= num_rows).unwrap_or(num_rows)
    }

    /// The sizes that up to `max_rows` sequences need.
    pub fn sizes(max_rows: usize) -> impl Iterator<Item = usize> {
        SIZES.iter().copied().take_while(move |size| *size <= Self::padded(max_rows))
    }

    /// Records `step` for every size up to what `max_rows` sequences need. `step` queues the work of so many rows and gives
    /// where its logits will be.
    pub fn capture(
        device: &Device,
        max_rows: usize,
        mut step: impl FnMut(usize) -> Result<View<f32>, DeviceError>,
    ) -> Result<Self, DeviceError> {
        let mut graphs = Self::none(device);
        for num_rows in Self::sizes(max_rows) {
            device.driver().begin_capture()?;
            // The recording is ended whatever came of it, or the stream stays unusable.
            let logits = step(num_rows);
            let graph = device.driver().end_capture();
            let (logits, graph) = (logits?, graph?);
            graphs.captured.push(Captured { num_rows, graph, logits });
        }
        Ok(graphs)
    }

    /// The size of the graph for a step of `num_rows`, if there is one.
    pub fn size_for(&self, num_rows: usize) -> Option<usize> {
        self.captured.iter().map(|captured| captured.num_rows).find(|size| *size >= num_rows)
    }

    /// Queues the graph of exactly this size, and gives where its logits will be.
    pub fn launch(&self, num_rows: usize) -> Result<View<f32>, DeviceError> {
        let captured = self.captured.iter().find(|captured| captured.num_rows == num_rows);
        let captured = captured.expect("asked for by `size_for`");
        self.device.driver().launch_graph(captured.graph)?;
        Ok(captured.logits)
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        for captured in &self.captured {
            self.device.driver().drop_graph(captured.graph);
        }
    }
}
