//! The list as a table for people and as CSV for spreadsheets.

use std::{collections::BTreeMap, fmt::Write as _};

use super::Inventory;
use crate::exchange::Side;

/// Lines up to this width; the route gets what the rest leaves.
const LEAST_ROUTE: usize = 16;

/// A table, `width` columns wide; colours only where `colour` says so.
#[must_use]
pub fn table(inventory: &Inventory, width: usize, colour: bool) -> String {
    let paint = |code: &str, text: String| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text };
    let fixed = 18 + 8 + 8 + 9 + 7 + 9 + 16 + 9 + 8;
    let room = width.saturating_sub(fixed).clamp(LEAST_ROUTE, 80);
    let mut out = String::new();
    let head = format!(
        "{:<17} {:<7} {:<7} {:<room$} {:>8} {:>6} {:>8} {:<15} {:<8} {:<6}",
        "SERVICE", "SIDE", "METHOD", "ROUTE", "REQUESTS", "ERR%", "P99", "AUTH", "EXPOSED", "LIFE"
    );
    let _ = writeln!(out, "{}", paint("7", head));
    for e in &inventory.endpoints {
        let errors = 100.0 * e.errors as f64 / e.requests.max(1) as f64;
        let open = e.side == Side::Server.name() && e.open_share() > Some(0.0) && e.exposure() == "internet";
        let auth = fit(&shares(&e.auth), 15);
        let _ = writeln!(
            out,
            "{} {} {} {} {:>8} {errors:>6.1} {:>8} {} {:<8} {:<6}",
            fit(&e.service, 17),
            fit(&e.side, 7),
            fit(&e.method, 7),
            fit(&e.route, room),
            e.requests,
            duration(e.p99_ns),
            if open { paint("33", auth) } else { auth },
            e.exposure(),
            e.life.name(),
        );
    }
    let services: std::collections::BTreeSet<_> = inventory.endpoints.iter().map(|e| &e.service).collect();
    let _ = writeln!(out, "{} endpoints of {} services", inventory.endpoints.len(), services.len());
    if inventory.overflowed + inventory.left_out > 0 {
        let _ = writeln!(
            out,
            "not told apart: {} requests beyond limits.endpoints; left out: {} endpoints",
            inventory.overflowed, inventory.left_out
        );
    }
    out
}

/// Comma-separated values (RFC 4180), a header first.
///
/// # Errors
/// Does not happen: it is written to memory.
pub fn csv(inventory: &Inventory) -> anyhow::Result<String> {
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record([
        "service",
        "namespace",
        "workload",
        "side",
        "method",
        "route",
        "route_source",
        "life",
        "first_seen",
        "last_seen",
        "requests",
        "errors",
        "statuses",
        "auth",
        "open_share",
        "exposure",
        "callers",
        "media_types",
        "query_keys",
        "protocols",
        "tls",
        "parameters",
        "p50_ms",
        "p99_ms",
        "response_size_p50",
        "confidence",
    ])?;
    for e in &inventory.endpoints {
        let statuses: Vec<_> = e.statuses.iter().map(|(s, n)| format!("{s}:{n}")).collect();
        let counted =
            |map: &BTreeMap<String, u64>| map.iter().map(|(k, n)| format!("{k}:{n}")).collect::<Vec<_>>().join(" ");
        let keys: Vec<_> = e.facts.query_keys.iter().map(String::as_str).collect();
        out.write_record(
            [
                e.service.clone(),
                e.namespace.clone(),
                e.workload.clone(),
                e.side.clone(),
                e.method.clone(),
                e.route.clone(),
                e.route_source.clone(),
                e.life.name().into(),
                time(e.first_seen),
                time(e.last_seen),
                e.requests.to_string(),
                e.errors.to_string(),
                statuses.join(" "),
                counted(&e.auth),
                e.open_share().map_or_else(String::new, |s| format!("{s:.3}")),
                e.exposure().into(),
                e.callers.to_string(),
                counted(&e.facts.media_types),
                keys.join(" "),
                counted(&e.facts.protocols),
                counted(&e.facts.tls),
                e.parameters().join(" "),
                format!("{:.3}", e.p50_ns as f64 / 1e6),
                format!("{:.3}", e.p99_ns as f64 / 1e6),
                e.response_size_p50.to_string(),
                format!("{:.2}", e.confidence()),
            ]
            .map(|field| harmless(&field)),
        )?;
    }
    Ok(String::from_utf8(out.into_inner()?)?)
}

/// A field that begins as a formula does would be run by a spreadsheet: it gets an apostrophe before it.
fn harmless(field: &str) -> String {
    if field.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{field}") } else { field.to_owned() }
}

/// `bearer 75% none 25%`, the greater first.
fn shares(counts: &BTreeMap<String, u64>) -> String {
    let all: u64 = counts.values().sum();
    let mut counts: Vec<_> = counts.iter().collect();
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    match counts.as_slice() {
        [] => "-".into(),
        [(only, _)] => (*only).clone(),
        several => {
            several.iter().map(|(k, n)| format!("{k} {}%", 100 * **n / all.max(1))).collect::<Vec<_>>().join(" ")
        }
    }
}

/// ns since the epoch as RFC 3339, in UTC and to the second.
#[must_use]
pub fn time(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil from days (Hinnant, chrono-compatible low-level date algorithms); before 9999 for every u64 of ns.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let of_year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_days = of_era - (365 * of_year + of_year / 4 - of_year / 100);
    let march = (5 * of_days + 2) / 153;
    let day = of_days - (153 * march + 2) / 5 + 1;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = of_year + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// Two digits and a unit.
fn duration(ns: u64) -> String {
    match ns {
        0 => "-".into(),
        1..1_000_000 => format!("{:.0}us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}ms", ns as f64 / 1e6),
        _ => format!("{:.2}s", ns as f64 / 1e9),
    }
}

/// Without what may steer a terminal or turn its text around.
#[must_use]
pub fn printable(text: &str) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    text.chars().map(|c| if steers(c) { '\u{fffd}' } else { c }).collect()
}

/// Exactly `width` columns.
fn fit(text: &str, width: usize) -> String {
    let mut text = printable(text);
    if text.chars().count() > width {
        text = text.chars().take(width.saturating_sub(1)).collect::<String>() + "…";
    }
    format!("{text:<width$}")
}

#[cfg(test)]
mod tests {
    use super::{super::tests::entry, *};

    #[test]
    fn times() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_400_000_000_000), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_764_165_906_123_456_789), "2025-11-26T14:05:06Z");
        assert_eq!(time(u64::MAX), "2554-07-21T23:34:33Z");
    }

    #[test]
    fn nothing_steers_a_terminal_or_a_spreadsheet() {
        let mut hostile = entry("/\x1b[2J\u{202e}", 1);
        hostile.service = "=cmd|'/c calc'!A1".into();
        let list = Inventory { endpoints: vec![hostile], ..Inventory::default() };
        let table = table(&list, 120, false);
        assert!(!table.contains(['\x1b', '\u{202e}']), "{table}");
        let csv = csv(&list).expect("in memory");
        assert!(csv.lines().nth(1).is_some_and(|l| l.starts_with("'=cmd")), "{csv}");
    }

    #[test]
    fn a_quote_in_a_route_stays_one_field() {
        let list = Inventory { endpoints: vec![entry("/a,\"b\"\n", 1)], ..Inventory::default() };
        let text = csv(&list).expect("in memory");
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let row = reader.records().next().expect("a row").expect("readable");
        assert_eq!(row.get(5), Some("/a,\"b\"\n"));
    }
}
