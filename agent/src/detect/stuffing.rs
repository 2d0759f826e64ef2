//! D3: credentials are tried out, from one source or against one endpoint.

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry,
    keep::{self, Packed, Words},
};
use crate::exchange::Side;

/// The rule.
pub static RULE: Rule = Rule {
    id: "D3",
    name: "credential-stuffing",
    title: "Credentials are tried out",
    owasp: &["API2:2023"],
    attack: &["T1110.004", "T1110.003"],
    signal: "401 and 403 (where people log in also 400, 422 and 429) by source and by endpoint, and distinct credentials that a source showed",
    algorithm: "in 5 minutes: 30 refusals of one source with 10 distinct credentials, or 100 at a login of which at most \
        one in five succeeds; or at a login four times the usual refusals of the endpoint and at least 200, from \
        however many sources",
    source: "thresholds on tumbling windows; distinct credentials by a 64-bit linear counter (Whang et al. 1990)",
    memory: "24 bytes a source (50,000), 40 an endpoint",
    blind: "fewer than 30 tries in 5 minutes from one source; logins that answer 200 to wrong passwords",
    settings: &[
        Setting { name: "refusals", default: 30.0, about: "refusals of one source in 5 minutes" },
        Setting { name: "credentials", default: 10.0, about: "distinct credentials of one source in 5 minutes" },
        Setting { name: "login", default: 100.0, about: "failed logins of one source in 5 minutes" },
        Setting { name: "endpoint", default: 200.0, about: "failed logins of one endpoint in 5 minutes, at least" },
    ],
};

const WINDOW: u64 = 300;

#[derive(Default, Clone, Copy)]
struct Source {
    window: u32,
    refused: u32,
    passed: u32,
    login: u32,
    credentials: u64,
}

#[derive(Default, Clone, Copy)]
struct Place {
    window: u32,
    refused: u32,
    passed: u32,
    /// Usual refusals in a window, and usual share of refusals.
    usual: f32,
    share: f32,
    windows: u32,
}

impl Packed for Place {
    const WORDS: usize = 6;
    fn pack(&self, out: &mut Vec<u32>) {
        out.extend([self.window, self.refused, self.passed, self.usual.to_bits(), self.share.to_bits(), self.windows]);
    }
    fn unpack(w: &mut Words<'_>) -> Self {
        Self {
            window: w.word(),
            refused: w.count(),
            passed: w.count(),
            usual: w.float(),
            share: w.float(),
            windows: w.count(),
        }
    }
}

/// The detector.
pub struct Stuffing {
    refusals: f64,
    credentials: f64,
    login: f64,
    endpoint: f64,
    sources: Vec<Source>,
    places: Vec<Place>,
}

impl Stuffing {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        let [refusals, credentials, login, endpoint] =
            ["refusals", "credentials", "login", "endpoint"].map(|n| settings.get(n));
        Self { refusals, credentials, login, endpoint, sources: Vec::new(), places: Vec::new() }
    }
}

impl Detector for Stuffing {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.endpoint.side != Side::Server {
            return;
        }
        let failed_login = c.endpoint.login && matches!(c.x.status, 400 | 422 | 429);
        let failed = c.refused || failed_login;
        if !failed && !c.success {
            return;
        }
        let window = u32::try_from(c.now / WINDOW).unwrap_or(0);
        let s = entry(&mut self.sources, c.origin.index);
        if c.origin.fresh || s.window != window {
            *s = Source { window, ..Source::default() };
        }
        if failed {
            s.refused += 1;
            s.login += u32::from(c.endpoint.login);
            let credential = c.x.principal.as_deref().map_or(0, super::principal);
            if credential != 0 {
                s.credentials |= 1 << (credential >> 58);
            }
        } else {
            s.passed += 1;
        }
        let (refused, passed, login) = (f64::from(s.refused), f64::from(s.passed), f64::from(s.login));
        // The logarithm is for those alone who were refused enough: most exchanges succeed.
        let distinct = if refused >= self.refusals {
            let used = s.credentials.count_ones();
            if used >= 64 { 64.0 * 64.0_f64.ln() } else { -64.0 * (1.0 - f64::from(used) / 64.0).ln() }
        } else {
            0.0
        };
        let spray = refused >= self.refusals && distinct >= self.credentials && refused > passed;
        let guess = login >= self.login && 4.0 * passed < refused;
        if failed && (spray || guess) && out.wants(&RULE, c.source_anywhere()) {
            let tried = if spray { format!(" with about {distinct:.0} different credentials") } else { String::new() };
            out.report(
                &RULE,
                c.source_anywhere(),
                Sighting {
                    severity: Some(if passed > 0.0 && spray { Severity::Critical } else { Severity::High }),
                    confidence: 0.85,
                    observed: refused,
                    expected: if spray { self.refusals } else { self.login },
                    unit: "{request}",
                    evidence: vec![("window_s", WINDOW as f64), ("credentials", distinct), ("successes", passed)],
                    explanation: format!(
                        "{} was refused {refused:.0} times within 5 minutes{tried}, {passed:.0} requests succeeded: credentials are being tried out.",
                        c.x.client.host()
                    ),
                    ..Sighting::default()
                },
            );
        }
        if !c.endpoint.login {
            return;
        }
        let p = entry(&mut self.places, c.at);
        if p.window != window {
            let covered = f64::from(p.refused) >= self.endpoint.max(4.0 * f64::from(p.usual));
            if p.window != 0 && !covered {
                let weight = 1.0 / (p.windows + 1).min(288) as f32;
                p.usual = (p.usual * 0.999).max(p.refused as f32);
                p.share += (p.refused as f32 / (p.refused + p.passed).max(1) as f32 - p.share) * weight;
                p.windows += 1;
            }
            (p.window, p.refused, p.passed) = (window, 0, 0);
        }
        if failed {
            p.refused += 1
        } else {
            p.passed += 1
        }
        let (refused, passed) = (f64::from(p.refused), f64::from(p.passed));
        let share = refused / (refused + passed);
        let limit = self.endpoint.max(4.0 * f64::from(p.usual));
        if failed
            && p.windows >= 288
            && refused >= limit
            && share > 2.0 * f64::from(p.share)
            && out.wants(&RULE, c.here())
        {
            let usual = f64::from(p.usual);
            out.report(
                &RULE,
                c.here(),
                Sighting {
                    severity: Some(Severity::High),
                    confidence: 0.75,
                    observed: refused,
                    expected: usual,
                    unit: "{request}",
                    evidence: vec![("window_s", WINDOW as f64), ("share_refused", share), ("successes", passed)],
                    explanation: format!(
                        "{} refused {refused:.0} logins within 5 minutes, where at most {usual:.0} are usual: passwords are being tried out from many places.",
                        c.where_()
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, at: usize, clock: &Clock<'_>) -> Readiness {
        match (clock.endpoints.get(at), self.places.get(at)) {
            (Some(e), Some(p)) if e.login => Readiness::after(f64::from(p.windows), 288.0),
            _ => Readiness::ARMED,
        }
    }

    fn save(&self, at: usize) -> Option<serde_json::Value> {
        self.places.get(at).filter(|p| p.window != 0).map(keep::one)
    }

    fn load(&mut self, at: usize, learned: &serde_json::Value) {
        if let Some(place) = keep::unone(learned) {
            *entry(&mut self.places, at) = place;
        }
    }

    fn bytes(&self) -> usize {
        self.sources.capacity() * size_of::<Source>() + self.places.capacity() * size_of::<Place>()
    }
}
