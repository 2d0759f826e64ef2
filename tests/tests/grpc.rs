//! gRPC by the libraries that people use: grpc-go, Python's grpcio, tonic. Every kind of call, its messages, sizes and
//! status, as the programs themselves say it.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use apiscope::{
    coverage::{Library, Reason},
    exchange::{Api, Attribution, End, Exchange, Side},
};
use apiscope_tests::{
    Agent, Want, free_port,
    process::{Folder, Guard, Process},
    program, python,
    rpc::{self, Called},
    tls::{certificate, wait_for},
};

/// Of one call: path, status, messages and bytes of content both ways.
type Shape = (String, Option<u32>, Option<[u64; 2]>, [Option<u64>; 2]);

fn wanted(calls: &[Called]) -> BTreeMap<Shape, usize> {
    let mut all = BTreeMap::new();
    for c in calls {
        let messages = Some([c.sent, c.got]);
        *all.entry((c.path.clone(), Some(c.status), messages, [Some(c.request), Some(c.answer)])).or_default() += 1;
    }
    all
}

fn seen(exchanges: &[Exchange]) -> BTreeMap<Shape, usize> {
    let mut all = BTreeMap::new();
    for x in exchanges {
        assert_eq!((x.api, x.method.as_str(), x.status, x.end), (Api::Grpc, "POST", 200, End::Complete), "{x:?}");
        let path = x.path.as_deref().unwrap_or_default().to_owned();
        let bodies = [x.request_body_bytes, x.response_body_bytes];
        *all.entry((path, x.grpc_status, x.messages, bodies)).or_default() += 1;
    }
    all
}

/// Waits until both ends saw so many, and holds them against what was called. Calls whose client gave up are not
/// held to an end: which of the two ends says it first is chance.
fn check(agent: &Agent, address: &str, calls: &[Called]) -> [Vec<Exchange>; 2] {
    let is_given_up = |path: &str| path.ends_with("/Wait");
    let (given_up, whole): (Vec<_>, Vec<_>) = calls.iter().cloned().partition(|c| is_given_up(&c.path));
    [Side::Server, Side::Client].map(|side| {
        let end = Instant::now() + Duration::from_secs(10);
        while agent.seen(address, side).len() < calls.len() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        let (waited, exchanges): (Vec<_>, Vec<_>) =
            agent.seen(address, side).into_iter().partition(|x| is_given_up(x.path.as_deref().unwrap_or_default()));
        assert_eq!(seen(&exchanges), wanted(&whole), "{side}");
        assert_eq!(waited.len(), given_up.len(), "{side}");
        for x in waited {
            let is_right = match x.end {
                // CANCEL; Envoy says INTERNAL_ERROR for it to what is behind.
                End::Reset => matches!(x.stream_error, Some(2 | 8)),
                _ => x.grpc_status == Some(4),
            };
            assert!(is_right && x.messages == Some([1, 0]) && x.duration_ns > 250_000_000, "{side} {x:?}");
        }
        exchanges
    })
}

/// What `cargo xtask setup test` makes of `tests/programs/grpc`.
fn grpc_go() -> PathBuf {
    let path = std::env::var_os("APISCOPE_GRPC_GO").map(PathBuf::from).filter(|p| p.is_file());
    path.expect("grpc-go's program is not there: `cargo xtask test` builds it with Go and names it in APISCOPE_GRPC_GO")
}

fn go_server(name: &str, tls: bool) -> Process {
    Process::ready(name, |folder, port| {
        let mut command = Command::new(grpc_go());
        command.args(["serve", &port.to_string()]);
        if tls {
            certificate(folder);
            command.args(["cert.pem", "key.pem"]);
        }
        command
    })
}

fn go_calls(server: &Process, tls: bool) -> Vec<Called> {
    let port = server.port.to_string();
    let out = server.client(
        &grpc_go().display().to_string(),
        [&["call", &port][..], if tls { &["cert.pem"] } else { &[] }].concat(),
    );
    said(&out)
}

/// What a client prints: a line of JSON for each call.
fn said(out: &Output) -> Vec<Called> {
    let lines = std::str::from_utf8(&out.stdout).expect("JSON");
    lines.lines().map(|line| serde_json::from_str(line).expect("a call")).collect()
}

#[test]
fn grpc_go_in_plaintext() {
    let agent = Agent::shared();
    let server = go_server("grpc-go", false);
    let calls = go_calls(&server, false);
    assert_eq!(calls.len(), 1 + 8 * 31 + 2);
    check(agent, &server.address(), &calls);
}

#[test]
fn grpc_go_inside_tls() {
    let agent = Agent::shared();
    // The agent finds a program that is new to it within seconds: these calls may be missed.
    let first = go_server("grpc-go-known", true);
    let end = Instant::now() + Duration::from_secs(30);
    while [Side::Server, Side::Client].iter().any(|side| agent.seen(&first.address(), *side).is_empty()) {
        assert!(Instant::now() < end, "the agent does not read grpc-go inside TLS");
        go_calls(&first, true);
    }
    let server = go_server("grpc-go-tls", true);
    let calls = go_calls(&server, true);
    let ends = check(agent, &server.address(), &calls);
    assert!(ends.iter().flatten().all(|x| x.attribution == Attribution::Nested && x.tls_version.is_some()));
}

/// Plaintext and inside TLS, which tonic has from rustls.
#[test]
fn tonic() {
    let agent = Agent::shared();
    let (address, calls) = rpc::tonic(None);
    check(agent, &address, &calls);

    let folder = Folder::new("tonic");
    certificate(&folder);
    let (address, calls) = rpc::tonic(Some(&folder));
    let ends = check(agent, &address, &calls);
    let is_right = |x: &Exchange| x.attribution == Attribution::Ciphertext && x.tls_version.is_some();
    assert!(ends.iter().flatten().all(is_right), "found by ciphertext, with its version");
}

/// Every kind of call; one that lasts is seen while it lasts, with its messages so far.
#[test]
fn grpcio() {
    let agent = Agent::shared();
    let port = free_port();
    let code = format!(
        "import sys, threading, grpc
from concurrent import futures
go = threading.Event()
def fail(r, c): c.abort(grpc.StatusCode.NOT_FOUND, 'no')
def stream(r, c):
    for _ in range(3): yield b'm' * 100
def slow(r, c):
    yield b'first'
    go.wait()
    yield b'x' * 100000
H = {{
  'Unary': grpc.unary_unary_rpc_method_handler(lambda r, c: r),
  'Fail': grpc.unary_unary_rpc_method_handler(fail),
  'Stream': grpc.unary_stream_rpc_method_handler(stream),
  'Slow': grpc.unary_stream_rpc_method_handler(slow),
  'Collect': grpc.stream_unary_rpc_method_handler(lambda it, c: b''.join(it)),
  'Both': grpc.stream_stream_rpc_method_handler(lambda it, c: (m for m in it)),
}}
s = grpc.server(futures.ThreadPoolExecutor(8))
s.add_generic_rpc_handlers((grpc.method_handlers_generic_handler('t.Echo', H),))
s.add_insecure_port('127.0.0.1:{port}')
s.start()
with grpc.insecure_channel('127.0.0.1:{port}') as ch:
    u = ch.unary_unary('/t.Echo/Unary')
    for f in [u.future(b'x' * i) for i in range(50)]: f.result()
    try: ch.unary_unary('/t.Echo/Fail')(b'')
    except grpc.RpcError: pass
    list(ch.unary_stream('/t.Echo/Stream')(b''))
    ch.stream_unary('/t.Echo/Collect')(iter([b'a' * 30000] * 7))
    list(ch.stream_stream('/t.Echo/Both')(iter([b'b'] * 4)))
    it = ch.unary_stream('/t.Echo/Slow')(b'')
    next(it)
    print('slow', flush=True)
    sys.stdin.readline()
    go.set()
    list(it)
print('done', flush=True)"
    );
    let mut child = Command::new(python("grpc"))
        .args(["-c", &code])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped"));
    let mut input = child.stdin.take().expect("piped");
    let _child = Guard(child);
    let mut line = String::new();
    lines.read_line(&mut line).expect("a line");
    assert_eq!(line.trim(), "slow");
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        // A busy machine may take longer than the agent waits for a snapshot.
        let snapshot = agent.snapshot().unwrap_or_default();
        let slow: Vec<_> = snapshot.live.iter().filter(|l| l.route == "/t.Echo/Slow").collect();
        if slow.len() == 2 {
            assert!(slow.iter().all(|l| l.api == "grpc" && l.request_messages == 1 && l.response_messages == 1));
            assert!(snapshot.lasting["grpc"] >= 2);
            break;
        }
        assert!(Instant::now() < end, "the call is not seen while it lasts: {:?}", snapshot.live);
        std::thread::sleep(Duration::from_millis(200));
    }
    std::io::Write::write_all(&mut input, b"go\n").expect("it reads");
    line.clear();
    lines.read_line(&mut line).expect("a line");
    let server = format!("127.0.0.1:{port}");
    let call = |method: &str| Want::any("POST", format!("/t.Echo/{method}"), 200);
    let mut wanted = vec![call("Unary"); 50];
    wanted.extend(["Fail", "Stream", "Collect", "Both", "Slow"].map(call));
    agent.expect(&server, &wanted);
    for side in [Side::Server, Side::Client] {
        let seen = agent.seen(&server, side);
        let of = |method: &str| {
            let path = format!("/t.Echo/{method}");
            seen.iter().find(|e| e.path.as_deref() == Some(&*path)).map(|e| (e.api, e.grpc_status, e.messages))
        };
        assert_eq!(of("Unary"), Some((Api::Grpc, Some(0), Some([1, 1]))));
        assert_eq!(of("Fail"), Some((Api::Grpc, Some(5), Some([1, 0]))));
        assert_eq!(of("Stream"), Some((Api::Grpc, Some(0), Some([1, 3]))));
        assert_eq!(of("Collect"), Some((Api::Grpc, Some(0), Some([7, 1]))));
        assert_eq!(of("Both"), Some((Api::Grpc, Some(0), Some([4, 4]))));
        assert_eq!(of("Slow"), Some((Api::Grpc, Some(0), Some([1, 2]))));
        assert!(seen.iter().any(|e| e.path.as_deref() == Some("/t.Echo/Slow") && e.duration_ns > 1_000_000_000));
    }
}

/// What `cargo xtask test --long` fetched and named in this variable.
fn fetched(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from).filter(|p| p.exists());
    path.unwrap_or_else(|| {
        panic!("{variable} names nothing: `cargo xtask test --long` fetches it and says why it cannot")
    })
}

#[test]
#[ignore = "fetches gRPC for Java"]
fn grpc_java() {
    let agent = Agent::shared();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/grpc-java/Echo.java");
    let java = |what: &str, port: u16| {
        let mut command = Command::new(program("java"));
        command.arg("-cp").arg(fetched("APISCOPE_GRPC_JAVA").join("*")).args([source, what, &port.to_string()]);
        command
    };
    let server = Process::ready("grpc-java", |_, port| java("serve", port));
    let out = java("call", server.port).stdin(Stdio::null()).output().expect("java starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let calls = said(&out);
    assert_eq!(calls.len(), 1 + 8 * 29);
    check(agent, &server.address(), &calls);
}

/// grpc-go through Envoy: each call four times, at both ends of both connections. Envoy's BoringSSL is stripped: what
/// comes to it in TLS is counted as not read, with the library and the reason, and its other side is seen all the same.
#[test]
#[ignore = "fetches Envoy"]
fn envoy() {
    let agent = Agent::shared();
    let behind = go_server("grpc-go-behind-envoy", false);
    let (plain, tls) = (free_port(), free_port());
    let envoy = Process::spawn("envoy", |folder, _| {
        certificate(folder);
        std::fs::write(folder.join("envoy.yaml"), envoy_config(plain, tls, behind.port)).expect("writable");
        let mut command = Command::new(fetched("APISCOPE_ENVOY"));
        command.args(["-c", "envoy.yaml", "--concurrency", "2", "--use-dynamic-base-id", "-l", "error"]);
        command
    });
    wait_for(plain);
    let through = |arguments: &[&str]| said(&envoy.client(&grpc_go().display().to_string(), arguments));
    let calls = through(&["call", &plain.to_string()]);
    assert_eq!(calls.len(), 1 + 8 * 31 + 2);
    check(agent, &format!("127.0.0.1:{plain}"), &calls);
    check(agent, &behind.address(), &calls);

    let more = through(&["call", &tls.to_string(), "cert.pem"]);
    check(agent, &behind.address(), &[calls, more].concat());
    assert!(agent.seen(&format!("127.0.0.1:{tls}"), Side::Server).is_empty(), "it is not read, and nothing is guessed");
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let snapshot = agent.snapshot().unwrap_or_default();
        let own = snapshot.tls_coverage.processes.into_iter().find(|p| p.pid == envoy.child.id());
        if let Some(own) = own.as_ref().filter(|own| own.connections.unread > 0 && !own.libraries.is_empty()) {
            let found = own.libraries.iter().map(|f| (f.library, f.reason)).collect::<Vec<_>>();
            assert_eq!(found, [(Library::Boringssl, Some(Reason::Stripped))], "{own:?}");
            return;
        }
        assert!(Instant::now() < end, "its TLS is not counted: {own:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A listener in plaintext and one with TLS; both go on to `behind` by HTTP/2.
fn envoy_config(plain: u16, tls: u16, behind: u16) -> String {
    const TYPE: &str = "type.googleapis.com/envoy.extensions";
    let manager = format!(
        r#"{{"name": "manager", "typed_config": {{
  "@type": "{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
  "stat_prefix": "all", "codec_type": "AUTO",
  "http_filters": [{{"name": "router", "typed_config": {{"@type": "{TYPE}.filters.http.router.v3.Router"}}}}],
  "route_config": {{"virtual_hosts": [{{"name": "all", "domains": ["*"],
    "routes": [{{"match": {{"prefix": "/"}}, "route": {{"cluster": "behind", "timeout": "0s"}}}}]}}]}}}}}}"#
    );
    let security = format!(
        r#"{{"name": "tls", "typed_config": {{
  "@type": "{TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
  "common_tls_context": {{"alpn_protocols": ["h2", "http/1.1"], "tls_certificates":
    [{{"certificate_chain": {{"filename": "cert.pem"}}, "private_key": {{"filename": "key.pem"}}}}]}}}}}}"#
    );
    let at = |port: u16| format!(r#"{{"socket_address": {{"address": "127.0.0.1", "port_value": {port}}}}}"#);
    format!(
        r#"{{"static_resources": {{
"listeners": [
  {{"address": {}, "filter_chains": [{{"filters": [{manager}]}}]}},
  {{"address": {}, "filter_chains": [{{"filters": [{manager}], "transport_socket": {security}}}]}}],
"clusters": [{{"name": "behind", "type": "STATIC",
  "typed_extension_protocol_options": {{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {{
    "@type": "{TYPE}.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {{"http2_protocol_options": {{}}}}}}}},
  "load_assignment": {{"cluster_name": "behind",
    "endpoints": [{{"lb_endpoints": [{{"endpoint": {{"address": {}}}}}]}}]}}}}]}}}}"#,
        at(plain),
        at(tls),
        at(behind)
    )
}
