//! Path -> route, by the shape of each segment alone: `/users/42` is `/users/{int}`. Learning routes
//! from what distinguishes real ids from words is a capability of its own; this is the floor it will
//! stand on, and it never turns a word into a parameter.
//!
//! Operator patterns (`/files/{name}`, a `{…}` segment takes anything) come before shapes.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::exchange::Method;

/// Most paths whose route is remembered; then all are forgotten.
const MAX_KNOWN: usize = 16_384;
/// Longest segment that can be a word.
const MAX_WORD: usize = 64;
/// Most segments of a route; the rest is `{rest}`.
const MAX_SEGMENTS: usize = 24;
/// Route of requests whose path is not known.
pub const UNKNOWN: &str = "{unknown}";

/// A route and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// `/users/{int}`.
    pub template: Arc<str>,
    /// `typed` or `config`.
    pub source: &'static str,
}

/// Finds routes. Deterministic: the same path has the same route at any time.
pub struct Routes {
    patterns: Vec<(Vec<Box<str>>, Arc<str>)>,
    known: FxHashMap<Box<str>, Route>,
    templates: FxHashMap<Box<str>, Arc<str>>,
}

impl Routes {
    /// With these operator patterns, first match first.
    #[must_use]
    pub fn new(patterns: &[String]) -> Self {
        let split = |p: &String| (segments(p).map(Into::into).collect(), p.as_str().into());
        Self {
            patterns: patterns.iter().map(split).collect(),
            known: FxHashMap::default(),
            templates: FxHashMap::default(),
        }
    }

    /// The route of a path. A path that was seen lately costs one hash.
    pub fn route(&mut self, method: &Method, path: Option<&str>) -> Route {
        let Some(path) = path else { return Route { template: UNKNOWN.into(), source: "typed" } };
        if let Some(known) = self.known.get(path) {
            return known.clone();
        }
        let route = self.find(method, path);
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
            self.templates.clear();
        }
        self.known.insert(path.into(), route.clone());
        route
    }

    fn find(&mut self, method: &Method, path: &str) -> Route {
        if *method == Method::Connect || !path.starts_with('/') {
            // The authority form names hosts, not routes; `*` is the server itself.
            let template = if path == "*" { "*" } else { "{authority}" };
            return Route { template: template.into(), source: "typed" };
        }
        if let Some((_, template)) = self.patterns.iter().find(|(pattern, _)| matches(pattern, path)) {
            return Route { template: template.clone(), source: "config" };
        }
        let mut template = String::with_capacity(path.len());
        for (i, segment) in segments(path).enumerate() {
            template.push('/');
            if i == MAX_SEGMENTS {
                template.push_str("{rest}");
                break;
            }
            match parameter(segment) {
                Some(kind) => template.push_str(kind),
                None => template.push_str(segment),
            }
        }
        if template.is_empty() || (path.ends_with('/') && path.len() > 1) {
            template.push('/');
        }
        let shared = match self.templates.get(template.as_str()) {
            Some(shared) => shared.clone(),
            None => {
                let shared: Arc<str> = template.as_str().into();
                self.templates.insert(template.into(), shared.clone());
                shared
            }
        };
        Route { template: shared, source: "typed" }
    }
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|s| !s.is_empty())
}

fn matches(pattern: &[Box<str>], path: &str) -> bool {
    let mut segments = segments(path);
    pattern.iter().all(|p| segments.next().is_some_and(|s| p.starts_with('{') || **p == *s))
        && segments.next().is_none()
}

/// The kind of parameter that a segment must be, if any.
fn parameter(segment: &str) -> Option<&'static str> {
    let bytes = segment.as_bytes();
    let len = bytes.len();
    let digits = bytes.iter().filter(|b| b.is_ascii_digit()).count();
    let hex = |b: &u8| b.is_ascii_hexdigit();
    if len > MAX_WORD {
        return Some("{long}");
    }
    if digits == len {
        return Some("{int}");
    }
    let dashes = |at: &[usize]| at.iter().all(|&i| bytes.get(i) == Some(&b'-'));
    if len == 36 && dashes(&[8, 13, 18, 23]) && bytes.iter().filter(|b| hex(b)).count() == 32 {
        return Some("{uuid}");
    }
    if len == 10 && dashes(&[4, 7]) && digits == 8 {
        return Some("{date}");
    }
    if segment.contains('@')
        && segment.rsplit('@').next().is_some_and(|host| host.contains('.'))
        && !segment.starts_with('@')
    {
        return Some("{email}");
    }
    if len >= 8 && digits >= 2 && bytes.iter().all(hex) {
        return Some("{hex}");
    }
    // Mixed classes without a word's shape: base62, base64url, ULIDs, prefixed ids.
    let upper = bytes.iter().filter(|b| b.is_ascii_uppercase()).count();
    let plain = bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if len >= 10 && digits >= 2 && plain && !segment.contains('.') {
        let class = |b: u8| {
            if b.is_ascii_digit() {
                0
            } else if b.is_ascii_uppercase() {
                1
            } else if b.is_ascii_lowercase() {
                2
            } else {
                3
            }
        };
        let changes = bytes.windows(2).filter(|w| class(w[0]) != class(w[1])).count();
        if changes >= 4 && (upper > 0 || digits * 3 >= len) {
            return Some("{id}");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(path: &str) -> String {
        Routes::new(&["/files/{name}".into()]).route(&Method::Get, Some(path)).template.to_string()
    }

    #[test]
    fn shapes() {
        for (path, wanted) in [
            ("/", "/"),
            ("/users/42/orders/7", "/users/{int}/orders/{int}"),
            ("/v1/oauth2/utf8", "/v1/oauth2/utf8"),
            ("/o/6fa459ea-ee8a-3ca4-894e-db77e160355e", "/o/{uuid}"),
            ("/d/2024-01-31/", "/d/{date}/"),
            ("/u/jo@x.org", "/u/{email}"),
            ("/h/deadbeef01", "/h/{hex}"),
            ("/c/cus_9sXk2LmQ8rT1", "/c/{id}"),
            ("/files/anything.txt", "/files/{name}"),
            ("/files/a/b", "/files/a/b"),
            ("*", "*"),
            ("/repository-settings/code-scanning", "/repository-settings/code-scanning"),
        ] {
            assert_eq!(route(path), wanted);
        }
        assert_eq!(&*Routes::new(&[]).route(&Method::Connect, Some("db:443")).template, "{authority}");
    }

    proptest::proptest! {
        #[test]
        fn never_panics_and_is_deterministic(path in ".{0,200}") {
            let mut routes = Routes::new(&[]);
            let first = routes.route(&Method::Get, Some(&path));
            proptest::prop_assert_eq!(first, routes.route(&Method::Get, Some(&path)));
        }
    }
}
