//! Metrics and spans as a real OpenTelemetry Collector decodes them. Its OTLP/JSON output goes to a small
//! server in the test.

use std::{
    collections::BTreeMap,
    io::Write as _,
    net::TcpStream,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use apiscope::exchange::Side;
use apiscope_tests::{Agent, Step, free_port, listener, play, process::Guard, sink};
use serde_json::Value;

/// What the collector handed on.
type Received = Arc<Mutex<Vec<Value>>>;

fn binary() -> PathBuf {
    std::env::var_os("APISCOPE_OTELCOL").map(PathBuf::from).filter(|p| p.exists()).expect(
        "APISCOPE_OTELCOL names no OpenTelemetry Collector: run these tests by `cargo xtask test`, which builds one",
    )
}

/// Takes OTLP/JSON over HTTP.
fn sink() -> (u16, Received) {
    let received = Received::default();
    let its = received.clone();
    let port = sink::start("application/json", "{}", move |_, body| {
        its.lock().expect("not poisoned").push(serde_json::from_slice(&body).expect("JSON"));
    });
    (port, received)
}

fn collector_with(grpc: u16, http: u16, sink: u16, more: &str) -> Guard {
    let file = std::env::temp_dir().join(format!("apiscope-otelcol-{}-{grpc}.yaml", std::process::id()));
    let text = format!(
        "receivers: {{otlp: {{protocols: {{grpc: {{endpoint: '127.0.0.1:{grpc}', {more}}}, http: {{endpoint: '127.0.0.1:{http}', {more}}}}}}}}}
exporters: {{otlphttp: {{endpoint: 'http://127.0.0.1:{sink}', encoding: json, compression: none}}}}
service: {{telemetry: {{metrics: {{level: none}}, logs: {{level: error}}}}, pipelines: {{metrics: {{receivers: [otlp], exporters: [otlphttp]}}, traces: {{receivers: [otlp], exporters: [otlphttp]}}, logs: {{receivers: [otlp], exporters: [otlphttp]}}}}}}
"
    );
    std::fs::write(&file, text).expect("writable");
    let child = Command::new(binary())
        .arg("--config")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("the collector starts");
    let collector = Guard(child);
    let end = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(("127.0.0.1", grpc)).is_err() || TcpStream::connect(("127.0.0.1", http)).is_err() {
        assert!(Instant::now() < end, "the collector does not listen");
        std::thread::sleep(Duration::from_millis(100));
    }
    collector
}

fn collector(grpc: u16, http: u16, sink: u16) -> Guard {
    collector_with(grpc, http, sink, "include_metadata: false")
}

fn list<'a>(value: &'a Value, keys: &[&str]) -> Vec<&'a Value> {
    keys.iter()
        .fold(vec![value], |all, key| all.into_iter().filter_map(|v| v.get(*key)?.as_array()).flatten().collect())
}

fn attribute<'a>(of: &'a Value, key: &str) -> Option<&'a Value> {
    let all = of.get("attributes")?.as_array()?;
    all.iter().find(|a| a["key"] == key).and_then(|a| a["value"].as_object()?.values().next())
}

/// The points of a metric in one export whose route is like that. `kind` is what holds them: `histogram`, `sum`.
fn points<'a>(export: &'a Value, metric: &str, kind: &str, route: impl Fn(&str) -> bool) -> Vec<&'a Value> {
    list(export, &["resourceMetrics", "scopeMetrics", "metrics"])
        .into_iter()
        .filter(|m| m["name"] == metric)
        .flat_map(|m| m[kind]["dataPoints"].as_array().into_iter().flatten())
        .filter(|p| attribute(p, "http.route").and_then(Value::as_str).is_some_and(&route))
        .collect()
}

/// A count as OTLP/JSON writes it.
fn number(point: &Value, key: &str) -> u64 {
    point[key].as_str().and_then(|c| c.parse().ok()).expect("a count")
}

/// Requests of such routes as the newest export of a server's durations that has them says, over all statuses.
fn counted(received: &Received, route: impl Fn(&str) -> bool) -> u64 {
    let received = received.lock().expect("not poisoned");
    let all = received.iter().rev().map(|e| points(e, "http.server.request.duration", "histogram", &route));
    all.filter(|points| !points.is_empty())
        .map(|points| points.iter().map(|p| number(p, "count")).sum())
        .next()
        .unwrap_or(0)
}

/// Requests of a route by scheme of their credential and whether they were refused, as the newest export says.
fn credentials(received: &Received, route: &str) -> BTreeMap<(String, bool), u64> {
    let received = received.lock().expect("not poisoned");
    let newest = received.iter().rev().map(|e| points(e, "apiscope.auth.requests", "sum", |r| r == route));
    let mut all = BTreeMap::new();
    for point in newest.into_iter().find(|points| !points.is_empty()).unwrap_or_default() {
        let scheme = attribute(point, "apiscope.auth.scheme").and_then(Value::as_str).expect("a scheme");
        let refused = attribute(point, "apiscope.auth.refused").and_then(Value::as_bool).expect("a flag");
        *all.entry((scheme.to_owned(), refused)).or_default() += number(point, "asInt");
    }
    all
}

fn traffic(path: &str, n: usize, status: u16) {
    let mut steps = Vec::new();
    for i in 0..n {
        let request = format!(
            "GET /{path}/{i} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer canary-{i}\r\n\
             traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n"
        );
        steps.push(Step::client(request));
        steps.push(Step::server(format!("HTTP/1.1 {status} X\r\nContent-Length: 4\r\n\r\nbody")));
    }
    play("127.0.0.1:0", &steps);
}

fn wait(what: &str, is_there: impl FnMut() -> bool) {
    wait_within(Duration::from_secs(30), what, is_there);
}

fn wait_within(time: Duration, what: &str, mut is_there: impl FnMut() -> bool) {
    let end = Instant::now() + time;
    while !is_there() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn agent(name: &str, protocol: &str, endpoint: &str) -> Agent {
    agent_with(name, protocol, endpoint, &[])
}

fn agent_with(name: &str, protocol: &str, endpoint: &str, arguments: &[&str]) -> Agent {
    Agent::start_with(
        name,
        arguments,
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "500"),
            ("OTEL_BSP_SCHEDULE_DELAY", "300"),
        ],
    )
}

fn through(protocol: &str) {
    let (grpc, http) = (free_port(), free_port());
    let (port, received) = sink();
    let name = protocol.replace('/', "-");
    let (path, route) = (format!("otlp-{name}"), format!("/otlp-{name}/{{int}}"));
    let endpoint = format!("http://127.0.0.1:{}", if protocol == "grpc" { grpc } else { http });
    // The collector is away at first: nothing may be lost by that.
    let agent = agent(&name, protocol, &endpoint);
    traffic(&path, 20, 200);
    std::thread::sleep(Duration::from_secs(2));
    let _collector = collector(grpc, http, port);
    traffic(&path, 10, 500);
    traffic(&path, 5, 401);
    wait("35 requests", || counted(&received, |r| r == route) == 35);
    let shown = BTreeMap::from([(("bearer".to_owned(), false), 30), (("bearer".to_owned(), true), 5)]);
    wait("the credentials", || credentials(&received, &route) == shown);
    let spans = || -> Vec<Value> {
        let received = received.lock().expect("not poisoned");
        let all = received.iter().flat_map(|e| list(e, &["resourceSpans", "scopeSpans", "spans"]));
        all.filter(|s| attribute(s, "http.route").is_some_and(|r| *r == *route)).cloned().collect()
    };
    wait("spans", || !spans().is_empty());
    for span in spans() {
        assert_eq!(span["traceId"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(span["parentSpanId"], "b7ad6b7169203331");
        assert_eq!(span["name"], format!("GET {route}"));
        assert_eq!(attribute(&span, "url.path").and_then(Value::as_str), Some(&*route));
    }
    let text = received.lock().expect("not poisoned").iter().map(Value::to_string).collect::<String>();
    assert!(text.contains("apiscope.capture.lost") && text.contains("service.name"), "the agent's own metrics");
    assert!(!text.contains("canary"), "a credential was exported");
    assert!(!text.contains(&format!("/{path}/7\"")), "a raw path was exported");
    agent.stop();
}

/// A certificate authority and certificates that it signed, as files.
fn certificates(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("apiscope-otlp-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let script = "set -e
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=ca
        for who in server client; do
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $who.key -out $who.csr -subj /CN=$who
            printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n' >$who.ext
            openssl x509 -req -in $who.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile $who.ext -out $who.crt
        done";
    let out = Command::new("sh").args(["-c", script]).current_dir(&folder).output().expect("sh starts");
    assert!(out.status.success(), "openssl: {}", String::from_utf8_lossy(&out.stderr));
    folder
}

/// A collector that demands a certificate of its clients, and authenticates itself by a private authority.
#[test]
fn mutual_tls() {
    for protocol in ["grpc", "http/protobuf"] {
        let name = format!("tls-{}", protocol.replace('/', "-"));
        let files = certificates(&name);
        let at = |file: &str| files.join(file).to_string_lossy().into_owned();
        let (grpc, http) = (free_port(), free_port());
        let (port, received) = sink();
        let tls = format!(
            "tls: {{cert_file: '{}', key_file: '{}', client_ca_file: '{}'}}",
            at("server.crt"),
            at("server.key"),
            at("ca.crt")
        );
        let _collector = collector_with(grpc, http, port, &tls);
        let endpoint = format!("https://127.0.0.1:{}", if protocol == "grpc" { grpc } else { http });
        let agent = Agent::start_with(
            &name,
            &[],
            &[
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
                ("OTEL_EXPORTER_OTLP_CERTIFICATE", &at("ca.crt")),
                ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &at("client.crt")),
                ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &at("client.key")),
                ("OTEL_METRIC_EXPORT_INTERVAL", "500"),
            ],
        );
        traffic(&name, 7, 200);
        wait("7 requests over TLS", || counted(&received, |r| r == format!("/{name}/{{int}}")) == 7);
        agent.stop();
        std::fs::remove_dir_all(files).expect("removable");
    }
}

#[test]
fn grpc() {
    through("grpc");
}

#[test]
fn http_protobuf() {
    through("http/protobuf");
}

/// A collector that accepts and never answers, or answers garbage, holds up nothing.
#[test]
fn a_collector_that_misbehaves() {
    for answer in [None, Some(&b"\x00\xffgarbage\r\n\r\n"[..])] {
        let listener = listener("127.0.0.1");
        let port = listener.local_addr().expect("an address").port();
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for mut stream in listener.incoming().flatten() {
                if let Some(answer) = answer {
                    // A client that is gone has had its answer.
                    let _ = stream.write_all(answer);
                } else {
                    kept.push(stream);
                }
            }
        });
        let name = if answer.is_some() { "garbage" } else { "silent" };
        let agent = agent(name, "http/protobuf", &format!("http://127.0.0.1:{port}"));
        let before = Instant::now();
        traffic(name, 50, 200);
        assert!(before.elapsed() < Duration::from_secs(5));
        wait("the exchanges", || {
            let text = std::fs::read_to_string(&agent.file).unwrap_or_default();
            text.lines()
                .filter(|l| {
                    l.contains(&format!("\"/{name}/")) && l.contains(&format!("\"side\":\"{}\"", Side::Server.name()))
                })
                .count()
                == 50
        });
        wait("a counted failure", || agent.snapshot().is_some_and(|s| s.totals.exports_failed > 0));
        agent.stop();
    }
}

/// A scan becomes a log event, over both protocols; the collector may be away when it happens.
#[test]
fn a_finding_is_a_log_event() {
    for protocol in ["grpc", "http/protobuf"] {
        let (grpc, http) = (free_port(), free_port());
        let (port, received) = sink();
        let endpoint = format!("http://127.0.0.1:{}", if protocol == "grpc" { grpc } else { http });
        let name = format!("finding-{}", protocol.replace('/', "-"));
        let agent = agent(&name, protocol, &endpoint);
        let steps: Vec<Step> = (0..90)
            .flat_map(|i| {
                let word = format!("{}{}", (b'a' + i % 26) as char, (b'a' + i / 26) as char).repeat(4);
                [
                    Step::client(format!(
                        "GET /{word} HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer canary-{i}\r\n\r\n"
                    )),
                    Step::server("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
                ]
            })
            .collect();
        // From an address of its own: the tests beside send from 127.0.0.1, and a scanner is judged by its share.
        play("[::1]:0", &steps);
        std::thread::sleep(Duration::from_secs(1));
        let _collector = collector(grpc, http, port);
        let found = || {
            let received = received.lock().expect("not poisoned");
            let all = received.iter().flat_map(|e| list(e, &["resourceLogs", "scopeLogs", "logRecords"]));
            all.filter(|r| r["eventName"] == "apiscope.finding").cloned().collect::<Vec<Value>>()
        };
        let is_scan = |r: &Value| attribute(r, "security_rule.uuid").is_some_and(|u| u == "D14");
        wait("a finding", || found().iter().any(is_scan));
        let finding = found().into_iter().find(is_scan).expect("it came");
        assert_eq!(finding["severityNumber"], 13, "{finding}");
        assert!(finding["body"]["stringValue"].as_str().is_some_and(|b| b.contains("different paths")), "{finding}");
        assert_eq!(attribute(&finding, "apiscope.finding.state").and_then(Value::as_str), Some("open"));
        assert!(attribute(&finding, "apiscope.finding.observed").is_some(), "{finding}");
        assert!(!finding.to_string().contains("canary"));
        assert!(agent.snapshot().is_some_and(|s| s.findings.iter().any(|f| f.rule == "D14")));
        agent.stop();
    }
}

/// Names that turn out to be values: the rename is an event, endpoints are, and no request is counted twice, whatever
/// name it came under.
#[test]
fn a_renamed_route_is_an_event_and_counted_once() {
    const REQUESTS: u64 = 300;
    let (grpc, http) = (free_port(), free_port());
    let (port, received) = sink();
    let _collector = collector(grpc, http, port);
    // Both ends are this process: values that come to one service twice each would look like words.
    let agent = agent_with("renamed", "grpc", &format!("http://127.0.0.1:{grpc}"), &["--side", "server"]);
    let mut steps = Vec::new();
    for i in 0..REQUESTS {
        let name: String =
            format!("{:x}", i.wrapping_mul(0x9e37_79b9)).chars().map(|c| (b'a' + c as u8 % 26) as char).collect();
        steps.push(Step::client(format!(
            "GET /renamed/{name}/orders HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer canary-{}\r\n\r\n",
            i % 60
        )));
        steps.push(Step::server(format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}",
            10 + i % 60,
            "x".repeat(10 + i as usize % 60)
        )));
    }
    play("127.0.0.1:0", &steps);
    let events = |name: &str| -> Vec<Value> {
        let received = received.lock().expect("not poisoned");
        let all = received.iter().flat_map(|e| list(e, &["resourceLogs", "scopeLogs", "logRecords"]));
        let ours = |r: &Value| attribute(r, "http.route").is_some_and(|r| r == "/renamed/{id}/orders");
        all.filter(|r| r["eventName"] == name && ours(r)).cloned().collect()
    };
    wait("the rename", || !events("apiscope.route.merged").is_empty());
    let event = &events("apiscope.route.merged")[0];
    let before = attribute(event, "apiscope.route.previous").and_then(Value::as_str).expect("the old name");
    assert!(before.starts_with("/renamed/") && before.ends_with("/orders") && !before.contains('{'), "{event}");
    // The list is looked at once a minute; sooner the first time, which may have been before.
    wait_within(Duration::from_secs(90), "the endpoint", || !events("apiscope.endpoint.discovered").is_empty());
    // What the newest export says of all names together.
    let sum = || counted(&received, |r| r.starts_with("/renamed/"));
    wait("every request", || sum() >= REQUESTS);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(sum(), REQUESTS, "of all names together");
    let snapshot = agent.snapshot().expect("the agent answers");
    let routes: Vec<_> = snapshot.endpoints.iter().map(|e| &*e.route).filter(|r| r.starts_with("/renamed/")).collect();
    assert_eq!(routes, ["/renamed/{id}/orders"], "one endpoint");
    agent.stop();
}
