//! What was promised against what was seen.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use super::{Document, Operation, fits, segments};
use crate::inventory::{Entry, Life};

/// In what they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Answered, and in no document.
    Shadow,
    /// The path is documented, the method is not.
    Method,
    /// A credential is asked for by the document, and requests without one are answered.
    Unauthenticated,
    /// Credentials are of another kind than documented.
    Auth,
    /// Deprecated, and used.
    Zombie,
    /// Documented, and not seen.
    Orphan,
    /// A status that is not documented. Server errors are not counted: few documents have them.
    Status,
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// In what.
    pub kind: Kind,
    /// Service that was seen; of an orphan the title of its document.
    pub service: String,
    /// Method.
    pub method: String,
    /// Route that was seen; of an orphan the template.
    pub route: String,
    /// A sentence.
    pub what: String,
    /// Requests.
    pub requests: u64,
}

impl Kind {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shadow => "shadow",
            Self::Method => "method",
            Self::Unauthenticated => "unauthenticated",
            Self::Auth => "auth",
            Self::Zombie => "zombie",
            Self::Orphan => "orphan",
            Self::Status => "status",
        }
    }
}

/// Operations by the number of segments of their templates: a route is compared with these alone.
struct Promises<'d> {
    by_length: HashMap<usize, Vec<(&'d str, usize)>>,
    operations: Vec<(&'d str, &'d Operation)>,
}

/// All differences, the gravest kinds first and in these the most used. The documents together are what was
/// promised; `entries` what was seen of it.
#[must_use]
pub fn diff(documents: &[Document], entries: &[Entry]) -> Vec<Difference> {
    let promises = Promises::new(documents);
    let mut seen = vec![false; promises.operations.len()];
    let mut all = Vec::new();
    for entry in entries {
        let fitting = promises.fitting(&entry.route);
        let mut say = |kind, what: String| {
            all.push(Difference {
                kind,
                service: entry.service.clone(),
                method: entry.method.clone(),
                route: entry.route.clone(),
                what,
                requests: entry.requests,
            });
        };
        if fitting.is_empty() {
            if is_offered(entry) {
                let open = entry.open_share().filter(|s| *s > 0.0);
                let open =
                    open.map_or_else(String::new, |s| format!(", {:.0} % of it without a credential", 100.0 * s));
                say(Kind::Shadow, format!("answered {} times{open}, and in no document", answered(entry)));
            }
            continue;
        }
        // HEAD is what GET is (RFC 9110 section 9.3.2).
        let of_method = |m: &str| fitting.iter().copied().find(|&at| promises.operations[at].1.method == m);
        let head = if entry.method == "HEAD" { of_method("GET") } else { None };
        let Some(at) = of_method(&entry.method).or(head) else {
            // Browsers ask with OPTIONS before they ask (CORS); a document need not have it.
            if is_offered(entry) && entry.method != "OPTIONS" {
                let methods: BTreeSet<_> =
                    fitting.iter().map(|&at| promises.operations[at].1.method.as_str()).collect();
                let methods = methods.into_iter().collect::<Vec<_>>().join(", ");
                say(Kind::Method, format!("answered {} times; documented are {methods}", answered(entry)));
            }
            continue;
        };
        seen[at] = true;
        compare(promises.operations[at].1, entry, &mut say);
    }
    for ((title, operation), _) in promises.operations.iter().zip(&seen).filter(|(_, seen)| !**seen) {
        all.push(Difference {
            kind: Kind::Orphan,
            service: (*title).to_owned(),
            method: operation.method.clone(),
            route: operation.templates.first().cloned().unwrap_or_default(),
            what: if operation.deprecated { "documented as deprecated, not seen" } else { "documented, not seen" }
                .into(),
            requests: 0,
        });
    }
    all.sort_by(|a, b| {
        let names = |d: &Difference| (d.service.clone(), d.route.clone(), d.method.clone());
        a.kind.cmp(&b.kind).then(b.requests.cmp(&a.requests)).then_with(|| names(a).cmp(&names(b)))
    });
    all
}

fn compare(operation: &Operation, entry: &Entry, say: &mut impl FnMut(Kind, String)) {
    let open = entry.facts.accepted.get("none").copied().unwrap_or(0);
    if !operation.open && open > 0 {
        let kinds = operation.auth.iter().cloned().collect::<Vec<_>>().join(" or ");
        say(
            Kind::Unauthenticated,
            format!("{open} requests without a credential were answered 2xx; documented is {kinds}"),
        );
    }
    let other = operation.auth.contains("other");
    let kinds = entry.facts.accepted.keys().filter(|k| *k != "none" && !operation.auth.contains(*k) && !other);
    // Browsers send their cookies to whatever they call.
    let kinds: Vec<_> =
        kinds.filter(|k| *k != "cookie" || operation.says_auth && operation.auth.is_empty()).cloned().collect();
    if !kinds.is_empty() {
        let documented = operation.auth.iter().cloned().collect::<Vec<_>>().join(", ");
        let documented = if documented.is_empty() { "none".into() } else { documented };
        say(Kind::Auth, format!("accepted with {}; documented is {documented}", kinds.join(", ")));
    }
    if entry.life != Life::Gone {
        if operation.deprecated {
            say(Kind::Zombie, format!("deprecated by the document, and used {} times", entry.requests));
        } else if entry.facts.deprecated > 0 {
            say(
                Kind::Zombie,
                format!("answers say that it is deprecated, the document does not; used {} times", entry.requests),
            );
        }
    }
    let known =
        |s: u16| operation.any_status || operation.statuses.contains(&s) || operation.ranges.contains(&(s / 100));
    let statuses: Vec<_> = entry
        .statuses
        .iter()
        .filter(|(s, _)| matches!(s, 200..=499) && !known(**s))
        .map(|(s, n)| format!("{s} ({n})"))
        .collect();
    if !statuses.is_empty() {
        say(Kind::Status, format!("answered {}, which the document does not have", statuses.join(", ")));
    }
}

/// Is there something at the route? Not when all answers said no, or came from something in front of it.
fn is_offered(entry: &Entry) -> bool {
    answered(entry) > 0
}

fn answered(entry: &Entry) -> u64 {
    entry.statuses.iter().filter(|(s, _)| matches!(s, 101 | 200..=299 | 304 | 500)).map(|(_, n)| n).sum()
}

impl<'d> Promises<'d> {
    fn new(documents: &'d [Document]) -> Self {
        let mut promises = Self { by_length: HashMap::new(), operations: Vec::new() };
        for document in documents {
            for operation in &document.operations {
                let at = promises.operations.len();
                promises.operations.push((&document.title, operation));
                for template in &operation.templates {
                    promises.by_length.entry(segments(template).count()).or_default().push((template, at));
                }
            }
        }
        promises
    }

    /// The operations whose template fits best: with the most equal words.
    fn fitting(&self, route: &str) -> Vec<usize> {
        let mut best = (0, Vec::new());
        for (template, at) in self.by_length.get(&segments(route).count()).into_iter().flatten() {
            match fits(template, route) {
                Some(equal) if best.1.is_empty() || equal > best.0 => best = (equal, vec![*at]),
                Some(equal) if equal == best.0 => best.1.push(*at),
                _ => {}
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use super::{super::read, *};

    const DOCUMENT: &str = "
openapi: 3.0.3
info: {title: Shop, version: '1'}
security: [{t: []}]
paths:
  /orders/{id}:
    get: {responses: {'200': {description: ok}}}
    delete: {deprecated: true, responses: {default: {description: ok}}}
  /orders/mine:
    get: {responses: {'200': {description: ok}}}
components: {securitySchemes: {t: {type: http, scheme: bearer}}}
";

    fn entry(method: &str, route: &str, auth: &str, statuses: &[(u16, u64)]) -> Entry {
        let ok = statuses.iter().filter(|(s, _)| matches!(s, 200..=299)).map(|(_, n)| n).sum();
        let mut entry = Entry {
            service: "shop".into(),
            method: method.into(),
            route: route.into(),
            requests: statuses.iter().map(|(_, n)| n).sum(),
            statuses: statuses.iter().copied().collect(),
            life: Life::Active,
            ..Entry::default()
        };
        if ok > 0 {
            entry.facts.accepted.insert(auth.into(), ok);
        }
        entry
    }

    #[test]
    fn every_kind() {
        let documents = [read(DOCUMENT.as_bytes()).expect("valid")];
        let entries = [
            entry("GET", "/orders/{int}", "none", &[(200, 5), (404, 2)]),
            entry("DELETE", "/orders/{int}", "basic", &[(204, 1)]),
            entry("PUT", "/orders/{int}", "bearer", &[(200, 3)]),
            entry("GET", "/debug/{word}", "none", &[(200, 7)]),
            entry("GET", "/wp-login.php", "none", &[(404, 900)]),
            entry("OPTIONS", "/orders/{int}", "none", &[(204, 9)]),
            entry("HEAD", "/orders/{int}", "bearer", &[(200, 1)]),
        ];
        let got: Vec<_> =
            diff(&documents, &entries).iter().map(|d| (d.kind.name(), d.method.clone(), d.route.clone())).collect();
        let of = |kind, method: &str, route: &str| (kind, method.to_owned(), route.to_owned());
        assert_eq!(
            got,
            [
                of("shadow", "GET", "/debug/{word}"),
                of("method", "PUT", "/orders/{int}"),
                of("unauthenticated", "GET", "/orders/{int}"),
                of("auth", "DELETE", "/orders/{int}"),
                of("zombie", "DELETE", "/orders/{int}"),
                of("orphan", "GET", "/orders/mine"),
                of("status", "GET", "/orders/{int}"),
            ]
        );
    }

    #[test]
    fn the_best_template_is_meant() {
        let documents = [read(DOCUMENT.as_bytes()).expect("valid")];
        let seen = [entry("GET", "/orders/mine", "bearer", &[(200, 1)])];
        let orphans: Vec<_> = diff(&documents, &seen).into_iter().map(|d| d.route).collect();
        assert_eq!(orphans, ["/orders/{id}", "/orders/{id}"]);
    }
}
