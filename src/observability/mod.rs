//! Metrics, in one table; their text for Prometheus; the log. Uses only `types`.

pub mod instruments;
pub mod metrics;
pub mod process;
pub mod sink;
pub mod text_table;
pub mod trace;

pub use instruments::{Counter, CounterVec, Gauge, GaugeF64, GaugeVec, Histogram, HistogramVec, LabelledValue};
pub use metrics::{MetricKind, MetricSpec, Metrics};
