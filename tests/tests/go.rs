//! HTTPS by Go's `crypto/tls`, of which nothing is exported: static, stripped, position-independent, with cgo; server
//! and client, HTTP/1.1 and HTTP/2. The program is `tests/programs/tls.go`, built once with the machine's Go (what
//! it makes is kept in `target/tmp`).

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use apiscope::{
    coverage::Library,
    exchange::{Attribution, End, Exchange, Peer, Protocol, Scheme, Side},
};
use apiscope_tests::{Agent, Want, free_port, program, ready};

/// How a program is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Static,
    Stripped,
    Pie,
    Cgo,
}

/// Time until the agent's probes are in a program that was not there before.
const PROBED: Duration = Duration::from_secs(30);

/// A program that the agent knows already: its second process is seen from its first byte.
fn built(agent: &Agent, kind: Kind) -> PathBuf {
    static READY: Mutex<Vec<(Kind, PathBuf)>> = Mutex::new(Vec::new());
    let mut ready = READY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, path)) = ready.iter().find(|(k, _)| *k == kind) {
        return path.clone();
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go");
    let path = folder.join(format!("tls-{kind:?}"));
    let mut build = Command::new(program("go"));
    build.args(["build", "-trimpath", "-o"]).arg(&path);
    match kind {
        Kind::Static | Kind::Cgo => {}
        Kind::Stripped => _ = build.arg("-ldflags=-s -w -buildid="),
        Kind::Pie => _ = build.args(["-buildmode=pie", "-ldflags=-s -w"]),
    }
    let done = build
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/programs/tls.go"))
        .env("CGO_ENABLED", if kind == Kind::Cgo { "1" } else { "0" })
        .envs([("GO111MODULE", "off"), ("GOENV", "off"), ("GOFLAGS", ""), ("GOTOOLCHAIN", "local")])
        .env("GOCACHE", folder.join("cache"))
        .env("GOPATH", folder.join("path"))
        .output()
        .expect("go starts");
    assert!(done.status.success(), "go build: {}", String::from_utf8_lossy(&done.stderr));
    let server = Server::start(&path);
    let address = server.address();
    let end = Instant::now() + PROBED;
    while agent.seen(&address, Side::Server).is_empty() || agent.seen(&address, Side::Client).is_empty() {
        assert!(Instant::now() < end, "the agent does not read {}", path.display());
        server.client(&["keepalive", "known", "1"]);
        std::thread::sleep(Duration::from_millis(200));
    }
    ready.push((kind, path.clone()));
    path
}

/// A server that ends with its test.
struct Server {
    child: Child,
    program: PathBuf,
    certificate: PathBuf,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.certificate);
    }
}

impl Server {
    fn start(path: &Path) -> Self {
        Self::start_as(path, "serve")
    }

    fn start_as(path: &Path, what: &str) -> Self {
        Self::start_with(path, what, &[])
    }

    fn start_with(path: &Path, what: &str, more: &[String]) -> Self {
        let port = free_port();
        let certificate = std::env::temp_dir().join(format!("apiscope-go-{}-{port}.pem", std::process::id()));
        let mut child = Command::new(path)
            .args([what, &port.to_string()])
            .arg(&certificate)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        ready(&mut child);
        Self { child, program: path.to_owned(), certificate, port }
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn client(&self, what: &[&str]) {
        let done = Command::new(&self.program).args(["client", &self.port.to_string()]).args(what).status();
        assert!(done.is_ok_and(|s| s.success()), "the client gets the right answers");
    }

    fn curl(&self, arguments: &[&str], paths: &[String]) {
        let done = Command::new(program("curl"))
            .args(["-sf", "--cacert"])
            .arg(&self.certificate)
            .args(arguments)
            .args(paths.iter().map(|p| format!("https://127.0.0.1:{}{p}", self.port)))
            .stdout(Stdio::null())
            // It shows a meter of parallel transfers there, silent or not.
            .stderr(Stdio::null())
            .status();
        assert!(done.is_ok_and(|s| s.success()), "curl gets its answers");
    }
}

/// Both ends saw what was sent, no more and no less, on the right sockets.
fn check(agent: &Agent, server: &Server, protocol: Protocol, wanted: &[Want]) {
    let address = server.address();
    agent.expect(&address, wanted);
    for side in [Side::Server, Side::Client] {
        for x in agent.seen(&address, side) {
            let shape = (x.scheme, x.attribution, x.protocol);
            assert_eq!(shape, (Scheme::Https, Attribution::Nested, protocol), "{side} {:?}", x.path);
            assert!(x.tls_version.is_some(), "the version of TLS is known");
        }
    }
}

fn hello(path: impl Into<String>) -> Want {
    Want::any("GET", path, 200).bodies(0, 5)
}

fn keep_alive(kind: Kind) {
    let agent = Agent::shared();
    let server = Server::start(&built(agent, kind));
    server.client(&["keepalive", "go", "40"]);
    let paths: Vec<String> = (0..20).map(|i| format!("/curl/{i}")).collect();
    server.curl(&["--http1.1"], &paths);
    let wanted: Vec<Want> = (0..40).map(|i| format!("/go/{i}")).chain(paths).map(hello).collect();
    check(agent, &server, Protocol::Http11, &wanted);
}

#[test]
fn static_program() {
    keep_alive(Kind::Static);
}

#[test]
fn stripped_program() {
    keep_alive(Kind::Stripped);
}

#[test]
fn position_independent_program() {
    keep_alive(Kind::Pie);
}

#[test]
fn program_with_cgo() {
    keep_alive(Kind::Cgo);
}

#[test]
fn streams_side_by_side() {
    let agent = Agent::shared();
    let server = Server::start(&built(agent, Kind::Static));
    server.client(&["streams", "200"]);
    let paths: Vec<String> = (0..20).map(|i| format!("/curl/{i}")).collect();
    server.curl(&["--http2", "--parallel"], &paths);
    let streams = (0..200).map(|s| match s % 8 {
        0 => Want::any("GET", format!("/large/100000/{s}"), 200).bodies(0, 100_000),
        _ => hello(format!("/stream/{s}")),
    });
    let wanted: Vec<Want> = [hello("/first")].into_iter().chain(streams).chain(paths.into_iter().map(hello)).collect();
    check(agent, &server, Protocol::Http2, &wanted);
}

#[test]
fn two_hundred_sessions_and_no_wrong_socket() {
    const SESSIONS: usize = 200;
    const REQUESTS: usize = 10;
    let agent = Agent::shared();
    let server = Server::start(&built(agent, Kind::Stripped));
    server.client(&["sessions", &SESSIONS.to_string(), &REQUESTS.to_string()]);
    let (address, all) = (server.address(), SESSIONS * (REQUESTS + 1));
    let ends = [Side::Server, Side::Client].map(|side| {
        let end = Instant::now() + Duration::from_secs(10);
        while agent.seen(&address, side).len() < all && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        let seen = agent.seen(&address, side);
        assert_eq!(seen.len(), all, "{side}");
        let mut requests = BTreeMap::new();
        for x in &seen {
            assert_eq!((x.attribution, x.end, x.response_body_bytes), (Attribution::Nested, End::Complete, Some(5)));
            let Peer::Ip(client) = &x.client else { panic!("{side}: a client without an address") };
            requests.insert((x.path.clone(), client.port()), x.ts);
        }
        requests
    });
    let [served, asked] = &ends;
    assert_eq!(served.keys().collect::<Vec<_>>(), asked.keys().collect::<Vec<_>>(), "the ends' sockets");
    // The client names its port in the path, before it knows whether its connection is still there.
    let renewed = served.keys().filter(|(path, port)| {
        let named = path.as_deref().and_then(|p| p.strip_prefix("/p/")?.split('/').next());
        named.is_some_and(|named| named != port.to_string())
    });
    assert!(renewed.count() <= SESSIONS / 50, "the wrong socket: {served:?}");
    for (request, ts) in served {
        assert!(asked[request] <= *ts, "{request:?} was served before it was asked for");
    }
}

/// Both ends of it in one process, each on sockets of its own.
#[test]
fn a_proxy_in_between() {
    let agent = Agent::shared();
    let path = built(agent, Kind::Static);
    let server = Server::start(&path);
    let proxy = Server::start_with(&path, "proxy", &[server.port.to_string()]);
    proxy.client(&["sessions", "40", "5"]);
    for (place, ends) in [(&proxy, [&proxy, &proxy]), (&server, [&server, &proxy])] {
        let address = place.address();
        let end = Instant::now() + Duration::from_secs(10);
        for side in [Side::Server, Side::Client] {
            while agent.seen(&address, side).len() < 240 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        let served = agent.seen(&address, Side::Server);
        let asked = agent.seen(&address, Side::Client);
        assert_eq!((served.len(), asked.len()), (240, 240), "{address}");
        // What one end says of a path and its socket is what the other end says.
        let pairs = |seen: &[Exchange]| {
            let mut pairs: Vec<String> = seen.iter().map(|x| format!("{:?} {:?}", x.path, x.client)).collect();
            pairs.sort();
            pairs
        };
        assert_eq!(pairs(&served), pairs(&asked), "{address}");
        assert!(served.iter().all(|x| x.pid == ends[0].child.id() && x.attribution == Attribution::Nested));
        if place.port == server.port {
            assert!(asked.iter().all(|x| x.pid == ends[1].child.id() && x.attribution == Attribution::Nested));
        }
    }
}

#[test]
fn sessions_that_are_resumed() {
    let agent = Agent::shared();
    let server = Server::start(&built(agent, Kind::Stripped));
    server.client(&["resumed", "10"]);
    let paths = (0..20).map(|i| hello(format!("/resumed/{}/{}", 2 + i / 10, i % 10)));
    check(agent, &server, Protocol::Http11, &paths.collect::<Vec<_>>());
    for side in [Side::Server, Side::Client] {
        for x in agent.seen(&server.address(), side) {
            let wanted = if x.path.as_deref().is_some_and(|p| p.starts_with("/resumed/2")) { "1.2" } else { "1.3" };
            assert_eq!(x.tls_version.map(|v| v.to_string()).as_deref(), Some(wanted), "{side} {:?}", x.path);
        }
    }
}

#[test]
fn large_bodies() {
    let agent = Agent::shared();
    let server = Server::start(&built(agent, Kind::Static));
    server.client(&["large"]);
    let wanted = [
        Want::any("POST", "/sum", 200).bodies(3 << 20, 64),
        Want::any("GET", "/large/5000000", 200).bodies(0, 5_000_000),
    ];
    check(agent, &server, Protocol::Http11, &wanted);
}

#[test]
fn a_body_that_ends_with_the_connection_and_one_that_is_cut_off() {
    let agent = Agent::shared();
    let server = Server::start(&built(agent, Kind::Static));
    server.client(&["until"]);
    server.client(&["early"]);
    let cut = Want { end: None, ..Want::any("GET", "/endless", 200) };
    let until = Want { end: None, ..Want::any("GET", "/until", 200).bodies(0, 13) };
    check(agent, &server, Protocol::Http11, &[until, cut]);
    for side in [Side::Server, Side::Client] {
        let seen = agent.seen(&server.address(), side);
        let cut = seen.iter().find(|x| x.path.as_deref() == Some("/endless")).expect("checked above");
        assert!(matches!(cut.end, End::Closed | End::Reset), "{side}: {:?}", cut.end);
        // The server closes without reading the client's own end: a reset, when that came before.
        let until = seen.iter().find(|x| x.path.as_deref() == Some("/until")).expect("checked above");
        let is_reset = side == Side::Server && until.end == End::Reset;
        assert!(until.end == End::Complete || is_reset, "{side}: {:?}", until.end);
    }
}

#[test]
fn a_connection_that_is_older_than_the_agent() {
    let path = built(Agent::shared(), Kind::Static);
    let server = Server::start(&path);
    // It asks for longer than any agent takes to come up.
    let mut client = Command::new(&path)
        .args(["client", &server.port.to_string(), "paced", "1000", "250"])
        .spawn()
        .expect("the client starts");
    std::thread::sleep(Duration::from_secs(1));
    let agent = Agent::start("go-late", &[]);
    std::thread::sleep(Duration::from_secs(4));
    client.kill().expect("it runs");
    client.wait().expect("a child");
    std::thread::sleep(Duration::from_secs(1));
    for side in [Side::Server, Side::Client] {
        // From the first that has its addresses on nothing is missing, and all have them.
        let seen = agent.seen(&server.address(), side);
        let number = |x: &Exchange| x.path.as_deref()?.strip_prefix("/paced/")?.parse::<usize>().ok();
        let numbers: Vec<usize> = seen.iter().filter_map(number).collect();
        assert!(numbers.len() > 4 && numbers.windows(2).all(|n| n[0] + 1 == n[1]), "{side}: {numbers:?}");
        assert!(seen.iter().all(|x| x.attribution == Attribution::Nested), "{side}: {seen:?}");
    }
    let _ = agent.stop();
}

#[test]
fn agents_that_come_and_are_killed_change_no_byte() {
    let path = built(Agent::shared(), Kind::Stripped);
    let server = Server::start(&path);
    let client = Command::new(&path)
        .args(["client", &server.port.to_string(), "checked", "30"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the client starts");
    for i in 0..3 {
        let mut agent = Agent::start(&format!("go-killed-{i}"), &[]);
        std::thread::sleep(Duration::from_secs(1));
        agent.child.kill().expect("it runs");
        agent.child.wait().expect("a child");
    }
    let done = client.wait_with_output().expect("a child");
    assert!(done.status.success(), "every answer was right");
    let count: u64 = String::from_utf8_lossy(&done.stdout).trim().parse().expect("a number");
    assert!(count > 1000, "only {count} requests");
}

/// The kernel keeps what it replaced by probes: in a file that was overwritten it would be another program's.
#[test]
fn an_executable_that_is_overwritten_in_place() {
    let agent = Agent::shared();
    let path = std::env::temp_dir().join(format!("apiscope-go-overwritten-{}", std::process::id()));
    for kind in [Kind::Static, Kind::Pie, Kind::Cgo, Kind::Static] {
        let content = fs::read(built(agent, kind)).expect("built");
        // Without a new file: the old one is cut off and written again.
        fs::write(&path, content).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("changed");
        // Twice: what was found in the first process is there for the second from its start.
        for _ in 0..2 {
            let server = Server::start(&path);
            let address = server.address();
            let end = Instant::now() + PROBED;
            while agent.seen(&address, Side::Server).is_empty() || agent.seen(&address, Side::Client).is_empty() {
                assert!(Instant::now() < end, "the agent does not read {kind:?} in the place of another");
                server.client(&["keepalive", "overwritten", "3"]);
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
    fs::remove_file(path).expect("removable");
}

#[test]
fn the_account_of_a_process() {
    let agent = Agent::shared();
    let server = Server::start(&built(agent, Kind::Stripped));
    server.client(&["keepalive", "account", "3"]);
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let processes = agent.snapshot().expect("the agent answers").tls_coverage.processes;
        let found = processes.into_iter().find(|p| p.pid == server.child.id());
        if let Some(library) = found.as_ref().and_then(|p| p.libraries.first()) {
            assert_eq!((library.library, library.reason), (Library::Go, None));
            assert!(library.version.as_deref().is_some_and(|v| v.starts_with("1.")), "{library:?}");
            return;
        }
        assert!(Instant::now() < end, "the agent's account is {found:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn tls_on_no_socket_says_so() {
    let agent = Agent::shared();
    let path = built(agent, Kind::Static);
    let number = std::process::id().to_string();
    let done = Command::new(path).args(["pipe", &number]).status();
    assert!(done.is_ok_and(|s| s.success()), "the program gets its answer");
    let wanted = format!("/pipe/{number}");
    let find = || -> Vec<Exchange> {
        let text = fs::read(&agent.file).unwrap_or_default();
        let lines = text.split(|&b| b == b'\n').filter_map(|line| Exchange::from_json(line).ok());
        lines.filter(|x| x.path.as_deref() == Some(&*wanted)).collect()
    };
    let end = Instant::now() + Duration::from_secs(10);
    while find().len() < 2 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    let seen = find();
    assert_eq!(seen.len(), 2, "one for each end");
    for x in seen {
        assert_eq!((x.status, x.attribution, x.response_body_bytes), (200, Attribution::None, Some(5)));
        assert_eq!((x.client, x.server), (Peer::Unknown, Peer::Unknown));
    }
}

#[test]
fn plaintext() {
    let agent = Agent::shared();
    let server = Server::start_as(&built(agent, Kind::Static), "plain");
    let port = server.port;
    let urls: Vec<String> = (0..20).map(|i| format!("http://127.0.0.1:{port}/plain/{i}")).collect();
    let done = Command::new(program("curl")).arg("-sf").args(urls).stdout(Stdio::null()).status();
    assert!(done.is_ok_and(|s| s.success()), "curl gets its answers");
    let wanted: Vec<Want> = (0..20).map(|i| hello(format!("/plain/{i}"))).collect();
    agent.expect(&server.address(), &wanted);
}
