//! The instruments that the table in `metrics` declares. Label values are `&'static str` wherever a client could otherwise
//! choose them, so the number of series is bounded.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus_client::metrics::counter::Counter as PrometheusCounter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge as PrometheusGauge;
use prometheus_client::metrics::histogram::Histogram as PrometheusHistogram;
use prometheus_client::registry::{Metric, Registry};

use super::metrics::MetricSpec;

/// A count that only grows.
pub type Counter = PrometheusCounter<u64, AtomicU64>;
/// A count of seconds.
pub type CounterF64 = PrometheusCounter<f64, AtomicU64>;
/// A whole number that goes up and down.
pub type Gauge = PrometheusGauge;
/// A fraction, a rate or a number of seconds.
pub type GaugeF64 = PrometheusGauge<f64, AtomicU64>;
/// A distribution over the buckets that the table gives.
pub type Histogram = PrometheusHistogram;

type Labels<const N: usize> = [(&'static str, &'static str); N];

fn labels<const N: usize>(names: &'static [&'static str], values: [&'static str; N]) -> Labels<N> {
    assert_eq!(names.len(), N, "the table declares as many labels as the instrument has");
    std::array::from_fn(|i| (names[i], values[i]))
}

/// Sets a counter that is kept elsewhere (by the engine) to its current value. It never decreases.
pub fn store_counter(counter: &Counter, value: u64) {
    counter.inner().fetch_max(value, Ordering::Relaxed);
}

/// The same for a counter of seconds.
pub fn store_seconds(counter: &CounterF64, value: Duration) {
    // Non-negative floats have the same order as their bits.
    counter.inner().fetch_max(value.as_secs_f64().to_bits(), Ordering::Relaxed);
}

/// How an instrument comes from its row of the table.
pub(super) trait Instrument: Sized {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self;
}

/// What may stand under a second name.
pub(super) trait Aliased: Instrument {
    fn register_again(&self, spec: &'static MetricSpec, registry: &mut Registry);
}

impl<T: Instrument + Clone + Metric> Aliased for T {
    fn register_again(&self, spec: &'static MetricSpec, registry: &mut Registry) {
        registry.register(spec.family(), spec.help, self.clone());
    }
}

impl Instrument for Counter {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let counter = Counter::default();
        registry.register(spec.family(), spec.help, counter.clone());
        counter
    }
}

impl Instrument for CounterF64 {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let counter = CounterF64::default();
        registry.register(spec.family(), spec.help, counter.clone());
        counter
    }
}

impl Instrument for Gauge {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let gauge = Gauge::default();
        registry.register(spec.family(), spec.help, gauge.clone());
        gauge
    }
}

impl Instrument for GaugeF64 {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let gauge = GaugeF64::default();
        registry.register(spec.family(), spec.help, gauge.clone());
        gauge
    }
}

impl Instrument for Histogram {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let histogram = Histogram::new(spec.buckets.iter().copied());
        registry.register(spec.family(), spec.help, histogram.clone());
        histogram
    }
}

/// Counters, one for each combination of label values.
#[derive(Clone, Debug)]
pub struct CounterVec<const N: usize> {
    names: &'static [&'static str],
    family: Family<Labels<N>, Counter>,
}

impl<const N: usize> CounterVec<N> {
    /// The counter of these label values, in the order in which the table declares the labels.
    pub fn with(&self, values: [&'static str; N]) -> Counter {
        self.family.get_or_create_owned(&labels(self.names, values))
    }
}

impl<const N: usize> Instrument for CounterVec<N> {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let family = Family::default();
        registry.register(spec.family(), spec.help, family.clone());
        Self { names: spec.labels, family }
    }
}

/// Counters by a name that an operator has chosen, and by more labels. The number of names is limited.
#[derive(Clone, Debug)]
pub struct NamedCounterVec<const N: usize> {
    names: &'static [&'static str],
    family: Family<Vec<(&'static str, String)>, Counter>,
    /// The counters that exist, so that a look-up allocates nothing.
    known: Arc<RwLock<BTreeMap<String, KnownCounters<N>>>>,
}

/// By the values of the other labels.
type KnownCounters<const N: usize> = Vec<([&'static str; N], Counter)>;

/// Further names are counted together, as [`OTHER_NAMES`].
const MAX_NAMES: usize = 100;
const OTHER_NAMES: &str = "other";

impl<const N: usize> NamedCounterVec<N> {
    /// The counter of this name and these values of the other labels, in the order in which the table declares the labels.
    pub fn with(&self, name: &str, values: [&'static str; N]) -> Counter {
        let known = self.known.read();
        let name = if known.contains_key(name) || known.len() < MAX_NAMES { name } else { OTHER_NAMES };
        let counter = known.get(name).and_then(|counters| counters.iter().find(|(of, _)| *of == values));
        if let Some((_, counter)) = counter {
            return counter.clone();
        }
        drop(known);
        self.create(name, values)
    }

    fn create(&self, name: &str, values: [&'static str; N]) -> Counter {
        assert_eq!(self.names.len(), N + 1, "the table declares as many labels as the instrument has");
        let all = std::iter::once(name).chain(values).map(str::to_owned);
        let counter = self.family.get_or_create_owned(&self.names.iter().copied().zip(all).collect());
        self.known.write().entry(name.to_owned()).or_default().push((values, counter.clone()));
        counter
    }
}

impl<const N: usize> Instrument for NamedCounterVec<N> {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let family = Family::default();
        registry.register(spec.family(), spec.help, family.clone());
        Self { names: spec.labels, family, known: Arc::default() }
    }
}

/// Gauges, one for each combination of label values.
#[derive(Clone, Debug)]
pub struct GaugeVec<const N: usize> {
    names: &'static [&'static str],
    family: Family<Labels<N>, GaugeF64>,
}

impl<const N: usize> GaugeVec<N> {
    pub fn with(&self, values: [&'static str; N]) -> GaugeF64 {
        self.family.get_or_create_owned(&labels(self.names, values))
    }
}

impl<const N: usize> Instrument for GaugeVec<N> {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let family = Family::default();
        registry.register(spec.family(), spec.help, family.clone());
        Self { names: spec.labels, family }
    }
}

/// Histograms, one for each combination of label values.
#[derive(Clone, Debug)]
pub struct HistogramVec<const N: usize> {
    names: &'static [&'static str],
    family: Family<Labels<N>, Histogram, Buckets>,
}

#[derive(Clone, Copy, Debug)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

impl<const N: usize> HistogramVec<N> {
    pub fn with(&self, values: [&'static str; N]) -> Histogram {
        self.family.get_or_create_owned(&labels(self.names, values))
    }
}

impl<const N: usize> Instrument for HistogramVec<N> {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let family = Family::new_with_constructor(Buckets(spec.buckets));
        registry.register(spec.family(), spec.help, family.clone());
        Self { names: spec.labels, family }
    }
}

/// A gauge that carries information in its labels, mostly of value 1. It has one series: setting it again replaces it.
#[derive(Clone, Debug)]
pub struct LabelledValue {
    names: &'static [&'static str],
    family: Family<Vec<(&'static str, String)>, Gauge>,
}

impl LabelledValue {
    /// The values in the order in which the table declares the labels.
    pub fn set(&self, values: &[&str]) {
        self.set_to(values, 1);
    }

    /// The same, at another height than 1.
    pub fn set_to(&self, values: &[&str], height: i64) {
        assert_eq!(self.names.len(), values.len(), "the table declares as many labels as there are values");
        let labels = self.names.iter().zip(values).map(|(name, value)| (*name, value.to_string())).collect();
        self.family.clear();
        self.family.get_or_create(&labels).set(height);
    }
}

impl Instrument for LabelledValue {
    fn register(spec: &'static MetricSpec, registry: &mut Registry) -> Self {
        let family = Family::default();
        registry.register(spec.family(), spec.help, family.clone());
        Self { names: spec.labels, family }
    }
}
