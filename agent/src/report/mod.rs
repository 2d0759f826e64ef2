//! The list as one HTML page for people: no network, no other file. What is seen in traffic is chosen by whoever sends
//! it, so the page gets it as JSON in which nothing can end a script, and shows it as text alone; a content security
//! policy lets the page's own script run and no other.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::inventory::{Inventory, time};

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page.
#[must_use]
pub fn html(inventory: &Inventory) -> String {
    let rows: Vec<Value> = inventory
        .endpoints
        .iter()
        .map(|e| {
            json!({
                "s": e.service, "w": [&*e.namespace, &*e.workload], "d": e.side, "m": e.method, "r": e.route,
                "src": e.route_source, "n": e.requests, "e": e.errors, "q": e.rate, "st": e.statuses, "a": e.auth,
                "o": e.open_share(), "p": [e.p50_ns, e.p90_ns, e.p99_ns], "h": e.facts.latency, "x": e.exposure(),
                "l": e.life.name(), "f": time(e.first_seen), "t": time(e.last_seen), "c": e.callers,
                "k": e.facts.callers, "mt": e.facts.media_types, "qk": e.facts.query_keys, "v": e.facts.protocols,
                "tls": e.facts.tls, "z": [e.request_size_p50, e.response_size_p50], "dep": e.facts.deprecated,
                "re": e.facts.reach, "cf": (e.confidence() * 100.0).round(),
            })
        })
        .collect();
    let data = json!({
        "made": time(inventory.made), "version": env!("CARGO_PKG_VERSION"), "overflowed": inventory.overflowed,
        "left_out": inventory.left_out, "rows": rows,
    });
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
    let policy = format!("default-src 'none'; style-src {}; script-src {}", hash(STYLE), hash(SCRIPT));
    // The data last: what it says is not looked at for the others' places.
    PAGE.replace("%POLICY%", &policy)
        .replace("%STYLE%", STYLE)
        .replace("%SCRIPT%", SCRIPT)
        .replace("%DATA%", &in_script(&data))
}

/// JSON in which nothing ends a script element or begins a comment.
fn in_script(value: &Value) -> String {
    let mut out = String::new();
    for c in value.to_string().chars() {
        match c {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::Entry;

    #[test]
    fn nothing_of_the_traffic_becomes_markup() {
        let route = "/</script><script>alert(1)</script><!--%STYLE%&\u{2028}";
        let endpoints =
            vec![Entry { service: "<img src=x onerror=a()>".into(), route: route.into(), ..Entry::default() }];
        let page = html(&Inventory { endpoints, ..Inventory::default() });
        assert_eq!(page.matches("</script").count(), 2, "the data's and the code's");
        assert!(!page.contains("<img") && !page.contains("alert(1)</") && page.contains("%STYLE%"));
        assert!(!page.contains("http://") || !page.contains("https://") || !page.contains("src="), "no other file");
        let data =
            page.split("type=\"application/json\">").nth(1).and_then(|d| d.split("</script").next()).expect("data");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(data["rows"][0]["r"], route);
    }
}
