//! The inventory as its users have it: of a running agent and of files, in every form. What is written for other tools
//! is read by these: OpenAPI and CycloneDX by public validators, the page by a headless browser.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use apiscope_tests::{Agent, Step, agent::binary, play, program};
use serde_json::Value;

const RQ: &str = "GET /inventory/7?page=2 HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer secret-canary-91\r\n\r\n";
const OPEN: &str = "GET /inventory/8 HTTP/1.1\r\nHost: t\r\n\r\n";
const RS: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 2\r\n\r\n{}";

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("apiscope-inventory-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).expect("writable");
    path
}

fn inventory(arguments: &[&str]) -> Output {
    Command::new(binary()).arg("inventory").args(arguments).output().expect("it runs")
}

fn text(arguments: &[&str]) -> String {
    let output = inventory(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A log with hostile paths, of `n` endpoints at least.
fn log(n: usize) -> String {
    let mut lines = String::new();
    for i in 0..n {
        let (user, path) = (if i % 3 == 0 { "-" } else { "anna" }, format!("/shop{}/part{i}/list", i % 40));
        let client = if i % 5 == 0 { "203.0.113.9" } else { "10.0.0.9" };
        lines +=
            &format!("{client} - {user} [26/Nov/2026:10:00:00 +0000] \"GET {path} HTTP/1.1\" 200 99 \"-\" \"c\"\n");
    }
    for path in
        ["/</script><script>document.title='owned'</script>", "/a%22b/{x}/{x}", "//evil.example/x", "/caf\u{e9}"]
    {
        lines += &format!("10.0.0.9 - - [26/Nov/2026:10:00:01 +0000] \"GET {path} HTTP/1.1\" 200 99 \"-\" \"c\"\n");
    }
    lines
}

/// Python with the validators.
fn validate(code: &str, file: &std::path::Path) {
    let python = std::env::var_os("APISCOPE_VALIDATORS").unwrap_or_else(|| "python3".into());
    let output = Command::new(python)
        .args(["-c", code])
        .arg(file)
        .output()
        .unwrap_or_else(|e| panic!("no Python with the validators ({e}): `cargo xtask setup test` makes one"));
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn of_a_running_agent_and_over_a_restart() {
    let folder = folder("restart");
    let (config, file) = (folder.join("c.toml"), folder.join("inventory.json"));
    std::fs::write(&config, format!("[inventory]\nfile = \"{}\"\n", file.display())).expect("writable");
    let config = config.display().to_string();
    let mut counts = Vec::new();
    for run in ["one", "two"] {
        let agent = Agent::start(&format!("inventory-{run}"), &["--config", &config, "--side", "server"]);
        play("127.0.0.1:0", &[Step::client(RQ), Step::server(RS), Step::client(OPEN), Step::server(RS)]);
        let socket = std::env::temp_dir()
            .join(format!("apiscope-test-{}-inventory-{run}/agent.sock", std::process::id()))
            .display()
            .to_string();
        let entry = || {
            let all: Value = serde_json::from_str(&text(&["--socket", &socket, "--format", "json"])).expect("JSON");
            let list = all["endpoints"].as_array().expect("a list").clone();
            list.into_iter().find(|e| e["route"] == "/inventory/{int}")
        };
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let wanted = 2 * (counts.len() as u64 + 1);
        let mut found = entry();
        while found.as_ref().is_none_or(|e| e["requests"] != wanted) && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(200));
            found = entry();
        }
        let entry = found.expect("it was seen");
        counts.push(entry["requests"].as_u64());
        assert_eq!(entry["facts"]["query_keys"][0], "page");
        assert_eq!(entry["facts"]["accepted"]["bearer"], entry["facts"]["accepted"]["none"]);
        assert!(entry["facts"]["media_types"]["application/json"].is_u64() && entry["life"] == "new", "{entry}");
        agent.stop();
        let kept = std::fs::read_to_string(&file).expect("kept");
        assert!(
            kept.contains("/inventory/{int}") && !kept.contains("canary") && !kept.contains("/inventory/7"),
            "{kept}"
        );
    }
    assert_eq!(counts, [Some(2), Some(4)], "what was before the restart is added");
    std::fs::remove_dir_all(folder).expect("removable");
}

#[test]
fn other_tools_read_what_is_written() {
    let folder = folder("tools");
    let (log_file, api, bom) = (folder.join("shop.log"), folder.join("api.json"), folder.join("bom.json"));
    std::fs::write(&log_file, log(60)).expect("writable");
    let from = log_file.display().to_string();
    std::fs::write(&api, text(&["--from", &from, "--format", "openapi"])).expect("writable");
    let code =
        "import json,sys,openapi_spec_validator as v; d=json.load(open(sys.argv[1])); v.validate(d); assert d['paths']";
    validate(code, &api);
    std::fs::write(&bom, text(&["--from", &from, "--format", "cyclonedx"])).expect("writable");
    let code = "import sys\nfrom cyclonedx.validation.json import JsonStrictValidator\nfrom cyclonedx.schema import SchemaVersion\n\
        e=JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())\nsys.exit(str(e) if e else 0)";
    validate(code, &bom);
    std::fs::remove_dir_all(folder).expect("removable");
}

#[test]
fn a_browser_shows_ten_thousand_endpoints_and_runs_nothing_of_theirs() {
    let folder = folder("page");
    let (list, page) = (folder.join("list.json"), folder.join("page.html"));
    // Beyond limits.endpoints they would not be told apart: the list is made of entries.
    let mut entries: Vec<Value> = (0..10_000)
        .map(|i| {
            serde_json::json!({ "service": format!("service-{}", i % 30), "side": "server", "method": "GET",
                "route": format!("/v1/r{i}/{{int}}"), "requests": i + 1, "first_seen": 1, "last_seen": 2,
                "facts": { "accepted": { "none": 1 }, "reach": { "internet": 1 }, "latency": [0, i, 5, 1] } })
        })
        .collect();
    entries.push(serde_json::json!({ "service": "<img src=x onerror=\"document.title='owned'\">", "side": "server",
        "method": "GET", "route": "/</script><script>document.title='owned'</script>", "requests": 99_999_999,
        "first_seen": 1, "last_seen": 2 }));
    let all = serde_json::json!({ "apiscope_inventory": 1, "made": 3, "endpoints": entries });
    std::fs::write(&list, all.to_string()).expect("writable");
    std::fs::write(&page, text(&["--from", &list.display().to_string(), "--format", "html"])).expect("writable");
    let begun = std::time::Instant::now();
    let output = Command::new(program("chromium"))
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", folder.join("profile").display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .expect("chromium runs");
    let dom = String::from_utf8_lossy(&output.stdout);
    assert!(dom.contains("<title>API inventory</title>") && !dom.contains("<img"), "something of the traffic ran");
    assert!(dom.contains("10,001 endpoints") && dom.contains("9,801 more"), "{dom:.2000}");
    assert_eq!(dom.matches("class=\"row\"").count(), 200, "as many rows as fit a look, the rest on demand");
    assert!(dom.contains("service-29"), "the map or the choice of services");
    eprintln!(
        "10,001 endpoints shown in {:?}, {} bytes of page",
        begun.elapsed(),
        page.metadata().expect("there").len()
    );
    std::fs::remove_dir_all(folder).expect("removable");
}

#[test]
fn exit_codes_of_diff() {
    let folder = folder("diff");
    let (log_file, document) = (folder.join("shop.log"), folder.join("shop.yaml"));
    std::fs::write(&log_file, "10.0.0.9 - - [26/Nov/2026:10:00:01 +0000] \"GET /known HTTP/1.1\" 200 9 \"-\" \"c\"\n")
        .expect("writable");
    std::fs::write(&document, "openapi: 3.0.0\npaths: {/known: {get: {responses: {200: {description: a}}}}}\n")
        .expect("writable");
    let (log_file, document) = (log_file.display().to_string(), document.display().to_string());
    let code = |arguments: &[&str]| inventory(&[&["diff"], arguments].concat()).status.code();
    assert_eq!(code(&[&document, "--from", &log_file, "--fail-on", "shadow,unauthenticated"]), Some(0));
    std::fs::write(folder.join("empty.yaml"), "openapi: 3.0.0\npaths: {}\n").expect("writable");
    let empty = folder.join("empty.yaml").display().to_string();
    assert_eq!(code(&[&empty, "--from", &log_file, "--fail-on", "shadow"]), Some(1));
    assert_eq!(code(&[&empty, "--from", &log_file]), Some(0), "nothing was asked to fail");
    assert_eq!(code(&[&log_file, "--from", &log_file]), Some(2), "a log is no document");
    assert_eq!(code(&[&document, "--from", &log_file, "--fail-on", "nonsense"]), Some(2));
    std::fs::remove_dir_all(folder).expect("removable");
}
