//! Findings: what detectors say, once. A finding is opened, updated while it goes on, and resolved when it
//! was quiet for `detect.quiet_hours`; equal (rule, endpoint, principal) is the same finding.
//!
//! Bounds: [`MAX_FINDINGS`] in all, [`MAX_PER_RULE`] of one rule and [`MAX_PER_PRINCIPAL`] of one
//! principal are told apart; what an attacker makes beyond that goes into one finding of the endpoint
//! without a principal, so that the list cannot be flooded. [`MAX_EVENTS`] wait to be handed out.

use std::collections::{BTreeMap, VecDeque};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::{Context, Endpoint, sketch};
use crate::config;

/// Findings that are kept; the oldest resolved one goes first, then the oldest of the least severity.
pub const MAX_FINDINGS: usize = 1_024;
/// Open findings of one rule that are told apart by principal.
pub const MAX_PER_RULE: usize = 128;
/// Open findings of one principal.
pub const MAX_PER_PRINCIPAL: usize = 8;
/// Events that wait.
pub const MAX_EVENTS: usize = 4_096;
/// A finding is worked out again at most this often, s; between, it is only counted.
const AGAIN: u64 = 60;
/// An update is handed out at most this often, s, unless the severity rises or the number doubles.
const UPDATE: u64 = 900;

/// What is known about a rule: the texts are its documentation.
#[derive(Debug, Serialize)]
pub struct Rule {
    /// `D4`.
    pub id: &'static str,
    /// `object-enumeration`.
    pub name: &'static str,
    /// A few words.
    pub title: &'static str,
    /// OWASP API Security Top 10 2023.
    pub owasp: &'static [&'static str],
    /// MITRE ATT&CK techniques.
    pub attack: &'static [&'static str],
    /// What it looks at.
    pub signal: &'static str,
    /// How it decides.
    pub algorithm: &'static str,
    /// Where that comes from.
    pub source: &'static str,
    /// What it keeps.
    pub memory: &'static str,
    /// What it does not see.
    pub blind: &'static str,
    /// What can be set, as `detect.thresholds."D4.hour"`.
    pub settings: &'static [Setting],
}

/// A number that can be set.
#[derive(Debug, Serialize)]
pub struct Setting {
    /// Its name after the rule's id.
    pub name: &'static str,
    /// Without configuration.
    pub default: f64,
    /// What it is, with its unit.
    pub about: &'static str,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Low,
    /// Look this week.
    Medium,
    /// Look today.
    High,
    /// Look now.
    Critical,
}

impl Severity {
    /// Severity number of OpenTelemetry logs: 9, 13, 17, 21.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Low => 9,
            Self::Medium => 13,
            Self::High => 17,
            Self::Critical => 21,
        }
    }

    /// Lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }
}

/// Where a finding is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It goes on.
    Open,
    /// It was quiet, or what it said holds no more.
    Resolved,
}

/// A finding at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// The same for the same rule, endpoint and principal, on any day and node: 16 hexadecimal digits.
    pub id: String,
    /// `D4`.
    pub rule: String,
    /// `object-enumeration`.
    pub name: String,
    /// A few words.
    pub title: String,
    /// How bad.
    pub severity: Severity,
    /// How sure: 0 to 1.
    pub confidence: f64,
    /// Open or resolved.
    pub state: State,
    /// The operator has acknowledged it in the configuration.
    pub acknowledged: bool,
    /// Service.
    pub service: String,
    /// Method; empty when the finding is about more than one endpoint.
    pub method: String,
    /// Route; as `method`.
    pub route: String,
    /// Who: the keyed hash of a credential.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<String>,
    /// From where: an address without port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// One sentence.
    pub explanation: String,
    /// What was seen, in `unit`.
    pub observed: f64,
    /// What is usual or allowed, in `unit`.
    pub expected: f64,
    /// Unit of both.
    pub unit: String,
    /// Other people's records that were exposed so far, as far as it can be estimated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records_exposed: Option<u64>,
    /// Other numbers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub evidence: BTreeMap<String, f64>,
    /// Times that it was seen.
    pub count: u64,
    /// ns since the epoch.
    pub first_seen: u64,
    /// ns since the epoch.
    pub last_seen: u64,
    /// OWASP API Security Top 10 2023.
    pub owasp: Vec<String>,
    /// MITRE ATT&CK techniques.
    pub attack: Vec<String>,
    /// Trace of one exchange that shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
}

/// What happened to a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// New, or back again.
    Opened,
    /// It goes on.
    Updated,
    /// It is over.
    Resolved,
}

/// A change and the finding after it.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// What happened.
    pub change: Change,
    /// The finding.
    #[serde(flatten)]
    pub finding: Finding,
}

/// What a detector saw.
#[derive(Debug, Default)]
pub struct Sighting {
    /// How bad; [`Severity::Medium`] without one.
    pub severity: Option<Severity>,
    /// How sure: 0 to 1.
    pub confidence: f64,
    /// See [`Finding`].
    pub observed: f64,
    /// See [`Finding`].
    pub expected: f64,
    /// See [`Finding`].
    pub unit: &'static str,
    /// See [`Finding`].
    pub records: Option<f64>,
    /// See [`Finding`].
    pub evidence: Vec<(&'static str, f64)>,
    /// One sentence.
    pub explanation: String,
}

/// What a finding is about.
#[derive(Clone, Copy, Default)]
pub struct About<'a> {
    /// An endpoint and its number.
    pub endpoint: Option<(usize, &'a Endpoint)>,
    /// Who.
    pub actor: Option<u64>,
    /// The exchange that shows it.
    pub context: Option<&'a Context<'a>>,
    /// Seconds since the epoch.
    pub now: u64,
}

/// Every finding.
pub struct Findings {
    list: Vec<Kept>,
    index: FxHashMap<u64, usize>,
    per_rule: FxHashMap<&'static str, usize>,
    per_actor: FxHashMap<u64, usize>,
    events: VecDeque<Event>,
    config: config::Detect,
    disabled: Vec<&'static str>,
    /// Events that did not fit.
    pub dropped: u64,
    /// Sightings that were put together with others because of a bound.
    pub merged: u64,
}

struct Kept {
    key: u64,
    rule: &'static Rule,
    /// Hash of the endpoint.
    endpoint: Option<u64>,
    actor: Option<u64>,
    worked_out: u64,
    handed_out: u64,
    handed_observed: f64,
    finding: Finding,
}

/// A finding as it is kept over a restart.
#[derive(Serialize, Deserialize)]
struct Saved {
    endpoint: Option<u64>,
    actor: Option<u64>,
    handed_out: u64,
    handed_observed: f64,
    finding: Finding,
}

const S: u64 = 1_000_000_000;

impl Findings {
    /// None yet.
    #[must_use]
    pub fn new(config: config::Detect) -> Self {
        Self {
            list: Vec::new(),
            index: FxHashMap::default(),
            per_rule: FxHashMap::default(),
            per_actor: FxHashMap::default(),
            events: VecDeque::new(),
            config,
            disabled: Vec::new(),
            dropped: 0,
            merged: 0,
        }
    }

    /// Says nothing of this rule.
    pub fn disable(&mut self, rule: &'static str) {
        self.disabled.push(rule);
    }

    fn key(rule: &Rule, about: About<'_>) -> u64 {
        let place = about.endpoint.map_or(0, |(_, e)| e.hash);
        sketch::mix(sketch::text(rule.id) ^ place.rotate_left(17)) ^ about.actor.map_or(0, sketch::mix)
    }

    /// Has this to be worked out? When the same was said lately it is only counted.
    #[cold]
    pub fn wants(&mut self, rule: &'static Rule, about: About<'_>) -> bool {
        if self.disabled.contains(&rule.id) {
            return false;
        }
        let key = Self::key(rule, about);
        if let Some(&at) = self.index.get(&key) {
            let kept = &mut self.list[at];
            if kept.finding.state == State::Open {
                kept.finding.count += 1;
                kept.finding.last_seen = kept.finding.last_seen.max(about.now * S);
                return about.now >= kept.worked_out + AGAIN;
            }
            return true;
        }
        !self.allowed(rule, about)
    }

    fn allowed(&self, rule: &Rule, about: About<'_>) -> bool {
        self.config.allow.iter().any(|a| {
            let matches = |pattern: &Option<String>, text: Option<&str>| {
                pattern.as_deref().is_none_or(|p| text.is_some_and(|t| config::glob(p, t)))
            };
            let endpoint = about.endpoint.map(|(_, e)| e);
            let hex = about.actor.map(|a| format!("{a:016x}"));
            let named = about.context.and_then(|c| c.x.principal.as_deref());
            matches(&a.rule, Some(rule.id))
                && matches(&a.service, endpoint.map(|e| &*e.service))
                && matches(&a.route, endpoint.map(|e| &*e.route))
                && matches(&a.method, endpoint.map(|e| e.method.as_str()))
                && (matches(&a.principal, named) || matches(&a.principal, hex.as_deref()))
                && matches(&a.caller, about.context.and_then(|c| c.x.caller.as_deref()))
        })
    }

    /// Takes what was worked out.
    #[cold]
    pub fn report(&mut self, rule: &'static Rule, mut about: About<'_>, sighting: Sighting) {
        let mut key = Self::key(rule, about);
        if !self.index.contains_key(&key) && about.actor.is_some() {
            let of_rule = self.per_rule.get(rule.id).copied().unwrap_or(0);
            let of_actor = about.actor.and_then(|a| self.per_actor.get(&a)).copied().unwrap_or(0);
            if of_rule >= MAX_PER_RULE || of_actor >= MAX_PER_PRINCIPAL {
                self.merged += 1;
                about.actor = None;
                key = Self::key(rule, about);
            }
        }
        let at = match self.index.get(&key) {
            Some(&at) => at,
            None => self.make(key, rule, about),
        };
        let kept = &mut self.list[at];
        let reopened = kept.finding.state == State::Resolved;
        if reopened {
            kept.finding.state = State::Open;
            kept.finding.first_seen = about.now * S;
            *self.per_rule.entry(rule.id).or_default() += 1;
            if let Some(actor) = kept.actor {
                *self.per_actor.entry(actor).or_default() += 1;
            }
        }
        let severity = sighting.severity.unwrap_or(Severity::Medium);
        let new = reopened || kept.handed_out == 0;
        let worse = severity > kept.finding.severity;
        let f = &mut kept.finding;
        f.severity = if new { severity } else { f.severity.max(severity) };
        f.confidence = if new { sighting.confidence } else { f.confidence.max(sighting.confidence) };
        f.observed = sighting.observed;
        f.expected = sighting.expected;
        sighting.unit.clone_into(&mut f.unit);
        f.explanation = sighting.explanation;
        f.last_seen = f.last_seen.max(about.now * S);
        f.evidence = sighting.evidence.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        let records = sighting.records.map(|r| r.max(0.0).round() as u64);
        f.records_exposed = if new { records } else { f.records_exposed.max(records) };
        if let Some(x) = about.context.map(|c| c.x) {
            f.trace_id = x.trace.map(|t| hex(&t.trace_id)).or(f.trace_id.take());
        }
        kept.worked_out = about.now;
        let doubled = sighting.observed > 2.0 * kept.handed_observed;
        if new || worse || doubled || about.now >= kept.handed_out + UPDATE {
            kept.handed_out = about.now.max(1);
            kept.handed_observed = sighting.observed;
            let event =
                Event { change: if new { Change::Opened } else { Change::Updated }, finding: kept.finding.clone() };
            self.push(event);
        }
    }

    fn make(&mut self, key: u64, rule: &'static Rule, about: About<'_>) -> usize {
        if self.list.len() >= MAX_FINDINGS {
            self.drop_one();
        }
        let endpoint = about.endpoint.map(|(_, e)| e);
        let x = about.context.map(|c| c.x);
        let id = format!("{key:016x}");
        let named = x.and_then(|x| x.principal.as_deref().map(str::to_owned));
        let finding = Finding {
            rule: rule.id.into(),
            name: rule.name.into(),
            title: rule.title.into(),
            severity: Severity::Low,
            confidence: 0.0,
            state: State::Open,
            acknowledged: self.config.acknowledge.contains(&id),
            service: endpoint
                .map_or_else(|| x.map(|x| x.service.to_string()), |e| Some(e.service.to_string()))
                .unwrap_or_default(),
            method: endpoint.map(|e| e.method.as_str().to_owned()).unwrap_or_default(),
            route: endpoint.map(|e| e.route.to_string()).unwrap_or_default(),
            principal: about.actor.and_then(|a| named.or_else(|| x.is_none().then(|| format!("{a:016x}")))),
            source: about.actor.and(x).map(|x| x.client.host()).filter(|s| !s.is_empty()),
            explanation: String::new(),
            observed: 0.0,
            expected: 0.0,
            unit: String::new(),
            records_exposed: None,
            evidence: BTreeMap::new(),
            count: 1,
            first_seen: about.now * S,
            last_seen: about.now * S,
            owasp: rule.owasp.iter().map(|s| (*s).to_owned()).collect(),
            attack: rule.attack.iter().map(|s| (*s).to_owned()).collect(),
            trace_id: None,
            id,
        };
        *self.per_rule.entry(rule.id).or_default() += 1;
        if let Some(actor) = about.actor {
            *self.per_actor.entry(actor).or_default() += 1;
        }
        self.list.push(Kept {
            key,
            rule,
            endpoint: about.endpoint.map(|(_, e)| e.hash),
            actor: about.actor,
            worked_out: 0,
            handed_out: 0,
            handed_observed: 0.0,
            finding,
        });
        self.index.insert(key, self.list.len() - 1);
        self.list.len() - 1
    }

    fn drop_one(&mut self) {
        let order = |k: &Kept| (k.finding.state == State::Open, k.finding.severity, k.finding.last_seen);
        let Some(at) = (0..self.list.len()).min_by_key(|&i| order(&self.list[i])) else { return };
        let gone = self.list.swap_remove(at);
        self.index.remove(&gone.key);
        if let Some(moved) = self.list.get(at) {
            self.index.insert(moved.key, at);
        }
        if gone.finding.state == State::Open {
            self.closed(gone.rule, gone.actor);
        }
    }

    fn closed(&mut self, rule: &'static Rule, actor: Option<u64>) {
        if let Some(n) = self.per_rule.get_mut(rule.id) {
            *n = n.saturating_sub(1);
        }
        if let Some(actor) = actor
            && let Some(n) = self.per_actor.get_mut(&actor)
        {
            *n = n.saturating_sub(1);
            if *n == 0 {
                self.per_actor.remove(&actor);
            }
        }
    }

    /// What a finding said holds no more.
    pub fn resolve(&mut self, rule: &'static Rule, about: About<'_>) {
        if let Some(&at) = self.index.get(&Self::key(rule, about))
            && self.list[at].finding.state == State::Open
        {
            self.end(at);
        }
    }

    fn end(&mut self, at: usize) {
        let kept = &mut self.list[at];
        kept.finding.state = State::Resolved;
        let (rule, actor, finding) = (kept.rule, kept.actor, kept.finding.clone());
        self.closed(rule, actor);
        self.push(Event { change: Change::Resolved, finding });
    }

    /// Resolves what was quiet. To be called about once a minute.
    pub fn sweep(&mut self, now: u64) {
        let quiet = self.config.quiet_hours.saturating_mul(3600);
        for at in 0..self.list.len() {
            let f = &self.list[at].finding;
            if f.state == State::Open && now > f.last_seen / S + quiet {
                self.end(at);
            }
        }
    }

    /// Is a finding of this rule open for the endpoint, and not acknowledged? Then its baseline is frozen.
    #[must_use]
    pub fn covers(&self, rule: &Rule, endpoint: &Endpoint) -> bool {
        self.per_rule.get(rule.id).is_some_and(|n| *n > 0)
            && self.list.iter().any(|k| {
                k.rule.id == rule.id
                    && k.endpoint == Some(endpoint.hash)
                    && k.finding.state == State::Open
                    && !k.finding.acknowledged
            })
    }

    /// The open findings, to be kept over a restart.
    #[must_use]
    pub fn save(&self) -> serde_json::Value {
        let open = self.list.iter().filter(|k| k.finding.state == State::Open);
        let kept: Vec<_> = open
            .map(|k| Saved {
                endpoint: k.endpoint,
                actor: k.actor,
                handed_out: k.handed_out,
                handed_observed: k.handed_observed,
                finding: k.finding.clone(),
            })
            .collect();
        serde_json::to_value(kept).unwrap_or_default()
    }

    /// Takes what [`Findings::save`] gave: they go on, and are not opened again. Those of rules that are off go.
    pub fn load(&mut self, saved: serde_json::Value, rule: impl Fn(&str) -> Option<&'static Rule>) {
        let saved: Vec<Saved> = serde_json::from_value(saved).unwrap_or_default();
        for s in saved.into_iter().take(MAX_FINDINGS) {
            let (Some(rule), Ok(key)) = (rule(&s.finding.rule), u64::from_str_radix(&s.finding.id, 16)) else {
                continue;
            };
            if self.index.contains_key(&key) {
                continue;
            }
            *self.per_rule.entry(rule.id).or_default() += 1;
            if let Some(actor) = s.actor {
                *self.per_actor.entry(actor).or_default() += 1;
            }
            let acknowledged = self.config.acknowledge.contains(&s.finding.id);
            self.index.insert(key, self.list.len());
            self.list.push(Kept {
                key,
                rule,
                endpoint: s.endpoint,
                actor: s.actor,
                worked_out: 0,
                handed_out: s.handed_out.max(1),
                handed_observed: s.handed_observed,
                finding: Finding { acknowledged, state: State::Open, ..s.finding },
            });
        }
    }

    fn push(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
            self.dropped += 1;
        }
        self.events.push_back(event);
    }

    /// Is there something to hand out?
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Hands out what happened since the last call.
    pub fn drain(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    /// Events of before a restart that were not handed out yet.
    pub fn put_back(&mut self, events: Vec<Event>) {
        events.into_iter().for_each(|e| self.push(e));
    }

    /// Every finding that is kept, the most severe first, open ones before resolved ones.
    #[must_use]
    pub fn view(&self) -> Vec<Finding> {
        let mut all: Vec<_> = self.list.iter().map(|k| k.finding.clone()).collect();
        all.sort_by(|a, b| {
            (a.state == State::Resolved)
                .cmp(&(b.state == State::Resolved))
                .then(b.severity.cmp(&a.severity))
                .then(b.last_seen.cmp(&a.last_seen))
                .then_with(|| a.id.cmp(&b.id))
        });
        all
    }

    /// Open ones by severity, acknowledged ones left out.
    #[must_use]
    pub fn open(&self) -> [u64; 4] {
        let mut counts = [0; 4];
        for k in self.list.iter().filter(|k| k.finding.state == State::Open && !k.finding.acknowledged) {
            counts[k.finding.severity as usize] += 1;
        }
        counts
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
