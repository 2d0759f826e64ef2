//! Spans of the test's calls, and what each should say.
//!
//! A caller names its pod, the kind of the call and its number in its user agent; so every span can be judged
//! alone, on whichever side it was seen.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::objects::{CALLERS, KINDS, SERVERS, SHOP};

/// One span.
#[derive(Debug, Clone)]
pub struct Span {
    attributes: Value,
    /// Pod of the caller, as it names itself.
    pub caller: String,
    /// Kind of the call.
    pub kind: String,
    /// Its number.
    pub number: u64,
}

/// What a number of spans came to.
#[derive(Debug, Default, Clone)]
pub struct Verdict {
    /// Ends of exchanges: two for each span.
    pub ends: usize,
    /// Ends without a pod.
    pub unnamed: usize,
    /// What is wrong, by what it says; and how often.
    pub wrong: BTreeMap<String, usize>,
}

impl Span {
    /// Of a line that the sink printed.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let attributes: Value = serde_json::from_str(line).ok()?;
        let mut words = attributes["user_agent.original"].as_str()?.split(' ').skip(1);
        let (caller, kind, number) = (words.next()?.to_owned(), words.next()?.to_owned(), words.next()?.parse().ok()?);
        Some(Self { attributes, caller, kind, number })
    }

    /// `server` or `client`.
    #[must_use]
    pub fn side(&self) -> &str {
        self.text("side")
    }

    /// When the exchange began, s since the epoch.
    #[must_use]
    pub fn start(&self) -> f64 {
        self.text("start").parse::<f64>().unwrap_or(0.0) / 1e9
    }

    /// Which call it is, on which side.
    #[must_use]
    pub fn key(&self) -> (&str, &str, u64, &str) {
        (&self.caller, &self.kind, self.number, self.side())
    }

    fn text(&self, key: &str) -> &str {
        self.attributes[key].as_str().unwrap_or_default()
    }

    /// What the span says, against what is so. `workload` is the caller's: its key and name.
    #[must_use]
    pub fn judge(&self, workload: (&str, &str)) -> Verdict {
        let shop = ("deployment", SHOP);
        let (own, peer, own_space, peer_space) = match self.side() {
            "server" => (shop, workload, SERVERS, CALLERS),
            _ => (workload, shop, CALLERS, SERVERS),
        };
        let mut verdict = Verdict { ends: 2, ..Verdict::default() };
        let mut expect = |key: String, wanted: &str| {
            if self.text(&key) != wanted {
                *verdict.wrong.entry(format!("{key} is `{}`, not `{wanted}`", self.text(&key))).or_default() += 1;
            }
        };
        let (tls, version) =
            (matches!(&*self.kind, "tls" | "h2"), if self.kind.starts_with('h') { "2" } else { "1.1" });
        expect("url.scheme".into(), if tls { "https" } else { "http" });
        expect("network.protocol.version".into(), version);
        let mut unnamed = 0;
        for (prefix, (key, name), space) in [("", own, own_space), ("apiscope.peer.", peer, peer_space)] {
            if self.text(&format!("{prefix}k8s.pod.name")).is_empty() {
                unnamed += 1;
                continue;
            }
            expect(format!("{prefix}k8s.namespace.name"), space);
            expect(format!("{prefix}k8s.{key}.name"), name);
            let pod = self.text(&format!("{prefix}k8s.pod.name"));
            let is_right = if name == SHOP { pod.starts_with("shop-") } else { pod == self.caller };
            if !is_right {
                expect(format!("{prefix}k8s.pod.name"), if name == SHOP { "shop-…" } else { &self.caller });
            }
        }
        verdict.unnamed = unnamed;
        verdict
    }
}

impl Verdict {
    /// Of many.
    pub fn add(&mut self, other: &Self) {
        self.ends += other.ends;
        self.unnamed += other.unnamed;
        for (what, n) in &other.wrong {
            *self.wrong.entry(what.clone()).or_default() += n;
        }
    }
}

/// How many calls these are, on both sides: each once, however often it was told.
#[must_use]
pub fn distinct(spans: &[Span]) -> usize {
    spans.iter().map(Span::key).collect::<BTreeSet<_>>().len()
}

/// Calls of each kind that were seen on each side, each once: `(kind, side)`.
#[must_use]
pub fn seen(spans: &[Span]) -> BTreeMap<(&'static str, &'static str), usize> {
    let mut all = BTreeMap::new();
    for kind in KINDS {
        for side in ["client", "server"] {
            let of = spans.iter().filter(|s| s.kind == kind && s.side() == side);
            all.insert((kind, side), of.map(|s| (&s.caller, s.number)).collect::<BTreeSet<_>>().len());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_and_missing_names_are_found() {
        let line = |pod: &str| {
            format!(
                r#"{{"side":"client","start":"1500000000","user_agent.original":"cluster-test brief-1 h2 0","url.scheme":"https",
                "network.protocol.version":"2","k8s.pod.name":"{pod}","k8s.namespace.name":"{CALLERS}","k8s.pod.uid":"x"}}"#
            )
        };
        let span = Span::parse(&line("brief-1")).expect("a span");
        assert_eq!((span.number, span.start()), (0, 1.5));
        let verdict = span.judge(("pod", "brief-1"));
        assert_eq!((verdict.ends, verdict.unnamed, verdict.wrong.len()), (2, 1, 0));
        let other = Span::parse(&line("brief-2")).expect("a span").judge(("pod", "brief-1"));
        assert!(!other.wrong.is_empty());
        assert!(Span::parse("{}").is_none());
    }
}
