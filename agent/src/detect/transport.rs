//! D12: credentials travel where they can be read.

use super::{Clock, Context, Detector, Findings, Readiness, Rule, Settings, Severity, Sighting, entry};
use crate::exchange::{Auth, Peer, Scheme, Side, TlsVersion};

/// The rule.
pub static RULE: Rule = Rule {
    id: "D12",
    name: "weak-transport",
    title: "Credentials can be read on the way",
    owasp: &["API8:2023"],
    attack: &["T1040", "T1557"],
    signal: "scheme, TLS version, kind of credential and names of query parameters of exchanges that leave the machine",
    algorithm: "a credential in plaintext HTTP from another machine (10 times; once from a public address), TLS below 1.2, \
        or a query parameter that carries a credential",
    source: "RFC 9325 (TLS 1.0 and 1.1 must not be used); RFC 6750 section 5.3 (no tokens in URIs)",
    memory: "12 bytes an endpoint",
    blind: "proxies and meshes on the same node that encrypt below: allow them by route or caller",
    settings: &[],
};

const TOKENS: [&str; 8] = ["access_token", "token", "api_key", "apikey", "auth_token", "jwt", "password", "secret"];

#[derive(Default, Clone, Copy)]
struct State {
    plain: u32,
    weak: u32,
    query: u32,
}

/// The detector.
pub struct Transport {
    states: Vec<State>,
}

impl Transport {
    /// With these settings.
    pub fn new(_: &Settings<'_>) -> Self {
        Self { states: Vec::new() }
    }
}

impl Detector for Transport {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        let x = c.x;
        let remote = match &x.client {
            Peer::Ip(a) => !a.ip().is_loopback(),
            _ => false,
        };
        if c.endpoint.side != Side::Server || !remote {
            return;
        }
        let carries = !matches!(x.auth, Auth::None | Auth::Negotiate | Auth::Digest | Auth::Mtls);
        let plain = carries && x.scheme == Scheme::Http;
        let weak = matches!(x.tls_version, Some(TlsVersion::Tls10 | TlsVersion::Tls11));
        let query = x.query_keys.iter().any(|k| TOKENS.iter().any(|t| k.eq_ignore_ascii_case(t)));
        if !(plain || weak || query) {
            return;
        }
        let s = entry(&mut self.states, c.at);
        (s.plain, s.weak, s.query) = (
            s.plain.saturating_add(u32::from(plain)),
            s.weak.saturating_add(u32::from(weak)),
            s.query.saturating_add(u32::from(query)),
        );
        let public = super::is_public(&x.client);
        let enough = (plain && (public || s.plain >= 10)) || weak || query;
        if !enough || !out.wants(&RULE, c.here()) {
            return;
        }
        let s = self.states[c.at];
        let (n, what, severity) = if s.plain >= s.query.max(1) && plain {
            let severity = if public { Severity::High } else { Severity::Medium };
            (s.plain, format!("{} credentials over plaintext HTTP", x.auth), severity)
        } else if query {
            (s.query, "credentials in the query, where logs and browsers keep them,".into(), Severity::Medium)
        } else {
            (s.weak, format!("requests over TLS {}", x.tls_version.map_or("", TlsVersion::name)), Severity::Medium)
        };
        out.report(
            &RULE,
            c.here(),
            Sighting {
                severity: Some(severity),
                confidence: 0.9,
                observed: f64::from(n),
                unit: "{request}",
                evidence: vec![
                    ("plaintext", f64::from(s.plain)),
                    ("weak_tls", f64::from(s.weak)),
                    ("in_query", f64::from(s.query)),
                ],
                explanation: format!(
                    "{} got {what} from {} ({n} times): whoever is on the way can read them.",
                    c.where_(),
                    x.client.host()
                ),
                ..Sighting::default()
            },
        );
    }

    fn readiness(&self, _: usize, _: &Clock<'_>) -> Readiness {
        Readiness::ARMED
    }

    fn bytes(&self) -> usize {
        self.states.capacity() * size_of::<State>()
    }
}
