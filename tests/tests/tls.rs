//! HTTPS by real programs: OpenSSL on the socket, on memory and through its BIO, GnuTLS; HTTP/2 in node.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use apiscope::exchange::{Attribution, Protocol, Scheme, Side};
use apiscope_tests::{Agent, Want, program, tls::Server};

const CURL: &[&str] = &["-sf", "--http1.1", "--cacert", "cert.pem"];
const WGET: &[&str] = &["-q", "--ca-certificate=cert.pem", "-O", "/dev/null"];

fn check(agent: &Agent, server: &Server, client: &str, count: usize, at_server: Attribution) {
    let address = format!("127.0.0.1:{}", server.port);
    let wanted: Vec<Want> = (0..count).map(|i| Want::any("GET", format!("/{client}/{i}"), 200).bodies(0, 5)).collect();
    agent.expect(&address, &wanted);
    for (side, attribution) in [(Side::Server, at_server), (Side::Client, Attribution::Nested)] {
        for x in agent.seen(&address, side) {
            assert_eq!((x.scheme, x.attribution), (Scheme::Https, attribution), "{}", x.method);
            assert!(x.tls_version.is_some() && x.tls_cipher.is_some(), "version and cipher of TLS are known");
        }
    }
}

#[test]
fn openssl_on_the_socket() {
    let agent = Agent::shared();
    let server = Server::start(
        "socket",
        "python3",
        "import http.server, ssl, sys
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        self.send_response(200); self.send_header('Content-Length', '5'); self.end_headers(); self.wfile.write(b'hello')
    def log_message(self, *a): pass
s = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), H)
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain('cert.pem', 'key.pem')
s.socket = c.wrap_socket(s.socket, server_side=True)
print('ready', flush=True); s.serve_forever()",
    );
    server.ask("curl", CURL, 20);
    check(agent, &server, "curl", 20, Attribution::Nested);
}

#[test]
fn openssl_on_memory_and_gnutls() {
    let agent = Agent::shared();
    let server = Server::start(
        "memory",
        "python3",
        "import asyncio, ssl, sys
c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); c.load_cert_chain('cert.pem', 'key.pem')
async def talk(r, w):
    try:
        while await r.readuntil(b'\\r\\n\\r\\n'):
            w.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello'); await w.drain()
    except (asyncio.IncompleteReadError, ConnectionError): w.close()
async def main():
    s = await asyncio.start_server(talk, '127.0.0.1', int(sys.argv[1]), ssl=c)
    print('ready', flush=True); await s.serve_forever()
asyncio.run(main())",
    );
    server.ask("wget", WGET, 20);
    check(agent, &server, "wget", 20, Attribution::Ciphertext);
}

/// Both ends read through the library's BIO, not by `SSL_read`; each call is seen once all the same.
#[test]
fn openssl_through_its_bio() {
    let agent = Agent::shared();
    let server = Server::s_server();
    server.ask("curl", &["-sf", "--http1.1", "--cacert", "cert.pem"], 20);
    let address = format!("127.0.0.1:{}", server.port);
    let mut wanted: Vec<Want> =
        (0..20).map(|i| Want { end: None, ..Want::any("GET", format!("/curl/{i}"), 200) }).collect();
    for i in 0..5 {
        let mut client = Command::new(program("openssl"))
            .args(["s_client", "-quiet", "-connect", &address])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("openssl");
        let mut input = client.stdin.take().expect("piped");
        write!(input, "GET /curl/{i} HTTP/1.0\r\n\r\n").expect("written");
        let status = client.wait().expect("a child");
        drop(input);
        assert!(status.success(), "s_client gets its answer");
        wanted.push(Want { end: None, ..Want::any("GET", format!("/curl/{i}"), 200) });
    }
    agent.expect(&address, &wanted);
    assert!(agent.seen(&address, Side::Server).iter().all(|x| x.attribution == Attribution::Nested));
}

#[test]
fn http2_inside_node() {
    let agent = Agent::shared();
    let server = Server::start(
        "http2",
        "node",
        "const http2 = require('http2'), fs = require('fs');
const s = http2.createSecureServer({ key: fs.readFileSync('key.pem'), cert: fs.readFileSync('cert.pem') });
s.on('stream', q => { q.respond({ ':status': 200, 'content-length': 5 }); q.end('hello'); });
s.listen(+process.argv[1], '127.0.0.1', () => console.log('ready'));",
    );
    server.ask("curl", &["-sf", "--http2", "--cacert", "cert.pem"], 10);
    check(agent, &server, "curl", 10, Attribution::Ciphertext);
    let address = format!("127.0.0.1:{}", server.port);
    assert!(agent.seen(&address, Side::Server).iter().all(|x| x.protocol == Protocol::Http2));
}
