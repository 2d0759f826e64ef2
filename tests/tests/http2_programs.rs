//! HTTP/2 by servers and clients that people use, in plaintext and inside TLS, with 1 to 100 streams a connection:
//! what they sent is what both ends are seen to send, no more and no less.

use std::{path::Path, process::Command};

use apiscope::exchange::{End, Protocol, Scheme, Side};
use apiscope_tests::{Agent, Want, process::Process, program, tls::certificate};

/// Sizes of the files that servers offer as `/f/SIZE`.
const SIZES: [usize; 4] = [0, 3, 1000, 50_000];

fn files(folder: &Path) {
    std::fs::create_dir_all(folder.join("root/f")).expect("a folder");
    for size in SIZES {
        std::fs::write(folder.join(format!("root/f/{size}")), vec![b'f'; size]).expect("writable");
    }
}

/// h2load asks for each file and one that is missing, with this many streams at once on each connection.
fn load(server: &Process, scheme: &str, streams: usize) -> Vec<Want> {
    const EACH: usize = 20;
    let paths: Vec<_> = SIZES.iter().map(|n| format!("/f/{n}?m={streams}")).chain(["/missing".to_owned()]).collect();
    let urls: Vec<_> = paths.iter().map(|p| format!("{scheme}://127.0.0.1:{}{p}", server.port)).collect();
    let (requests, streams) = (format!("-n{}", EACH * paths.len()), format!("-m{streams}"));
    let arguments = ["-t1", "-c2", &requests, &streams].into_iter().chain(urls.iter().map(String::as_str));
    let out = server.client("h2load", arguments);
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(said.contains(&format!("{} done", EACH * paths.len())) && said.contains(" 0 errored"), "{said}");
    let file = |n: &usize| Want::any("GET", format!("/f/{n}"), 200).bodies(0, *n);
    let all = SIZES.iter().map(file).chain([Want::any("GET", "/missing", 404)]);
    all.flat_map(|want| std::iter::repeat_n(want, EACH)).collect()
}

fn check(server: &Process, scheme: Scheme, wanted: &[Want]) {
    let agent = Agent::shared();
    agent.expect(&server.address(), wanted);
    for side in [Side::Server, Side::Client] {
        let other = agent
            .seen(&server.address(), side)
            .into_iter()
            .find(|x| (x.scheme, x.protocol) != (scheme, Protocol::Http2));
        assert!(other.is_none(), "{other:?}");
    }
}

/// Apache as one process with threads.
fn apache(name: &str, tls: bool) -> Process {
    Agent::shared();
    Process::listening(name, |folder, port| {
        files(folder);
        if tls {
            certificate(folder);
        }
        let f = folder.display();
        let modules = "/usr/lib/apache2/modules";
        let extra = if tls {
            format!(
                "LoadModule ssl_module {modules}/mod_ssl.so\nSSLEngine on\nSSLCertificateFile {f}/cert.pem\n\
                 SSLCertificateKeyFile {f}/key.pem\nProtocols h2\n"
            )
        } else {
            "Protocols h2c http/1.1\n".to_owned()
        };
        let text = format!(
            "ServerRoot {f}\nDefaultRuntimeDir {f}\nPidFile {f}/pid\nErrorLog {f}/error.log\nServerName localhost\n\
             Listen 127.0.0.1:{port}\nMutex file:{f}\nLoadModule mpm_event_module {modules}/mod_mpm_event.so\n\
             LoadModule authz_core_module {modules}/mod_authz_core.so\nLoadModule http2_module {modules}/mod_http2.so\n\
             User nobody\nGroup nogroup\nMaxKeepAliveRequests 0\nH2Push off\nDocumentRoot {f}/root\n{extra}"
        );
        std::fs::write(folder.join("apache.conf"), text).expect("writable");
        let mut command = Command::new(program("apache2"));
        command.args(["-X", "-f"]).arg(folder.join("apache.conf"));
        command
    })
}

#[test]
fn apache_in_plaintext_and_by_upgrade() {
    let server = apache("apache", false);
    let mut wanted: Vec<_> = [1, 2, 8, 100].into_iter().flat_map(|streams| load(&server, "http", streams)).collect();
    let url = |path: &str| format!("http://127.0.0.1:{}{path}", server.port);
    server.client("curl", ["-sS", "-o", "/dev/null", "--http2-prior-knowledge", &url("/f/1000")]);
    // Requests in HTTP/1.1 that are answered in HTTP/2. One a connection: each other time this server says `timeout`
    // to the next stream of an upgraded connection, watched or not, and curl 7.88 fails with it altogether.
    for path in ["/f/3?upgrade", "/f/50000?upgrade"] {
        server.client("nghttp", ["-u", "-n", &url(path)]);
    }
    wanted.extend([1000, 3, 50_000].map(|n| Want::any("GET", format!("/f/{n}"), 200).bodies(0, n)));
    check(&server, Scheme::Http, &wanted);
}

#[test]
fn apache_inside_tls() {
    let server = apache("apache-tls", true);
    let mut wanted: Vec<_> = [1, 100].into_iter().flat_map(|streams| load(&server, "https", streams)).collect();
    let url = format!("https://127.0.0.1:{}/f/50000", server.port);
    server.client("curl", ["-sS", "-o", "a", "--http2", "--cacert", "cert.pem", &url]);
    wanted.push(Want::any("GET", "/f/50000", 200).bodies(0, 50_000));
    check(&server, Scheme::Https, &wanted);
}

fn nghttpd(name: &str, arguments: &[&str], tls: bool) -> Process {
    Agent::shared();
    Process::listening(name, |folder, port| {
        files(folder);
        let mut command = Command::new(program("nghttpd"));
        command.args(["-a", "127.0.0.1", "-d", "root"]).args(arguments).arg(port.to_string());
        if tls {
            certificate(folder);
            command.args(["key.pem", "cert.pem"]);
        } else {
            command.arg("--no-tls");
        }
        command
    })
}

#[test]
fn nghttpd_and_h2load() {
    for tls in [false, true] {
        let server = nghttpd(if tls { "nghttpd-tls" } else { "nghttpd" }, &[], tls);
        let (text, scheme) = if tls { ("https", Scheme::Https) } else { ("http", Scheme::Http) };
        let wanted: Vec<_> = [1, 2, 8, 100].into_iter().flat_map(|streams| load(&server, text, streams)).collect();
        check(&server, scheme, &wanted);
    }
}

/// A table of headers of no size, padding, trailers, bodies that are sent back, and a push.
#[test]
fn nghttpd_with_uploads_trailers_and_push() {
    let more = ["--echo-upload", "--trailer", "x-end: of it", "--padding=200", "-p/f/3=/f/1000", "-c0"];
    let server = nghttpd("nghttpd-more", &more, false);
    std::fs::write(server.folder.join("upload"), vec![b'u'; 30_000]).expect("writable");
    let url = |path: &str| format!("http://127.0.0.1:{}{path}", server.port);
    server.client("h2load", ["-t1", "-c1", "-m8", "-n40", "-dupload", &url("/echo")]);
    server.client("nghttp", ["-n", "-b50", "--trailer", "x-ours: too", "-dupload", &url("/echo/nghttp")]);
    server.client("nghttp", ["-n", &url("/f/3")]);
    let mut wanted = vec![Want::any("POST", "/echo", 200).bodies(30_000, 30_000); 40];
    wanted.push(Want::any("POST", "/echo/nghttp", 200).bodies(30_000, 30_000));
    wanted.extend([3, 1000].map(|n| Want::any("GET", format!("/f/{n}"), 200).bodies(0, n)));
    check(&server, Scheme::Http, &wanted);
}

/// Python's asyncio: plaintext, and TLS on memory whose ciphertext goes over a socket elsewhere.
#[test]
fn hypercorn() {
    const APP: &str = "
async def app(scope, receive, send):
    if scope['type'] != 'http': return
    size, more = 0, True
    while more:
        m = await receive()
        size += len(m.get('body', b''))
        more = m.get('more_body', False)
    n = int(scope['path'].rsplit('/', 1)[1])
    await send({'type': 'http.response.start', 'status': 200 + n % 3, 'headers': [(b'x-size', str(size).encode())]})
    for _ in range(3): await send({'type': 'http.response.body', 'body': b'h' * n, 'more_body': True})
    await send({'type': 'http.response.body', 'body': b'', 'more_body': False})
";
    Agent::shared();
    for tls in [false, true] {
        let server = Process::listening(if tls { "hypercorn-tls" } else { "hypercorn" }, |folder, port| {
            std::fs::write(folder.join("app.py"), APP).expect("writable");
            let mut command = Command::new("/usr/bin/python3");
            command.args(["-m", "hypercorn", "--bind", &format!("127.0.0.1:{port}")]);
            if tls {
                certificate(folder);
                command.args(["--certfile", "cert.pem", "--keyfile", "key.pem"]);
            }
            command.arg("app:app");
            command
        });
        let (text, scheme) = if tls { ("https", Scheme::Https) } else { ("http", Scheme::Http) };
        std::fs::write(server.folder.join("upload"), vec![b'u'; 20_000]).expect("writable");
        let mut wanted = Vec::new();
        for streams in [1, 8, 100] {
            let paths = [1, 2, 3000].map(|n| format!("/{streams}/{n}"));
            let urls = paths.each_ref().map(|p| format!("{text}://127.0.0.1:{}{p}", server.port));
            let m = format!("-m{streams}");
            server.client("h2load", ["-t1", "-c2", "-n120", "-dupload", &m, &urls[0], &urls[1], &urls[2]]);
            for (path, n) in paths.iter().zip([1, 2, 3000]) {
                let want = Want::any("POST", path, 200 + n as u16 % 3).bodies(20_000, 3 * n);
                wanted.extend(std::iter::repeat_n(want, 40));
            }
        }
        check(&server, scheme, &wanted);
    }
}

/// node, both ends in one process: streams side by side, one that its client cancels, one that the server refuses,
/// and an answer without a request.
#[test]
fn node() {
    const CODE: &str = "
const http2 = require('http2'), port = +process.argv[1];
const server = http2.createServer();
server.on('stream', (s, h) => {
  s.on('error', () => {});
  const path = h[':path'], n = +path.split('/').pop();
  if (path.startsWith('/cancel')) return s.respond({ ':status': 200 });
  if (path.startsWith('/refuse')) return s.close(http2.constants.NGHTTP2_REFUSED_STREAM);
  if (path.startsWith('/push')) s.pushStream({ ':path': '/pushed/' + n }, (e, p) => { p.respond({ ':status': 203 }); p.end('p'.repeat(n)); });
  if (path.startsWith('/hint')) s.additionalHeaders({ ':status': 103, link: '</x>; rel=preload' });
  s.respond({ ':status': 200 + n % 4, 'x-n': n }, { waitForTrailers: true });
  s.on('wantTrailers', () => s.sendTrailers({ 'x-trailer': 'end' }));
  s.resume();
  s.on('end', () => s.end('n'.repeat(n)));
});
server.listen(port, '127.0.0.1', async () => {
  for (const streams of [1, 2, 8, 100]) {
    const c = http2.connect('http://127.0.0.1:' + port);
    const ask = (path, body) => new Promise(r => {
      const q = c.request({ ':path': path, ':method': body ? 'PUT' : 'GET' });
      q.on('close', r); q.on('error', () => {});
      if (path.startsWith('/cancel')) q.on('response', () => q.close(http2.constants.NGHTTP2_CANCEL));
      q.resume(); q.end(body);
    });
    c.on('stream', s => s.resume());
    for (let at = 0; at < 200; at += streams)
      await Promise.all([...Array(streams).keys()].map(i => ask(`/s/${streams}/${at + i}`, i % 2 ? 'b'.repeat(i) : undefined)));
    for (const path of ['/cancel/1', '/refuse/1', '/push/7', '/hint/9']) await ask(path);
    await new Promise(r => setTimeout(r, 50));
    c.close();
  }
  console.log('ready');
});";
    Agent::shared();
    let server = Process::ready("node-h2", |_, port| {
        let mut command = Command::new(program("node"));
        command.args(["-e", CODE, &port.to_string()]);
        command
    });
    let mut wanted = Vec::new();
    for streams in [1, 2, 8, 100_usize] {
        wanted.extend((0..200).map(|n| {
            let i = n % streams;
            let method = if i % 2 == 1 { "PUT" } else { "GET" };
            Want::any(method, format!("/s/{streams}/{n}"), 200 + n as u16 % 4).bodies(if i % 2 == 1 { i } else { 0 }, n)
        }));
        wanted.extend([
            Want::any("GET", "/cancel/1", 200).ending(End::Reset),
            Want::any("GET", "/refuse/1", 0).ending(End::Reset),
            Want::any("GET", "/push/7", 203).bodies(0, 7),
            Want::any("GET", "/pushed/7", 203).bodies(0, 7),
            Want::any("GET", "/hint/9", 201).bodies(0, 9),
        ]);
    }
    check(&server, Scheme::Http, &wanted);
}
