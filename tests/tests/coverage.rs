//! Whose TLS is read and whose is not: the agent's account of processes and connections is held against what was done.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use apiscope::coverage::{Library, Process, Reason};
use apiscope_tests::{
    Agent, free_port, listener, program,
    tls::{certificate, wait_for},
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
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

/// Requests from a client with rustls to a server with rustls, both in this process, one a connection.
fn talk_by_rustls(folder: &Path, count: usize) {
    let chain: Vec<_> = CertificateDer::pem_file_iter(folder.join("cert.pem"))
        .expect("a certificate")
        .map(|c| c.expect("a certificate"))
        .collect();
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).expect("a key");
    let mut roots = RootCertStore::empty();
    roots.add(chain[0].clone()).expect("a root");
    let provider = Arc::new(ring::default_provider());
    let server = Arc::new(
        ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("a key of the certificate"),
    );
    let client = Arc::new(
        ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth(),
    );
    let listener = listener("127.0.0.1");
    let address = listener.local_addr().expect("an address");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..count {
                let (socket, _) = listener.accept().expect("a client");
                let session = ServerConnection::new(server.clone()).expect("a session");
                let mut stream = StreamOwned::new(session, socket);
                let mut request = [0; 256];
                assert!(stream.read(&mut request).expect("a request") > 0);
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").expect("taken");
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        });
        for _ in 0..count {
            let name = ServerName::try_from("localhost").expect("a name");
            let session = ClientConnection::new(client.clone(), name).expect("a session");
            let mut stream = StreamOwned::new(session, TcpStream::connect(address).expect("listens"));
            stream.write_all(b"GET /rustls HTTP/1.1\r\nHost: x\r\n\r\n").expect("taken");
            let mut answer = Vec::new();
            // Some servers close without saying so first.
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.ends_with(b"hello"));
        }
    });
}

#[test]
fn what_is_not_read_is_counted_and_named() {
    let agent = Agent::shared();
    let folder = folder("rustls");
    let before = agent.snapshot().expect("the agent answers").totals;
    talk_by_rustls(&folder, 20);
    let own = account(agent, std::process::id(), |p| p.connections.unread >= 40 && !p.libraries.is_empty());
    assert_eq!((own.connections.read, own.connections.unread), (0, 40), "both ends of twenty connections");
    // A handshake alone has a certificate of some hundred bytes.
    assert!(own.connections.unread_bytes > 40 * 1000, "{own:?}");
    assert!(!own.covered && own.reason() == Some(Reason::Unsupported), "{own:?}");
    assert_eq!(own.libraries[0].library, Library::Rustls);
    assert!(own.libraries[0].version.as_deref().is_some_and(|v| v.starts_with("0.23.")), "{own:?}");
    let totals = agent.snapshot().expect("the agent answers").totals;
    assert!(totals.unread["tls"] >= before.unread["tls"] + 40);
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
