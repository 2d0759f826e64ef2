//! Who calls what, as drafts of policies: the learned graph of workloads and endpoints as Kubernetes
//! NetworkPolicy and Istio AuthorizationPolicy objects, and what each would have blocked of the traffic
//! that it was not learned from (dry run).
//!
//! Drafts are for people to read: a call that comes once a quarter is not in a recording of a week.
//! Bounds: [`MAX_EDGES`] edges; what comes later is counted.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Value, json};

use crate::exchange::{Exchange, Peer, Side};

/// Edges that are kept.
pub const MAX_EDGES: usize = 16_384;

/// What a caller does at a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Call {
    /// Workload of the caller, `namespace/name`.
    pub caller: String,
    /// Service.
    pub service: String,
    /// Method.
    pub method: String,
    /// Route.
    pub route: String,
}

/// The graph.
#[derive(Debug, Default)]
pub struct Graph {
    calls: BTreeMap<Call, u64>,
    ports: BTreeMap<String, BTreeSet<u16>>,
    /// Exchanges whose caller is not known, by service: no policy can allow them by name.
    pub nameless: BTreeMap<String, u64>,
    /// Exchanges beyond [`MAX_EDGES`].
    pub overflowed: u64,
}

/// What a policy would have done.
#[derive(Debug, Default, Serialize)]
pub struct DryRun {
    /// Exchanges that were judged.
    pub judged: u64,
    /// Of these, allowed.
    pub allowed: u64,
    /// Calls that an AuthorizationPolicy would have blocked, and how often.
    pub blocked_calls: Vec<(Call, u64)>,
    /// Of all blocked exchanges, those that a NetworkPolicy would have blocked too: strangers to the service.
    pub blocked_by_network: u64,
    /// Exchanges of callers whose workload is not known: blocked by both.
    pub blocked_nameless: u64,
}

fn call(x: &Exchange, route: &str) -> Option<Call> {
    Some(Call {
        caller: x.caller.as_deref()?.into(),
        service: x.service.to_string(),
        method: x.method.as_str().into(),
        route: route.into(),
    })
}

/// Only what was answered is what somebody may do.
fn counts(x: &Exchange) -> bool {
    x.side == Side::Server && (100..400).contains(&x.status)
}

impl Graph {
    /// Learns from an exchange of the server's side that was answered below 400.
    pub fn learn(&mut self, x: &Exchange, route: &str) {
        if !counts(x) {
            return;
        }
        if let Peer::Ip(a) = &x.server
            && a.port() != 0
        {
            self.ports.entry(x.service.to_string()).or_default().insert(a.port());
        }
        let Some(call) = call(x, route) else {
            *self.nameless.entry(x.service.to_string()).or_default() += 1;
            return;
        };
        if self.calls.len() >= MAX_EDGES && !self.calls.contains_key(&call) {
            self.overflowed += 1;
            return;
        }
        *self.calls.entry(call).or_default() += 1;
    }

    /// Judges an exchange by what was learned.
    pub fn judge(&self, x: &Exchange, route: &str, run: &mut DryRun) {
        if !counts(x) {
            return;
        }
        run.judged += 1;
        let Some(call) = call(x, route) else {
            run.blocked_nameless += 1;
            return;
        };
        if self.calls.contains_key(&call) {
            run.allowed += 1;
            return;
        }
        let knows = self.calls.keys().any(|c| c.caller == call.caller && c.service == call.service);
        run.blocked_by_network += u64::from(!knows);
        match run.blocked_calls.iter().position(|(c, _)| *c == call) {
            Some(at) => run.blocked_calls[at].1 += 1,
            None if run.blocked_calls.len() < MAX_EDGES => run.blocked_calls.push((call, 1)),
            None => {}
        }
    }

    /// Calls that were learned, with how often they came.
    #[must_use]
    pub fn calls(&self) -> &BTreeMap<Call, u64> {
        &self.calls
    }

    /// Istio AuthorizationPolicy objects, one a service, as a list that `kubectl` takes.
    #[must_use]
    pub fn istio(&self) -> Value {
        let items = self.services().into_iter().map(|(service, callers)| {
            let rules: Vec<Value> = callers
                .iter()
                .map(|(caller, calls)| {
                    let (namespace, name) = split(caller);
                    let mut by_path = BTreeMap::<String, BTreeSet<&str>>::new();
                    for call in calls {
                        by_path.entry(path(&call.route)).or_default().insert(&call.method);
                    }
                    let to: Vec<Value> = by_path.iter().map(|(p, m)| json!({ "operation": { "methods": m, "paths": [p] } })).collect();
                    json!({ "from": [{ "source": { "principals": [format!("cluster.local/ns/{namespace}/sa/{name}")] } }], "to": to })
                })
                .collect();
            json!({
                "apiVersion": "security.istio.io/v1",
                "kind": "AuthorizationPolicy",
                "metadata": self.metadata(service),
                "spec": { "selector": { "matchLabels": { "app": service } }, "action": "ALLOW", "rules": rules },
            })
        });
        json!({ "apiVersion": "v1", "kind": "List", "items": items.collect::<Vec<_>>() })
    }

    /// Kubernetes NetworkPolicy objects, one a service.
    #[must_use]
    pub fn network(&self) -> Value {
        let items = self.services().into_iter().map(|(service, callers)| {
            let from: Vec<Value> = callers
                .keys()
                .map(|caller| {
                    let (namespace, name) = split(caller);
                    json!({
                        "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": namespace } },
                        "podSelector": { "matchLabels": { "app": name } },
                    })
                })
                .collect();
            let ports: Vec<Value> = self
                .ports
                .get(service)
                .into_iter()
                .flatten()
                .map(|p| json!({ "protocol": "TCP", "port": p }))
                .collect();
            json!({
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": self.metadata(service),
                "spec": {
                    "podSelector": { "matchLabels": { "app": service } },
                    "policyTypes": ["Ingress"],
                    "ingress": [{ "from": from, "ports": ports }],
                },
            })
        });
        json!({ "apiVersion": "v1", "kind": "List", "items": items.collect::<Vec<_>>() })
    }

    fn metadata(&self, service: &str) -> Value {
        let nameless = self.nameless.get(service).copied().unwrap_or(0);
        json!({
            "name": format!("apiscope-draft-{}", dns(service)),
            "annotations": { "apiscope/draft": "learned from traffic; read before use", "apiscope/nameless-exchanges": nameless.to_string() },
        })
    }

    fn services(&self) -> BTreeMap<&str, BTreeMap<&str, Vec<&Call>>> {
        let mut services = BTreeMap::<&str, BTreeMap<&str, Vec<&Call>>>::new();
        for call in self.calls.keys() {
            services.entry(&call.service).or_default().entry(&call.caller).or_default().push(call);
        }
        services
    }
}

/// Namespace and name of a workload; the last part is the name, `default` where there is no namespace.
fn split(caller: &str) -> (&str, &str) {
    match caller.split_once('/') {
        Some((namespace, rest)) => (namespace, rest.rsplit('/').next().unwrap_or(rest)),
        None => ("default", caller),
    }
}

/// A route as a path template of Istio (1.22): `{*}` is one segment, `{**}` the rest.
fn path(route: &str) -> String {
    let segments = route.split('/').map(|s| match s {
        "{rest}" => "{**}",
        s if s.contains('{') => "{*}",
        s => s,
    });
    segments.collect::<Vec<_>>().join("/")
}

/// A name that Kubernetes takes (RFC 1123).
fn dns(name: &str) -> String {
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).take(40).collect();
    plain.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(caller: Option<&str>, status: u16) -> Exchange {
        Exchange {
            service: "billing".into(),
            caller: caller.map(Into::into),
            method: crate::exchange::Method::Get,
            status,
            server: Peer::parse("10.0.0.1:8080"),
            ..Exchange::default()
        }
    }

    #[test]
    fn what_was_learned_is_allowed_and_the_rest_is_named() {
        let mut graph = Graph::default();
        graph.learn(&exchange(Some("shop/web"), 200), "/invoices/{int}");
        graph.learn(&exchange(Some("guest/shell"), 403), "/invoices/{int}");
        graph.learn(&exchange(None, 200), "/invoices/{int}");
        let istio = graph.istio();
        let rule = &istio["items"][0]["spec"]["rules"][0];
        assert_eq!(rule["from"][0]["source"]["principals"][0], "cluster.local/ns/shop/sa/web");
        assert_eq!(rule["to"][0]["operation"]["paths"][0], "/invoices/{*}");
        assert_eq!(istio["items"][0]["spec"]["rules"].as_array().map(Vec::len), Some(1));
        assert_eq!(graph.network()["items"][0]["spec"]["ingress"][0]["ports"][0]["port"], 8080);
        let mut run = DryRun::default();
        for (caller, route) in [
            (Some("shop/web"), "/invoices/{int}"),
            (Some("shop/web"), "/charges"),
            (Some("guest/shell"), "/charges"),
            (None, "/charges"),
        ] {
            graph.judge(&exchange(caller, 200), route, &mut run);
        }
        assert_eq!((run.judged, run.allowed, run.blocked_by_network, run.blocked_nameless), (4, 1, 1, 1));
        assert_eq!(run.blocked_calls.len(), 2);
    }
}
