//! Spans: SERVER and CLIENT spans of sampled exchanges, in a bounded queue, the oldest dropped first.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use anyhow::bail;
use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId,
    trace::{SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_sdk::trace::{IdGenerator as _, RandomIdGenerator, SpanData, SpanEvents, SpanLinks};

use super::{WrongVariable, resource, variable};
use crate::{
    exchange::{Alpn, Api, Exchange, Origin, Peer, Side},
    stats::Stats,
    status,
};

/// Spans that wait for an export.
const MAX_WAITING: usize = 2_048;
/// Spans a second, as long as nothing is wrong, and as many again for errors.
const SPANS_PER_SECOND: f64 = 100.0;

/// Which exchanges become spans, before the rate limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampler {
    /// All that the rate limit allows.
    On,
    /// None.
    Off,
    /// This share, by trace id.
    Ratio(f64),
}

impl Sampler {
    /// From `OTEL_TRACES_SAMPLER` and its argument.
    ///
    /// # Errors
    /// Names what they may be.
    pub fn from_environment() -> anyhow::Result<Self> {
        let name = variable("OTEL_TRACES_SAMPLER");
        match name.as_deref().map(|n| n.strip_prefix("parentbased_").unwrap_or(n)) {
            None | Some("always_on") => Ok(Self::On),
            Some("always_off") => Ok(Self::Off),
            Some("traceidratio") => {
                let text = variable("OTEL_TRACES_SAMPLER_ARG").unwrap_or_else(|| "1".into());
                match text.parse::<f64>() {
                    Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(Self::Ratio(ratio)),
                    _ => bail!(WrongVariable(format!(
                        "OTEL_TRACES_SAMPLER_ARG is `{text}`: it must be a number from 0 to 1"
                    ))),
                }
            }
            Some(other) => bail!(WrongVariable(format!(
                "OTEL_TRACES_SAMPLER is `{other}`: it must be always_on, always_off or traceidratio, with or without parentbased_"
            ))),
        }
    }
}

/// Spans that wait.
pub struct Queue {
    inner: Mutex<Inner>,
    sampler: Sampler,
    stats: Arc<Stats>,
}

/// One resource each.
pub type Key = (Arc<str>, Option<Arc<Origin>>);

struct Inner {
    waiting: VecDeque<(Key, SpanData)>,
    /// Allowance: usual spans, and errors.
    tokens: [f64; 2],
    filled: Instant,
    ids: RandomIdGenerator,
    scope: InstrumentationScope,
}

impl Inner {
    /// Adds what time allows, not more often than is worth it. Is there a span's worth now?
    fn fill(&mut self, is_error: usize) -> bool {
        let passed = self.filled.elapsed();
        if passed < Duration::from_millis(10) {
            return false;
        }
        self.filled = Instant::now();
        for tokens in &mut self.tokens {
            *tokens = (*tokens + passed.as_secs_f64() * SPANS_PER_SECOND).min(SPANS_PER_SECOND);
        }
        self.tokens[is_error] >= 1.0
    }
}

impl Queue {
    /// An empty one.
    pub fn new(sampler: Sampler, stats: Arc<Stats>) -> Self {
        let inner = Inner {
            waiting: VecDeque::new(),
            tokens: [SPANS_PER_SECOND; 2],
            filled: Instant::now(),
            ids: RandomIdGenerator::default(),
            scope: InstrumentationScope::builder("apiscope").with_version(env!("CARGO_PKG_VERSION")).build(),
        };
        Self { inner: Mutex::new(inner), sampler, stats }
    }

    /// Takes an exchange as a span, when it is sampled and the rate allows.
    pub fn offer(&self, exchange: &Exchange, route: &str) {
        if self.sampler == Sampler::Off {
            return;
        }
        // The exporting thread holds this for as long as it takes to empty the queue.
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let inner = &mut *inner;
        let trace_id = exchange.trace.map_or_else(|| inner.ids.new_trace_id(), |t| TraceId::from_bytes(t.trace_id));
        if let Sampler::Ratio(ratio) = self.sampler {
            let [.., a, b, c, d] = trace_id.to_bytes();
            if f64::from(u32::from_be_bytes([a, b, c, d])) >= ratio * f64::from(u32::MAX) {
                return;
            }
        }
        let is_error = usize::from(status::is_server_error(exchange));
        if inner.tokens[is_error] < 1.0 && !inner.fill(is_error) {
            self.stats.spans_limited.fetch_add(1, Ordering::Relaxed);
            return;
        }
        inner.tokens[is_error] -= 1.0;
        let span = span(exchange, route, trace_id, inner.ids.new_span_id(), inner.scope.clone());
        if inner.waiting.len() >= MAX_WAITING {
            inner.waiting.pop_front();
            self.stats.spans_dropped.fetch_add(1, Ordering::Relaxed);
        }
        inner.waiting.push_back(((exchange.service.clone(), exchange.origin.clone()), span));
        self.stats.spans.fetch_add(1, Ordering::Relaxed);
    }

    /// What waits, by service and container.
    pub fn take(&self) -> HashMap<Key, Vec<SpanData>> {
        let waiting = std::mem::take(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner).waiting);
        let mut batches: HashMap<Key, Vec<SpanData>> = HashMap::new();
        for (key, span) in waiting {
            batches.entry(key).or_default().push(span);
        }
        batches
    }
}

fn time(ns: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(ns)
}

fn span(exchange: &Exchange, route: &str, trace_id: TraceId, span_id: SpanId, scope: InstrumentationScope) -> SpanData {
    let method = exchange.method.semantic_name();
    let mut attributes = vec![
        KeyValue::new("http.request.method", method.to_owned()),
        KeyValue::new("http.route", route.to_owned()),
        // Never the path as sent: it carries ids.
        KeyValue::new("url.path", route.to_owned()),
        KeyValue::new("url.scheme", exchange.scheme.name()),
        KeyValue::new("network.protocol.version", exchange.protocol.name()),
        KeyValue::new("apiscope.exchange.end", exchange.end.name()),
        KeyValue::new("apiscope.auth.scheme", exchange.auth.name()),
    ];
    if exchange.status != 0 {
        attributes.push(KeyValue::new("http.response.status_code", i64::from(exchange.status)));
    }
    if let Some(version) = exchange.tls_version {
        attributes.push(KeyValue::new("tls.protocol.name", "tls"));
        attributes.push(KeyValue::new("tls.protocol.version", version.name()));
    }
    if let Some(cipher) = exchange.tls_cipher {
        attributes.push(KeyValue::new("tls.cipher", cipher.name()));
    }
    if let Some(alpn) = exchange.tls_alpn.filter(|a| !matches!(a, Alpn::None | Alpn::Other)) {
        attributes.push(KeyValue::new("tls.next_protocol", alpn.name()));
    }
    if let Some(shown) = exchange.client_certificate {
        attributes.push(KeyValue::new("apiscope.tls.client_certificate", shown));
    }
    if let Peer::Ip(server) = &exchange.server {
        attributes.push(KeyValue::new("server.address", server.ip().to_string()));
        attributes.push(KeyValue::new("server.port", i64::from(server.port())));
    }
    if let (Peer::Ip(client), Side::Server) = (&exchange.client, exchange.side) {
        attributes.push(KeyValue::new("client.address", client.ip().to_string()));
    }
    if let Some(agent) = &exchange.user_agent {
        attributes.push(KeyValue::new("user_agent.original", agent.to_string()));
    }
    if let Some(n) = exchange.request_body_bytes {
        attributes.push(KeyValue::new("http.request.body.size", i64::try_from(n).unwrap_or(i64::MAX)));
    }
    if let Some(n) = exchange.response_body_bytes {
        attributes.push(KeyValue::new("http.response.body.size", i64::try_from(n).unwrap_or(i64::MAX)));
    }
    attributes.extend(exchange.peer.iter().flat_map(|peer| resource::of_peer(peer)));
    let mut name = format!("{method} {route}");
    if exchange.api == Api::Grpc {
        name = route.trim_start_matches('/').to_owned();
        attributes.push(KeyValue::new("rpc.system.name", "grpc"));
        attributes.push(KeyValue::new("rpc.method", name.clone()));
        if let Some(code) = exchange.grpc_status {
            attributes.push(KeyValue::new("rpc.response.status_code", status::grpc_name(code)));
        }
    } else if exchange.api != Api::Http {
        attributes.push(KeyValue::new("apiscope.api", exchange.api.name()));
    }
    let error = status::error_type(exchange.side, exchange.status, exchange.grpc_status, exchange.stream_error);
    let status = if error.is_some() { Status::error("") } else { Status::Unset };
    attributes.extend(error.map(|e| KeyValue::new("error.type", e)));
    SpanData {
        span_context: SpanContext::new(trace_id, span_id, TraceFlags::SAMPLED, false, TraceState::default()),
        parent_span_id: exchange.trace.map_or(SpanId::INVALID, |t| SpanId::from_bytes(t.parent_id)),
        parent_span_is_remote: exchange.trace.is_some(),
        span_kind: if exchange.side == Side::Server { SpanKind::Server } else { SpanKind::Client },
        name: name.into(),
        start_time: time(exchange.ts),
        end_time: time(exchange.ts + exchange.duration_ns),
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status,
        instrumentation_scope: scope,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::TraceContext;

    #[test]
    fn parents_are_kept_and_the_queue_is_bounded() {
        let stats = Arc::new(Stats::default());
        let queue = Queue::new(Sampler::On, stats.clone());
        let trace = TraceContext { trace_id: [7; 16], parent_id: [9; 8], sampled: true };
        let exchange =
            Exchange { path: Some("/users/42".into()), status: 500, trace: Some(trace), ..Exchange::default() };
        for _ in 0..10_000 {
            queue.offer(&exchange, "/users/{int}");
        }
        let spans: Vec<_> = queue.take().into_values().flatten().collect();
        assert!(!spans.is_empty() && spans.len() <= MAX_WAITING);
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let taken = get(&stats.spans);
        assert_eq!(taken - get(&stats.spans_dropped), spans.len() as u64);
        assert_eq!(taken + get(&stats.spans_limited), 10_000, "each is a span or counted");
        assert_eq!(spans[0].parent_span_id, SpanId::from_bytes([9; 8]));
        assert_eq!(spans[0].span_context.trace_id(), TraceId::from_bytes([7; 16]));
        assert!(!format!("{spans:?}").contains("/users/42"), "the raw path must not be exported");
    }
}
