//! The text of a page of metrics, by the crate `prometheus`. Families are made of a snapshot of
//! numbers that others count, and are not registered anywhere.

use prometheus::proto::{Bucket, Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{TEXT_FORMAT, TextEncoder};

use crate::engine::{BUCKET_BOUNDS, Histogram};

/// The content type of [`Page::text`].
pub(super) const CONTENT_TYPE: &str = TEXT_FORMAT;

/// Whether a number only grows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Counter,
    Gauge,
}

/// The page that is being written.
#[derive(Debug, Default)]
pub(super) struct Page {
    families: Vec<MetricFamily>,
}

impl Page {
    /// The page in Prometheus' text format.
    pub(super) fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.families)
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(Kind::Gauge, name, help, [(&[][..], value)]);
    }

    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(Kind::Counter, name, help, [(&[][..], value as f64)]);
    }

    /// Adds a family with one label.
    pub(super) fn labelled<'a>(
        &mut self,
        (kind, name, help): (Kind, &str, &str),
        label: &str,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) {
        let values = values.into_iter();
        let samples = values.map(|(text, value)| sample(kind, &[(label, text)], value));
        self.add(kind_type(kind), name, help, samples.collect());
    }

    /// Adds a family of samples with these labels.
    pub(super) fn family<'a>(
        &mut self,
        kind: Kind,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (&'a [(&'a str, &'a str)], f64)>,
    ) {
        let samples = samples.into_iter();
        let samples = samples.map(|(labels, value)| sample(kind, labels, value));
        self.add(kind_type(kind), name, help, samples.collect());
    }

    pub(super) fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        let mut below = 0;
        let buckets = BUCKET_BOUNDS.iter().zip(histogram.counts);
        let buckets = buckets.map(|(bound, count)| {
            below += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(below);
            bucket
        });
        let mut value = prometheus::proto::Histogram::default();
        value.set_bucket(buckets.collect());
        value.set_sample_sum(histogram.sum);
        value.set_sample_count(histogram.count());
        let mut metric = Metric::default();
        metric.set_histogram(value);
        self.add(MetricType::HISTOGRAM, name, help, vec![metric]);
    }

    /// Adds a family, unless it has no sample, which the format does not know.
    fn add(&mut self, kind: MetricType, name: &str, help: &str, samples: Vec<Metric>) {
        if samples.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(samples);
        self.families.push(family);
    }
}

fn kind_type(kind: Kind) -> MetricType {
    match kind {
        Kind::Counter => MetricType::COUNTER,
        Kind::Gauge => MetricType::GAUGE,
    }
}

fn sample(kind: Kind, labels: &[(&str, &str)], value: f64) -> Metric {
    let labels = labels.iter().map(|(name, value)| {
        let mut label = LabelPair::default();
        label.set_name((*name).to_owned());
        label.set_value((*value).to_owned());
        label
    });
    let mut metric = Metric::from_label(labels.collect());
    match kind {
        Kind::Counter => {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        }
        Kind::Gauge => {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
    }
    metric
}
