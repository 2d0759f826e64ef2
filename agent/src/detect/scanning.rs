//! D14: a source tries paths that are not there.

use super::{
    Clock, Context, Detector, Findings, Readiness, Rule, Setting, Settings, Severity, Sighting, entry, sketch,
};
use crate::exchange::Side;

/// The rule.
pub static RULE: Rule = Rule {
    id: "D14",
    name: "scanning",
    title: "Paths are tried out",
    owasp: &["API8:2023", "API9:2023"],
    attack: &["T1595.003", "T1046"],
    signal: "answers 400, 403, 404, 405 and 501 by source, and distinct endpoints and paths among them",
    algorithm: "in 5 minutes at least 30 distinct paths were not there, and they are at least 80 % of the source's requests",
    source: "128-bit linear counter (Whang et al. 1990)",
    memory: "32 bytes a source (50,000)",
    blind: "scans slower than 30 paths in 5 minutes, or spread over sources; a broken client repeats one path and is no scan",
    settings: &[
        Setting { name: "paths", default: 30.0, about: "distinct paths not found in 5 minutes" },
        Setting { name: "share", default: 0.8, about: "share of the source's requests" },
    ],
};

const WINDOW: u64 = 300;

#[derive(Default, Clone, Copy)]
struct Source {
    window: u32,
    all: u32,
    missing: u32,
    paths: u128,
}

/// The detector.
pub struct Scanning {
    paths: f64,
    share: f64,
    sources: Vec<Source>,
}

impl Scanning {
    /// With these settings.
    pub fn new(settings: &Settings<'_>) -> Self {
        Self { paths: settings.get("paths"), share: settings.get("share"), sources: Vec::new() }
    }
}

impl Detector for Scanning {
    fn rule(&self) -> &'static Rule {
        &RULE
    }

    fn observe(&mut self, c: &Context<'_>, out: &mut Findings) {
        if c.endpoint.side != Side::Server {
            return;
        }
        let window = u32::try_from(c.now / WINDOW).unwrap_or(0);
        let s = entry(&mut self.sources, c.origin.index);
        if c.origin.fresh || s.window != window {
            *s = Source { window, ..Source::default() };
        }
        s.all += 1;
        if !matches!(c.x.status, 400 | 403 | 404 | 405 | 501) {
            return;
        }
        s.missing += 1;
        // A wrong id of a known object is no new path.
        let path = if c.endpoint.has_object && c.endpoint.requests > 100 { 0 } else { c.params.object };
        s.paths |= 1 << (sketch::mix(c.endpoint.hash ^ path) >> 57);
        let used = s.paths.count_ones();
        let distinct = if used >= 128 { 128.0 * 128.0_f64.ln() } else { -128.0 * (1.0 - f64::from(used) / 128.0).ln() };
        let share = f64::from(s.missing) / f64::from(s.all);
        if distinct >= self.paths && share >= self.share && out.wants(&RULE, c.source_anywhere()) {
            out.report(
                &RULE,
                c.source_anywhere(),
                Sighting {
                    severity: Some(if super::is_public(&c.x.client) { Severity::Low } else { Severity::Medium }),
                    confidence: 0.9,
                    observed: distinct,
                    expected: self.paths,
                    unit: "{path}",
                    evidence: vec![("window_s", WINDOW as f64), ("share", share), ("requests", f64::from(s.all))],
                    explanation: format!(
                        "{} asked {} for about {distinct:.0} different paths within 5 minutes that are not there: somebody looks for what might be exposed.",
                        c.x.client.host(),
                        c.endpoint.service
                    ),
                    ..Sighting::default()
                },
            );
        }
    }

    fn readiness(&self, _: usize, _: &Clock<'_>) -> Readiness {
        Readiness::ARMED
    }

    fn bytes(&self) -> usize {
        self.sources.capacity() * size_of::<Source>()
    }
}
