//! Metrics, by the semantic conventions for HTTP 1.44: one provider per workload, collected and
//! exported together.

use std::{
    cell::OnceCell,
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::Ordering},
    time::Duration,
};

use anyhow::bail;
use opentelemetry::{
    KeyValue,
    metrics::{BoundCounter, BoundHistogram, Counter, Histogram, Meter, MeterProvider as _},
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    metrics::{
        Aggregation, Instrument, InstrumentKind, ManualReader, Pipeline, SdkMeterProvider, Stream, Temporality,
        data::ResourceMetrics, reader::MetricReader,
    },
};

use super::{MAX_WORKLOADS, resource::resource, variable};
use crate::{
    aggregate::{Recorder, SeriesKey, SeriesSink},
    coverage::{Reason, Sum},
    exchange::{self, Api, Auth, Exchange, Side},
    stats::{Loss, Stats, Unnamed, Unread},
    status,
};

/// Name of the instrumentation scope.
const SCOPE: &str = "apiscope";
/// Service of workloads beyond [`MAX_WORKLOADS`].
const OVERFLOW_SERVICE: &str = "apiscope.overflow";
/// Series of one instrument and workload; the rest is one overflow series, so that sums stay right.
const MAX_SERIES: usize = 2_000;
/// Buckets of durations, s (semantic conventions for HTTP metrics).
const DURATION_BOUNDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// Buckets of sizes, bytes.
const SIZE_BOUNDS: [f64; 10] =
    [0.0, 64.0, 256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0, 10_485_760.0];

/// A reader that is asked from outside.
#[derive(Debug, Clone)]
struct Reader(Arc<ManualReader>);

impl MetricReader for Reader {
    fn register_pipeline(&self, pipeline: Weak<Pipeline>) {
        self.0.register_pipeline(pipeline);
    }
    fn collect(&self, metrics: &mut ResourceMetrics) -> OTelSdkResult {
        self.0.collect(metrics)
    }
    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }
    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }
    fn temporality(&self, kind: InstrumentKind) -> Temporality {
        self.0.temporality(kind)
    }
}

/// Every workload's instruments.
pub struct Workloads {
    known: HashMap<Key, Workload>,
    temporality: Temporality,
    exponential: bool,
    /// The agent's own.
    own: (SdkMeterProvider, Reader),
}

/// One resource each.
type Key = (Arc<str>, Option<Arc<exchange::Workload>>);

#[derive(Clone)]
struct Workload {
    reader: Reader,
    /// Keeps the pipeline alive.
    _provider: SdkMeterProvider,
    server: Histogram<f64>,
    client: Histogram<f64>,
    rpc_server: Histogram<f64>,
    rpc_client: Histogram<f64>,
    request_size: Histogram<u64>,
    response_size: Histogram<u64>,
    auth: Counter<u64>,
}

impl Workloads {
    /// None yet but the agent itself.
    pub fn new(temporality: Temporality, stats: Arc<Stats>) -> anyhow::Result<Self> {
        const AGGREGATION: &str = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION";
        let exponential = match variable(AGGREGATION).map(|v| v.to_ascii_lowercase()).as_deref() {
            None | Some("explicit_bucket_histogram") => false,
            Some("base2_exponential_bucket_histogram") => true,
            Some(other) => bail!(super::WrongVariable(format!(
                "{AGGREGATION} is `{other}`: it must be explicit_bucket_histogram or base2_exponential_bucket_histogram"
            ))),
        };
        let own = provider(resource("apiscope", None), temporality, exponential);
        observe(&own.0, &stats);
        Ok(Self { known: HashMap::new(), temporality, exponential, own })
    }

    fn workload(&mut self, key: &Key) -> Workload {
        if let Some(known) = self.known.get(key) {
            return known.clone();
        }
        let key = if self.known.len() < MAX_WORKLOADS { key.clone() } else { (OVERFLOW_SERVICE.into(), None) };
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let (provider, reader) = provider(resource(&key.0, key.1.as_deref()), self.temporality, self.exponential);
        let meter = provider.meter(SCOPE);
        let duration = |name: &'static str| {
            meter.f64_histogram(name).with_unit("s").with_boundaries(DURATION_BOUNDS.into()).build()
        };
        let size =
            |name: &'static str| meter.u64_histogram(name).with_unit("By").with_boundaries(SIZE_BOUNDS.into()).build();
        let workload = Workload {
            server: duration("http.server.request.duration"),
            client: duration("http.client.request.duration"),
            rpc_server: duration("rpc.server.call.duration"),
            rpc_client: duration("rpc.client.call.duration"),
            request_size: size("http.server.request.body.size"),
            response_size: size("http.server.response.body.size"),
            auth: meter.u64_counter("apiscope.auth.requests").with_unit("{request}").build(),
            reader,
            _provider: provider,
        };
        self.known.insert(key, workload.clone());
        workload
    }

    /// The state of every workload.
    pub fn collect(&self) -> Vec<ResourceMetrics> {
        let readers = self.known.values().map(|w| &w.reader).chain([&self.own.1]);
        readers
            .filter_map(|reader| {
                let mut metrics = ResourceMetrics::default();
                reader.collect(&mut metrics).ok()?;
                Some(metrics)
            })
            .collect()
    }
}

fn provider(resource: Resource, temporality: Temporality, exponential: bool) -> (SdkMeterProvider, Reader) {
    let reader = Reader(Arc::new(ManualReader::builder().with_temporality(temporality).build()));
    let view = move |i: &Instrument| {
        let stream = Stream::builder().with_cardinality_limit(MAX_SERIES);
        let stream = if exponential && i.kind() == InstrumentKind::Histogram {
            stream.with_aggregation(Aggregation::Base2ExponentialHistogram {
                max_size: 160,
                max_scale: 20,
                record_min_max: true,
            })
        } else {
            stream
        };
        stream.build().ok()
    };
    let provider =
        SdkMeterProvider::builder().with_resource(resource).with_reader(reader.clone()).with_view(view).build();
    (provider, reader)
}

/// The agent's own numbers, read when they are collected.
fn observe(provider: &SdkMeterProvider, stats: &Arc<Stats>) {
    let meter = provider.meter(SCOPE);
    let (lost, unread, exchanges, connections, dropped, failed) =
        (stats.clone(), stats.clone(), stats.clone(), stats.clone(), stats.clone(), stats.clone());
    let (streams, limited) = (stats.clone(), stats.clone());
    // The instruments live as long as their provider does.
    let _ = meter
        .u64_observable_counter("apiscope.capture.lost")
        .with_unit("{exchange}")
        .with_callback(move |o| {
            Loss::ALL.iter().for_each(|&r| o.observe(lost.lost(r), &[KeyValue::new("reason", r.name())]))
        })
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.capture.unread")
        .with_unit("{event}")
        .with_callback(move |o| {
            Unread::ALL.iter().for_each(|&r| o.observe(unread.unread(r), &[KeyValue::new("reason", r.name())]))
        })
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.exchange.count")
        .with_unit("{exchange}")
        .with_callback(move |o| {
            for (side, n) in ["server", "client"].iter().zip(&exchanges.exchanges) {
                o.observe(n.load(Ordering::Relaxed), &[KeyValue::new("side", *side)]);
            }
        })
        .build();
    let (unnamed, pods, kubernetes) = (stats.clone(), stats.clone(), stats.clone());
    let _ = meter
        .u64_observable_counter("apiscope.identity.unnamed")
        .with_unit("{exchange}")
        .with_callback(move |o| {
            Unnamed::ALL.iter().for_each(|&r| o.observe(unnamed.unnamed_by(r), &[KeyValue::new("reason", r.name())]))
        })
        .build();
    let _ = meter
        .u64_observable_gauge("apiscope.identity.pods")
        .with_unit("{pod}")
        .with_callback(move |o| o.observe(pods.pods.load(Ordering::Relaxed), &[]))
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.identity.requests.failed")
        .with_unit("{request}")
        .with_callback(move |o| o.observe(kubernetes.kubernetes_failed.load(Ordering::Relaxed), &[]))
        .build();
    let _ = meter
        .u64_observable_gauge("apiscope.agent.connections")
        .with_unit("{connection}")
        .with_callback(move |o| o.observe(connections.connections.load(Ordering::Relaxed), &[]))
        .build();
    let _ = meter
        .u64_observable_gauge("apiscope.agent.streams")
        .with_unit("{stream}")
        .with_callback(move |o| o.observe(streams.streams.load(Ordering::Relaxed), &[]))
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.agent.spans.dropped")
        .with_unit("{span}")
        .with_callback(move |o| o.observe(dropped.spans_dropped.load(Ordering::Relaxed), &[]))
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.agent.spans.limited")
        .with_unit("{span}")
        .with_callback(move |o| o.observe(limited.spans_limited.load(Ordering::Relaxed), &[]))
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.agent.exports.failed")
        .with_unit("{export}")
        .with_callback(move |o| o.observe(failed.exports_failed.load(Ordering::Relaxed), &[]))
        .build();
    observe_tls(&meter, stats);
    let (open, unsent) = (stats.clone(), stats.clone());
    let _ = meter
        .u64_observable_gauge("apiscope.finding.count")
        .with_unit("{finding}")
        .with_callback(move |o| {
            for (severity, n) in ["low", "medium", "high", "critical"].iter().zip(&open.findings_open) {
                o.observe(n.load(Ordering::Relaxed), &[KeyValue::new("apiscope.finding.severity", *severity)]);
            }
        })
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.agent.findings.dropped")
        .with_unit("{event}")
        .with_callback(move |o| o.observe(unsent.findings_dropped.load(Ordering::Relaxed), &[]))
        .build();
    let _ = meter
        .f64_observable_counter("apiscope.agent.cpu.time")
        .with_unit("s")
        .with_callback(|o| o.observe(crate::stats::usage().0, &[]))
        .build();
    let _ = meter
        .u64_observable_gauge("apiscope.agent.memory.usage")
        .with_unit("By")
        .with_callback(|o| o.observe(crate::stats::usage().1, &[]))
        .build();
}

/// TLS connections, and who carries them.
fn observe_tls(meter: &Meter, stats: &Arc<Stats>) {
    let (states, undecided, bytes, calls, without, sums, unread) =
        (stats.clone(), stats.clone(), stats.clone(), stats.clone(), stats.clone(), stats.clone(), stats.clone());
    let _ = meter
        .u64_observable_counter("apiscope.tls.connections")
        .with_unit("{connection}")
        .with_callback(move |o| {
            let tls = states.tls();
            for (state, n) in [("read", tls.read), ("unread", tls.unread), ("left_out", tls.left_out)] {
                o.observe(n, &[KeyValue::new("state", state)]);
            }
        })
        .build();
    let _ = meter
        .u64_observable_gauge("apiscope.tls.connections.undecided")
        .with_unit("{connection}")
        .with_callback(move |o| {
            let tls = undecided.tls();
            o.observe(tls.connections.saturating_sub(tls.read + tls.unread + tls.left_out), &[]);
        })
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.tls.unread.bytes")
        .with_unit("By")
        .with_callback(move |o| o.observe(bytes.tls().unread_bytes, &[]))
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.tls.calls")
        .with_unit("{call}")
        .with_callback(move |o| o.observe(calls.tls().calls, &[]))
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.tls.sessions_without_socket")
        .with_unit("{session}")
        .with_callback(move |o| o.observe(without.tls().sessions_without_socket, &[]))
        .build();
    let labels = |sum: &Sum| {
        let reason = sum.reason.map_or("", Reason::label);
        [KeyValue::new("library", sum.library.label()), KeyValue::new("reason", reason)]
    };
    let _ = meter
        .u64_observable_gauge("apiscope.tls.processes")
        .with_unit("{process}")
        .with_callback(move |o| {
            for sum in sums.coverage().view().libraries {
                o.observe(sum.processes, &labels(&sum));
            }
        })
        .build();
    let _ = meter
        .u64_observable_counter("apiscope.tls.unread.connections")
        .with_unit("{connection}")
        .with_callback(move |o| {
            for sum in unread.coverage().view().libraries.iter().filter(|s| s.reason.is_some()) {
                o.observe(sum.connections.unread, &labels(sum));
            }
        })
        .build();
}

/// Opens the series of all workloads.
pub struct Sink(Arc<Mutex<Workloads>>);

impl Sink {
    /// For these workloads.
    pub fn new(workloads: Arc<Mutex<Workloads>>) -> Self {
        Self(workloads)
    }
}

impl SeriesSink for Sink {
    fn open(&mut self, key: &SeriesKey) -> Box<dyn Recorder> {
        let workload = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .workload(&(key.service.clone(), key.workload.clone()));
        let mut attributes = vec![
            KeyValue::new("http.request.method", key.method.semantic_name().to_owned()),
            KeyValue::new("http.route", key.route.clone()),
            KeyValue::new("apiscope.route.source", key.route_source),
            KeyValue::new("url.scheme", key.scheme.name()),
            KeyValue::new("network.protocol.version", key.protocol.name()),
        ];
        if key.status != 0 {
            attributes.push(KeyValue::new("http.response.status_code", i64::from(key.status)));
        }
        if let Some(error) = status::error_type(key.side, key.status, key.grpc_status, key.stream_error) {
            attributes.push(KeyValue::new("error.type", error));
        }
        let server = key.side == Side::Server;
        let auth = server.then(|| Credentials::new(&workload.auth, key));
        if key.api == Api::Grpc {
            // A call is counted once: by the conventions for RPC, not by those for HTTP beside.
            attributes.retain(|a| matches!(a.key.as_str(), "error.type" | "network.protocol.version"));
            attributes.push(KeyValue::new("rpc.system.name", "grpc"));
            attributes.push(KeyValue::new("rpc.method", key.route.trim_start_matches('/').to_owned()));
            if let Some(code) = key.grpc_status {
                attributes.push(KeyValue::new("rpc.response.status_code", status::grpc_name(code)));
            }
            let duration = if server { &workload.rpc_server } else { &workload.rpc_client };
            return Box::new(Series { duration: duration.bind(&attributes), sizes: None, auth });
        }
        Box::new(Series {
            duration: if server { &workload.server } else { &workload.client }.bind(&attributes),
            sizes: server.then(|| (workload.request_size.bind(&attributes), workload.response_size.bind(&attributes))),
            auth,
        })
    }
}

struct Series {
    duration: BoundHistogram<f64>,
    sizes: Option<(BoundHistogram<u64>, BoundHistogram<u64>)>,
    auth: Option<Credentials>,
}

const SCHEMES: usize = Auth::Other as usize + 1;

/// Requests of an endpoint by the scheme of their credential: who shows none, and what is refused. Its trend is
/// the posture of the endpoint.
struct Credentials {
    counter: Counter<u64>,
    attributes: Vec<KeyValue>,
    /// By scheme; most endpoints see one or two.
    bound: [OnceCell<BoundCounter<u64>>; SCHEMES],
}

impl Credentials {
    fn new(counter: &Counter<u64>, key: &SeriesKey) -> Self {
        let attributes = vec![
            KeyValue::new("http.request.method", key.method.semantic_name().to_owned()),
            KeyValue::new("http.route", key.route.clone()),
            KeyValue::new("apiscope.auth.refused", matches!(key.status, 401 | 403)),
        ];
        Self { counter: counter.clone(), attributes, bound: Default::default() }
    }

    fn count(&self, auth: Auth) {
        let bound = self.bound[auth as usize].get_or_init(|| {
            let mut attributes = self.attributes.clone();
            attributes.push(KeyValue::new("apiscope.auth.scheme", auth.name()));
            self.counter.bind(&attributes)
        });
        bound.add(1);
    }
}

impl Recorder for Series {
    fn record(&self, exchange: &Exchange) {
        self.duration.record(exchange.duration_ns as f64 / 1e9);
        if let Some(auth) = &self.auth {
            auth.count(exchange.auth);
        }
        if let Some((request, response)) = &self.sizes {
            if let Some(n) = exchange.request_body_bytes {
                request.record(n);
            }
            if let Some(n) = exchange.response_body_bytes {
                response.record(n);
            }
        }
    }
}
