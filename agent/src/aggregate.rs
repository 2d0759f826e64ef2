//! Exchanges -> per-endpoint access patterns. An endpoint is a service, a side, a method and a route.
//!
//! Bounds: `limits.endpoints` endpoints (2,000 by default); what comes later is added to one overflow endpoint per side, so
//! that sums stay right ([`OVERFLOW`]). Per endpoint [`MAX_STATUSES`] statuses and [`MAX_CALLERS`]
//! callers. About 6 KB each. Nothing is evicted: an inventory must not forget what an attacker floods.

use std::{collections::BTreeMap, sync::Arc};

use histogram::Histogram;
use rustc_hash::{FxHashMap, FxHashSet};
use serde::{Deserialize, Serialize};

mod facts;

pub use facts::{Facts, FactsView};

use crate::{
    exchange::{Api, Auth, Exchange, Method, Peer, Protocol, Scheme, Side, Workload},
    route::Route,
    status,
};

/// Most statuses that are told apart of one endpoint; the rest is counted by its class.
pub const MAX_STATUSES: usize = 16;
/// Most callers that are told apart of one endpoint.
pub const MAX_CALLERS: usize = 64;
/// Route of the endpoints that did not fit.
pub const OVERFLOW: &str = "/{overflow}";
/// Seconds over which the rate is averaged.
const RATE_SECONDS: usize = 10;
/// Endpoints that are found again without their texts: 8 KiB, a place each for the usual limit.
const LATELY: usize = 2_048;
/// Durations: 2^4 buckets for each power of two, so within 6.25 %, up to 2^43 ns (2.4 hours).
const DURATION: (u8, u8) = (4, 43);
/// Sizes: within 25 %, up to 2^40 bytes.
const SIZE: (u8, u8) = (2, 40);

/// What tells one metric series from another. No client identity and no Host header: attackers
/// choose them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SeriesKey {
    /// Service; with the workload, one OpenTelemetry resource each.
    pub service: Arc<str>,
    /// Where it runs; `None` outside containers.
    pub workload: Option<Arc<Workload>>,
    /// End that was seen.
    pub side: Side,
    /// Method.
    pub method: Method,
    /// Route, [`OVERFLOW`] when the endpoint table is full.
    pub route: Arc<str>,
    /// Where the route came from: `typed`, `config`, `overflow`.
    pub route_source: &'static str,
    /// Status code; 0 where no answer came.
    pub status: u16,
    /// Scheme.
    pub scheme: Scheme,
    /// HTTP version.
    pub protocol: Protocol,
    /// gRPC status.
    pub grpc_status: Option<u32>,
    /// Code of what ended an HTTP/2 stream early.
    pub stream_error: Option<u32>,
    /// Kind of API.
    pub api: Api,
}

/// An endpoint whose route has another name now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Service.
    pub service: Arc<str>,
    /// End that was seen.
    pub side: Side,
    /// Method.
    pub method: Method,
    /// Route until now.
    pub from: Arc<str>,
    /// Route from now on.
    pub into: Arc<str>,
    /// There was an endpoint of that name: the two are one now.
    pub merged: bool,
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

/// All endpoints of this node.
pub struct Endpoints {
    index: FxHashMap<Key, usize>,
    /// Numbers of endpoints that came lately, by [`place`]: what is found here needs no hash of its texts.
    lately: Box<[u32; LATELY]>,
    list: Vec<Endpoint>,
    sink: Option<Box<dyn SeriesSink>>,
    limit: usize,
    /// Exchanges that went to an overflow endpoint.
    pub overflowed: u64,
}

/// Identity of an endpoint. Services and routes are shared strings: their addresses are compared first.
#[derive(PartialEq, Eq, Hash, Clone)]
struct Key {
    service: Arc<str>,
    /// Services of one name in two namespaces are two.
    workload: Option<Arc<Workload>>,
    side: Side,
    method: Method,
    route: Arc<str>,
}

impl Key {
    fn is_of(&self, exchange: &Exchange, route: &Arc<str>) -> bool {
        self.route == *route
            && self.service == exchange.service
            && self.side == exchange.side
            && self.method == exchange.method
            && self.workload.as_ref() == exchange.origin.as_ref().and_then(|o| o.workload.as_ref())
    }
}

/// Where a number may be in [`Endpoints::lately`]: routes are shared, so their addresses say nearly always which it is.
fn place(exchange: &Exchange, route: &Arc<str>) -> usize {
    let addresses = [route.as_ptr() as u64, exchange.method.as_str().as_ptr() as u64, exchange.side as u64];
    // The upper bits of a product depend on all bits below (Fibonacci hashing).
    let mixed = addresses.iter().fold(0, |h: u64, a| (h.rotate_left(5) ^ a).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mixed >> 32) as usize % LATELY
}

struct Endpoint {
    key: Key,
    /// Its numbers went to another endpoint when their routes became one. Its place stays: others count by it.
    moved: bool,
    source: &'static str,
    count: u64,
    errors: u64,
    statuses: Vec<Series>,
    other_statuses: BTreeMap<u16, u64>,
    auth: [u64; 9],
    duration: Histogram,
    request_size: Histogram,
    response_size: Histogram,
    request_bytes: u64,
    response_bytes: u64,
    callers: FxHashSet<Peer>,
    other_callers: u64,
    first_seen: u64,
    last_seen: u64,
    rate: [u32; RATE_SECONDS],
    rate_second: u64,
    facts: Facts,
}

/// One status (and version, and scheme) of an endpoint.
struct Series {
    status: u16,
    protocol: Protocol,
    scheme: Scheme,
    grpc_status: Option<u32>,
    stream_error: Option<u32>,
    api: Api,
    count: u64,
    recorder: Option<Box<dyn Recorder>>,
}

/// An endpoint at one moment, for output.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct EndpointView {
    /// Service.
    pub service: String,
    /// Namespace of its workload; empty outside Kubernetes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// `Kind/name` of its workload, or of its container; empty outside containers.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub workload: String,
    /// `server` or `client`.
    pub side: String,
    /// Method; `_OTHER` is not used here.
    pub method: String,
    /// Route.
    pub route: String,
    /// Where the route came from.
    pub route_source: String,
    /// Exchanges since the start.
    pub requests: u64,
    /// Of these, server errors and requests without an answer.
    pub errors: u64,
    /// Exchanges a second over the last ten seconds.
    pub rate: f64,
    /// Exchanges by status; 0 is no answer.
    pub statuses: BTreeMap<u16, u64>,
    /// Exchanges by kind of credential.
    pub auth: BTreeMap<String, u64>,
    /// Duration quantiles, ns.
    pub p50_ns: u64,
    /// See `p50_ns`.
    pub p90_ns: u64,
    /// See `p50_ns`.
    pub p99_ns: u64,
    /// Median sizes, bytes.
    pub request_size_p50: u64,
    /// See `request_size_p50`.
    pub response_size_p50: u64,
    /// Bytes received by the server in all.
    pub request_bytes: u64,
    /// Bytes sent by the server in all.
    pub response_bytes: u64,
    /// Different callers, by address; a lower bound when it is [`MAX_CALLERS`].
    pub callers: u64,
    /// First and last exchange, ns since the epoch.
    pub first_seen: u64,
    /// See `first_seen`.
    pub last_seen: u64,
    /// What the inventory adds to the numbers.
    #[serde(default)]
    pub facts: FactsView,
}

impl Endpoints {
    /// None yet. Every exchange also goes to `sink`.
    #[must_use]
    pub fn new(limit: usize, sink: Option<Box<dyn SeriesSink>>) -> Self {
        let lately = Box::new([u32::MAX; LATELY]);
        Self { index: FxHashMap::default(), lately, list: Vec::new(), sink, limit, overflowed: 0 }
    }

    /// Adds one exchange under its route. Gives the number of its endpoint, which stays the same; `None`
    /// for one that did not fit.
    pub fn record(&mut self, exchange: &Exchange, route: &Arc<str>, source: &'static str) -> Option<usize> {
        let place = place(exchange, route);
        let lately = self.lately[place] as usize;
        let at = match self.list.get(lately) {
            Some(endpoint) if !endpoint.moved && endpoint.key.is_of(exchange, route) => lately,
            _ => {
                let at = self.find(exchange, route, source);
                self.lately[place] = u32::try_from(at).unwrap_or(u32::MAX);
                at
            }
        };
        let endpoint = self.list.get_mut(at)?;
        endpoint.add(exchange, &mut self.sink);
        (endpoint.source != "overflow").then_some(at)
    }

    fn find(&mut self, exchange: &Exchange, route: &Arc<str>, source: &'static str) -> usize {
        let key = Key {
            service: exchange.service.clone(),
            workload: exchange.origin.as_ref().and_then(|o| o.workload.clone()),
            side: exchange.side,
            method: exchange.method.clone(),
            route: route.clone(),
        };
        match self.index.get(&key) {
            Some(&at) => at,
            None => self.add(key, source, exchange.ts),
        }
    }

    fn add(&mut self, key: Key, source: &'static str, ts: u64) -> usize {
        let (key, source) = if self.list.len() < self.limit {
            (key, source)
        } else {
            self.overflowed += 1;
            let key = Key {
                service: "apiscope.overflow".into(),
                workload: None,
                side: key.side,
                method: Method::Unknown,
                route: OVERFLOW.into(),
            };
            if let Some(&at) = self.index.get(&key) {
                return at;
            }
            (key, "overflow")
        };
        self.list.push(Endpoint::empty(key.clone(), source, ts));
        self.index.insert(key, self.list.len() - 1);
        self.list.len() - 1
    }

    /// Gives the endpoints of a service the routes that they have now. Two that become one are added up; what
    /// was exported under the old name stays there and grows no more, so nothing is counted twice.
    pub fn reroute(&mut self, service: &str, mut route: impl FnMut(&Method, &str) -> Route) -> Vec<Moved> {
        let mut moves = Vec::new();
        for at in 0..self.list.len() {
            let Some(endpoint) = self.list.get_mut(at).filter(|e| !e.moved && *e.key.service == *service) else {
                continue;
            };
            let now = route(&endpoint.key.method, &endpoint.key.route);
            if now.template == endpoint.key.route {
                endpoint.source = now.source;
                continue;
            }
            let key = Key { route: now.template.clone(), ..endpoint.key.clone() };
            moves.push(Moved {
                service: key.service.clone(),
                side: key.side,
                method: key.method.clone(),
                from: endpoint.key.route.clone(),
                into: now.template,
                merged: self.index.contains_key(&key),
            });
            self.index.remove(&endpoint.key);
            endpoint.source = now.source;
            match self.index.get(&key).copied() {
                Some(target) => {
                    let husk = Endpoint { moved: true, ..Endpoint::empty(endpoint.key.clone(), endpoint.source, 0) };
                    let taken = std::mem::replace(endpoint, husk);
                    if let Some(target) = self.list.get_mut(target) {
                        target.absorb(taken, &mut self.sink);
                    }
                }
                None => {
                    self.index.insert(key.clone(), at);
                    endpoint.key = key;
                    endpoint.reopen(&mut self.sink);
                }
            }
        }
        moves
    }

    /// Endpoints that are told apart.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.iter().filter(|e| !e.moved).count()
    }

    /// True when there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Every endpoint, busiest first. `now` is ns since the epoch.
    #[must_use]
    pub fn view(&self, now: u64) -> Vec<EndpointView> {
        let mut views: Vec<_> = self.list.iter().filter(|e| !e.moved).map(|e| e.view(now)).collect();
        views.sort_by(|a, b| {
            b.rate.total_cmp(&a.rate).then(b.requests.cmp(&a.requests)).then_with(|| a.route.cmp(&b.route))
        });
        views
    }
}

impl Endpoint {
    fn empty(key: Key, source: &'static str, ts: u64) -> Self {
        let histogram = |(grouping, max): (u8, u8)| Histogram::new(grouping, max).expect("constant and valid");
        Self {
            key,
            moved: false,
            source,
            count: 0,
            errors: 0,
            statuses: Vec::new(),
            other_statuses: BTreeMap::new(),
            auth: [0; 9],
            duration: histogram(DURATION),
            request_size: histogram(SIZE),
            response_size: histogram(SIZE),
            request_bytes: 0,
            response_bytes: 0,
            callers: FxHashSet::default(),
            other_callers: 0,
            first_seen: ts,
            last_seen: ts,
            rate: [0; RATE_SECONDS],
            rate_second: 0,
            facts: Facts::default(),
        }
    }

    /// Takes over the numbers of another endpoint, whose requests had another route until now.
    fn absorb(&mut self, other: Self, sink: &mut Option<Box<dyn SeriesSink>>) {
        self.count += other.count;
        self.errors += other.errors;
        for (sum, n) in self.auth.iter_mut().zip(other.auth) {
            *sum += n;
        }
        for (sum, more) in [
            (&mut self.duration, &other.duration),
            (&mut self.request_size, &other.request_size),
            (&mut self.response_size, &other.response_size),
        ] {
            // The buckets are the same constants; a sum beyond u64 does not come.
            if let Ok(both) = sum.checked_add(more) {
                *sum = both;
            }
        }
        self.request_bytes += other.request_bytes;
        self.response_bytes += other.response_bytes;
        self.first_seen = self.first_seen.min(other.first_seen);
        self.last_seen = self.last_seen.max(other.last_seen);
        self.other_callers += other.other_callers;
        self.facts.absorb(other.facts);
        for caller in &other.callers {
            self.caller(caller);
        }
        self.tick(other.rate_second);
        for back in 0..RATE_SECONDS as u64 {
            let Some(second) = other.rate_second.checked_sub(back) else { break };
            if self.rate_second - second < RATE_SECONDS as u64 {
                let slot = usize::try_from(second).unwrap_or(0) % RATE_SECONDS;
                self.rate[slot] += other.rate[slot];
            }
        }
        for (status, n) in other.other_statuses {
            *self.other_statuses.entry(status).or_default() += n;
        }
        for series in other.statuses {
            let kind = |s: &Series| (s.status, s.protocol, s.scheme, s.grpc_status, s.stream_error, s.api);
            let same = |s: &Series| kind(s) == kind(&series);
            match self.statuses.iter().position(same) {
                Some(i) => self.statuses[i].count += series.count,
                None if self.statuses.len() < MAX_STATUSES => self.statuses.push(series),
                None => *self.other_statuses.entry(series.status / 100 * 100).or_default() += series.count,
            }
        }
        self.reopen(sink);
    }

    /// Exports under the name that the endpoint has now.
    fn reopen(&mut self, sink: &mut Option<Box<dyn SeriesSink>>) {
        let Some(sink) = sink else { return };
        for i in 0..self.statuses.len() {
            let key = self.series_key(&self.statuses[i]);
            self.statuses[i].recorder = Some(sink.open(&key));
        }
    }

    fn series_key(&self, series: &Series) -> SeriesKey {
        SeriesKey {
            service: self.key.service.clone(),
            workload: self.key.workload.clone(),
            side: self.key.side,
            method: self.key.method.clone(),
            route: self.key.route.clone(),
            route_source: self.source,
            status: series.status,
            scheme: series.scheme,
            protocol: series.protocol,
            grpc_status: series.grpc_status,
            stream_error: series.stream_error,
            api: series.api,
        }
    }

    fn add(&mut self, exchange: &Exchange, sink: &mut Option<Box<dyn SeriesSink>>) {
        self.count += 1;
        self.errors += u64::from(status::is_server_error(exchange));
        self.auth[exchange.auth as usize] += 1;
        // A value above the range is counted in the highest bucket.
        let _ = self.duration.increment(exchange.duration_ns.min((1 << DURATION.1) - 1));
        let _ = self.request_size.increment(exchange.request_bytes.min((1 << SIZE.1) - 1));
        let _ = self.response_size.increment(exchange.response_bytes.min((1 << SIZE.1) - 1));
        self.request_bytes += exchange.request_bytes;
        self.response_bytes += exchange.response_bytes;
        self.last_seen = self.last_seen.max(exchange.ts);
        self.first_seen = self.first_seen.min(exchange.ts);
        self.tick(exchange.ts / 1_000_000_000);
        self.rate[usize::try_from(self.rate_second).unwrap_or(0) % RATE_SECONDS] += 1;
        self.caller(&exchange.client);
        self.facts.add(exchange);
        let found = self.statuses.iter_mut().find(|s| {
            s.status == exchange.status
                && s.protocol == exchange.protocol
                && s.scheme == exchange.scheme
                && s.grpc_status == exchange.grpc_status
                && s.stream_error == exchange.stream_error
                && s.api == exchange.api
        });
        let series = match found {
            Some(series) => series,
            None => {
                if self.statuses.len() >= MAX_STATUSES {
                    *self.other_statuses.entry(exchange.status / 100 * 100).or_default() += 1;
                    return;
                }
                let mut series = Series {
                    status: exchange.status,
                    protocol: exchange.protocol,
                    scheme: exchange.scheme,
                    grpc_status: exchange.grpc_status,
                    stream_error: exchange.stream_error,
                    api: exchange.api,
                    count: 0,
                    recorder: None,
                };
                series.recorder = sink.as_mut().map(|s| s.open(&self.series_key(&series)));
                self.statuses.push(series);
                let last = self.statuses.len() - 1;
                &mut self.statuses[last]
            }
        };
        series.count += 1;
        if let Some(recorder) = &series.recorder {
            recorder.record(exchange);
        }
    }

    /// Notes who asked, by host: ports change with each connection.
    fn caller(&mut self, client: &Peer) {
        let host = match client {
            Peer::Ip(address) => Peer::Ip(std::net::SocketAddr::new(address.ip(), 0)),
            other => other.clone(),
        };
        if !self.callers.contains(&host) {
            if self.callers.len() < MAX_CALLERS {
                self.callers.insert(host);
            } else {
                self.other_callers += 1;
            }
        }
    }

    /// Moves the window of the rate on to `second`.
    fn tick(&mut self, second: u64) {
        if second <= self.rate_second {
            return;
        }
        for passed in self.rate_second + 1..=second.min(self.rate_second + RATE_SECONDS as u64) {
            self.rate[usize::try_from(passed).unwrap_or(0) % RATE_SECONDS] = 0;
        }
        if second - self.rate_second > RATE_SECONDS as u64 {
            self.rate = [0; RATE_SECONDS];
        }
        self.rate_second = second;
    }

    fn view(&self, now: u64) -> EndpointView {
        let second = now / 1_000_000_000;
        // Seconds of the window that are over and still counted.
        let rate = (0..RATE_SECONDS as u64)
            .filter_map(|back| self.rate_second.checked_sub(back))
            .filter(|s| second.saturating_sub(*s) < RATE_SECONDS as u64)
            .map(|s| f64::from(self.rate[usize::try_from(s).unwrap_or(0) % RATE_SECONDS]))
            .fold(0.0, |sum, n| sum + n)
            / RATE_SECONDS as f64;
        let mut statuses = self.other_statuses.clone();
        for series in &self.statuses {
            *statuses.entry(series.status).or_default() += series.count;
        }
        let [p50, p90, p99] = quantiles(&self.duration, [0.5, 0.9, 0.99]);
        EndpointView {
            service: self.key.service.to_string(),
            namespace: self.key.workload.as_ref().map(|w| w.namespace.to_string()).unwrap_or_default(),
            workload: self.key.workload.as_ref().map(|w| format!("{}/{}", w.kind.name(), w.name)).unwrap_or_default(),
            side: self.key.side.name().into(),
            method: self.key.method.as_str().into(),
            route: self.key.route.to_string(),
            route_source: self.source.into(),
            requests: self.count,
            errors: self.errors,
            rate,
            statuses,
            auth: AUTHS.iter().map(|a| (a.name().to_owned(), self.auth[*a as usize])).filter(|(_, n)| *n > 0).collect(),
            p50_ns: p50,
            p90_ns: p90,
            p99_ns: p99,
            request_size_p50: quantiles(&self.request_size, [0.5])[0],
            response_size_p50: quantiles(&self.response_size, [0.5])[0],
            request_bytes: self.request_bytes,
            response_bytes: self.response_bytes,
            callers: self.callers.len() as u64,
            first_seen: self.first_seen,
            last_seen: self.last_seen,
            facts: self.facts.view(&self.duration),
        }
    }
}

const AUTHS: [Auth; 9] = [
    Auth::None,
    Auth::Basic,
    Auth::Bearer,
    Auth::ApiKey,
    Auth::Cookie,
    Auth::Digest,
    Auth::Negotiate,
    Auth::Mtls,
    Auth::Other,
];

/// Upper ends of the buckets in which the quantiles lie; 0 for an empty histogram.
fn quantiles<const N: usize>(histogram: &Histogram, wanted: [f64; N]) -> [u64; N] {
    let total: u64 = histogram.as_slice().iter().sum();
    wanted.map(|q| {
        let mut left = (total as f64 * q).ceil() as u64;
        for bucket in histogram.into_iter().filter(|b| b.count() > 0) {
            if bucket.count() >= left {
                return bucket.end();
            }
            left -= bucket.count();
        }
        0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(status: u16, ts: u64) -> Exchange {
        Exchange {
            service: "s".into(),
            method: Method::Get,
            status,
            ts,
            duration_ns: 1_000_000,
            request_bytes: 10,
            ..Exchange::default()
        }
    }

    #[test]
    fn endpoints_whose_routes_become_one_are_added_up() {
        let mut endpoints = Endpoints::new(10, None);
        let exchange = |path: &str, status| Exchange {
            service: "s".into(),
            method: Method::Get,
            path: Some(path.into()),
            status,
            ts: 5_000_000_000,
            duration_ns: 1000,
            ..Exchange::default()
        };
        for (path, status) in [("/u/anna", 200), ("/u/ben", 200), ("/u/ben", 500), ("/other", 200)] {
            endpoints.record(&exchange(path, status), &path.into(), "typed");
        }
        let route = |_: &Method, route: &str| Route {
            template: if route.starts_with("/u/") { "/u/{id}".into() } else { route.into() },
            source: "learned",
        };
        let moved = endpoints.reroute("s", route);
        assert_eq!(
            moved.iter().map(|m| (&*m.from, m.merged)).collect::<Vec<_>>(),
            [("/u/anna", false), ("/u/ben", true)]
        );
        assert!(endpoints.reroute("s", route).is_empty());
        let view = endpoints.view(5_000_000_000);
        let one = view.iter().find(|e| e.route == "/u/{id}").expect("there");
        assert_eq!((view.len(), endpoints.len(), one.requests, one.errors), (2, 2, 3, 1));
        assert_eq!(one.statuses, [(200, 2), (500, 1)].into());
        assert!((one.rate - 0.3).abs() < 1e-9);
        let slot = endpoints.record(&exchange("/u/cleo", 200), &"/u/{id}".into(), "learned");
        assert_eq!((slot, endpoints.view(0)[0].requests.max(endpoints.view(0)[1].requests)), (Some(0), 4));
    }

    #[test]
    fn sums_are_right_even_in_overflow() {
        let mut endpoints = Endpoints::new(3, None);
        for i in 0..10_u64 {
            let route: Arc<str> = format!("/r{i}").into();
            endpoints.record(&exchange(200, i), &route, "typed");
            endpoints.record(&exchange(500, i), &route, "typed");
        }
        let view = endpoints.view(0);
        assert_eq!(view.len(), 4);
        assert_eq!(view.iter().map(|e| e.requests).sum::<u64>(), 20);
        assert_eq!(view.iter().map(|e| e.errors).sum::<u64>(), 10);
        assert_eq!(view.iter().find(|e| e.route == OVERFLOW).map(|e| e.requests), Some(14));
    }

    #[test]
    fn quantiles_and_rate() {
        let mut endpoints = Endpoints::new(10, None);
        let route: Arc<str> = "/a".into();
        for i in 0..100_u64 {
            let mut e = exchange(200, 5_000_000_000 + i * 50_000_000);
            e.duration_ns = (i + 1) * 1_000_000;
            endpoints.record(&e, &route, "typed");
        }
        let view = &endpoints.view(10_000_000_000)[0];
        assert!((47_000_000..55_000_000).contains(&view.p50_ns), "{}", view.p50_ns);
        assert!((93_000_000..107_000_000).contains(&view.p99_ns), "{}", view.p99_ns);
        assert!((view.rate - 10.0).abs() < 0.01, "{}", view.rate);
        assert!(endpoints.view(60_000_000_000)[0].rate.abs() < 0.01);
    }
}
