//! What a person or a script is shown of a snapshot: pure functions from it to text.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    aggregate::EndpointView,
    coverage::{Process, View},
    detect::{Coverage, Finding, Readiness, State},
    stats::Totals,
};

/// The state of an agent at one moment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// Version of the agent.
    pub version: String,
    /// Every probe is attached.
    pub ready: bool,
    /// Which hooks are used.
    pub door: String,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// ns since the epoch.
    pub now: u64,
    /// Counters.
    #[serde(flatten)]
    pub totals: Totals,
    /// What it costs.
    pub cost: Cost,
    /// Endpoints, busiest first.
    pub endpoints: Vec<EndpointView>,
    /// Exchanges beyond the endpoint limit.
    pub overflowed: u64,
    /// Exchanges that have lasted for more than a second and are not over, the oldest first; cut off at a
    /// hundred. `lasting` counts them all, by kind of API.
    #[serde(default)]
    pub live: Vec<Lasting>,
    /// See `live`.
    #[serde(default)]
    pub lasting: BTreeMap<String, u64>,
    /// Findings, the open and most severe first.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// Whose TLS is read, and whose is not and why.
    #[serde(default)]
    pub tls_coverage: View,
    /// Which detectors are armed, learning or blind.
    #[serde(default)]
    pub coverage: Arc<Vec<Coverage>>,
}

/// An exchange that is not over.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Lasting {
    /// Service.
    pub service: String,
    /// `server` or `client`.
    pub side: String,
    /// Kind of API.
    pub api: String,
    /// Method.
    pub method: String,
    /// Route.
    pub route: String,
    /// Since its first byte, ms.
    pub age_ms: u64,
    /// Content bytes so far, of HTTP/2; of HTTP/1 they are known at the end.
    pub request_body_bytes: u64,
    /// See `request_body_bytes`.
    pub response_body_bytes: u64,
    /// gRPC messages so far.
    pub request_messages: u64,
    /// See `request_messages`.
    pub response_messages: u64,
}

/// What the agent uses.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Cost {
    /// CPU time of the agent since its start, seconds.
    pub cpu_s: f64,
    /// Resident memory, bytes.
    pub rss_bytes: u64,
    /// Memory of the eBPF maps, bytes. Not the ring's: it is mapped, and twice in `rss_bytes`.
    pub map_bytes: u64,
    /// Runs of the eBPF programs and their time, ns; only counted while `kernel.bpf_stats_enabled` is 1.
    pub programs: Vec<Program>,
}

/// Cost of one eBPF program.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Program {
    /// Name.
    pub name: String,
    /// Runs.
    pub runs: u64,
    /// Time, ns.
    pub ns: u64,
    /// Instructions that the verifier looked at when it was loaded; the kernel's limit is a million. 0
    /// where it does not say (before Linux 5.16).
    #[serde(default)]
    pub verified: u64,
}

/// How the table is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// With colours.
    pub colour: bool,
    /// Columns of the terminal.
    pub width: usize,
    /// Lines of the terminal.
    pub height: usize,
}

/// A duration with three digits: `1.25ms`.
#[must_use]
pub fn duration(ns: u64) -> String {
    let n = ns as f64;
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns}ns"),
        1_000..1_000_000 => (n / 1e3, "us"),
        1_000_000..1_000_000_000 => (n / 1e6, "ms"),
        _ => (n / 1e9, "s"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$}{unit}")
}

fn count(n: f64) -> String {
    match n {
        n if n < 10.0 => format!("{n:.1}"),
        n if n < 100_000.0 => format!("{n:.0}"),
        n if n < 1e8 => format!("{:.1}k", n / 1e3),
        n => format!("{:.1}M", n / 1e6),
    }
}

/// Reasons that occurred, as `a 3, b 1`.
fn reasons<'a>(all: impl IntoIterator<Item = (&'a String, &'a u64)>) -> String {
    all.into_iter().filter(|(_, n)| **n > 0).map(|(k, n)| format!("{k} {n}")).collect::<Vec<_>>().join(", ")
}

/// Text from the wire must not steer a terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Cuts a text to `width` columns, the end left out.
fn fit(text: &str, width: usize) -> String {
    let text = printable(text);
    if text.chars().count() <= width {
        return format!("{text:<width$}");
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// The table of a terminal.
#[must_use]
pub fn table(snapshot: &Snapshot, style: Style) -> String {
    let paint =
        |code: &str, text: &str| if style.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let mut out = String::new();
    let totals = &snapshot.totals;
    let exchanges: u64 = totals.exchanges.values().sum();
    let lost: u64 = totals.losses.values().sum();
    let rate: f64 = snapshot.endpoints.iter().map(|e| e.rate).sum();
    let _ = writeln!(
        out,
        "{}  up {}s  {} exchanges ({}/s)  {} connections  agent {:.1}s cpu, {:.0} MiB",
        paint("1", &format!("apiscope {}", snapshot.version)),
        snapshot.uptime_s,
        exchanges,
        count(rate),
        totals.connections,
        snapshot.cost.cpu_s,
        snapshot.cost.rss_bytes as f64 / 1048576.0,
    );
    let lost_text = if lost == 0 {
        paint("32", "nothing lost")
    } else {
        paint("1;31", &format!("lost: {}", reasons(&totals.losses)))
    };
    let unread = reasons(&totals.unread);
    let _ =
        writeln!(out, "{lost_text}{}", if unread.is_empty() { String::new() } else { format!("  not read: {unread}") });
    let tls = &totals.tls;
    if tls.connections > 0 {
        let _ = writeln!(out, "{}", fit(&tls_line(snapshot), style.width.max(40)).trim_end());
    }
    if !snapshot.lasting.is_empty() {
        let _ = writeln!(out, "open for more than a second: {}", reasons(&snapshot.lasting));
    }
    let open: Vec<_> = snapshot.findings.iter().filter(|f| f.state == State::Open && !f.acknowledged).collect();
    if let Some(worst) = open.first() {
        let text = format!(
            "{} open findings; {} {}: {}",
            open.len(),
            worst.severity.name(),
            worst.rule,
            printable(&worst.explanation)
        );
        let _ = writeln!(out, "{}", paint("1;33", fit(&text, style.width.max(40)).trim_end()));
    }
    out += &rows(&snapshot.endpoints, style);
    if snapshot.endpoints.is_empty() {
        let _ = writeln!(out, "waiting for HTTP requests …");
    }
    out
}

/// TLS connections in one line: how many are read, and who carries those that are not.
fn tls_line(snapshot: &Snapshot) -> String {
    let tls = &snapshot.totals.tls;
    let mut out = format!("TLS connections: {} read, {} not read", tls.read, tls.unread);
    if tls.unread > 0 {
        let _ = write!(out, " ({})", bytes(tls.unread_bytes));
    }
    let unread = |p: &&Process| p.connections.unread > 0;
    for (i, p) in snapshot.tls_coverage.processes.iter().filter(unread).take(3).enumerate() {
        let name = p.exe.rsplit('/').next().unwrap_or_default();
        let why = p.libraries.iter().find(|f| f.reason.is_some()).map_or("nothing known in it", |f| f.library.name());
        let _ = write!(out, "{}{name}[{}] {} ({why})", if i == 0 { ": " } else { ", " }, p.pid, p.connections.unread);
    }
    out
}

/// Bytes with a unit: `4.2 KiB`.
#[must_use]
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.*} {}", usize::from(unit > 0), UNITS[unit])
}

/// Processes with TLS, one a line.
#[must_use]
pub fn tls_processes(processes: &[Process], colour: bool) -> String {
    let paint = |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let mut out = String::new();
    for p in processes {
        let covered = if p.covered { paint("32", "read    ") } else { paint("33", "not read") };
        let names: Vec<String> = p
            .libraries
            .iter()
            .map(|f| format!("{} {}", f.library.name(), f.version.as_deref().unwrap_or_default()).trim_end().to_owned())
            .collect();
        let names = if names.is_empty() { "no known TLS library in its files".to_owned() } else { names.join(", ") };
        let _ = write!(out, "{:>8}  {covered}  {}  {}", p.pid, printable(&p.exe), printable(&names));
        if let Some(reason) = p.reason() {
            let _ = write!(out, ": {}", reason.text());
        }
        let c = p.connections;
        if c.read + c.unread > 0 {
            let _ = write!(out, "; connections: {} read, {} not ({})", c.read, c.unread, bytes(c.unread_bytes));
        }
        out.push('\n');
    }
    out
}

/// Findings as a list: a line that can be scanned, and a sentence.
#[must_use]
pub fn findings(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "no findings\n".into();
    }
    let mut out = String::new();
    for f in findings {
        let state = match f.state {
            State::Resolved => " resolved",
            State::Open if f.acknowledged => " acknowledged",
            State::Open => "",
        };
        let place =
            if f.route.is_empty() { f.service.clone() } else { format!("{} {} {}", f.service, f.method, f.route) };
        let _ = writeln!(
            out,
            "{:<8} {:<4} {}  {}{state}  seen {}x  [{}]\n         {}",
            f.severity.name(),
            f.rule,
            f.id,
            printable(&place),
            f.count,
            f.owasp.iter().chain(&f.attack).map(String::as_str).collect::<Vec<_>>().join(" "),
            printable(&f.explanation)
        );
    }
    out
}

/// What detectors cover, an endpoint a line.
#[must_use]
pub fn coverage(coverage: &[Coverage]) -> String {
    let mut out = String::new();
    for c in coverage {
        let of = |wanted: fn(&Readiness) -> bool| {
            c.detectors.iter().filter(|(_, r)| wanted(r)).map(|(d, _)| d.as_str()).collect::<Vec<_>>().join(" ")
        };
        let least = c.minimum_leak_per_hour.map_or_else(|| "none".into(), |n| format!("{n:.0} records/h"));
        let _ = writeln!(
            out,
            "{} {} {}\n  smallest leak found: {least}\n  armed: {}\n  learning: {}\n  blind: {}",
            printable(&c.service),
            printable(&c.method),
            printable(&c.route),
            of(|r| matches!(r, Readiness::Armed { .. })),
            of(|r| matches!(r, Readiness::Learning { .. })),
            of(|r| matches!(r, Readiness::Blind { .. })),
        );
    }
    out
}

/// The endpoints alone, without colours: for a replay.
#[must_use]
pub fn endpoints(endpoints: &[EndpointView], width: usize) -> String {
    rows(endpoints, Style { colour: false, width, height: usize::MAX })
}

fn rows(endpoints: &[EndpointView], style: Style) -> String {
    let paint =
        |code: &str, text: &str| if style.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let mut out = String::new();
    let fixed = 6 + 1 + 8 + 1 + 8 + 1 + 6 + 1 + 8 + 1 + 8 + 1 + 10 + 1 + 7;
    let service = 16.min(style.width.saturating_sub(fixed + 14).max(8));
    let route = style.width.saturating_sub(fixed + service + 2).clamp(12, 80);
    let head = format!(
        "{:<service$} {:<6} {:<8} {:<route$} {:>8} {:>6} {:>8} {:>8} {:<10} {:>7}",
        "SERVICE", "SIDE", "METHOD", "ROUTE", "RATE/S", "ERR%", "P50", "P99", "AUTH", "CALLERS"
    );
    let _ = writeln!(out, "{}", paint("7", &head));
    let room = style.height.saturating_sub(5).max(1);
    for e in endpoints.iter().take(room) {
        let errors = 100.0 * e.errors as f64 / e.requests.max(1) as f64;
        let error_text = format!("{errors:>6.1}");
        let auth = e.auth.iter().max_by_key(|(_, n)| **n).map_or("", |(a, _)| a);
        let auth = if e.auth.len() > 1 { format!("{auth}+") } else { auth.to_owned() };
        let _ = writeln!(
            out,
            "{} {:<6} {} {} {:>8} {} {:>8} {:>8} {:<10} {:>7}",
            fit(&e.service, service),
            e.side,
            fit(&e.method, 8),
            fit(&e.route, route),
            count(e.rate),
            if errors > 0.0 { paint("31", &error_text) } else { error_text },
            duration(e.p50_ns),
            duration(e.p99_ns),
            auth,
            e.callers,
        );
    }
    if endpoints.len() > room {
        let _ = writeln!(out, "… {} more endpoints", endpoints.len() - room);
    }
    out
}

/// One line for each endpoint, for a pipe: `key=value`, in this order.
#[must_use]
pub fn lines(snapshot: &Snapshot) -> String {
    let mut out = String::new();
    for e in &snapshot.endpoints {
        let _ = writeln!(
            out,
            "service={} side={} method={} route={} requests={} rate={:.2} errors={} p50_ns={} p90_ns={} p99_ns={} callers={}",
            quoted(&e.service),
            e.side,
            quoted(&e.method),
            quoted(&e.route),
            e.requests,
            e.rate,
            e.errors,
            e.p50_ns,
            e.p90_ns,
            e.p99_ns,
            e.callers
        );
    }
    out
}

/// One JSON object for each endpoint.
#[must_use]
pub fn json_lines(snapshot: &Snapshot) -> String {
    snapshot
        .endpoints
        .iter()
        .filter_map(|e| serde_json::to_string(e).ok())
        .fold(String::new(), |out, line| out + &line + "\n")
}

fn quoted(text: &str) -> String {
    if !text.is_empty() && text.chars().all(|c| !c.is_whitespace() && !c.is_control() && c != '"' && c != '=') {
        text.to_owned()
    } else {
        format!("{text:?}")
    }
}

/// The line of totals at the end.
#[must_use]
pub fn summary(totals: &Totals) -> String {
    let exchanges = |side: &str| totals.exchanges.get(side).copied().unwrap_or(0);
    let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
    format!(
        "apiscope: {} server and {} client exchanges; lost: {}; not read: {}",
        exchanges("server"),
        exchanges("client"),
        or_none(reasons(&totals.losses)),
        or_none(reasons(&totals.unread)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let shown: Vec<String> = [999, 1_250, 12_500, 1_250_000_000].map(duration).into();
        assert_eq!(shown, ["999ns", "1.25us", "12.5us", "1.25s"]);
    }

    #[test]
    fn no_colours_and_no_control_characters() {
        let mut snapshot = Snapshot::default();
        let json = r#"{"service":"a b","side":"server","method":"GET","route":"/x\u001b[2J","route_source":"typed","requests":2,"errors":1,
            "rate":1.5,"statuses":{"200":1,"500":1},"auth":{"none":2},"p50_ns":1000,"p90_ns":1000,"p99_ns":2000,"request_size_p50":1,
            "response_size_p50":1,"request_bytes":1,"response_bytes":1,"callers":1,"first_seen":1,"last_seen":2}"#;
        snapshot.endpoints.push(serde_json::from_str(json).expect("an endpoint"));
        let plain = table(&snapshot, Style { colour: false, width: 100, height: 24 });
        assert!(!plain.contains('\x1b') && plain.contains("50.0"), "{plain}");
        assert!(lines(&snapshot).starts_with("service=\"a b\" side=server method=GET route="));
        assert_eq!(json_lines(&snapshot).lines().count(), 1);
    }

    #[test]
    fn tls_that_is_not_read_is_named() {
        use crate::coverage::{Coverage, Found, Library, Reason};
        let mut coverage = Coverage::default();
        coverage.runs(7, "/usr/bin/java");
        coverage.found(7, &Found { library: Library::Jsse, version: None, reason: Some(Reason::CompiledAtRunTime) });
        coverage.ended(7, false, 5000);
        let mut snapshot = Snapshot { tls_coverage: coverage.view(), ..Snapshot::default() };
        assert!(!table(&snapshot, Style { colour: false, width: 120, height: 24 }).contains("TLS"));
        snapshot.totals.tls.connections = 1;
        snapshot.totals.tls.unread = 1;
        snapshot.totals.tls.unread_bytes = 5000;
        let text = table(&snapshot, Style { colour: false, width: 120, height: 24 });
        assert!(text.contains("TLS connections: 0 read, 1 not read (4.9 KiB): java[7] 1 (Java JSSE)"), "{text}");
        let list = tls_processes(&snapshot.tls_coverage.processes, false);
        assert!(list.contains("not read  /usr/bin/java  Java JSSE: compiled at run time"), "{list}");
    }
}
