//! OpenTelemetry: metrics, traces and findings (as log events) over OTLP, by gRPC or HTTP/protobuf. The only place that knows
//! `opentelemetry`.
//!
//! Configured by the standard variables (`OTEL_EXPORTER_OTLP_*`, `OTEL_METRIC_EXPORT_INTERVAL`,
//! `OTEL_TRACES_SAMPLER`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SDK_DISABLED` …), which the exporters read
//! themselves. One thread exports; the capture thread only adds to bound instruments and puts spans into
//! a bounded queue, so that nothing a collector does can hold it up. Metrics are cumulative: what a
//! collector misses while it is away is in the next export. Spans are sampled, and dropped first.
//!
//! One resource per workload ([`MAX_WORKLOADS`]; later ones share one), not one for the agent: metrics by
//! workload, so that a rollout makes no new series; spans by pod and container.

mod environment;
mod logs;
mod metrics;
mod resource;
mod tls;
mod traces;

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use opentelemetry_otlp::{
    LogExporter, MetricExporter, SpanExporter, WithExportConfig as _, WithHttpConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::metrics::{Temporality, exporter::PushMetricExporter as _};

pub use environment::WrongVariable;

use crate::{
    aggregate::{Moved, SeriesSink},
    detect::Event,
    exchange::Exchange,
    inventory,
    stats::Stats,
};

/// Workloads with a resource of their own.
pub const MAX_WORKLOADS: usize = 256;
/// Time between two exports of metrics, without `OTEL_METRIC_EXPORT_INTERVAL` (the specification's).
const METRIC_INTERVAL: Duration = Duration::from_secs(60);
/// Time between two exports of spans, without `OTEL_BSP_SCHEDULE_DELAY` (the specification's).
const SPAN_INTERVAL: Duration = Duration::from_secs(5);
/// A failing collector is complained about this often.
const COMPLAIN_AFTER: Duration = Duration::from_secs(60);

/// Protocol of an exporter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    Grpc,
    Http,
}

/// The exporter, running.
pub struct Exporter {
    workloads: Arc<Mutex<metrics::Workloads>>,
    spans: Arc<traces::Queue>,
    findings: Arc<logs::Queue>,
    stop: mpsc::SyncSender<()>,
    done: mpsc::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}

/// A variable in milliseconds.
fn milliseconds(name: &str, default: Duration) -> anyhow::Result<Duration> {
    match variable(name) {
        None => Ok(default),
        Some(text) => match text.trim().parse::<u64>() {
            Ok(ms) if ms > 0 => Ok(Duration::from_millis(ms)),
            _ => bail!(WrongVariable(format!("{name} is `{text}`: it must be a positive number of milliseconds"))),
        },
    }
}

fn wire(signal: &str) -> anyhow::Result<Wire> {
    for name in [format!("OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"), "OTEL_EXPORTER_OTLP_PROTOCOL".into()] {
        return match variable(&name).as_deref() {
            None => continue,
            Some("grpc") => Ok(Wire::Grpc),
            Some("http/protobuf") => Ok(Wire::Http),
            Some(other) => bail!(WrongVariable(format!("{name} is `{other}`: it must be grpc or http/protobuf"))),
        };
    }
    Ok(Wire::Http)
}

/// Is this signal to be exported?
fn enabled(signal: &str) -> bool {
    let exporter = variable(&format!("OTEL_{signal}_EXPORTER"));
    let endpoint =
        variable("OTEL_EXPORTER_OTLP_ENDPOINT").or_else(|| variable(&format!("OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")));
    exporter.as_deref() != Some("none") && endpoint.is_some()
}

/// Where a signal goes, as the operator wrote it, without any credentials in it.
fn endpoint(signal: &str) -> String {
    let own = variable(&format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", signal.to_ascii_uppercase()));
    let text = own.or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT")).unwrap_or_default();
    match text.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?.1))) {
        Some((scheme, rest)) => format!("{scheme}://{rest}"),
        None => text,
    }
}

/// Is a collector configured?
#[must_use]
pub fn is_configured() -> bool {
    variable("OTEL_SDK_DISABLED").is_none_or(|v| !v.eq_ignore_ascii_case("true"))
        && (enabled("METRICS") || enabled("TRACES") || enabled("LOGS"))
}

/// Takes what became of endpoints.
#[derive(Clone)]
pub struct Changes(Arc<logs::Queue>);

impl Changes {
    /// Takes a change; never blocks.
    pub fn add(&self, change: &inventory::Change) {
        self.0.changed(change);
    }
}

impl Exporter {
    /// Starts exporting; `None` when no collector is configured.
    ///
    /// # Errors
    /// Names the variable that is wrong, and what it may be.
    pub fn start(stats: Arc<Stats>) -> anyhow::Result<Option<Self>> {
        if !is_configured() {
            return Ok(None);
        }
        environment::check(variable)?;
        let interval = milliseconds("OTEL_METRIC_EXPORT_INTERVAL", METRIC_INTERVAL)?;
        let delay = milliseconds("OTEL_BSP_SCHEDULE_DELAY", SPAN_INTERVAL)?;
        let temporality = match variable("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE")
            .map(|v| v.to_ascii_lowercase())
            .as_deref()
        {
            None | Some("cumulative") => Temporality::Cumulative,
            Some("delta") => Temporality::Delta,
            Some("lowmemory") => Temporality::LowMemory,
            Some(other) => bail!(WrongVariable(format!(
                "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE is `{other}`: it must be cumulative, delta or lowmemory"
            ))),
        };
        let (metric_wire, span_wire, log_wire) = (wire("METRICS")?, wire("TRACES")?, wire("LOGS")?);
        let sampler = traces::Sampler::from_environment()?;
        // Another part of the process may have chosen a provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("failed to start the exporter")?;
        let (metrics, spans, logs) = {
            let _guard = runtime.enter();
            (
                enabled("METRICS").then(|| metric_exporter(metric_wire, temporality)).transpose()?,
                enabled("TRACES").then(|| span_exporter(span_wire)).transpose()?,
                enabled("LOGS").then(|| log_exporter(log_wire)).transpose()?,
            )
        };
        let workloads = Arc::new(Mutex::new(metrics::Workloads::new(temporality, stats.clone())?));
        let queue =
            Arc::new(traces::Queue::new(if spans.is_some() { sampler } else { traces::Sampler::Off }, stats.clone()));
        let findings = Arc::new(logs::Queue::new(logs.is_some(), stats.clone()));
        let (stop, stopped) = mpsc::sync_channel(1);
        let (finished, done) = mpsc::sync_channel(1);
        let (its_workloads, its_queue, its_findings) = (workloads.clone(), queue.clone(), findings.clone());
        let thread = std::thread::Builder::new().name("export".into()).spawn(move || {
            let mut work = Work {
                metrics,
                spans,
                logs,
                workloads: its_workloads,
                queue: its_queue,
                findings: its_findings,
                stats,
                complained: None,
            };
            let (mut next_metrics, mut next_spans) = (Instant::now() + interval, Instant::now() + delay);
            loop {
                let wait = next_metrics.min(next_spans).saturating_duration_since(Instant::now());
                let ends = stopped.recv_timeout(wait) != Err(mpsc::RecvTimeoutError::Timeout);
                let now = Instant::now();
                if ends || now >= next_spans {
                    runtime.block_on(work.export_findings());
                    runtime.block_on(work.export_spans());
                    next_spans = Instant::now() + delay;
                }
                if ends || now >= next_metrics {
                    runtime.block_on(work.export_metrics());
                    next_metrics = now + interval;
                }
                if ends {
                    // Whoever waits may have given up.
                    let _ = finished.send(());
                    return;
                }
            }
        })?;
        Ok(Some(Self { workloads, spans: queue, findings, stop, done, thread: Some(thread) }))
    }

    /// What records exchanges as metrics.
    #[must_use]
    pub fn sink(&self) -> Box<dyn SeriesSink> {
        Box::new(metrics::Sink::new(self.workloads.clone()))
    }

    /// Offers an exchange as a span; never blocks.
    pub fn span(&self, exchange: &Exchange, route: &str) {
        self.spans.offer(exchange, route);
    }

    /// Takes a change of a finding; never blocks.
    pub fn finding(&self, event: &Event) {
        self.findings.add(event);
    }

    /// Takes that a route has another name; never blocks.
    pub fn moved(&self, moved: &Moved) {
        self.findings.moved(moved);
    }

    /// Where another thread says what became of endpoints.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes(self.findings.clone())
    }

    /// Exports once more and ends, within `timeout`.
    pub fn shutdown(mut self, timeout: Duration) {
        // A thread that is gone needs no telling.
        let _ = self.stop.try_send(());
        if self.done.recv_timeout(timeout).is_ok() {
            if let Some(thread) = self.thread.take() {
                // Its work is done; a panic there was reported already.
                let _ = thread.join();
            }
        } else {
            log::warn!("the collector did not take the last export within {} s", timeout.as_secs());
        }
    }
}

/// The exporter of a signal. A macro, since the builders share no trait; `$signal` is the part of the
/// `OTEL_EXPORTER_OTLP_*` names that tells signals apart, `$what` is how messages call it.
macro_rules! exporter {
    ($builder:expr, $wire:expr, $signal:literal, $what:literal) => {{
        let (builder, tls) = ($builder, tls::Tls::from_environment($signal)?);
        let built = match $wire {
            Wire::Grpc => match tls.grpc() {
                Some(tls) => builder.with_tonic().with_tls_config(tls).build(),
                None => builder.with_tonic().build(),
            },
            Wire::Http => {
                let builder = builder.with_http().with_protocol(opentelemetry_otlp::Protocol::HttpBinary);
                match tls.http()? {
                    Some(client) => builder.with_http_client(client).build(),
                    None => builder.build(),
                }
            }
        };
        built.map_err(|e| {
            WrongVariable(format!(
                concat!("no exporter of ", $what, " can be made of the OTEL_EXPORTER_OTLP_* variables: {}"),
                e
            ))
            .into()
        })
    }};
}

fn metric_exporter(wire: Wire, temporality: Temporality) -> anyhow::Result<MetricExporter> {
    exporter!(MetricExporter::builder().with_temporality(temporality), wire, "METRICS", "metrics")
}

fn span_exporter(wire: Wire) -> anyhow::Result<SpanExporter> {
    exporter!(SpanExporter::builder(), wire, "TRACES", "traces")
}

fn log_exporter(wire: Wire) -> anyhow::Result<LogExporter> {
    exporter!(LogExporter::builder(), wire, "LOGS", "findings")
}

/// What the exporting thread works on.
struct Work {
    metrics: Option<MetricExporter>,
    spans: Option<SpanExporter>,
    logs: Option<LogExporter>,
    workloads: Arc<Mutex<metrics::Workloads>>,
    queue: Arc<traces::Queue>,
    findings: Arc<logs::Queue>,
    stats: Arc<Stats>,
    complained: Option<Instant>,
}

impl Work {
    async fn export_metrics(&mut self) {
        let Some(exporter) = &self.metrics else { return };
        let collected = self.workloads.lock().unwrap_or_else(PoisonError::into_inner).collect();
        let mut results = Vec::new();
        for metrics in &collected {
            let result = exporter.export(metrics).await;
            let failed = result.is_err();
            results.push(result.map_err(|e| e.to_string()));
            if failed {
                // The others would fail as slowly; being cumulative they lose nothing.
                break;
            }
        }
        self.note("metrics", results);
    }

    async fn export_spans(&mut self) {
        use opentelemetry_sdk::trace::SpanExporter as _;
        let Some(exporter) = &mut self.spans else { return };
        let mut results = Vec::new();
        for ((service, origin), spans) in self.queue.take() {
            exporter.set_resource(&resource::of_container(&service, origin.as_deref()));
            let n = spans.len() as u64;
            let result = exporter.export(spans).await;
            if result.is_err() {
                self.stats.spans_dropped.fetch_add(n, Ordering::Relaxed);
            }
            results.push(result.map_err(|e| e.to_string()));
        }
        self.note("traces", results);
    }

    async fn export_findings(&mut self) {
        use opentelemetry_sdk::logs::{LogBatch, LogExporter as _};
        let Some(exporter) = &mut self.logs else { return };
        let (scope, mut results) = (logs::scope(), Vec::new());
        for (service, records) in self.findings.take() {
            exporter.set_resource(&resource::resource(&service, None));
            let batch: Vec<_> = records.iter().map(|r| (r, &scope)).collect();
            let result = exporter.export(LogBatch::new(&batch)).await;
            if result.is_err() {
                self.findings.put_back(&service, records);
            }
            results.push(result.map_err(|e| e.to_string()));
        }
        self.note("findings", results);
    }

    /// Counts results, and says when something fails: once, then every minute.
    fn note(&mut self, signal: &str, results: Vec<Result<(), String>>) {
        for result in results {
            match result {
                Ok(()) => {
                    self.stats.exports.fetch_add(1, Ordering::Relaxed);
                    if self.complained.take().is_some() {
                        log::warn!("the collector takes {signal} again");
                    }
                }
                Err(e) => {
                    self.stats.exports_failed.fetch_add(1, Ordering::Relaxed);
                    if self.complained.is_none_or(|at| at.elapsed() > COMPLAIN_AFTER) {
                        self.complained = Some(Instant::now());
                        log::warn!(
                            "the collector at {} does not take {signal}: {e}: is it there, and is OTEL_EXPORTER_OTLP_ENDPOINT right? metrics are kept, spans are dropped",
                            endpoint(signal)
                        );
                    }
                }
            }
        }
    }
}
