//! HTTPS by more real programs: Apache httpd, NSS on both ends, Ruby on both ends, uvicorn, requests and httpx of
//! Python, renegotiation and key updates; and
//! Java, whose TLS is not read: it is named and counted.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use apiscope::{
    coverage::{Library, Reason},
    exchange::{Attribution, Scheme, Side},
};
use apiscope_tests::{
    Agent, Want, free_port, program, python,
    tls::{Server, certificate, wait_for},
};

const CURL: &[&str] = &["-sf", "--http1.1", "--cacert", "cert.pem"];

/// A folder with a certificate.
fn folder(name: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("apiscope-tls-programs-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    certificate(&folder);
    folder
}

/// A program that runs in a folder, its output of no interest.
fn quiet(name: &str, folder: &Path) -> Command {
    let mut command = Command::new(program(name));
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

const NESTED: &[Attribution] = &[Attribution::Nested];

/// The certificate and its key as `server.p12`, with the password "secret".
fn key_store(folder: &Path) {
    let export = ["pkcs12", "-export", "-inkey", "key.pem", "-in", "cert.pem", "-name", "server", "-out", "server.p12"];
    let made = quiet("openssl", folder).args(export).args(["-passout", "pass:secret"]).status();
    assert!(made.is_ok_and(|s| s.success()), "openssl makes a key store");
}

/// Both ends saw `wanted`, and the socket of every exchange was found in one of the ways that each end is given.
fn hold(agent: &Agent, port: u16, wanted: &[Want], ends: [&[Attribution]; 2]) {
    let address = format!("127.0.0.1:{port}");
    agent.expect(&address, wanted);
    for (side, ways) in [Side::Server, Side::Client].into_iter().zip(ends) {
        for x in agent.seen(&address, side) {
            assert_eq!(x.scheme, Scheme::Https);
            assert!(ways.contains(&x.attribution), "{side}: {:?}", x.attribution);
            assert!(x.tls_version.is_some() && x.tls_cipher.is_some(), "version and cipher of TLS are known");
        }
    }
}

/// The main process ends its workers when it is asked to end.
fn end(mut child: Child) {
    let pid = libc::pid_t::try_from(child.id()).expect("a pid");
    // SAFETY: our own child, which is not waited for yet.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let _ = child.wait();
}

#[test]
fn apache_httpd() {
    let agent = Agent::shared();
    let folder = folder("apache");
    let (port, at) = (free_port(), folder.display());
    std::fs::create_dir_all(folder.join("files")).expect("a folder");
    std::fs::write(folder.join("files/hello"), "hello").expect("a file");
    std::fs::write(folder.join("files/large"), vec![b'x'; 3_000_000]).expect("a file");
    let modules = "/usr/lib/apache2/modules";
    let configuration = format!(
        "ServerRoot {at}\nServerName localhost\nPidFile {at}/pid\nErrorLog {at}/error\nDefaultRuntimeDir {at}\n\
         LoadModule mpm_event_module {modules}/mod_mpm_event.so\nLoadModule authz_core_module {modules}/mod_authz_core.so\n\
         LoadModule ssl_module {modules}/mod_ssl.so\nListen 127.0.0.1:{port}\nUser nobody\nGroup nogroup\n\
         KeepAlive On\nMaxKeepAliveRequests 0\nDocumentRoot {at}/files\n\
         SSLEngine on\nSSLCertificateFile {at}/cert.pem\nSSLCertificateKeyFile {at}/key.pem\n"
    );
    std::fs::write(folder.join("httpd.conf"), configuration).expect("a file");
    let mut server = quiet("apache2", &folder);
    let server = server.args(["-DFOREGROUND", "-f"]).arg(folder.join("httpd.conf")).spawn().expect("httpd starts");
    wait_for(port);
    let url = |path: &str| format!("https://127.0.0.1:{port}/{path}");
    let asked = quiet("curl", &folder).args(CURL).args([url("hello?[0-19]"), url("large")]).status();
    let posted = quiet("wget", &folder)
        .args(["-q", "--ca-certificate=cert.pem", "-O", "/dev/null", "--post-data=0123456789", &url("hello?post")])
        .status();
    end(server);
    assert!(asked.is_ok_and(|s| s.success()) && posted.is_ok_and(|s| s.success()), "every answer comes");
    let mut wanted: Vec<Want> = (0..20).map(|_| Want::any("GET", "/hello", 200).bodies(0, 5)).collect();
    wanted.push(Want::any("GET", "/large", 200).bodies(0, 3_000_000));
    wanted.push(Want::any("POST", "/hello", 200).bodies(10, 5));
    // Seen once, not explained: the server's socket found by ciphertext, with every address and size right.
    hold(agent, port, &wanted, [&[Attribution::Nested, Attribution::Ciphertext], NESTED]);
    std::fs::remove_dir_all(folder).expect("removable");
}

/// `selfserv` answers by `PR_Writev`, `tstclnt` asks by `PR_Send`; curl asks by OpenSSL.
#[test]
fn nss_on_both_ends() {
    let agent = Agent::shared();
    let folder = folder("nss");
    let run = |name: &str, arguments: &[&str]| {
        let done = quiet(name, &folder).args(arguments).status();
        assert!(done.is_ok_and(|s| s.success()), "{name} does its part");
    };
    std::fs::create_dir_all(folder.join("db")).expect("a folder");
    run("certutil", &["-N", "-d", "sql:db", "--empty-password"]);
    key_store(&folder);
    run("pk12util", &["-i", "server.p12", "-d", "sql:db", "-W", "secret", "-K", ""]);
    let port = free_port();
    let text = port.to_string();
    let mut server = quiet("selfserv", &folder);
    let server = server.args(["-d", "sql:db", "-n", "server", "-p", &text, "-V", "tls1.2:tls1.3"]).spawn();
    let server = server.expect("selfserv starts");
    wait_for(port);
    for i in 0..10 {
        let mut client = Command::new(program("tstclnt"))
            .args(["-h", "127.0.0.1", "-p", &text, "-d", "sql:db", "-o", "-V", "tls1.2:tls1.3"])
            .current_dir(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("tstclnt starts");
        let mut input = client.stdin.take().expect("piped");
        write!(input, "GET /nss/{i} HTTP/1.0\r\n\r\n").expect("written");
        let mut line = String::new();
        BufReader::new(client.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
        // It would wait for more.
        client.kill().expect("ours");
        client.wait().expect("ours");
        assert!(line.starts_with("HTTP/1.0 200 OK"), "{line}");
    }
    run("curl", &[CURL, &["--http1.0", &format!("https://127.0.0.1:{port}/curl")]].concat());
    end(server);
    let mut wanted: Vec<Want> =
        (0..10).map(|i| Want { end: None, ..Want::any("GET", format!("/nss/{i}"), 200) }).collect();
    wanted.push(Want { end: None, ..Want::any("GET", "/curl", 200) });
    hold(agent, port, &wanted, [NESTED; 2]);
    std::fs::remove_dir_all(folder).expect("removable");
}

const RUBY_SERVER: &str = "require 'socket'; require 'openssl'
c = OpenSSL::SSL::SSLContext.new
c.cert = OpenSSL::X509::Certificate.new(File.read('cert.pem')); c.key = OpenSSL::PKey.read(File.read('key.pem'))
s = OpenSSL::SSL::SSLServer.new(TCPServer.new('127.0.0.1', ARGV[0].to_i), c)
puts 'ready'; STDOUT.flush
loop { Thread.new(s.accept) { |t|
  while (line = t.gets)
    length = 0
    while (h = t.gets) != \"\\r\\n\"; length = h.split(': ')[1].to_i if h.downcase.start_with?('content-length'); end
    body = t.read(length) if length > 0
    t.write(\"HTTP/1.1 200 OK\\r\\nContent-Length: #{[length, 5].max}\\r\\n\\r\\n\"); t.write(body || 'hello')
  end; t.close } }";
const RUBY_CLIENT: &str = "require 'net/http'
h = Net::HTTP.new('localhost', ARGV[0].to_i); h.use_ssl = true; h.ca_file = 'cert.pem'; h.ipaddr = '127.0.0.1'
h.start { |c|
  10.times { |i| raise 'answer' unless c.get(\"/ruby/#{i}\").body == 'hello' }
  body = 'x' * 100_000
  raise 'echo' unless c.post('/ruby/echo', body).body == body }";

#[test]
fn ruby_on_both_ends() {
    let agent = Agent::shared();
    let server = Server::start("ruby", "ruby", RUBY_SERVER);
    let client = quiet("ruby", &server.folder).args(["-e", RUBY_CLIENT, &server.port.to_string()]).status();
    assert!(client.is_ok_and(|s| s.success()), "every answer comes");
    let mut wanted: Vec<Want> = (0..10).map(|i| Want::any("GET", format!("/ruby/{i}"), 200).bodies(0, 5)).collect();
    wanted.push(Want::any("POST", "/ruby/echo", 200).bodies(100_000, 100_000));
    hold(agent, server.port, &wanted, [NESTED; 2]);
}

const UVICORN: &str = "import sys, uvicorn
async def app(scope, receive, send):
    size, more = 0, True
    while more:
        part = await receive()
        size, more = size + len(part.get('body', b'')), part.get('more_body')
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})
    await send({'type': 'http.response.body', 'body': str(size).encode()})
class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets=sockets)
        print('ready', flush=True)
files = {'ssl_keyfile': 'key.pem', 'ssl_certfile': 'cert.pem'}
Server(uvicorn.Config(app, port=int(sys.argv[1]), log_level='critical', lifespan='off', **files)).run()";
const PYTHON_CLIENTS: &str = "import asyncio, httpx, requests, sys
at, usual = 'https://localhost:' + sys.argv[1], {'verify': 'cert.pem', 'trust_env': False}
with requests.Session() as c:
    c.trust_env, c.verify = False, 'cert.pem'
    for i in range(5): assert c.post(f'{at}/requests/{i}', data=b'd' * 30000).text == '30000'
with httpx.Client(**usual) as c:
    for i in range(5): assert c.post(f'{at}/httpx/{i}', content=b'd' * 30000).text == '30000'
async def all():
    async with httpx.AsyncClient(**usual) as c:
        for a in await asyncio.gather(*[c.post(f'{at}/async/{i}', content=b'd' * 30000) for i in range(5)]):
            assert a.text == '30000'
asyncio.run(all())";

/// Sessions on memory at the server and at the last of the clients, which has several at once.
#[test]
fn uvicorn_asked_by_requests_and_httpx() {
    let agent = Agent::shared();
    let python = python("uvicorn, httpx, requests");
    let server = Server::start("uvicorn", python.to_str().expect("a path"), UVICORN);
    let mut client = Command::new(&python);
    client.current_dir(&server.folder).args(["-c", PYTHON_CLIENTS, &server.port.to_string()]);
    assert!(client.status().is_ok_and(|s| s.success()), "every answer comes");
    let paths = ["requests", "httpx", "async"].into_iter().flat_map(|who| (0..5).map(move |i| format!("/{who}/{i}")));
    let wanted: Vec<Want> = paths.map(|path| Want::any("POST", path, 200).bodies(30_000, 5)).collect();
    let both = &[Attribution::Nested, Attribution::Ciphertext];
    hold(agent, server.port, &wanted, [&both[1..], both]);
}

/// Requests of `openssl s_client` after each of its commands: `K` is a key update of both ends (TLS 1.3), `R` a
/// renegotiation (TLS 1.2).
fn command_between(agent: &Agent, version: &str, command: &str) {
    let server = Server::s_server();
    for i in 0..5 {
        let mut client = Command::new(program("openssl"))
            .args(["s_client", version, "-connect", &format!("127.0.0.1:{}", server.port)])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl");
        let mut input = client.stdin.take().expect("piped");
        // One read of its input is one command.
        for line in [command.to_owned(), format!("GET /curl/{i} HTTP/1.0\r\n\r\n")] {
            std::thread::sleep(Duration::from_millis(400));
            input.write_all(line.as_bytes()).expect("written");
        }
        assert!(client.wait().expect("ours").success(), "s_client gets its answer");
    }
    let wanted: Vec<Want> = (0..5).map(|i| Want { end: None, ..Want::any("GET", format!("/curl/{i}"), 200) }).collect();
    hold(agent, server.port, &wanted, [NESTED; 2]);
}

#[test]
fn key_updates() {
    command_between(Agent::shared(), "-tls1_3", "K\n");
}

#[test]
fn renegotiations() {
    command_between(Agent::shared(), "-tls1_2", "R\n");
}

const JAVA: &str = "import com.sun.net.httpserver.*; import java.io.*; import java.net.*; import java.security.*; import javax.net.ssl.*;
public class Server { public static void main(String[] a) throws Exception {
  KeyStore k = KeyStore.getInstance(\"PKCS12\"); k.load(new FileInputStream(\"server.p12\"), \"secret\".toCharArray());
  KeyManagerFactory m = KeyManagerFactory.getInstance(\"SunX509\"); m.init(k, \"secret\".toCharArray());
  SSLContext c = SSLContext.getInstance(\"TLS\"); c.init(m.getKeyManagers(), null, null);
  HttpsServer s = HttpsServer.create(new InetSocketAddress(\"127.0.0.1\", Integer.parseInt(a[0])), 0);
  s.setHttpsConfigurator(new HttpsConfigurator(c));
  s.createContext(\"/\", x -> { x.sendResponseHeaders(200, 5); x.getResponseBody().write(\"hello\".getBytes()); x.close(); });
  s.start(); } }";

#[test]
fn java_is_named_and_counted() {
    let agent = Agent::shared();
    let folder = folder("java");
    key_store(&folder);
    std::fs::write(folder.join("Server.java"), JAVA).expect("a file");
    let port = free_port();
    let mut server = quiet("java", &folder);
    let mut server = server.args(["Server.java", &port.to_string()]).spawn().expect("java starts");
    wait_for(port);
    for i in 0..10 {
        let asked = quiet("curl", &folder).args(CURL).arg(format!("https://127.0.0.1:{port}/java/{i}")).status();
        assert!(asked.is_ok_and(|s| s.success()), "curl gets its answer");
    }
    let end = Instant::now() + Duration::from_secs(20);
    let process = loop {
        let snapshot = agent.snapshot().expect("the agent answers");
        let found = snapshot.tls_coverage.processes.into_iter().find(|p| p.pid == server.id());
        // That of `wait_for` said nothing, and is no TLS.
        if let Some(found) = found.clone().filter(|p| p.connections.unread >= 10) {
            break found;
        }
        assert!(Instant::now() < end, "the agent's account of java is {found:?}");
        std::thread::sleep(Duration::from_millis(100));
    };
    server.kill().expect("ours");
    server.wait().expect("ours");
    assert_eq!((process.connections.read, process.connections.unread), (0, 10), "{process:?}");
    assert!(!process.covered && process.reason() == Some(Reason::CompiledAtRunTime), "{process:?}");
    assert!(process.libraries.iter().any(|f| f.library == Library::Jsse), "{process:?}");
    let wanted: Vec<Want> = (0..10).map(|i| Want::any("GET", format!("/java/{i}"), 200).bodies(0, 5)).collect();
    let address = format!("127.0.0.1:{port}");
    agent.expect_side(&address, Side::Client, &wanted);
    assert_eq!(agent.seen(&address, Side::Server).len(), 0, "ciphertext is never taken for HTTP");
    std::fs::remove_dir_all(folder).expect("removable");
}
