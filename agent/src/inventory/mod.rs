//! The living list of every API: endpoints with all that is known of them, over restarts and over nodes.
//!
//! An [`Entry`] is a workload, a side, a method and a route. It has numbers, kinds and names; never a value that
//! a request carried. Bounds: [`MAX_ENTRIES`] entries; beyond it the ones seen longest ago are left out, and
//! counted.
//!
//! - `life`: new, active, idle, gone, and what changed between two looks.
//! - `store`: the file of an agent, and the JSON that nodes' lists are handed on as.
//! - `text`: a table for people, CSV for spreadsheets.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::aggregate::{EndpointView, FactsView, Moved, OVERFLOW};

mod life;
mod store;
mod text;

pub use life::{Ages, Change, Life, changes};
pub use store::{Keeper, MAX_FILE, parse};
pub use text::{csv, printable, table, time};

/// Version of the JSON form. A reader refuses a later one.
pub const VERSION: u32 = 1;
/// Most endpoints of a list: several nodes' together.
pub const MAX_ENTRIES: usize = 50_000;

/// Every API that was seen.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// [`VERSION`] of who wrote it.
    pub apiscope_inventory: u32,
    /// When it was made, ns since the epoch.
    pub made: u64,
    /// Requests to endpoints beyond `limits.endpoints`: they are not told apart.
    #[serde(default)]
    pub overflowed: u64,
    /// Entries beyond [`MAX_ENTRIES`].
    #[serde(default)]
    pub left_out: u64,
    /// Endpoints, by service, route and method.
    pub endpoints: Vec<Entry>,
}

/// One endpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// Name of the service that was seen.
    pub service: String,
    /// Namespace of its workload; empty outside Kubernetes.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// `Kind/name` of its workload; empty outside containers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub workload: String,
    /// `server`: it is offered here; `client`: it is used from here.
    pub side: String,
    /// Method as sent.
    pub method: String,
    /// Route.
    pub route: String,
    /// `documented`, `config`, `learned` or `typed`.
    pub route_source: String,
    /// Where it is in its life. Worked out anew at each look.
    pub life: Life,
    /// Requests.
    pub requests: u64,
    /// Of these, server errors and those without an answer.
    pub errors: u64,
    /// Requests a second over the ten seconds before.
    pub rate: f64,
    /// Requests by status; 0 is no answer, `x00` in hundreds what did not fit.
    pub statuses: BTreeMap<u16, u64>,
    /// Requests by credential.
    pub auth: BTreeMap<String, u64>,
    /// Quantiles of durations, ns. Of several runs or nodes the highest.
    pub p50_ns: u64,
    /// See `p50_ns`.
    pub p90_ns: u64,
    /// See `p50_ns`.
    pub p99_ns: u64,
    /// Median sizes, bytes. Of several runs or nodes the highest.
    pub request_size_p50: u64,
    /// See `request_size_p50`.
    pub response_size_p50: u64,
    /// Bytes in all.
    pub request_bytes: u64,
    /// Bytes in all.
    pub response_bytes: u64,
    /// Different callers by address: a lower bound, and of several nodes the highest.
    pub callers: u64,
    /// First request, ns since the epoch.
    pub first_seen: u64,
    /// Last request.
    pub last_seen: u64,
    /// The rest.
    pub facts: FactsView,
}

/// What tells entries apart: the same on every node.
pub type Key<'e> = (&'e str, &'e str, &'e str, &'e str, &'e str, &'e str);

impl Entry {
    /// What it is told apart by.
    #[must_use]
    pub fn key(&self) -> Key<'_> {
        (&self.service, &self.namespace, &self.workload, &self.side, &self.route, &self.method)
    }

    /// Share of requests without a credential, of those that were answered 2xx; `None` when none was.
    #[must_use]
    pub fn open_share(&self) -> Option<f64> {
        let all: u64 = self.facts.accepted.values().sum();
        let open = self.facts.accepted.get("none").copied().unwrap_or(0);
        (all > 0).then(|| open as f64 / all as f64)
    }

    /// Is there something at this route? Not when every answer was that there is nothing, or not that way: that is
    /// what scanners leave behind.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.statuses.keys().any(|s| !matches!(s, 0 | 400 | 404 | 405))
    }

    /// Kinds of the parameters in the route: `int`, `uuid`, and so on.
    #[must_use]
    pub fn parameters(&self) -> Vec<&str> {
        self.route.split('/').filter_map(|s| s.strip_prefix('{')?.split('}').next()).collect()
    }

    /// The widest place that requests came from: `internet`, `private`, `host` or `unknown`.
    #[must_use]
    pub fn exposure(&self) -> &'static str {
        ["internet", "private", "host"].into_iter().find(|r| self.facts.reach.contains_key(*r)).unwrap_or("unknown")
    }

    /// How sure it is that this is one endpoint, and its route the right one: 0 to 1. A route of a document or
    /// the operator is certain; one of the traffic grows with it; one by shape alone may still be a value.
    #[must_use]
    pub fn confidence(&self) -> f64 {
        let seen = self.requests as f64;
        let answered = self.statuses.iter().any(|(s, _)| matches!(s, 200..=399));
        let ceiling = match self.route_source.as_str() {
            "documented" | "config" => return 1.0,
            "learned" => 0.99,
            _ => 0.9,
        };
        ceiling * (seen / (seen + 3.0)) * if answered { 1.0 } else { 0.5 }
    }

    /// Adds what another run or node knows of the same endpoint.
    pub fn merge(&mut self, other: &Self) {
        for (sum, n) in [
            (&mut self.requests, other.requests),
            (&mut self.errors, other.errors),
            (&mut self.request_bytes, other.request_bytes),
            (&mut self.response_bytes, other.response_bytes),
        ] {
            *sum = sum.saturating_add(n);
        }
        for (most, n) in [
            (&mut self.p50_ns, other.p50_ns),
            (&mut self.p90_ns, other.p90_ns),
            (&mut self.p99_ns, other.p99_ns),
            (&mut self.request_size_p50, other.request_size_p50),
            (&mut self.response_size_p50, other.response_size_p50),
            (&mut self.callers, other.callers),
        ] {
            *most = (*most).max(n);
        }
        for (status, n) in &other.statuses {
            let sum = self.statuses.entry(*status).or_default();
            *sum = sum.saturating_add(*n);
        }
        for (kind, n) in &other.auth {
            let sum = self.auth.entry(kind.clone()).or_default();
            *sum = sum.saturating_add(*n);
        }
        self.rate += other.rate;
        if other.last_seen > self.last_seen {
            self.route_source.clone_from(&other.route_source);
        }
        self.first_seen = self.first_seen.min(other.first_seen);
        self.last_seen = self.last_seen.max(other.last_seen);
        self.facts.merge(&other.facts);
    }
}

impl From<&EndpointView> for Entry {
    fn from(view: &EndpointView) -> Self {
        let EndpointView {
            service,
            namespace,
            workload,
            side,
            method,
            route,
            route_source,
            requests,
            errors,
            rate,
            statuses,
            auth,
            p50_ns,
            p90_ns,
            p99_ns,
            request_size_p50,
            response_size_p50,
            request_bytes,
            response_bytes,
            callers,
            first_seen,
            last_seen,
            facts,
            ..
        } = view.clone();
        Self {
            service,
            namespace,
            workload,
            side,
            method,
            route,
            route_source,
            life: Life::default(),
            requests,
            errors,
            rate,
            statuses,
            auth,
            p50_ns,
            p90_ns,
            p99_ns,
            request_size_p50,
            response_size_p50,
            request_bytes,
            response_bytes,
            callers,
            first_seen,
            last_seen,
            facts,
        }
    }
}

impl Inventory {
    /// Of the endpoints of one run. What did not fit into their table is counted, not listed.
    #[must_use]
    pub fn new(views: &[EndpointView], made: u64) -> Self {
        let (overflow, views): (Vec<_>, Vec<_>) = views.iter().partition(|v| v.route == OVERFLOW);
        let mut inventory = Self {
            apiscope_inventory: VERSION,
            made,
            overflowed: overflow.iter().map(|v| v.requests).sum(),
            left_out: 0,
            endpoints: views.into_iter().map(Entry::from).collect(),
        };
        inventory.tidy();
        inventory
    }

    /// Adds another list: of an earlier run, or of another node.
    pub fn merge(&mut self, other: &Self) {
        self.made = self.made.max(other.made);
        self.overflowed = self.overflowed.saturating_add(other.overflowed);
        self.left_out = self.left_out.saturating_add(other.left_out);
        self.endpoints.extend(other.endpoints.iter().cloned());
        self.tidy();
    }

    /// Renames the entries of routes that have another name now; two of one name are added up.
    pub fn reroute(&mut self, moves: &[Moved]) {
        let to: HashMap<_, _> =
            moves.iter().map(|m| ((&*m.service, m.side.name(), m.method.as_str(), &*m.from), &*m.into)).collect();
        for entry in &mut self.endpoints {
            // A route may have moved on while the list waited; each step is in the list of moves.
            for _ in 0..moves.len().min(8) {
                let key = (entry.service.as_str(), entry.side.as_str(), entry.method.as_str(), entry.route.as_str());
                let Some(into) = to.get(&key).filter(|into| **into != entry.route) else { break };
                entry.route = (*into).to_owned();
            }
        }
        self.tidy();
    }

    /// Works out where each entry is in its life at `now`, ns since the epoch.
    pub fn age(&mut self, now: u64, ages: Ages) {
        for entry in &mut self.endpoints {
            entry.life = life::at(entry, now, ages);
        }
    }

    /// Sorted, each endpoint once, and not more than fit.
    fn tidy(&mut self) {
        self.endpoints.sort_by(|a, b| a.key().cmp(&b.key()));
        self.endpoints.dedup_by(|later, first| {
            let same = later.key() == first.key();
            if same {
                first.merge(later);
            }
            same
        });
        if self.endpoints.len() > MAX_ENTRIES {
            self.left_out += (self.endpoints.len() - MAX_ENTRIES) as u64;
            self.endpoints.sort_by_key(|e| std::cmp::Reverse(e.last_seen));
            self.endpoints.truncate(MAX_ENTRIES);
            self.endpoints.sort_by(|a, b| a.key().cmp(&b.key()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::{Method, Side};

    pub(super) fn entry(route: &str, requests: u64) -> Entry {
        Entry {
            service: "shop".into(),
            side: "server".into(),
            method: "GET".into(),
            route: route.into(),
            route_source: "learned".into(),
            requests,
            statuses: [(200, requests)].into(),
            auth: [("none".to_owned(), requests)].into(),
            first_seen: 1_000,
            last_seen: 2_000,
            facts: FactsView { accepted: [("none".to_owned(), requests)].into(), ..FactsView::default() },
            ..Entry::default()
        }
    }

    fn list(entries: &[Entry]) -> Inventory {
        Inventory { apiscope_inventory: VERSION, endpoints: entries.to_vec(), ..Inventory::default() }
    }

    #[test]
    fn nodes_are_added_up() {
        let mut one = list(&[entry("/a", 2), entry("/b", 1)]);
        one.merge(&list(&[entry("/b", 4), Entry { first_seen: 10, ..entry("/c", 1) }]));
        let counts: Vec<_> = one.endpoints.iter().map(|e| (e.route.as_str(), e.requests, e.statuses[&200])).collect();
        assert_eq!(counts, [("/a", 2, 2), ("/b", 5, 5), ("/c", 1, 1)]);
    }

    #[test]
    fn entries_move_with_their_routes_and_nothing_is_counted_twice() {
        let mut inventory = list(&[entry("/u/anna", 2), entry("/u/bert", 3), entry("/x", 1)]);
        let moved = |from: &str| Moved {
            service: "shop".into(),
            side: Side::Server,
            method: Method::Get,
            from: from.into(),
            into: "/u/{id}".into(),
            merged: false,
        };
        inventory.reroute(&[moved("/u/anna"), moved("/u/bert")]);
        let counts: Vec<_> = inventory.endpoints.iter().map(|e| (e.route.as_str(), e.requests)).collect();
        assert_eq!(counts, [("/u/{id}", 5), ("/x", 1)]);
    }

    #[test]
    fn what_an_entry_says() {
        let mut e = entry("/u/{int}/f/{uuid}", 9);
        assert_eq!((e.parameters(), e.open_share(), e.exposure()), (vec!["int", "uuid"], Some(1.0), "unknown"));
        e.facts.accepted.insert("bearer".into(), 9);
        e.facts.reach.insert("private".into(), 1);
        assert_eq!((e.open_share(), e.exposure()), (Some(0.5), "private"));
        assert!(e.confidence() > 0.7 && Entry { statuses: [(404, 9)].into(), ..e }.confidence() < 0.5);
    }
}
