//! What an inventory wants to know of an endpoint beyond its numbers: media types, names of query parameters,
//! versions, credentials of answered requests, callers by name and by where they are. Sets of bounded size.
//!
//! On the way of every exchange: counters, and a comparison with what came last; nothing is allocated for what
//! is known already.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash as _, Hasher as _},
    net::IpAddr,
    sync::Arc,
};

use histogram::Histogram;
use rustc_hash::FxHasher;
use serde::{Deserialize, Serialize};

use super::AUTHS;
use crate::exchange::{Api, Exchange, Marks, Peer, Protocol, Scheme, TlsVersion};

/// Most media types that are told apart of one endpoint.
pub const MAX_MEDIA_TYPES: usize = 8;
/// Most names of query parameters of one endpoint.
pub const MAX_QUERY_NAMES: usize = 32;
/// Most callers that are known by name of one endpoint.
pub const MAX_NAMED: usize = 16;
/// Longest name that is kept, bytes; a longer one is left out and counted.
const MAX_NAME: usize = 96;
/// Points of the picture of durations; each is four times the one before, the first is up to 16 us.
pub const LATENCY_POINTS: usize = 12;

/// Where callers are, as far as their address says.
#[derive(Debug, Clone, Copy)]
enum Reach {
    Internet,
    Private,
    Host,
    Unknown,
}

const REACH: [&str; 4] = ["internet", "private", "host", "unknown"];
const PROTOCOLS: [Protocol; 4] = [Protocol::Http10, Protocol::Http11, Protocol::Http2, Protocol::Http3];
const TLS: [TlsVersion; 4] = [TlsVersion::Tls10, TlsVersion::Tls11, TlsVersion::Tls12, TlsVersion::Tls13];
const APIS: [Api; 7] =
    [Api::Http, Api::Grpc, Api::GrpcWeb, Api::JsonRpc, Api::GraphQl, Api::EventStream, Api::WebSocket];

/// The state of one endpoint: about 300 bytes, and what its bounded sets hold.
#[derive(Default)]
pub struct Facts {
    media_types: Vec<(Box<str>, u64)>,
    query_names: Vec<Box<str>>,
    /// Hash of the names that came last: most requests of an endpoint have the same ones.
    last_query: u64,
    callers: Vec<(Arc<str>, u64)>,
    protocols: [u64; 4],
    /// Without TLS, of unknown version, then [`TLS`].
    tls: [u64; 6],
    apis: [u64; 7],
    /// Requests that were answered 2xx, by credential.
    accepted: [u64; 9],
    reach: [u64; 4],
    deprecated: u64,
    sunset: u64,
    /// Names that did not fit.
    left_out: u64,
}

/// See [`Facts`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FactsView {
    /// Media types of answers.
    pub media_types: BTreeMap<String, u64>,
    /// Names of query parameters.
    pub query_keys: BTreeSet<String>,
    /// HTTP versions.
    pub protocols: BTreeMap<String, u64>,
    /// `none`, `unknown`, or the version.
    pub tls: BTreeMap<String, u64>,
    /// Kinds of API.
    pub apis: BTreeMap<String, u64>,
    /// Requests that were answered 2xx, by credential.
    pub accepted: BTreeMap<String, u64>,
    /// Requests by where they came from: `internet`, `private`, `host`, `unknown`.
    pub reach: BTreeMap<String, u64>,
    /// Callers whose workload is known.
    pub callers: BTreeMap<String, u64>,
    /// Answers that said that the endpoint is deprecated (RFC 9745).
    pub deprecated: u64,
    /// Answers that said when it goes (RFC 8594).
    pub sunset: u64,
    /// Names beyond the bounds.
    pub left_out: u64,
    /// Requests by duration: up to 16 us, 64 us, 256 us and so on; the last point has what is longer.
    pub latency: Vec<u64>,
}

impl Facts {
    /// Adds one exchange.
    pub fn add(&mut self, exchange: &Exchange) {
        self.protocols[exchange.protocol as usize] += 1;
        let tls = match (exchange.scheme, exchange.tls_version) {
            (Scheme::Http, None) => 0,
            (_, None) => 1,
            (_, Some(version)) => 2 + version as usize,
        };
        self.tls[tls] += 1;
        self.apis[exchange.api as usize] += 1;
        self.accepted[exchange.auth as usize] += u64::from(matches!(exchange.status, 200..=299));
        self.reach[reach(&exchange.client) as usize] += 1;
        self.deprecated += u64::from(exchange.marks.has(Marks::DEPRECATED));
        self.sunset += u64::from(exchange.marks.has(Marks::SUNSET));
        if let Some(kind) = exchange.response_type.as_deref() {
            self.left_out += u64::from(!count(&mut self.media_types, kind, MAX_MEDIA_TYPES, 1, |k| k.into()));
        }
        if let Some(caller) = &exchange.caller {
            self.left_out += u64::from(!count(&mut self.callers, caller, MAX_NAMED, 1, |_| caller.clone()));
        }
        if !exchange.query_keys.is_empty() {
            self.query(&exchange.query_keys);
        }
    }

    fn query(&mut self, names: &[Box<str>]) {
        let mut hasher = FxHasher::default();
        names.hash(&mut hasher);
        if std::mem::replace(&mut self.last_query, hasher.finish()) == self.last_query {
            return;
        }
        for name in names {
            if self.query_names.iter().any(|known| known == name) {
                continue;
            }
            if self.query_names.len() < MAX_QUERY_NAMES && name.len() <= MAX_NAME {
                self.query_names.push(name.clone());
            } else {
                self.left_out += 1;
            }
        }
    }

    /// Takes over what was known of another endpoint.
    pub fn absorb(&mut self, other: Self) {
        for (name, n) in other.media_types {
            self.left_out += u64::from(!count(&mut self.media_types, &name, MAX_MEDIA_TYPES, n, |k| k.into()));
        }
        for (name, n) in other.callers {
            self.left_out += u64::from(!count(&mut self.callers, &name, MAX_NAMED, n, |_| name.clone()));
        }
        self.query(&other.query_names);
        add(&mut self.protocols, other.protocols);
        add(&mut self.tls, other.tls);
        add(&mut self.apis, other.apis);
        add(&mut self.accepted, other.accepted);
        add(&mut self.reach, other.reach);
        self.deprecated += other.deprecated;
        self.sunset += other.sunset;
        self.left_out += other.left_out;
    }

    /// For output, with the picture of `durations`.
    #[must_use]
    pub fn view(&self, durations: &Histogram) -> FactsView {
        let mut latency = vec![0; LATENCY_POINTS];
        for bucket in durations.into_iter().filter(|b| b.count() > 0) {
            // 16 us are 2^14 ns: the n-th point ends at 2^(14 + 2n).
            let bits = 64 - bucket.end().leading_zeros() as usize;
            latency[bits.saturating_sub(14).div_ceil(2).min(LATENCY_POINTS - 1)] += bucket.count();
        }
        let tls = ["none", "unknown"].into_iter().chain(TLS.iter().map(|t| t.name()));
        FactsView {
            media_types: self.media_types.iter().map(|(k, n)| (k.to_string(), *n)).collect(),
            query_keys: self.query_names.iter().map(ToString::to_string).collect(),
            protocols: named(PROTOCOLS.iter().map(|p| p.name()), &self.protocols),
            tls: named(tls, &self.tls),
            apis: named(APIS.iter().map(|a| a.name()), &self.apis),
            accepted: named(AUTHS.iter().map(|a| a.name()), &self.accepted),
            reach: named(REACH.into_iter(), &self.reach),
            callers: self.callers.iter().map(|(k, n)| (k.to_string(), *n)).collect(),
            deprecated: self.deprecated,
            sunset: self.sunset,
            left_out: self.left_out,
            latency,
        }
    }
}

impl FactsView {
    /// Adds what another node, or an earlier run, knows of the same endpoint.
    pub fn merge(&mut self, other: &Self) {
        let sums = [
            (&mut self.media_types, &other.media_types, MAX_MEDIA_TYPES * 4),
            (&mut self.protocols, &other.protocols, usize::MAX),
            (&mut self.tls, &other.tls, usize::MAX),
            (&mut self.apis, &other.apis, usize::MAX),
            (&mut self.accepted, &other.accepted, usize::MAX),
            (&mut self.reach, &other.reach, usize::MAX),
            (&mut self.callers, &other.callers, MAX_NAMED * 4),
        ];
        for (into, from, limit) in sums {
            for (name, n) in from {
                if into.len() < limit || into.contains_key(name) {
                    let sum = into.entry(name.clone()).or_default();
                    *sum = sum.saturating_add(*n);
                } else {
                    self.left_out += 1;
                }
            }
        }
        for name in &other.query_keys {
            if self.query_keys.len() < MAX_QUERY_NAMES * 4 {
                self.query_keys.insert(name.clone());
            }
        }
        self.deprecated = self.deprecated.saturating_add(other.deprecated);
        self.sunset = self.sunset.saturating_add(other.sunset);
        self.left_out = self.left_out.saturating_add(other.left_out);
        self.latency.resize(LATENCY_POINTS, 0);
        for (sum, n) in self.latency.iter_mut().zip(&other.latency) {
            *sum = sum.saturating_add(*n);
        }
    }
}

/// Adds to a name's count; false when it is new and does not fit.
fn count<N: AsRef<str>>(
    all: &mut Vec<(N, u64)>,
    name: &str,
    limit: usize,
    n: u64,
    own: impl FnOnce(&str) -> N,
) -> bool {
    if let Some((_, sum)) = all.iter_mut().find(|(known, _)| known.as_ref() == name) {
        *sum += n;
        return true;
    }
    let fits = all.len() < limit && name.len() <= MAX_NAME;
    if fits {
        all.push((own(name), n));
    }
    fits
}

fn add<const N: usize>(sums: &mut [u64; N], more: [u64; N]) {
    for (sum, n) in sums.iter_mut().zip(more) {
        *sum += n;
    }
}

fn named<'a>(names: impl Iterator<Item = &'a str>, counts: &[u64]) -> BTreeMap<String, u64> {
    names.zip(counts).filter(|(_, n)| **n > 0).map(|(name, n)| (name.to_owned(), *n)).collect()
}

/// By RFC 1918, RFC 6598, RFC 4193, RFC 3927 and RFC 4291; what is in none of them is the internet.
fn reach(client: &Peer) -> Reach {
    let Peer::Ip(address) = client else {
        return if matches!(client, Peer::Unix(_)) { Reach::Host } else { Reach::Unknown };
    };
    match address.ip() {
        ip if ip.is_loopback() => Reach::Host,
        ip if ip.is_unspecified() => Reach::Unknown,
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && b & 0xc0 == 64;
            if ip.is_private() || ip.is_link_local() || shared { Reach::Private } else { Reach::Internet }
        }
        IpAddr::V6(ip) => {
            if ip.is_unique_local() || ip.is_unicast_link_local() {
                Reach::Private
            } else {
                Reach::Internet
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_bounded_and_what_does_not_fit_is_counted() {
        let mut facts = Facts::default();
        for i in 0..100 {
            let exchange = Exchange {
                response_type: Some(format!("application/x{i}").into()),
                query_keys: vec![format!("q{i}").into(), "page".into()].into(),
                caller: Some(format!("caller{i}").into()),
                client: Peer::parse("203.0.113.7:1"),
                status: 200,
                ..Exchange::default()
            };
            facts.add(&exchange);
            facts.add(&exchange);
        }
        let view = facts.view(&Histogram::new(4, 43).expect("valid"));
        assert_eq!(
            (view.media_types.len(), view.query_keys.len(), view.callers.len()),
            (MAX_MEDIA_TYPES, MAX_QUERY_NAMES, MAX_NAMED)
        );
        assert_eq!(view.media_types.get("application/x0"), Some(&2));
        assert!(view.query_keys.contains("page") && view.left_out > 0);
        assert_eq!((view.accepted.get("none"), view.reach.get("internet")), (Some(&200), Some(&200)));
    }

    #[test]
    fn where_callers_are() {
        let reached = |text: &str| REACH[reach(&Peer::parse(text)) as usize];
        assert_eq!(
            ["127.0.0.1:1", "10.1.2.3:1", "100.64.0.1:1", "8.8.8.8:1", "[fd00::1]:1", "[2001:db8::1]:1"].map(reached),
            ["host", "private", "private", "internet", "private", "internet"]
        );
    }

    #[test]
    fn durations_fall_into_their_points() {
        let mut durations = Histogram::new(4, 43).expect("valid");
        for ns in [1_000, 16_000, 60_000, 1_000_000, 3_600_000_000_000] {
            durations.increment(ns).expect("in range");
        }
        let latency = Facts::default().view(&durations).latency;
        assert_eq!((latency[0], latency[1], latency[3], latency[LATENCY_POINTS - 1]), (2, 1, 1, 1), "{latency:?}");
    }
}
