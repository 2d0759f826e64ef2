//! Findings as log events: event name `apiscope.finding`, attributes `security_rule.*` of the semantic
//! conventions and `apiscope.finding.*`, one resource per workload. Beside them what becomes of endpoints and routes:
//! `apiscope.endpoint.discovered`, `apiscope.endpoint.changed`, `apiscope.route.merged`.
//!
//! Findings are few and precious: what a collector does not take waits ([`MAX_WAITING`], the oldest go
//! first, counted) and is offered again. The other events have no more than half of that room ([`MAX_OTHERS`]), so that
//! they never push a finding out.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use opentelemetry::{
    InstrumentationScope,
    logs::{AnyValue, LogRecord as _, Logger as _, LoggerProvider as _, Severity},
};
use opentelemetry_sdk::logs::{SdkLogRecord, SdkLogger, SdkLoggerProvider};

use crate::{
    aggregate::Moved,
    detect::{self, Change, Event, State},
    inventory,
    stats::Stats,
};

/// Events that wait for the collector.
const MAX_WAITING: usize = 4_096;
/// Other events are taken while no more than this waits.
const MAX_OTHERS: usize = MAX_WAITING / 2;

/// Records by service, in order.
type Waiting = VecDeque<(String, SdkLogRecord)>;

/// Findings on their way to the collector.
pub struct Queue {
    waiting: Mutex<Waiting>,
    logger: SdkLogger,
    on: bool,
    stats: Arc<Stats>,
}

/// The scope of the records.
pub fn scope() -> InstrumentationScope {
    InstrumentationScope::builder("apiscope").with_version(env!("CARGO_PKG_VERSION")).build()
}

impl Queue {
    /// An empty one; takes nothing unless it is `on`.
    pub fn new(on: bool, stats: Arc<Stats>) -> Self {
        // The provider only makes records; handing them on is this module's work.
        let logger = SdkLoggerProvider::builder().build().logger_with_scope(scope());
        Self { waiting: Mutex::default(), logger, on, stats }
    }

    /// Adds a change of a finding.
    pub fn add(&self, event: &Event) {
        if !self.on {
            return;
        }
        let record = self.record(event);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push_back((event.finding.service.clone(), record));
        self.trim(&mut waiting);
    }

    /// Adds what became of an endpoint.
    pub fn changed(&self, change: &inventory::Change) {
        let attributes = [
            ("apiscope.side", change.side.as_str()),
            ("http.request.method", &change.method),
            ("http.route", &change.route),
        ];
        self.other(change.event, &change.service, &change.what, &attributes);
    }

    /// Adds that a route has another name from now on.
    pub fn moved(&self, moved: &Moved) {
        let what = if moved.merged { "is part of" } else { "is called" };
        let attributes = [
            ("apiscope.side", moved.side.name()),
            ("http.request.method", moved.method.as_str()),
            ("http.route", &moved.into),
            ("apiscope.route.previous", &moved.from),
        ];
        let what = format!("{} {what} {} from now on", moved.from, moved.into);
        self.other("apiscope.route.merged", &moved.service, &what, &attributes);
    }

    fn other(&self, event: &'static str, service: &str, what: &str, attributes: &[(&'static str, &str)]) {
        if !self.on {
            return;
        }
        let mut record = self.blank(event, SystemTime::now(), (Severity::Info, "INFO"), what);
        for (key, value) in attributes {
            record.add_attribute(*key, (*value).to_owned());
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MAX_OTHERS {
            waiting.push_back((service.to_owned(), record));
        } else {
            self.stats.findings_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn trim(&self, waiting: &mut Waiting) {
        while waiting.len() > MAX_WAITING {
            waiting.pop_front();
            self.stats.findings_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What waits, by service.
    pub fn take(&self) -> BTreeMap<String, Vec<SdkLogRecord>> {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let mut by_service = BTreeMap::<_, Vec<_>>::new();
        for (service, record) in waiting {
            // What is of no service is the agent's.
            let service = if service.is_empty() { "apiscope".into() } else { service };
            by_service.entry(service).or_default().push(record);
        }
        by_service
    }

    /// What the collector did not take comes back, before what came since.
    pub fn put_back(&self, service: &str, records: Vec<SdkLogRecord>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        for record in records.into_iter().rev() {
            waiting.push_front((service.to_owned(), record));
        }
        self.trim(&mut waiting);
    }

    /// A record without attributes.
    fn blank(
        &self,
        event: &'static str,
        at: SystemTime,
        severity: (Severity, &'static str),
        body: &str,
    ) -> SdkLogRecord {
        let mut record = self.logger.create_log_record();
        record.set_event_name(event);
        record.set_timestamp(at);
        record.set_observed_timestamp(SystemTime::now());
        record.set_severity_number(severity.0);
        record.set_severity_text(severity.1);
        record.set_body(AnyValue::from(body.to_owned()));
        record
    }

    fn record(&self, event: &Event) -> SdkLogRecord {
        let f = &event.finding;
        let time = |ns: u64| SystemTime::UNIX_EPOCH + Duration::from_nanos(ns);
        let severity = match f.severity {
            detect::Severity::Low => (Severity::Info, "INFO"),
            detect::Severity::Medium => (Severity::Warn, "WARN"),
            detect::Severity::High => (Severity::Error, "ERROR"),
            detect::Severity::Critical => (Severity::Fatal, "FATAL"),
        };
        let mut record = self.blank("apiscope.finding", time(f.last_seen), severity, &f.explanation);
        let change = match event.change {
            Change::Opened => "opened",
            Change::Updated => "updated",
            Change::Resolved => "resolved",
        };
        let state = if f.state == State::Open { "open" } else { "resolved" };
        for (key, value) in [
            ("security_rule.uuid", f.rule.as_str()),
            ("security_rule.name", f.name.as_str()),
            ("security_rule.description", f.title.as_str()),
            ("security_rule.category", "api"),
            ("apiscope.finding.id", f.id.as_str()),
            ("apiscope.finding.state", state),
            ("apiscope.finding.change", change),
            ("apiscope.finding.severity", f.severity.name()),
            ("apiscope.finding.unit", f.unit.as_str()),
            ("http.request.method", f.method.as_str()),
            ("http.route", f.route.as_str()),
            ("apiscope.principal", f.principal.as_deref().unwrap_or_default()),
            ("client.address", f.source.as_deref().unwrap_or_default()),
            ("apiscope.finding.trace_id", f.trace_id.as_deref().unwrap_or_default()),
        ] {
            if !value.is_empty() {
                record.add_attribute(key, value.to_owned());
            }
        }
        let list =
            |values: &[String]| AnyValue::ListAny(Box::new(values.iter().map(|v| AnyValue::from(v.clone())).collect()));
        record.add_attribute("apiscope.owasp", list(&f.owasp));
        record.add_attribute("apiscope.attack.technique", list(&f.attack));
        record.add_attribute("apiscope.finding.confidence", f.confidence);
        record.add_attribute("apiscope.finding.observed", f.observed);
        record.add_attribute("apiscope.finding.expected", f.expected);
        record.add_attribute("apiscope.finding.acknowledged", f.acknowledged);
        let integer = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        record.add_attribute("apiscope.finding.count", integer(f.count));
        record.add_attribute("apiscope.finding.first_seen", integer(f.first_seen));
        record.add_attribute("apiscope.finding.last_seen", integer(f.last_seen));
        if let Some(records) = f.records_exposed {
            record.add_attribute("apiscope.finding.records_exposed", integer(records));
        }
        for (key, value) in &f.evidence {
            record.add_attribute(format!("apiscope.finding.evidence.{key}"), *value);
        }
        record
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::{Method, Side};

    fn moved(n: usize) -> Moved {
        Moved {
            service: "shop".into(),
            side: Side::Server,
            method: Method::Get,
            from: format!("/u/{n}").into(),
            into: "/u/{id}".into(),
            merged: n > 0,
        }
    }

    #[test]
    fn other_events_leave_room_for_findings() {
        let stats = Arc::new(Stats::default());
        let queue = Queue::new(true, stats.clone());
        for n in 0..MAX_OTHERS + 5 {
            queue.moved(&moved(n));
        }
        assert_eq!(stats.findings_dropped.load(Ordering::Relaxed), 5);
        let taken = queue.take();
        assert_eq!(taken["shop"].len(), MAX_OTHERS);
        let first = &taken["shop"][0];
        assert_eq!(first.event_name(), Some("apiscope.route.merged"));
        assert!(first.attributes_iter().any(|(k, _)| k.as_str() == "apiscope.route.previous"));
        let off = Queue::new(false, stats);
        off.moved(&moved(1));
        assert!(off.take().is_empty());
    }
}
