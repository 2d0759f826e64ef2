//! No application notices: agents come and go under load and no byte changes, confined processes live, files are
//! replaced, sessions are forked, resumed and half closed; and with many sessions at once each is attributed right.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use apiscope::exchange::{Attribution, Scheme, Side};
use apiscope_tests::{
    Agent, Want, free_port,
    process::Folder,
    program,
    tls::{Server, certificate, wait_for},
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};

/// Bodies of these sizes are fetched: within one record, within one system call, of many of both.
const SIZES: [usize; 4] = [1, 700, 20_000, 400_000];

/// Bytes that differ from place to place, so that one that moved would show.
fn content(size: usize) -> Vec<u8> {
    (0..size as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// nginx with files of [`SIZES`].
struct Nginx {
    child: Child,
    folder: Folder,
    port: u16,
}

impl Nginx {
    fn start(name: &str) -> Self {
        let folder = Folder::new(&format!("safety-{name}"));
        certificate(&folder);
        for size in SIZES {
            std::fs::write(folder.join(size.to_string()), content(size)).expect("a file");
        }
        let port = free_port();
        let at = folder.display();
        let configuration = format!(
            "daemon off; worker_processes 2; pid {at}/pid; error_log stderr; user root;
events {{ worker_connections 512; }}
http {{ access_log off; keepalive_requests 1000000; client_body_temp_path {at}; proxy_temp_path {at};
  fastcgi_temp_path {at}; uwsgi_temp_path {at}; scgi_temp_path {at};
  server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {at}/cert.pem; ssl_certificate_key {at}/key.pem; root {at}; }} }}"
        );
        std::fs::write(folder.join("nginx.conf"), configuration).expect("a file");
        let child = Command::new(program("nginx"))
            .arg("-c")
            .arg(folder.join("nginx.conf"))
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx starts");
        wait_for(port);
        Self { child, folder, port }
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a pid");
        // SAFETY: our own child, which is not waited for yet; its workers end with it.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let _ = self.child.wait();
    }
}

/// A client with rustls, in this process: what it sees is what the server's end made.
fn client(folder: &std::path::Path, port: u16) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("cert.pem")).expect("a certificate")).expect("a root");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("a name");
    let session = ClientConnection::new(Arc::new(config), name).expect("a session");
    let socket = TcpStream::connect(("127.0.0.1", port)).expect("listens");
    socket.set_nodelay(true).expect("a socket");
    StreamOwned::new(session, socket)
}

/// Fetches each file in turn, and holds every byte against what it is.
fn fetch(nginx: &Nginx, pause: Duration, goes_on: &(dyn Fn() -> bool + Sync), done: &AtomicU64) {
    let files = SIZES.map(|size| (size, content(size)));
    let mut stream = client(&nginx.folder, nginx.port);
    let mut answer = vec![0; 500_000];
    for i in 0.. {
        if !goes_on() {
            return;
        }
        // Most are small, as they are in life.
        let (size, body) = &files[if i % 16 == 0 { 3 } else { i % 3 }];
        stream.write_all(format!("GET /{size} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).expect("taken");
        let (mut have, mut head) = (0, None);
        while head.is_none_or(|end| have < end + size) {
            let n = stream.read(&mut answer[have..]).expect("an answer");
            assert!(n > 0, "the server closed within an answer");
            have += n;
            head = head.or_else(|| memchr::memmem::find(&answer[..have], b"\r\n\r\n").map(|at| at + 4));
        }
        let head = head.expect("found");
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..head]));
        assert!(answer[head..have] == body[..], "the body of {size} bytes is another one");
        done.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
}

/// Sends bodies to a server that answers with them, over OpenSSL on both ends.
const ECHO_CLIENT: &str = "import http.client, os, ssl, sys, time
port, flag, pause = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
c = ssl.create_default_context(cafile='cert.pem'); n = 0
h = http.client.HTTPSConnection('localhost', port, context=c)
while not os.path.exists(flag):
    body = os.urandom([1, 900, 30000, 200000][n % 16 % 4 if n % 16 < 13 else 1])
    h.request('POST', '/echo/%d' % n, body)
    r = h.getresponse(); answer = r.read()
    assert r.status == 200 and answer == body, (n, r.status, len(body), len(answer))
    n += 1; time.sleep(pause)
print(n)";
const ECHO_SERVER: &str = "const https = require('https'), fs = require('fs');
https.createServer({ key: fs.readFileSync('key.pem'), cert: fs.readFileSync('cert.pem'), keepAliveTimeout: 600000 }, (q, a) => {
  const parts = []; q.on('data', p => parts.push(p)); q.on('end', () => a.end(Buffer.concat(parts))); })
  .listen(+process.argv[1], '127.0.0.1', () => console.log('ready'));";

/// Something failed.
struct Failed(AtomicBool);

/// Notes a panic that passes by.
struct Watch<'a>(&'a Failed);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Agents attach, detach and are killed until `requests` were answered, at least `turns` times. Each client pauses
/// between two requests: at full speed the agents would wait for the processor.
fn come_and_go(name: &str, requests: u64, turns: usize, pause: Duration) {
    let nginx = Nginx::start(name);
    let echo = Server::start(name, "node", ECHO_SERVER);
    let (done, agents) = (AtomicU64::new(0), AtomicUsize::new(0));
    let flag = echo.folder.join("over");
    // A failure here must end the threads that wait for the turns.
    let failed = Failed(AtomicBool::new(false));
    let goes_on = || {
        !failed.0.load(Ordering::Relaxed)
            && (done.load(Ordering::Relaxed) < requests || agents.load(Ordering::Relaxed) < turns)
    };
    std::thread::scope(|scope| {
        let watch = Watch(&failed);
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| fetch(&nginx, pause, &goes_on, &done))).collect();
        let client = Command::new(program("python3"))
            .args(["-c", ECHO_CLIENT, &echo.port.to_string()])
            .arg(&flag)
            .arg(pause.as_secs_f64().to_string())
            .current_dir(&echo.folder)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        while goes_on() && threads.iter().all(|t| !t.is_finished()) {
            let turn = agents.load(Ordering::Relaxed);
            let mut agent = Agent::start(&format!("{name}-{turn}"), &[]);
            std::thread::sleep(Duration::from_millis(300 + 200 * (turn as u64 % 5)));
            let recording = agent.file.clone();
            if turn % 2 == 0 {
                agent.child.kill().expect("ours");
                agent.child.wait().expect("ours");
            } else {
                agent.stop();
            }
            // Many agents on a fast machine record gigabytes.
            if let Some(folder) = recording.parent() {
                std::fs::remove_dir_all(folder).expect("removable");
            }
            agents.fetch_add(1, Ordering::Relaxed);
        }
        drop(watch);
        for thread in threads {
            thread.join().expect("every answer is right");
        }
        std::fs::write(&flag, "").expect("written");
        let end = client.wait_with_output().expect("a child");
        assert!(end.status.success(), "a body came back as another one, or not at all");
        let echoed: u64 = String::from_utf8_lossy(&end.stdout).trim().parse().expect("a number");
        assert!(echoed > 100, "{echoed} bodies came back");
        println!(
            "{} answers and {echoed} echoes under {} agents",
            done.load(Ordering::Relaxed),
            agents.load(Ordering::Relaxed)
        );
    });
}

#[test]
fn agents_come_and_go_under_load() {
    come_and_go("come-and-go", 20_000, 4, Duration::from_millis(1));
}

/// On a two-processor machine with Linux 6.18: 1,878,075 answers of nginx and 88,521 echoes of node under 40 agents, half
/// of them killed, each byte as it should be, no connection cut; 323 s.
#[test]
#[ignore = "takes minutes: `cargo xtask test --long`"]
fn a_million_requests_under_agents_that_come_and_go() {
    come_and_go("million", 1_000_000, 40, Duration::ZERO);
}

/// Since 6.11 the return of a probed function makes a system call of its own, which a filter that is older than it does
/// not know.
const CONFINED: &str = "import ctypes, http.server, ssl, struct, sys
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        self.send_response(200); self.send_header('Content-Length', '5'); self.end_headers(); self.wfile.write(b'hello')
    def log_message(self, *a): pass
s = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), H)
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain('cert.pem', 'key.pem')
s.socket = c.wrap_socket(s.socket, server_side=True)
LOAD, GE, RETURN, KILL, ALLOW = 0x20, 0x35, 0x06, 0x80000000, 0x7fff0000
# Numbers 335 to 423 and those above 470 end the process.
code = [(LOAD, 0, 0, 0), (GE, 0, 4, 335), (GE, 1, 0, 424), (RETURN, 0, 0, KILL), (GE, 0, 1, 471), (RETURN, 0, 0, KILL), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *i) for i in code), 8 * len(code))
class Filter(ctypes.Structure): _fields_ = [('len', ctypes.c_ushort), ('code', ctypes.c_void_p)]
f = Filter(7, ctypes.cast(code, ctypes.c_void_p))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(f), 0, 0) == 0
print('ready', flush=True); s.serve_forever()";

#[test]
#[cfg(target_arch = "x86_64")]
fn a_confined_process_lives() {
    let agent = Agent::shared();
    let mut server = Server::start("confined", "python3", CONFINED);
    server.ask("curl", &["-sf", "--http1.1", "--cacert", "cert.pem"], 20);
    assert!(server.child.try_wait().expect("ours").is_none(), "the server was ended by its filter");
    let wanted: Vec<Want> = (0..20).map(|i| Want::any("GET", format!("/curl/{i}"), 200).bodies(0, 5)).collect();
    agent.expect(&format!("127.0.0.1:{}", server.port), &wanted);
}

/// Each client asks for its own port: an exchange of another session would show it.
const MANY_SERVER: &str = "import asyncio, ssl, sys
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain('cert.pem', 'key.pem')
async def talk(r, w):
    try:
        while await r.readuntil(b'\\r\\n\\r\\n'):
            w.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello'); await w.drain()
    except (asyncio.IncompleteReadError, ConnectionError): w.close()
async def main():
    s = await asyncio.start_server(talk, '127.0.0.1', int(sys.argv[1]), ssl=c, backlog=512)
    print('ready', flush=True); await s.serve_forever()
asyncio.run(main())";
const MANY_CLIENT: &str = "import asyncio, ssl, sys
c = ssl.create_default_context(cafile='cert.pem')
async def one(all_open, count):
    r, w = await asyncio.open_connection('localhost', int(sys.argv[1]), ssl=c, family=2)
    port = w.get_extra_info('sockname')[1]
    count[0] += 1
    if count[0] == 200: all_open.set()
    await all_open.wait()
    for i in range(5):
        w.write(b'GET /%d/%d HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' % (port, i)); await w.drain()
        assert (await r.readexactly(43)).endswith(b'hello')
    w.close()
async def main():
    all_open = asyncio.Event(); count = [0]
    await asyncio.gather(*(one(all_open, count) for _ in range(200)))
asyncio.run(main())";

#[test]
fn two_hundred_sessions_at_once_each_with_its_own_addresses() {
    let agent = Agent::shared();
    let server = Server::start("many", "python3", MANY_SERVER);
    let done = Command::new(program("python3"))
        .args(["-c", MANY_CLIENT, &server.port.to_string()])
        .current_dir(&server.folder)
        .status();
    assert!(done.is_ok_and(|s| s.success()), "every answer comes");
    let address = format!("127.0.0.1:{}", server.port);
    for side in [Side::Server, Side::Client] {
        let end = Instant::now() + Duration::from_secs(10);
        while agent.seen(&address, side).len() < 1000 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(100));
        }
        let seen = agent.seen(&address, side);
        assert_eq!(seen.len(), 1000, "{side}");
        for x in seen {
            let path = x.path.as_deref().unwrap_or_default();
            let port = path.split('/').nth(1).expect("a port");
            assert_eq!(x.client.to_string(), format!("127.0.0.1:{port}"), "{side} {path}");
            assert_eq!((x.scheme, x.attribution, x.status), (Scheme::Https, Attribution::Ciphertext, 200));
        }
    }
}

/// The handshake is the parent's, the requests are the child's.
const FORKING: &str = "import os, signal, socket, ssl, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain('cert.pem', 'key.pem')
l = socket.create_server(('127.0.0.1', int(sys.argv[1])))
print('ready', flush=True)
while True:
    s, _ = l.accept(); t = c.wrap_socket(s, server_side=True)
    if os.fork() == 0:
        f = t.makefile('rb')
        while f.readline():
            while f.readline().strip(): pass
            t.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello')
        os._exit(0)
    os.close(t.detach())";

#[test]
fn a_session_goes_on_in_a_fork() {
    let agent = Agent::shared();
    let server = Server::start("fork", "python3", FORKING);
    server.ask("curl", &["-sf", "--http1.1", "--cacert", "cert.pem"], 10);
    let address = format!("127.0.0.1:{}", server.port);
    let wanted: Vec<Want> = (0..10).map(|i| Want::any("GET", format!("/curl/{i}"), 200).bodies(0, 5)).collect();
    agent.expect(&address, &wanted);
    for x in agent.seen(&address, Side::Server) {
        assert_eq!(x.attribution, Attribution::Nested);
        assert_ne!(x.pid, server.child.id(), "the child answers");
    }
}

/// Sessions of TLS 1.2 that are resumed (no certificate, other messages), and ends that send no more early.
const RESUMING: &str = "import socket, ssl, sys
c = ssl.create_default_context(cafile='cert.pem'); c.maximum_version = ssl.TLSVersion.TLSv1_2
session = None
for i in range(8):
    s = socket.create_connection(('localhost', int(sys.argv[1])))
    t = c.wrap_socket(s, server_hostname='localhost', session=session)
    assert i == 0 or t.session_reused
    session = t.session
    t.sendall(b'GET /resumed/%d HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' % i)
    if i % 2: socket.socket.shutdown(t, socket.SHUT_WR)
    answer = b''
    while not answer.endswith(b'hello'):
        part = t.recv(100); assert part; answer += part
    t.close()";

#[test]
fn resumed_sessions_and_half_closed_ones() {
    let agent = Agent::shared();
    let server = Server::start("resumed", "python3", MANY_SERVER);
    let done = Command::new(program("python3"))
        .args(["-c", RESUMING, &server.port.to_string()])
        .current_dir(&server.folder)
        .status();
    assert!(done.is_ok_and(|s| s.success()), "every answer comes");
    let wanted: Vec<Want> = (0..8).map(|i| Want::any("GET", format!("/resumed/{i}"), 200).bodies(0, 5)).collect();
    let address = format!("127.0.0.1:{}", server.port);
    agent.expect(&address, &wanted);
    for x in agent.seen(&address, Side::Server) {
        assert_eq!(x.tls_version.map(|v| v.name()), Some("1.2"));
        assert!(x.tls_cipher.is_some_and(|c| c.name().starts_with("TLS_ECDHE_")), "{:?}", x.tls_cipher);
    }
}

/// Two processes with a library of their own; its file is replaced while the first one runs.
#[test]
fn a_library_is_replaced_while_it_runs() {
    let agent = Agent::shared();
    let folder = std::env::temp_dir().join(format!("apiscope-safety-{}-own library é", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let linked = Command::new("ldd").arg(program("curl")).output().expect("ldd");
    let linked = String::from_utf8_lossy(&linked.stdout).into_owned();
    let path = |name: &str| {
        let line = linked.lines().find(|l| l.trim_start().starts_with(name)).map(str::to_owned);
        PathBuf::from(
            line.as_deref().and_then(|l| l.split(' ').nth(2)).unwrap_or_else(|| panic!("curl without {name}")),
        )
    };
    let (ssl, crypto) = (path("libssl.so"), path("libcrypto.so"));
    let name = |p: &PathBuf| p.file_name().expect("a name").to_owned();
    for file in [&ssl, &crypto] {
        std::fs::copy(file, folder.join(name(file))).expect("copied");
    }
    let server = Server::start("replaced", "python3", MANY_SERVER);
    let start = || {
        let mut child = Command::new(program("curl"))
            .args(["-sf", "--http1.1", "--cacert", "cert.pem", "--rate", "2/s", "-o", "/dev/null"])
            .arg(format!("https://127.0.0.1:{}/replaced/[0-7]", server.port))
            .env("LD_LIBRARY_PATH", &folder)
            .current_dir(&server.folder)
            .stderr(Stdio::piped())
            .spawn()
            .expect("curl starts");
        std::thread::sleep(Duration::from_millis(700));
        assert!(child.try_wait().expect("ours").is_none(), "curl runs for four seconds");
        child
    };
    let first = start();
    let copy = folder.join("new");
    std::fs::copy(&ssl, &copy).expect("copied");
    std::fs::rename(&copy, folder.join(name(&ssl))).expect("replaced");
    let second = start();
    for child in [first, second] {
        let end = child.wait_with_output().expect("ours");
        assert!(end.status.success(), "{}", String::from_utf8_lossy(&end.stderr));
    }
    std::fs::remove_dir_all(folder).expect("removable");
    let address = format!("127.0.0.1:{}", server.port);
    let end = Instant::now() + Duration::from_secs(10);
    while agent.seen(&address, Side::Client).len() < 16 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    let client: Vec<_> = agent.seen(&address, Side::Client).into_iter().filter_map(|x| x.path).collect();
    for i in 0..8 {
        let path = format!("/replaced/{i}");
        let seen = client.iter().filter(|p| ***p == *path).count();
        // A library that nobody mapped before is probed as it is mapped: the first request may be earlier.
        assert!(seen == 2 || i == 0, "{path} was seen {seen} times at the clients");
    }
    assert_eq!(agent.seen(&address, Side::Server).len(), 16);
}

/// Whole lives of some milliseconds, of an executable that nobody ran before in this test.
#[test]
fn processes_that_live_for_milliseconds() {
    let agent = Agent::shared();
    let server = Server::start("short", "python3", MANY_SERVER);
    let own = server.folder.join("s client");
    std::fs::copy(program("openssl"), &own).expect("copied");
    let mut least = Duration::MAX;
    for i in 0..30 {
        let begun = Instant::now();
        let mut client = Command::new(&own)
            .args(["s_client", "-quiet", "-connect", &format!("127.0.0.1:{}", server.port)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl");
        let mut input = client.stdin.take().expect("piped");
        write!(input, "GET /short/{i} HTTP/1.1\r\nHost: x\r\n\r\n").expect("written");
        let mut line = String::new();
        BufReader::new(client.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
        assert!(line.starts_with("HTTP/1.1 200"), "{line}");
        client.kill().expect("ours");
        client.wait().expect("ours");
        least = least.min(begun.elapsed());
    }
    println!("the shortest life was {least:?}");
    let wanted: Vec<Want> = (0..30).map(|i| Want::any("GET", format!("/short/{i}"), 200).bodies(0, 5)).collect();
    agent.expect(&format!("127.0.0.1:{}", server.port), &wanted);
}
