//! What was seen, as an OpenAPI 3.1 document: a beginning for who has none.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde_json::{Map, Value, json};

use crate::inventory::{Entry, Inventory, time};

const METHODS: [&str; 8] = ["GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"];

/// One document of all entries; the caller has chosen one service. What OpenAPI has no place for (other methods,
/// `CONNECT`, routes that are not known) is listed under `x-apiscope-left-out`; what was asked for and is not there, is
/// in neither.
#[must_use]
pub fn export(title: &str, inventory: &Inventory) -> Value {
    // Templates that differ in the names of parameters alone are one path (OpenAPI 3.1 section 4.8.8.2).
    let mut paths: BTreeMap<String, (Template, BTreeMap<&str, Entry>)> = BTreeMap::new();
    let mut left_out = BTreeSet::new();
    for entry in inventory.endpoints.iter().filter(|e| e.is_there()) {
        let method = METHODS.iter().find(|m| **m == entry.method);
        match (method, entry.route.starts_with('/')) {
            (Some(method), true) => {
                let template = Template::new(&entry.route);
                let (_, methods) = paths.entry(template.shape.clone()).or_insert_with(|| (template, BTreeMap::new()));
                methods.entry(method).and_modify(|e| e.merge(entry)).or_insert_with(|| entry.clone());
            }
            _ => {
                left_out.insert(format!("{} {}", entry.method, entry.route));
            }
        }
    }
    let mut schemes = BTreeSet::new();
    let mut documented = Map::new();
    for (template, methods) in paths.values() {
        let mut item = Map::new();
        if !template.parameters.is_empty() {
            item.insert("parameters".into(), template.parameters.iter().map(|(n, kind)| parameter(n, kind)).collect());
        }
        for (method, entry) in methods {
            item.insert(method.to_lowercase(), operation(entry, &mut schemes));
        }
        documented.insert(template.path.clone(), Value::Object(item));
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": time(inventory.made),
            "description": "Seen by apiscope. It has what was used, not what there is.",
        },
        "paths": documented,
    });
    if !schemes.is_empty() {
        let schemes: Map<_, _> = schemes.into_iter().filter_map(|s| Some((s.to_owned(), scheme(s)?))).collect();
        document["components"] = json!({ "securitySchemes": schemes });
    }
    if !left_out.is_empty() {
        document["x-apiscope-left-out"] = left_out.into_iter().collect();
    }
    document
}

/// A route as OpenAPI wants it: each parameter with a name of its own.
struct Template {
    path: String,
    /// The path with all parameters alike.
    shape: String,
    parameters: Vec<(String, String)>,
}

impl Template {
    fn new(route: &str) -> Self {
        let mut template = Self { path: String::new(), shape: String::new(), parameters: Vec::new() };
        for segment in route.split('/').skip(1) {
            template.path.push('/');
            template.shape.push('/');
            let mut rest = segment;
            while let Some((before, after)) = rest.split_once('{') {
                let Some((kind, after)) = after.split_once('}') else { break };
                template.literal(before);
                let name: String = kind.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                let name = if name.is_empty() { "p".to_owned() } else { name };
                let same = template.parameters.iter().filter(|(_, k)| k == kind).count();
                let mut unique = if same == 0 { name.clone() } else { format!("{name}{}", same + 1) };
                while template.parameters.iter().any(|(n, _)| *n == unique) {
                    unique.push('_');
                }
                let _ = write!(template.path, "{{{unique}}}");
                template.shape.push_str("{}");
                template.parameters.push((unique, kind.to_owned()));
                rest = after;
            }
            template.literal(rest);
        }
        template
    }

    /// What is no parameter: braces, and what no path has, percent-encoded.
    fn literal(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                '{' | '}' | '?' | '#' | '"' | '<' | '>' | '\\' | '^' | '`' | '|' | ' ' => {
                    let _ = write!(self.path, "%{:02X}", c as u32);
                    let _ = write!(self.shape, "%{:02X}", c as u32);
                }
                c if c.is_control() => {
                    for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                        let _ = write!(self.path, "%{byte:02X}");
                        let _ = write!(self.shape, "%{byte:02X}");
                    }
                }
                c => {
                    self.path.push(c);
                    self.shape.push(c);
                }
            }
        }
    }
}

fn parameter(name: &str, kind: &str) -> Value {
    let schema = match kind {
        "int" => json!({ "type": "integer" }),
        "uuid" => json!({ "type": "string", "format": "uuid" }),
        "date" => json!({ "type": "string", "format": "date" }),
        _ => json!({ "type": "string" }),
    };
    json!({ "name": name, "in": "path", "required": true, "schema": schema })
}

fn operation(entry: &Entry, schemes: &mut BTreeSet<&'static str>) -> Value {
    let media: Map<_, _> =
        entry.facts.media_types.keys().filter(|m| m.contains('/')).map(|m| (m.clone(), json!({}))).collect();
    let mut responses = Map::new();
    for status in entry.statuses.keys().filter(|s| (100..600).contains(*s)) {
        let mut response = json!({ "description": format!("Answered {status}") });
        if matches!(status, 200 | 201 | 202 | 203 | 206) && !media.is_empty() {
            response["content"] = Value::Object(media.clone());
        }
        responses.insert(status.to_string(), response);
    }
    if responses.is_empty() {
        responses.insert("default".into(), json!({ "description": "No answer was seen" }));
    }
    let mut operation = json!({
        "responses": responses,
        "x-apiscope-first-seen": time(entry.first_seen),
        "x-apiscope-last-seen": time(entry.last_seen),
        "x-apiscope-requests": entry.requests,
        "x-apiscope-callers": entry.callers,
        "x-apiscope-p99-ms": entry.p99_ns as f64 / 1e6,
        "x-apiscope-exposure": entry.exposure(),
        "x-apiscope-life": entry.life.name(),
        "x-apiscope-confidence": (entry.confidence() * 100.0).round() / 100.0,
    });
    if entry.facts.deprecated > 0 {
        operation["deprecated"] = true.into();
    }
    if !entry.facts.query_keys.is_empty() {
        let query = |name| json!({ "name": name, "in": "query", "schema": { "type": "string" } });
        operation["parameters"] = entry.facts.query_keys.iter().map(query).collect();
    }
    let mut security = Vec::new();
    for kind in entry.facts.accepted.keys() {
        if kind == "none" {
            security.push(json!({}));
        } else if let Some(known) = KINDS.iter().find(|k| *k == kind) {
            schemes.insert(known);
            security.push(json!({ *known: [] }));
        }
    }
    if !security.is_empty() {
        operation["security"] = Value::Array(security);
    }
    operation
}

/// Kinds of credentials that OpenAPI has a place for.
const KINDS: [&str; 7] = ["basic", "bearer", "digest", "negotiate", "apikey", "cookie", "mtls"];

fn scheme(kind: &str) -> Option<Value> {
    let unknown = "apiscope does not keep the name of the field that carries it; this one is the usual name";
    Some(match kind {
        "basic" | "bearer" | "digest" | "negotiate" => json!({ "type": "http", "scheme": kind }),
        "apikey" => json!({ "type": "apiKey", "in": "header", "name": "X-API-Key", "description": unknown }),
        "cookie" => json!({ "type": "apiKey", "in": "cookie", "name": "session", "description": unknown }),
        "mtls" => json!({ "type": "mutualTLS" }),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{super::read, *};

    fn entry(method: &str, route: &str) -> Entry {
        Entry {
            method: method.into(),
            route: route.into(),
            requests: 3,
            statuses: [(200, 2), (0, 1)].into(),
            facts: crate::aggregate::FactsView {
                accepted: [("none".to_owned(), 1), ("bearer".to_owned(), 1)].into(),
                media_types: [("application/json".to_owned(), 2)].into(),
                query_keys: ["page".to_owned()].into(),
                ..Default::default()
            },
            ..Entry::default()
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let endpoints = vec![
            entry("GET", "/a/{int}/b/{int}"),
            entry("GET", "/a/{uuid}/b/{int}"),
            entry("CONNECT", "{authority}"),
            entry("GET", "/x{y\"<>"),
        ];
        let value = export("t", &Inventory { endpoints, ..Inventory::default() });
        let paths: Vec<_> = value["paths"].as_object().expect("paths").keys().cloned().collect();
        assert_eq!(paths, ["/a/{int}/b/{int2}", "/x%7By%22%3C%3E"]);
        assert_eq!(value["paths"]["/a/{int}/b/{int2}"]["get"]["x-apiscope-requests"], 6);
        assert_eq!(value["x-apiscope-left-out"][0], "CONNECT {authority}");
        let document = read(value.to_string().as_bytes()).expect("our own");
        assert!(document.operations[0].open && document.operations[0].auth.contains("bearer"));
    }

    proptest::proptest! {
        #[test]
        fn every_parameter_has_a_name_of_its_own(route in "/[a-z{}/.]{0,40}") {
            let template = Template::new(&route);
            let names: BTreeSet<_> = template.parameters.iter().map(|(n, _)| n).collect();
            assert_eq!(names.len(), template.parameters.len());
            assert_eq!(template.path.matches('{').count(), names.len());
        }
    }
}
