//! Where an endpoint is in its life, and what changed between two looks.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{Entry, Inventory};

const HOUR: u64 = 3_600_000_000_000;

/// Where an endpoint is in its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Life {
    /// First seen lately.
    New,
    /// Used.
    #[default]
    Active,
    /// Not used for days.
    Idle,
    /// Not used for weeks.
    Gone,
}

/// Times between the stages, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ages {
    /// An endpoint is new for this long after its first request.
    pub new: u64,
    /// It is idle this long after its last request.
    pub idle: u64,
    /// It is gone this long after its last request.
    pub gone: u64,
}

impl Default for Ages {
    /// A day; a week, so that what runs once a week is not idle; and 31 days for what runs once a month.
    fn default() -> Self {
        Self { new: 24 * HOUR, idle: 7 * 24 * HOUR, gone: 31 * 24 * HOUR }
    }
}

/// What happened to an endpoint between two looks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `apiscope.endpoint.discovered` or `apiscope.endpoint.changed`.
    pub event: &'static str,
    /// Service.
    pub service: String,
    /// End that was seen.
    pub side: String,
    /// Method.
    pub method: String,
    /// Route.
    pub route: String,
    /// What changed, as a sentence: `answers without a credential now`.
    pub what: String,
}

impl Life {
    /// As in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Active => "active",
            Self::Idle => "idle",
            Self::Gone => "gone",
        }
    }
}

/// The stage of an entry at `now`.
pub(super) fn at(entry: &Entry, now: u64, ages: Ages) -> Life {
    let quiet = now.saturating_sub(entry.last_seen);
    if quiet >= ages.gone {
        Life::Gone
    } else if quiet >= ages.idle {
        Life::Idle
    } else if now.saturating_sub(entry.first_seen) < ages.new {
        Life::New
    } else {
        Life::Active
    }
}

/// What changed from one look to the next, endpoint by endpoint. The lists are of the same agent.
#[must_use]
pub fn changes(before: &Inventory, after: &Inventory) -> Vec<Change> {
    let known: HashMap<_, _> = before.endpoints.iter().map(|e| (e.key(), e)).collect();
    let mut all = Vec::new();
    for entry in &after.endpoints {
        let mut say = |event, what: String| {
            all.push(Change {
                event,
                service: entry.service.clone(),
                side: entry.side.clone(),
                method: entry.method.clone(),
                route: entry.route.clone(),
                what,
            });
        };
        let Some(old) = known.get(&entry.key()) else {
            say("apiscope.endpoint.discovered", format!("first seen, by {} callers", entry.callers));
            continue;
        };
        let mut changed = |what: String| say("apiscope.endpoint.changed", what);
        match (old.life, entry.life) {
            (Life::Idle | Life::Gone, Life::New | Life::Active) => {
                changed(format!("used again; it was {}", old.life.name()));
            }
            (was, Life::Idle) if was != Life::Idle => changed("idle: not used for days".into()),
            (was, Life::Gone) if was != Life::Gone => changed("gone: not used for weeks".into()),
            _ => {}
        }
        if old.open_share() == Some(0.0) && entry.open_share() > Some(0.0) {
            changed("answers without a credential now".into());
        }
        for scheme in entry.auth.keys().filter(|k| !old.auth.contains_key(*k) && *k != "none") {
            changed(format!("credential of a kind not seen before: {scheme}"));
        }
        for kind in entry.facts.media_types.keys().filter(|k| !old.facts.media_types.contains_key(*k)) {
            changed(format!("media type not seen before: {kind}"));
        }
        if entry.facts.reach.contains_key("internet") && !old.facts.reach.contains_key("internet") {
            changed("called from the internet now".into());
        }
        if entry.facts.deprecated > 0 && old.facts.deprecated == 0 {
            changed("says that it is deprecated".into());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::{super::tests::entry, *};

    #[test]
    fn stages() {
        let (e, day) = (Entry { first_seen: 0, last_seen: 30 * 24 * HOUR, ..entry("/a", 1) }, 24 * HOUR);
        let stage = |now| at(&e, now, Ages::default());
        assert_eq!([stage(30 * day), stage(37 * day), stage(61 * day)], [Life::Active, Life::Idle, Life::Gone]);
        assert_eq!(at(&Entry { last_seen: 5, ..e }, 6, Ages::default()), Life::New);
    }

    #[test]
    fn changes_are_said_once() {
        let list = |e: &Entry| Inventory { endpoints: vec![e.clone()], ..Inventory::default() };
        let mut old = entry("/a", 1);
        old.facts.accepted = [("bearer".to_owned(), 1)].into();
        let mut new = old.clone();
        new.facts.accepted.insert("none".into(), 1);
        new.facts.media_types.insert("text/csv".into(), 1);
        let said: Vec<_> = changes(&list(&old), &list(&new)).into_iter().map(|c| c.what).collect();
        assert_eq!(said, ["answers without a credential now", "media type not seen before: text/csv"]);
        assert!(changes(&list(&new), &list(&new)).is_empty());
        assert_eq!(changes(&Inventory::default(), &list(&new))[0].event, "apiscope.endpoint.discovered");
    }
}
