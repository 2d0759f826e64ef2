//! HTTPS by programs with rustls: hyper at the server, reqwest, hyper and curl at the client, seen from both ends, with
//! every size and address.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use apiscope::{
    coverage::{Library, Process},
    exchange::{Attribution, Exchange, Protocol, Scheme, Side},
};
use apiscope_tests::{Agent, Want, free_port, process::Folder, program, tls::certificate};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What both ends speak.
#[derive(Clone, Copy)]
struct Ways {
    version: &'static SupportedProtocolVersion,
    /// The name of the protocol inside.
    alpn: &'static [u8],
    /// Tickets of a server of TLS 1.3: without them its first record is an answer.
    tickets: usize,
}

const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

fn server_config(folder: &Path, ways: Ways) -> ServerConfig {
    let chain = CertificateDer::pem_file_iter(folder.join("cert.pem")).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).expect("a key");
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[ways.version])
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain.map(|c| c.expect("a certificate")).collect(), key)
        .expect("a key of the certificate");
    config.alpn_protocols = vec![ways.alpn.to_vec()];
    config.send_tls13_tickets = ways.tickets;
    config
}

fn client_config(folder: &Path, ways: Ways) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("cert.pem")).expect("a certificate")).expect("a root");
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[ways.version])
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ways.alpn.to_vec()];
    config
}

/// Answers with as many bytes as the path's last part says.
async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let size = request.uri().path().rsplit('/').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let body = request.into_body().collect().await.map(|b| b.to_bytes().len()).unwrap_or_default();
    let answer = Response::builder().header("x-got", body).body(Full::new(Bytes::from(vec![b'a'; size])));
    Ok(answer.expect("an answer"))
}

/// A server with hyper on this runtime.
async fn serve(folder: &Path, ways: Ways) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", free_port())).await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let acceptor = TlsAcceptor::from(Arc::new(server_config(folder, ways)));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(socket).await else { return };
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(HTTP2);
                let io = TokioIo::new(stream);
                // How the client leaves is its own affair.
                if is_http2 {
                    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection(io, service_fn(answer)).await;
                } else {
                    let builder = hyper::server::conn::http1::Builder::new();
                    let _ = builder.serve_connection(io, service_fn(answer)).await;
                }
            });
        }
    });
    address
}

/// A session of a client: where it comes from, and its stream.
async fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> (SocketAddr, TokioIo<impl Stream>) {
    let socket = TcpStream::connect(address).await.expect("a server");
    let from = socket.local_addr().expect("an address");
    let name = ServerName::try_from("localhost").expect("a name");
    (from, TokioIo::new(TlsConnector::from(config.clone()).connect(name, socket).await.expect("a session")))
}

trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static> Stream for T {}

fn request(method: &str, path: &str, body: usize) -> Request<Full<Bytes>> {
    let uri = format!("https://localhost{path}");
    Request::builder().method(method).uri(uri).body(Full::new(Bytes::from(vec![b'q'; body]))).expect("a request")
}

/// Both ends saw `wanted`, and found the socket by its ciphertext. Returns what they saw.
fn hold(agent: &Agent, address: SocketAddr, wanted: &[Want], ends: &[Side], protocol: Protocol) -> Vec<Exchange> {
    let address = address.to_string();
    let mut all = Vec::new();
    for &side in ends {
        agent.expect_side(&address, side, wanted);
        for x in agent.seen(&address, side) {
            assert_eq!(
                (x.scheme, x.attribution, x.protocol),
                (Scheme::Https, Attribution::Ciphertext, protocol),
                "{x:?}"
            );
            assert!(x.tls_version.is_some() && x.tls_cipher.is_some(), "version and cipher of TLS are known");
            all.push(x);
        }
    }
    all
}

const BOTH: [Side; 2] = [Side::Server, Side::Client];

/// Waits until the agent reads this program: it finds one that is new to it within moments.
fn known(agent: &Agent) -> Process {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let snapshot = agent.snapshot().expect("the agent answers");
        let own = snapshot.tls_coverage.processes.into_iter().find(|p| p.pid == std::process::id());
        if let Some(own) = own {
            return own;
        }
        assert!(Instant::now() < end, "the agent does not know this program");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().expect("threads")
}

/// Sizes of requests and answers: within a record, of several, of many.
const SIZES: [(usize, usize); 6] = [(0, 5), (10, 0), (700, 20_000), (40_000, 3), (1_000_000, 6), (1, 3_000_000)];

fn reqwest_asks(ways: Ways, path: &str) {
    let agent = Agent::shared();
    let own = known(agent);
    assert!(own.covered && own.libraries[0].library == Library::Rustls, "{own:?}");
    assert!(own.libraries[0].version.as_deref().is_some_and(|v| v.starts_with("0.23.")), "{own:?}");
    let folder = Folder::new(&format!("rustls-{path}"));
    certificate(&folder);
    let mut wanted = Vec::new();
    let address = runtime().block_on(async {
        let address = serve(&folder, ways).await;
        // Ten connections, one after the other, of six requests each.
        for i in 0..10 {
            let builder = reqwest::Client::builder().tls_backend_preconfigured(client_config(&folder, ways)).no_proxy();
            let client = builder.resolve("localhost", address).build().expect("a client");
            for (got, size) in SIZES {
                let path = format!("/{path}/{i}/{size}");
                let url = format!("https://localhost:{}{path}", address.port());
                let answer = client.post(url).body(vec![b'q'; got]).send().await.expect("an answer");
                assert_eq!(answer.headers()["x-got"], got.to_string());
                assert_eq!(answer.bytes().await.expect("a body").len(), size);
                wanted.push(Want::any("POST", path, 200).bodies(got, size));
            }
        }
        address
    });
    let seen = hold(agent, address, &wanted, &BOTH, Protocol::Http11);
    // The client takes a second connection now and then: what counts is that both ends name the same.
    let [at_server, at_client] = BOTH.map(|side| {
        let mut of = BTreeMap::<String, Vec<_>>::new();
        for x in seen.iter().filter(|x| x.side == side) {
            of.entry(x.client.to_string()).or_default().push(x.path.clone());
        }
        of.values_mut().for_each(|paths| paths.sort());
        of
    });
    assert_eq!(at_server, at_client);
}

#[test]
fn reqwest_over_tls_1_3() {
    reqwest_asks(Ways { version: &TLS13, alpn: HTTP1, tickets: 2 }, "new");
}

#[test]
fn reqwest_over_tls_1_2() {
    reqwest_asks(Ways { version: &TLS12, alpn: HTTP1, tickets: 2 }, "old");
}

/// The first record that such a server encrypts with a key is its answer, which waits for its send.
#[test]
fn reqwest_without_tickets() {
    reqwest_asks(Ways { version: &TLS13, alpn: HTTP1, tickets: 0 }, "ticketless");
}

fn http2(ways: Ways, path: &str) {
    let agent = Agent::shared();
    known(agent);
    let folder = Folder::new(&format!("rustls-{path}"));
    certificate(&folder);
    let mut wanted = Vec::new();
    let address = runtime().block_on(async {
        let address = serve(&folder, ways).await;
        let config = Arc::new(client_config(&folder, ways));
        for i in 0..5 {
            let (_, io) = connect(address, &config).await;
            let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
            let (sender, connection) = builder.handshake(io).await.expect("a connection");
            tokio::spawn(connection);
            let mut streams = Vec::new();
            for (got, size) in SIZES {
                let path = format!("/{path}/{i}/{size}");
                let mut sender = sender.clone();
                wanted.push(Want::any("POST", path.clone(), 200).bodies(got, size));
                streams.push(tokio::spawn(async move {
                    let answer = sender.send_request(request("POST", &path, got)).await.expect("an answer");
                    assert_eq!(answer.headers()["x-got"], got.to_string());
                    assert_eq!(answer.into_body().collect().await.expect("a body").to_bytes().len(), size);
                }));
            }
            for stream in streams {
                stream.await.expect("an answer");
            }
        }
        address
    });
    hold(agent, address, &wanted, &BOTH, Protocol::Http2);
}

#[test]
fn http2_over_tls_1_3() {
    http2(Ways { version: &TLS13, alpn: HTTP2, tickets: 2 }, "h2-new");
}

#[test]
fn http2_without_tickets() {
    http2(Ways { version: &TLS13, alpn: HTTP2, tickets: 0 }, "h2-ticketless");
}

#[test]
fn http2_over_tls_1_2() {
    http2(Ways { version: &TLS12, alpn: HTTP2, tickets: 2 }, "h2-old");
}

/// curl asks by OpenSSL: what it sends at once with the end of its handshake is read too.
#[test]
fn curl_asks() {
    let agent = Agent::shared();
    known(agent);
    for (ways, protocol, name) in [
        (Ways { version: &TLS13, alpn: HTTP1, tickets: 2 }, Protocol::Http11, "curl-1"),
        (Ways { version: &TLS12, alpn: HTTP1, tickets: 0 }, Protocol::Http11, "curl-2"),
        (Ways { version: &TLS13, alpn: HTTP2, tickets: 0 }, Protocol::Http2, "curl-3"),
    ] {
        let folder = Folder::new(&format!("rustls-{name}"));
        certificate(&folder);
        let runtime = runtime();
        let address = runtime.block_on(serve(&folder, ways));
        for i in 0..10 {
            let mut curl = std::process::Command::new(program("curl"));
            curl.args(["-sf", "--http2", "--cacert", "cert.pem"]).current_dir(&*folder);
            curl.args(["-o", "/dev/null", "-o", "/dev/null"]);
            let url = |n| format!("https://localhost:{}/{name}/{i}/{n}", address.port());
            let asked = curl
                .args(["--resolve", &format!("localhost:{}:127.0.0.1", address.port())])
                .args([url(7), url(70_000)]);
            assert!(asked.status().is_ok_and(|s| s.success()), "curl gets its answers");
        }
        let of = |i, n| Want::any("GET", format!("/{name}/{i}/{n}"), 200).bodies(0, n);
        let wanted: Vec<Want> = (0..10).flat_map(|i| [of(i, 7), of(i, 70_000)]).collect();
        hold(agent, address, &wanted, &[Side::Server], protocol);
    }
}

/// Many sessions at once, in tasks that wander between threads: each exchange has the addresses of its own.
#[test]
fn two_hundred_sessions_at_once() {
    const SESSIONS: usize = 200;
    const ROUNDS: usize = 5;
    let agent = Agent::shared();
    known(agent);
    let ways = Ways { version: &TLS13, alpn: HTTP1, tickets: 0 };
    let folder = Folder::new("rustls-many");
    certificate(&folder);
    let (address, from) = runtime().block_on(async {
        let address = serve(&folder, ways).await;
        let config = Arc::new(client_config(&folder, ways));
        let start = Arc::new(tokio::sync::Barrier::new(SESSIONS));
        let mut tasks = Vec::new();
        for i in 0..SESSIONS {
            let (config, start) = (config.clone(), start.clone());
            tasks.push(tokio::spawn(async move {
                let (from, io) = connect(address, &config).await;
                let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.expect("a connection");
                tokio::spawn(connection);
                start.wait().await;
                for k in 0..ROUNDS {
                    let path = format!("/many/{i}/{k}/{}", i * 100);
                    sender.ready().await.expect("a connection");
                    let answer = sender.send_request(request("POST", &path, i)).await.expect("an answer");
                    assert_eq!(answer.into_body().collect().await.expect("a body").to_bytes().len(), i * 100);
                }
                from
            }));
        }
        let mut from = Vec::new();
        for task in tasks {
            from.push(task.await.expect("a session"));
        }
        (address, from)
    });
    let wanted: Vec<Want> = (0..SESSIONS)
        .flat_map(|i| (0..ROUNDS).map(move |k| (i, k)))
        .map(|(i, k)| Want::any("POST", format!("/many/{i}/{k}/{}", i * 100), 200).bodies(i, i * 100))
        .collect();
    let seen = hold(agent, address, &wanted, &BOTH, Protocol::Http11);
    let mut wrong = BTreeMap::new();
    for x in seen {
        let path = x.path.clone().unwrap_or_default();
        let session: usize = path.split('/').nth(2).and_then(|i| i.parse().ok()).expect("a session");
        if x.client.to_string() != from[session].to_string() {
            wrong.insert(path, (x.side, x.client.to_string(), from[session]));
        }
    }
    assert!(wrong.is_empty(), "exchanges of other sessions: {wrong:?}");
}

/// Sessions from before the agent are found by their next records, and read from then on.
#[test]
fn sessions_from_before_the_agent() {
    let ways = Ways { version: &TLS13, alpn: HTTP1, tickets: 2 };
    let folder = Folder::new("rustls-before");
    certificate(&folder);
    let runtime = runtime();
    let (address, mut senders) = runtime.block_on(async {
        let address = serve(&folder, ways).await;
        let config = Arc::new(client_config(&folder, ways));
        let mut senders = Vec::new();
        for _ in 0..10 {
            let (_, io) = connect(address, &config).await;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.expect("a connection");
            tokio::spawn(connection);
            let answer = sender.send_request(request("POST", "/before/5", 3)).await.expect("an answer");
            answer.into_body().collect().await.expect("a body");
            senders.push(sender);
        }
        (address, senders)
    });
    let agent = Agent::start("rustls-before", &[]);
    known(&agent);
    let mut wanted = Vec::new();
    runtime.block_on(async {
        for (i, sender) in senders.iter_mut().enumerate() {
            for (got, size) in SIZES {
                let path = format!("/after/{i}/{size}");
                sender.ready().await.expect("a connection");
                let answer = sender.send_request(request("POST", &path, got)).await.expect("an answer");
                assert_eq!(answer.into_body().collect().await.expect("a body").to_bytes().len(), size);
                wanted.push(Want::any("POST", path, 200).bodies(got, size));
            }
        }
    });
    agent.expect(&address.to_string(), &wanted);
    agent.stop();
}
