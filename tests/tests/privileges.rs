//! Least privilege, proven: with the chart's four capabilities the agent works, and without any one of them
//! it lacks what the chart's README says that it lacks. Run through setpriv(1), under no_new_privs as in a
//! container without privilege escalation.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use apiscope_tests::{agent::binary, free_port, process::Guard, program, tls::certificate};
use serde_json::Value;

/// What the chart adds (helm/templates/daemonset.yaml).
const CAPABILITIES: [&str; 4] = ["bpf", "perfmon", "sys_ptrace", "dac_read_search"];
/// Someone who is not root: `nobody` of every distribution.
const NOBODY: &str = "65534";

/// Numbers of `capability.h`: setpriv may be older than the names.
fn number(name: &str) -> u8 {
    match name {
        "bpf" => 39,
        "perfmon" => 38,
        "sys_ptrace" => 19,
        "dac_read_search" => 2,
        other => panic!("{other} is not in the table"),
    }
}

fn restricted(capabilities: &[&str]) -> Command {
    let mut set = "-all".to_owned();
    for name in capabilities {
        set.push_str(&format!(",+cap_{}", number(name)));
    }
    let mut command = Command::new(program("setpriv"));
    command.args(["--no-new-privs", "--inh-caps=-all", "--bounding-set"]).arg(set);
    command.stdin(Stdio::null());
    command
}

/// A web server of another user, which names itself in its environment; with TLS by what is in `folder`.
fn server(folder: Option<&Path>) -> (Guard, u16) {
    const TLS: &str = "import http.server, ssl, sys
s = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain('cert.pem', 'key.pem')
s.socket = c.wrap_socket(s.socket, server_side=True); s.serve_forever()";
    let port = free_port();
    // The system's own: one in root's home is not for others.
    let system = PathBuf::from("/usr/bin/python3");
    let python = if system.exists() { system } else { program("python3") };
    let mut command = Command::new(program("setpriv"));
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(python);
    match folder {
        Some(folder) => command.args(["-c", TLS, &port.to_string()]).current_dir(folder),
        None => command.args(["-m", "http.server", &port.to_string(), "--bind", "127.0.0.1"]).current_dir("/"),
    };
    command
        .env("OTEL_SERVICE_NAME", "named-by-itself")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let server = Guard(command.spawn().expect("setpriv and python3"));
    let end = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "the web server does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    (server, port)
}

/// The server's end of one request as an agent with these capabilities saw it; an error where it does not start.
fn seen(capabilities: &[&str], scheme: &str, port: u16) -> Result<Value, String> {
    let name = format!("apiscope-privileges-{}-{scheme}-{}", std::process::id(), capabilities.join("-"));
    let folder = std::env::temp_dir().join(name);
    fs::create_dir_all(&folder).expect("a folder");
    let (file, socket): (PathBuf, PathBuf) = (folder.join("x.ndjson"), folder.join("agent.sock"));
    fs::write(folder.join("config.toml"), format!("[identity]\nkey_file = \"{}\"\n", folder.join("key").display()))
        .expect("written");
    let mut command = restricted(capabilities);
    command
        .arg(binary())
        .args(["run", "--quiet", "--side", "server", "--capture-path", "raw", "--exchanges"])
        .arg(&file);
    command.arg("--socket").arg(&socket).arg("--config").arg(folder.join("config.toml"));
    command.args(["--include-port", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut agent = Guard(command.spawn().expect("setpriv"));
    let end = Instant::now() + Duration::from_secs(60);
    while !apiscope::local::snapshot(&socket).is_ok_and(|s| s.ready) {
        if let Some(status) = agent.0.try_wait().expect("a child") {
            let mut text = String::new();
            if let Some(mut stderr) = agent.0.stderr.take() {
                std::io::Read::read_to_string(&mut stderr, &mut text).expect("readable");
            }
            fs::remove_dir_all(folder).expect("removable");
            return Err(format!("{status}: {text}"));
        }
        assert!(Instant::now() < end, "the agent neither comes up nor ends");
        std::thread::sleep(Duration::from_millis(50));
    }
    let asked = Command::new(program("curl"))
        .args(["-sk", "-o", "/dev/null"])
        .arg(format!("{scheme}://127.0.0.1:{port}/"))
        .status();
    assert!(asked.expect("curl").success());
    let end = Instant::now() + Duration::from_secs(10);
    let exchange = loop {
        let text = fs::read_to_string(&file).unwrap_or_default();
        if let Some(line) = text.lines().next() {
            break serde_json::from_str(line).expect("an exchange");
        }
        assert!(Instant::now() < end, "nothing was seen with {capabilities:?}");
        std::thread::sleep(Duration::from_millis(50));
    };
    drop(agent);
    fs::remove_dir_all(folder).expect("removable");
    Ok(exchange)
}

#[test]
fn four_capabilities_are_enough_and_each_is_needed() {
    let (_server, port) = server(None);
    let without = |name: &str| CAPABILITIES.iter().copied().filter(|c| *c != name).collect::<Vec<_>>();

    let whole = seen(&CAPABILITIES, "http", port).expect("four are enough");
    assert_eq!(whole["service"], "named-by-itself");
    assert!(whole["exe"].as_str().is_some_and(|e| e.contains("python3")), "{whole}");

    for name in ["bpf", "perfmon"] {
        let why = seen(&without(name), "http", port).expect_err("it must not start without");
        assert!(why.contains("CAP_BPF") || why.contains("privilege") || why.contains("permitted"), "{name}: {why}");
    }
    let blind = seen(&without("sys_ptrace"), "http", port).expect("it captures");
    assert!(blind["exe"].is_null(), "without SYS_PTRACE: {blind}");
    let deaf = seen(&without("dac_read_search"), "http", port).expect("it captures");
    assert!(deaf["service"] != "named-by-itself", "without DAC_READ_SEARCH: {deaf}");
    assert!(deaf["exe"].is_string(), "without DAC_READ_SEARCH: {deaf}");
}

#[test]
fn tls_is_read_without_sys_admin() {
    let folder = std::env::temp_dir().join(format!("apiscope-privileges-{}-tls", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    certificate(&folder);
    for file in ["cert.pem", "key.pem"] {
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        fs::set_permissions(folder.join(file), readable).expect("ours");
    }
    let (_server, port) = server(Some(&folder));
    let whole = seen(&CAPABILITIES, "https", port).expect("four are enough");
    assert_eq!((&whole["scheme"], &whole["attribution"]), (&"https".into(), &"nested".into()), "{whole}");
    assert_eq!((&whole["service"], &whole["status"]), (&"named-by-itself".into(), &200.into()), "{whole}");
    fs::remove_dir_all(folder).expect("removable");
}
