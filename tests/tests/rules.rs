//! Which connections are traced: every kind of rule, by file and by flag, with agents of their own. Both ends
//! of each connection are in this process unless a rule is about processes.

use std::process::{Child, Command, Stdio};

use apiscope::exchange::Side;
use apiscope_tests::{Agent, Step, Want, free_port, play, program};

const RQ: &str = "GET /rule HTTP/1.1\r\nHost: t\r\n\r\n";
const RS: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// An agent with this configuration.
fn agent(name: &str, config: &str, arguments: &[&str]) -> Agent {
    let file = std::env::temp_dir().join(format!("apiscope-rules-{}-{name}.toml", std::process::id()));
    std::fs::write(&file, config).expect("writable");
    let path = file.display().to_string();
    let agent = Agent::start(name, &[&["--config", &*path], arguments].concat());
    std::fs::remove_file(file).expect("removable");
    agent
}

/// Three exchanges on one connection to `address`; the server's address.
fn traffic(address: &str) -> String {
    let one = [Step::client(RQ), Step::server(RS)];
    play(address, &[one.clone(), one.clone(), one].concat())
}

fn three() -> Vec<Want> {
    vec![Want::new("GET", "/rule", 200, RQ.as_bytes(), RS.as_bytes()); 3]
}

fn seen(agent: &Agent, server: &str, sides: &[Side]) {
    for side in [Side::Server, Side::Client] {
        agent.expect_side(server, side, &if sides.contains(&side) { three() } else { Vec::new() });
    }
}

const BOTH: [Side; 2] = [Side::Server, Side::Client];

#[test]
fn ports() {
    let (one, two) = (free_port(), free_port());
    let (a, b) = (format!("127.0.0.1:{one}"), format!("127.0.0.1:{two}"));
    let without = agent("port-out", &format!("[[capture.exclude]]\nport = {one}\n"), &[]);
    let only = agent("port-in", "", &["--include-port", &one.to_string()]);
    traffic(&a);
    traffic(&b);
    seen(&without, &a, &[]);
    seen(&without, &b, &BOTH);
    seen(&only, &a, &BOTH);
    seen(&only, &b, &[]);
    without.stop();
    only.stop();
}

#[test]
fn addresses() {
    let out = agent("address-out", "[[capture.exclude]]\naddress = \"127.7.0.0/16\"\n", &[]);
    let only = agent("address-in", "[[capture.include]]\naddress = \"127.7.0.0/16\"\n", &[]);
    // The rule is about the other end: the client's is 127.7.0.1, the server's 127.0.0.1, since that is the
    // address that a socket on the loopback device gets.
    let (far, near) = (traffic("127.7.0.1:0"), traffic("127.0.0.1:0"));
    seen(&out, &far, &[Side::Server]);
    seen(&out, &near, &BOTH);
    seen(&only, &far, &[Side::Client]);
    seen(&only, &near, &[]);
    out.stop();
    only.stop();
}

#[test]
fn sides() {
    for (name, config, arguments, sides) in [
        ("side-flag", "", &["--side", "client"][..], [Side::Client]),
        ("side-file", "[capture]\nsides = \"server\"\n", &[], [Side::Server]),
        ("side-out", "[[capture.exclude]]\nside = \"client\"\n", &[], [Side::Server]),
        ("side-in", "[[capture.include]]\nside = \"client\"\n", &[], [Side::Client]),
    ] {
        let agent = agent(name, config, arguments);
        let server = traffic("127.0.0.1:0");
        seen(&agent, &server, &sides);
        agent.stop();
    }
}

/// All that a rule names must match.
#[test]
fn several_at_once() {
    let (one, two) = (free_port(), free_port());
    let config = format!(
        "[[capture.exclude]]\nport = {one}\nside = \"client\"\n[[capture.exclude]]\nport = {two}\nexe = \"*/no-such\"\n"
    );
    let agent = agent("several", &config, &[]);
    let (a, b) = (traffic(&format!("127.0.0.1:{one}")), traffic(&format!("127.0.0.1:{two}")));
    seen(&agent, &a, &[Side::Server]);
    seen(&agent, &b, &BOTH);
    agent.stop();
}

/// A Python server in a process of its own.
struct Server(Child, u16);

impl Server {
    fn start(name: &str) -> Self {
        let port = free_port();
        let code = format!(
            "import http.server as h
class H(h.BaseHTTPRequestHandler):
    protocol_version='HTTP/1.1'
    def do_GET(s): s.send_response(200); s.send_header('Content-Length','2'); s.end_headers(); s.wfile.write(b'ok')
    def log_message(s,*a): pass
h.ThreadingHTTPServer(('127.0.0.1',{port}),H).serve_forever()"
        );
        let child = Command::new(program("python3"))
            .args(["-c", &code])
            .env("OTEL_SERVICE_NAME", name)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("python starts");
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(std::time::Instant::now() < end, "nothing listens at {port}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Self(child, port)
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.1)
    }

    /// `n` requests on connections of their own, by one process each.
    fn ask(&self, n: usize) {
        for i in 0..n {
            let url = format!("http://127.0.0.1:{}/asked/{i}", self.1);
            let status = Command::new(program("curl")).args(["-sf", "-o", "/dev/null", &url]).status();
            assert!(status.expect("curl starts").success());
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn asked(n: usize) -> Vec<Want> {
    (0..n).map(|i| Want::any("GET", format!("/asked/{i}"), 200)).collect()
}

#[test]
fn processes_executables_and_names() {
    let server = Server::start("named-elsewhere");
    let pid = server.0.id().to_string();
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).expect("ours").display().to_string();
    let cases: [(&str, String, Vec<&str>, &[Side]); 7] = [
        ("pid-flag", String::new(), vec!["--exclude-pid", &pid], &[Side::Client]),
        ("exe-flag", String::new(), vec!["--exclude-exe", "*/curl"], &[Side::Server]),
        ("exe-in", String::new(), vec!["--include-exe", &exe], &[Side::Server]),
        ("pid-file", format!("[[capture.exclude]]\npid = {pid}\n"), vec![], &[Side::Client]),
        ("name-file", "[[capture.exclude]]\nname = \"pyth*\"\n".into(), vec![], &[Side::Client]),
        ("name-in", "[[capture.include]]\nname = \"curl\"\n".into(), vec![], &[Side::Client]),
        // The name is the process's, whatever the service calls itself.
        ("name-side", "[[capture.exclude]]\nname = \"python3\"\nside = \"server\"\n".into(), vec![], &[Side::Client]),
    ];
    let agents = cases.map(|(name, config, arguments, sides)| (name, agent(name, &config, &arguments), sides));
    server.ask(20);
    for (name, agent, sides) in agents {
        for side in BOTH {
            let wanted = if sides.contains(&side) { asked(20) } else { Vec::new() };
            eprintln!("{name}, {side}");
            agent.expect_side(&server.address(), side, &wanted);
        }
        let totals = agent.snapshot().expect("an answer").totals;
        assert_eq!(totals.losses.values().sum::<u64>(), 0, "what is left out is not lost: {:?}", totals.losses);
        agent.stop();
    }
}

/// What is left out takes no room.
#[test]
fn what_is_left_out_leaves_the_table_empty() {
    let server = Server::start("left-out");
    let agent =
        agent("table", "[[capture.exclude]]\nexe = \"*/curl\"\n[[capture.exclude]]\nexe = \"*/python3*\"\n", &[]);
    let before = agent.snapshot().expect("an answer").totals.connections;
    server.ask(100);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let after = agent.snapshot().expect("an answer").totals.connections;
    // Kept, they would be 200. The rest of the machine has connections of its own meanwhile.
    assert!(after < before + 80, "connections of excluded processes stay in the table: {before} -> {after}");
    agent.expect(&server.address(), &[]);
    agent.stop();
}
