//! Whose TLS is read and whose is not: the agent's account of processes and connections is held against what was done.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use apiscope::coverage::{Library, Process, Reason};
use apiscope_tests::{
    Agent, free_port,
    process::Guard,
    program, ready,
    tls::{certificate, wait_for},
};

/// The agent's account of a process, once it satisfies `is_settled`.
fn account(agent: &Agent, pid: u32, is_settled: impl Fn(&Process) -> bool) -> Process {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let snapshot = agent.snapshot().expect("the agent answers");
        let found = snapshot.tls_coverage.processes.into_iter().find(|p| p.pid == pid);
        if let Some(found) = found.clone().filter(&is_settled) {
            return found;
        }
        assert!(Instant::now() < end, "the agent's account of {pid} is {found:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn folder(name: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("apiscope-coverage-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    certificate(&folder);
    folder
}

/// A program with rustls that talked twenty times to itself, and is still there.
fn talked(program: &Path, folder: &Path) -> Guard {
    let mut child = Command::new(program)
        .arg(folder)
        .arg("20")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program with rustls starts");
    ready(&mut child);
    Guard(child)
}

const RUSTLS: &str = env!("CARGO_BIN_EXE_apiscope-rustls");

#[test]
fn what_is_not_read_is_counted_and_named() {
    let agent = Agent::shared();
    let folder = folder("stripped");
    let before = agent.snapshot().expect("the agent answers").totals;
    // Without its table of sections a file has no symbols.
    let mut content = std::fs::read(RUSTLS).expect("built");
    content[0x28..0x30].fill(0);
    content[0x3a..0x40].fill(0);
    let stripped = folder.join("stripped");
    std::fs::write(&stripped, content).expect("a file");
    std::fs::set_permissions(&stripped, std::fs::Permissions::from_mode(0o755)).expect("a file");
    let child = talked(&stripped, &folder);
    let own = account(agent, child.id(), |p| p.connections.unread >= 40 && !p.libraries.is_empty());
    assert_eq!((own.connections.read, own.connections.unread), (0, 40), "both ends of twenty connections");
    // A handshake alone has a certificate of some hundred bytes.
    assert!(own.connections.unread_bytes > 40 * 1000, "{own:?}");
    assert!(!own.covered && own.reason() == Some(Reason::Stripped), "{own:?}");
    assert_eq!(own.libraries[0].library, Library::Rustls);
    assert!(own.libraries[0].version.as_deref().is_some_and(|v| v.starts_with("0.23.")), "{own:?}");
    let totals = agent.snapshot().expect("the agent answers").totals;
    assert!(totals.unread["tls"] >= before.unread["tls"] + 40);
    drop(child);
    std::fs::remove_dir_all(folder).expect("removable");
}

#[test]
fn rustls_is_read_and_named() {
    let agent = Agent::shared();
    let folder = folder("rustls");
    // One that is new to the agent may have talked before it was found.
    let first = talked(RUSTLS.as_ref(), &folder);
    account(agent, first.id(), |p| !p.libraries.is_empty());
    drop(first);
    let child = talked(RUSTLS.as_ref(), &folder);
    let own = account(agent, child.id(), |p| p.connections.read + p.connections.unread >= 40);
    assert_eq!((own.connections.read, own.connections.unread), (40, 0), "both ends of twenty connections");
    assert!(own.covered && own.libraries.len() == 1, "{own:?}");
    assert_eq!(own.libraries[0].library, Library::Rustls);
    assert!(own.libraries[0].version.as_deref().is_some_and(|v| v.starts_with("0.23.")), "{own:?}");
    drop(child);
    std::fs::remove_dir_all(folder).expect("removable");
}

#[test]
fn what_is_read_is_counted_with_its_library() {
    let agent = Agent::shared();
    let folder = folder("openssl");
    let port = free_port();
    let mut server = Command::new(program("python3"))
        .args(["-c", SERVER, &port.to_string()])
        .current_dir(&folder)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("python3 starts");
    wait_for(port);
    for _ in 0..10 {
        let asked = Command::new(program("curl"))
            .args(["-sf", "--cacert", "cert.pem", "-o", "/dev/null", &format!("https://127.0.0.1:{port}/")])
            .current_dir(&folder)
            .status();
        assert!(asked.is_ok_and(|s| s.success()), "curl gets its answer");
    }
    let account = account(agent, server.id(), |p| p.connections.read >= 10);
    server.kill().expect("ours");
    server.wait().expect("ours");
    std::fs::remove_dir_all(folder).expect("removable");
    assert_eq!((account.connections.read, account.connections.unread), (10, 0));
    assert!(account.covered && account.reason().is_none(), "{account:?}");
    let openssl = account.libraries.iter().find(|f| f.library == Library::Openssl).expect("python's library");
    assert!(openssl.version.as_deref().is_some_and(|v| v.starts_with(['1', '3'])), "{account:?}");
    // Of the machine: all that were recognised went somewhere.
    let tls = agent.snapshot().expect("the agent answers").totals.tls;
    assert!(tls.connections >= tls.read + tls.unread + tls.left_out && tls.calls > 0, "{tls:?}");
}

const SERVER: &str = "import http.server, ssl, sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header('Content-Length', '5'); self.end_headers(); self.wfile.write(b'hello')
    def log_message(self, *a): pass
s = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), H)
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain('cert.pem', 'key.pem')
s.socket = c.wrap_socket(s.socket, server_side=True)
s.serve_forever()";
