//! Real servers and clients, and the agent's own life: readiness, signals, refusals.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use apiscope::exchange::Side;
use apiscope_tests::{Agent, Want, free_port, process::Guard, program, ready};

fn wait_for(port: u16) {
    let end = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "nothing listens at {port}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn nginx(name: &str, location: &str) -> (Guard, u16, std::path::PathBuf) {
    let port = free_port();
    let folder = std::env::temp_dir().join(format!("apiscope-nginx-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let f = folder.display();
    let text = format!(
        "daemon off; worker_processes 1; pid {f}/pid; error_log {f}/error.log; user root; events {{ worker_connections 2048; }}
        http {{ access_log off; client_body_temp_path {f}/b; proxy_temp_path {f}/p; fastcgi_temp_path {f}/f; uwsgi_temp_path {f}/u;
        scgi_temp_path {f}/s; keepalive_requests 10000000; server {{ listen 127.0.0.1:{port}; {location} }} }}"
    );
    std::fs::write(folder.join("nginx.conf"), text).expect("writable");
    // One process: killing it must end it all.
    let child = Command::new(program("nginx"))
        .args(["-g", "master_process off;", "-p"])
        .arg(&folder)
        .arg("-c")
        .arg(folder.join("nginx.conf"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nginx starts");
    wait_for(port);
    (Guard(child), port, folder)
}

fn script(interpreter: &str, code: &str) -> Guard {
    let mut child = Command::new(program(interpreter))
        .args([if interpreter == "node" { "-e" } else { "-c" }, code])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    ready(&mut child);
    Guard(child)
}

fn curl(url: &str) {
    Agent::shared();
    let status = Command::new(program("curl")).args(["-sf", "-o", "/dev/null", url]).status().expect("curl starts");
    assert!(status.success(), "curl {url}: {status}");
}

#[test]
fn nginx_and_curl_with_sendfile() {
    let folder = std::env::temp_dir().join(format!("apiscope-files-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let location =
        format!("location /files/ {{ alias {}/; sendfile on; }} location / {{ return 200 ok; }}", folder.display());
    let (_server, port, _) = nginx("files", &location);
    let mut wanted = Vec::new();
    for size in [0_usize, 1, 100_000, 5_000_000] {
        std::fs::write(folder.join(format!("f{size}")), vec![0; size]).expect("writable");
        curl(&format!("http://127.0.0.1:{port}/files/f{size}"));
        wanted.push(Want::any("GET", format!("/files/f{size}"), 200).bodies(0, size));
    }
    curl(&format!("http://127.0.0.1:{port}/c/[0-49]"));
    wanted.extend((0..50).map(|i| Want::any("GET", format!("/c/{i}"), 200).bodies(0, 2)));
    Agent::shared().expect(&format!("127.0.0.1:{port}"), &wanted);
    std::fs::remove_dir_all(folder).expect("removable");
}

/// What was sent is what was counted, or counted as lost.
#[test]
fn wrk_at_full_speed() {
    let (_server, port, _) = nginx("wrk", "location / { return 200 ok; }");
    let agent = Agent::shared();
    let before = agent.lost();
    for connections in ["16", "256"] {
        let out = Command::new(program("wrk"))
            .args(["-t1", "-d2s", "-c", connections, &format!("http://127.0.0.1:{port}/w")])
            .output()
            .expect("wrk starts");
        assert!(out.status.success());
    }
    std::thread::sleep(Duration::from_secs(1));
    let server = format!("127.0.0.1:{port}");
    let (served, sent) =
        (agent.seen(&server, Side::Server).len() as u64, agent.seen(&server, Side::Client).len() as u64);
    let lost = agent.lost() - before;
    assert!(served > 1000, "wrk sent only {served}");
    // A load tool ends with requests in flight: at most one for each connection is seen at one end only.
    assert!(served.abs_diff(sent) <= 272 + lost, "{served} served, {sent} sent, {lost} counted as lost");
}

#[test]
fn python_threads_and_asyncio() {
    for kind in ["threads", "asyncio"] {
        let port = free_port();
        let code = if kind == "threads" {
            format!(
                "import http.server as h
class H(h.BaseHTTPRequestHandler):
    protocol_version='HTTP/1.1'
    def do_GET(s): s.send_response(200); s.send_header('Content-Length','5'); s.end_headers(); s.wfile.write(b'hello')
    def log_message(s,*a): pass
s=h.ThreadingHTTPServer(('127.0.0.1',{port}),H); print('ready',flush=True); s.serve_forever()"
            )
        } else {
            format!(
                "import asyncio
async def t(r,w):
    try:
        while await r.readuntil(b'\\r\\n\\r\\n'):
            w.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello'); await w.drain()
    except (asyncio.IncompleteReadError, ConnectionError): w.close()
async def m():
    s=await asyncio.start_server(t,'127.0.0.1',{port}); print('ready',flush=True); await s.serve_forever()
asyncio.run(m())"
            )
        };
        let _server = script("python3", &code);
        curl(&format!("http://127.0.0.1:{port}/{kind}/[0-99]"));
        let wanted: Vec<_> = (0..100).map(|i| Want::any("GET", format!("/{kind}/{i}"), 200).bodies(0, 5)).collect();
        Agent::shared().expect(&format!("127.0.0.1:{port}"), &wanted);
    }
}

#[test]
fn node_server() {
    let port = free_port();
    let code = format!(
        "require('http').createServer((q,s)=>{{q.resume();q.on('end',()=>s.end('ok'))}}).listen({port},'127.0.0.1',()=>console.log('ready'))"
    );
    let _server = script("node", &code);
    curl(&format!("http://127.0.0.1:{port}/n/[0-99]"));
    let wanted: Vec<_> = (0..100).map(|i| Want::any("GET", format!("/n/{i}"), 200).bodies(0, 2)).collect();
    Agent::shared().expect(&format!("127.0.0.1:{port}"), &wanted);
}

#[test]
fn processes_that_live_shortly() {
    let (_server, port, _) = nginx("short", "location / { return 200 ok; }");
    for i in 0..50 {
        curl(&format!("http://127.0.0.1:{port}/p/{i}"));
    }
    let wanted: Vec<_> = (0..50).map(|i| Want::any("GET", format!("/p/{i}"), 200)).collect();
    Agent::shared().expect(&format!("127.0.0.1:{port}"), &wanted);
}

#[test]
fn a_service_is_named_by_its_environment() {
    let port = free_port();
    let code = format!(
        "import http.server as h; s=h.HTTPServer(('127.0.0.1',{port}),h.SimpleHTTPRequestHandler); print('ready',flush=True); s.serve_forever()"
    );
    let child = Command::new(program("python3"))
        .args(["-c", &code])
        .env("OTEL_SERVICE_NAME", "named-here")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("python starts");
    let _server = Guard(child);
    wait_for(port);
    curl(&format!("http://127.0.0.1:{port}/"));
    let server = format!("127.0.0.1:{port}");
    Agent::shared().expect_side(&server, Side::Server, &[Want::any("GET", "/", 200)]);
    assert_eq!(&*Agent::shared().seen(&server, Side::Server)[0].service, "named-here");
}

/// An agent of its own: sides, exclusion, a second agent, output and a clean end.
#[test]
fn the_life_of_an_agent() {
    let excluded = free_port();
    let agent = Agent::start("life", &["--side", "server", "--exclude-port", &excluded.to_string()]);
    let second = Command::new(&agent.binary)
        .args(["run", "--quiet", "--socket"])
        .arg(&agent.socket)
        .output()
        .expect("it starts");
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another agent"), "{second:?}");
    let traced = free_port();
    for port in [traced, excluded] {
        let code = format!(
            "import http.server as h; s=h.HTTPServer(('127.0.0.1',{port}),h.SimpleHTTPRequestHandler); print('ready',flush=True); s.serve_forever()"
        );
        let _server = script("python3", &code);
        curl(&format!("http://127.0.0.1:{port}/"));
    }
    agent.expect_side(&format!("127.0.0.1:{traced}"), Side::Server, &[Want::any("GET", "/", 200)]);
    agent.expect_side(&format!("127.0.0.1:{traced}"), Side::Client, &[]);
    agent.expect_side(&format!("127.0.0.1:{excluded}"), Side::Server, &[]);
    let top = Command::new(&agent.binary)
        .args(["top", "--once", "--json", "--socket"])
        .arg(&agent.socket)
        .output()
        .expect("it starts");
    assert!(top.status.success());
    let snapshot: serde_json::Value = serde_json::from_slice(&top.stdout).expect("JSON");
    assert_eq!(snapshot["losses"]["ring_full"], 0);
    let endpoints = snapshot["endpoints"].as_array().expect("a list");
    assert!(endpoints.iter().any(|e| e["route"] == "/" && e["side"] == "server"), "{snapshot}");
    let (binary, socket) = (agent.binary.clone(), agent.socket.clone());
    let file = agent.stop();
    assert!(file.exists() && !socket.exists());
    let away = Command::new(&binary).args(["top", "--once", "--socket"]).arg(&socket).output().expect("it starts");
    assert_eq!(away.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&away.stderr).contains("no agent answers"));
}

#[test]
fn a_replay_of_the_recording_and_of_an_access_log() {
    let binary = apiscope_tests::agent::binary();
    let folder = std::env::temp_dir().join(format!("apiscope-replay-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let log = folder.join("access.log");
    let mut file = std::fs::File::create(&log).expect("writable");
    for i in 0..100 {
        writeln!(file, "10.0.0.{i} - - [10/Oct/2023:13:55:36 +0000] \"GET /users/{i} HTTP/1.1\" 200 12 \"-\" \"x\"")
            .expect("writable");
    }
    writeln!(file, "garbage").expect("writable");
    drop(file);
    let routes = folder.join("routes.tsv");
    let run = |files: &[&Path]| {
        Command::new(&binary)
            .arg("replay")
            .args(files)
            .args(["--report", "json", "--routes"])
            .arg(&routes)
            .output()
            .expect("it starts")
    };
    let out = run(&[&log]);
    assert!(out.status.success(), "{out:?}");
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!((report["lines"].as_u64(), report["exchanges"].as_u64()), (Some(101), Some(100)));
    assert_eq!(report["endpoints"][0]["route"], "/users/{int}");
    let text = std::fs::read_to_string(&routes).expect("written");
    assert_eq!(text.lines().count(), 101);
    assert!(text.ends_with("/users/{int}\n-\n"));
    let missing = run(&[Path::new("/no/such/file")]);
    assert_eq!(missing.status.code(), Some(2));
    std::fs::remove_dir_all(folder).expect("removable");
}

#[test]
fn a_wrong_configuration_is_refused() {
    let binary = apiscope_tests::agent::binary();
    let file = std::env::temp_dir().join(format!("apiscope-config-{}.toml", std::process::id()));
    std::fs::write(&file, "[capture]\nsidse = \"both\"\n").expect("writable");
    let out = Command::new(&binary).args(["config", "check"]).arg(&file).output().expect("it starts");
    assert_eq!(out.status.code(), Some(2));
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("did you mean `sides`") && text.contains("line 2"), "{text}");
    let print = Command::new(&binary).args(["config", "print"]).output().expect("it starts");
    std::fs::write(&file, &print.stdout).expect("writable");
    assert!(Command::new(&binary).args(["config", "check"]).arg(&file).output().expect("it starts").status.success());
    std::fs::remove_file(file).expect("removable");
}
