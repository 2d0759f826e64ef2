//! The list as a bill of materials: CycloneDX 1.6 `services` (ECMA-424). A service has its endpoints, whether they ask
//! for a credential (left out when some do, or nobody knows), and whether requests cross a trust boundary.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::inventory::{Entry, Inventory, time};

/// The bill of what is offered: not of what was asked for and is not there. The same list gives the same bill, its serial number included.
#[must_use]
pub fn bill(inventory: &Inventory) -> Value {
    let mut services: BTreeMap<(&str, &str, &str), Vec<&Entry>> = BTreeMap::new();
    for entry in inventory.endpoints.iter().filter(|e| e.side != "client" && e.is_there()) {
        services.entry((&entry.service, &entry.namespace, &entry.workload)).or_default().push(entry);
    }
    let reference =
        |(service, namespace, workload): (&str, &str, &str)| format!("service:{namespace}/{workload}/{service}");
    let mut dependencies: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (key, entries) in &services {
        for caller in entries.iter().flat_map(|e| e.facts.callers.keys()) {
            // Callers are known by name: what stands for one is every service of that name.
            for from in services.keys().filter(|k| k.0 == caller && *k != key) {
                dependencies.entry(reference(*from)).or_default().insert(reference(*key));
            }
        }
    }
    let listed: Vec<Value> = services.iter().map(|(key, entries)| service(&reference(*key), *key, entries)).collect();
    let dependencies: Vec<Value> =
        dependencies.into_iter().map(|(from, to)| json!({ "ref": from, "dependsOn": to })).collect();
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": serial(&listed, inventory.made),
        "version": 1,
        "metadata": {
            "timestamp": time(inventory.made),
            "lifecycles": [{ "phase": "operations" }],
            "tools": { "components": [{
                "type": "application", "name": "apiscope", "version": env!("CARGO_PKG_VERSION"),
            }] },
        },
        "services": listed,
        "dependencies": dependencies,
    })
}

fn service(reference: &str, (name, namespace, workload): (&str, &str, &str), entries: &[&Entry]) -> Value {
    let mut accepted = BTreeMap::<&str, u64>::new();
    for (kind, n) in entries.iter().flat_map(|e| &e.facts.accepted) {
        *accepted.entry(kind).or_default() += n;
    }
    let endpoints: BTreeSet<String> = entries.iter().map(|e| reference_of(&e.route)).collect();
    let mut properties = Vec::new();
    let mut say =
        |name: &str, value: String| properties.push(json!({ "name": format!("apiscope:{name}"), "value": value }));
    if !workload.is_empty() {
        say("workload", workload.into());
    }
    for e in entries {
        let shown = format!(
            "{} {} requests={} life={} exposure={} auth={} first_seen={} last_seen={}",
            e.method,
            e.route,
            e.requests,
            e.life.name(),
            e.exposure(),
            e.facts.accepted.keys().cloned().collect::<Vec<_>>().join("+"),
            time(e.first_seen),
            time(e.last_seen)
        );
        say("endpoint", shown);
    }
    let mut service = Map::new();
    service.insert("bom-ref".into(), reference.into());
    if !namespace.is_empty() {
        service.insert("group".into(), namespace.into());
    }
    service.insert("name".into(), if name.is_empty() { "unknown" } else { name }.into());
    service.insert("endpoints".into(), endpoints.into_iter().collect());
    match (accepted.contains_key("none"), accepted.len()) {
        (_, 0) => {}
        (true, 1) => drop(service.insert("authenticated".into(), false.into())),
        (false, _) => drop(service.insert("authenticated".into(), true.into())),
        (true, _) => {}
    }
    let reach: BTreeSet<_> = entries.iter().map(|e| e.exposure()).collect();
    if reach.contains("internet") {
        service.insert("x-trust-boundary".into(), true.into());
    } else if !reach.contains("unknown") {
        service.insert("x-trust-boundary".into(), false.into());
    }
    service.insert("properties".into(), properties.into());
    Value::Object(service)
}

/// A route as a reference (RFC 3986): what may not be in one is percent-encoded, the braces of parameters too.
fn reference_of(route: &str) -> String {
    let mut out = String::with_capacity(route.len() + 8);
    let mut bytes = route.bytes().peekable();
    if !route.starts_with('/') {
        out.push('/');
    }
    while let Some(byte) = bytes.next() {
        match byte {
            // Two slashes at the beginning would be the name of a host.
            b'/' if out.is_empty() => {
                out.push('/');
                if bytes.peek() == Some(&b'/') {
                    out.push('.');
                }
            }
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' => out.push(byte.into()),
            b'-' | b'.' | b'_' | b'~' | b'/' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';'
            | b'=' | b':' | b'@' => out.push(byte.into()),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

/// A UUID of what the bill says (version 8: RFC 9562 section 5.8).
fn serial(services: &[Value], made: u64) -> String {
    let mut hash = Sha256::new();
    hash.update(made.to_be_bytes());
    for service in services {
        hash.update(service.to_string());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&hash.finalize()[..16]);
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    let hex: String = id.iter().map(|b| format!("{b:02x}")).collect();
    format!("urn:uuid:{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregate::FactsView;

    fn entry(service: &str, accepted: &[&str], reach: &str) -> Entry {
        Entry {
            service: service.into(),
            side: "server".into(),
            method: "GET".into(),
            statuses: [(200, 1)].into(),
            route: "/a/{int}".into(),
            facts: FactsView {
                accepted: accepted.iter().map(|k| ((*k).to_owned(), 1)).collect(),
                reach: [(reach.to_owned(), 1)].into(),
                ..FactsView::default()
            },
            ..Entry::default()
        }
    }

    #[test]
    fn authenticated_is_left_out_when_mixed() {
        let mut calls = entry("c", &["bearer"], "unknown");
        calls.facts.callers.insert("a".into(), 1);
        let endpoints = vec![
            entry("a", &["none", "bearer"], "private"),
            entry("b", &["none"], "internet"),
            calls,
            entry("d", &[], "host"),
        ];
        let bill = bill(&Inventory { endpoints, ..Inventory::default() });
        let said: Vec<_> =
            (0..4).map(|i| (&bill["services"][i]["authenticated"], &bill["services"][i]["x-trust-boundary"])).collect();
        let (yes, no, none) = (Value::from(true), Value::from(false), Value::Null);
        assert_eq!(said, [(&none, &no), (&no, &yes), (&yes, &none), (&none, &no)]);
        assert_eq!(bill["dependencies"][0]["dependsOn"][0], bill["services"][2]["bom-ref"]);
        assert_eq!(bill["services"][0]["endpoints"][0], "/a/%7Bint%7D");
    }

    #[test]
    fn references() {
        assert_eq!(["/a b", "//evil", "*", "/\u{e9}"].map(reference_of), ["/a%20b", "/./evil", "/*", "/%C3%A9"]);
    }
}
