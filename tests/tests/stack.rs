//! The chart's rules and dashboards in the stack they are for: every expression is taken by Prometheus' own
//! tool, the rules do what they say, and every metric that they name is one that the agent has.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use apiscope::{scrape, stats::Stats};
use apiscope_tests::program;
use serde_json::Value;

/// What goes by OTLP, as a collector writes it for Prometheus; see `export/metrics.rs` of the agent.
const BY_OTLP: [&str; 4] = [
    "http_server_request_duration_seconds",
    "http_client_request_duration_seconds",
    "http_server_request_body_size_bytes",
    "http_server_response_body_size_bytes",
];
/// Of detectors, by OTLP.
const BY_DETECTORS: [&str; 1] = ["apiscope_finding_count"];

fn clone() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the root of the clone").to_owned()
}

fn promtool(arguments: &[&str]) {
    let out = Command::new(program("promtool")).args(arguments).output().expect("promtool starts");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "promtool {}:\n{text}", arguments.join(" "));
}

/// Expressions of a dashboard's Prometheus panels.
fn expressions(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|p| p["targets"].as_array().cloned().unwrap_or_default());
    targets
        .filter(|t| t["datasource"]["type"] == "prometheus")
        .map(|t| t["expr"].as_str().expect("an expression").to_owned())
        .collect()
}

fn dashboards() -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(clone().join("helm/dashboards")).expect("dashboards") {
        let path = entry.expect("readable").path();
        let text = fs::read_to_string(&path).expect("readable");
        found.push((path.display().to_string(), serde_json::from_str(&text).expect("JSON")));
    }
    assert_eq!(found.len(), 5, "fleet, service, endpoint, findings, agent");
    found
}

#[test]
fn rules_are_valid_and_do_what_they_say() {
    let root = clone();
    promtool(&["check", "rules", &root.join("helm/rules/apiscope.yaml").to_string_lossy()]);
    promtool(&["test", "rules", &root.join("tests/prometheus/apiscope.test.yaml").to_string_lossy()]);
}

#[test]
fn every_expression_of_the_dashboards_is_promql() {
    let mut rules = String::from("groups:\n  - name: dashboards\n    rules:\n");
    let mut n = 0;
    for (name, dashboard) in dashboards() {
        let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
        for panel in dashboard["panels"].as_array().expect("panels") {
            assert!(ids.insert(panel["id"].to_string()), "{name}: two panels of one id");
            let place = &panel["gridPos"];
            let of = |key: &str| place[key].as_u64().expect("a place");
            assert!(of("x") + of("w") <= 24, "{name}: a panel beyond the edge");
            for x in of("x")..of("x") + of("w") {
                for y in of("y")..of("y") + of("h") {
                    assert!(taken.insert((x, y)), "{name}: panels lie over each other at {x},{y}");
                }
            }
        }
        for text in expressions(&dashboard) {
            let text = text.replace("$__rate_interval", "5m").replace('\\', "\\\\").replace('"', "\\\"");
            rules.push_str(&format!("      - record: dashboard_{n}\n        expr: \"{text}\"\n"));
            n += 1;
        }
    }
    assert!(n > 30, "only {n} expressions");
    let file = std::env::temp_dir().join(format!("apiscope-dashboards-{}.yaml", std::process::id()));
    fs::write(&file, rules).expect("writable");
    promtool(&["check", "rules", &file.to_string_lossy()]);
    fs::remove_file(file).expect("removable");
}

#[test]
fn every_metric_that_is_named_exists() {
    let own = scrape::text(&Stats::default());
    let mut known: BTreeSet<String> =
        own.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect();
    known.extend(BY_DETECTORS.map(str::to_owned));
    for name in BY_OTLP {
        known.extend(["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")));
    }
    let rules = fs::read_to_string(clone().join("helm/rules/apiscope.yaml")).expect("readable");
    let rules = rules.lines().filter_map(|l| l.trim().strip_prefix("expr: ")).map(str::to_owned);
    let mut named = BTreeSet::new();
    for text in rules.chain(dashboards().iter().flat_map(|(_, d)| expressions(d))) {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "_:".contains(c)));
        named.extend(
            words
                .filter(|w| w.starts_with("apiscope_") || ["_bucket", "_sum", "_count"].iter().any(|e| w.ends_with(e)))
                .map(str::to_owned),
        );
    }
    // Labels, not metrics.
    let labels = ["apiscope_finding_severity", "apiscope_route_source"].map(str::to_owned);
    let unknown: Vec<_> = named.iter().filter(|n| !known.contains(*n) && !labels.contains(n)).collect();
    assert!(named.len() > 12 && unknown.is_empty(), "not metrics of the agent: {unknown:?}");
}

/// What the agent serves is the text format.
#[test]
fn what_is_scraped_is_the_text_format() {
    use std::io::Write as _;
    let mut check = Command::new(program("promtool"))
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("promtool starts");
    let mut input = check.stdin.take().expect("a pipe");
    input.write_all(scrape::text(&Stats::default()).as_bytes()).expect("taken");
    drop(input);
    let out = check.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    // Only a style is complained about: OpenTelemetry's names, which both ways share.
    let other: Vec<_> = said.lines().filter(|l| !l.contains("apiscope_exchange_count_total")).collect();
    assert!(other.is_empty(), "{said}");
}
