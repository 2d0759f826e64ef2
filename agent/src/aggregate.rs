//! Exchanges -> per-endpoint access patterns. (Interfaces first; see `SeriesSink`.)

use std::sync::Arc;

use crate::exchange::{Exchange, Method, Protocol, Scheme, Side};

/// What tells one metric series from another. No client identity and no Host header: attackers
/// choose them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SeriesKey {
    /// Service (one OpenTelemetry resource each).
    pub service: Arc<str>,
    /// End that was seen.
    pub side: Side,
    /// Method.
    pub method: Method,
    /// Route, `/{overflow}` when the endpoint table is full.
    pub route: Arc<str>,
    /// Where the route came from: `learned`, `typed`, `openapi`, `config`, `overflow`.
    pub route_source: &'static str,
    /// Status code; 0 where no answer came.
    pub status: u16,
    /// Scheme.
    pub scheme: Scheme,
    /// HTTP version.
    pub protocol: Protocol,
    /// gRPC status.
    pub grpc_status: Option<u32>,
}

/// Opens a recorder for a new series. Implemented by `export`, so that this module knows nothing of
/// OpenTelemetry.
pub trait SeriesSink: Send {
    /// Called once per series, from the capture thread; must not block.
    fn open(&mut self, key: &SeriesKey) -> Box<dyn Recorder>;
}

/// Records the exchanges of one series. On the path of every exchange: a few tens of nanoseconds.
pub trait Recorder: Send {
    /// Adds one exchange.
    fn record(&self, exchange: &Exchange);
}
