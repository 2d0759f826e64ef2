//! What a handshake agreed on: version, cipher suite, the protocol that ALPN chose, and whether the client showed a
//! certificate, as OpenSSL keeps them (nginx, curl; node, which has it inside and moves the ciphertext itself).

use std::{path::Path, process::Command};

use apiscope::exchange::{Alpn, Auth, Exchange, Protocol, Side, TlsVersion};
use apiscope_tests::{
    Agent, Want, program,
    tls::{Server, certificate},
};

/// nginx, which asks for a certificate and does without; HTTP/2 where the client offers it.
fn nginx(versions: &str) -> Server {
    Server::listening("handshake-nginx", |folder: &Path, port| {
        certificate(folder);
        let configuration = format!(
            "daemon off; pid nginx.pid; error_log stderr; events {{}}\nhttp {{ access_log off;\n\
             client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;\n\
             ssl_certificate {0}/cert.pem; ssl_certificate_key {0}/key.pem; ssl_protocols {versions};\n\
             ssl_verify_client optional_no_ca;\n\
             server {{ listen 127.0.0.1:{port} ssl http2; location / {{ return 200 \"ok\\n\"; }} }} }}\n",
            folder.display()
        );
        std::fs::write(folder.join("nginx.conf"), configuration).expect("a file");
        let mut command = Command::new(program("nginx"));
        command.arg("-p").arg(folder).arg("-c").arg(folder.join("nginx.conf")).args(["-e", "stderr"]);
        command
    })
}

/// One more way to ask, by what curl is told: the path says which.
const WAYS: [(&str, &[&str], Alpn, bool); 5] = [
    ("/plain", &["--http1.1"], Alpn::Http11, false),
    ("/silent", &["--http1.1", "--no-alpn"], Alpn::None, false),
    ("/two", &["--http2"], Alpn::H2, false),
    ("/known", &["--http1.1", "--cert", "cert.pem", "--key", "key.pem"], Alpn::Http11, true),
    ("/known-two", &["--http2", "--cert", "cert.pem", "--key", "key.pem"], Alpn::H2, true),
];

/// Asks in every way; returns what the server's and the client's end of `way` looked like.
fn asked(server: &Server, more: &[&str]) -> impl Fn(&str) -> [Exchange; 2] {
    let agent = Agent::shared();
    for (path, arguments, ..) in WAYS {
        let url = format!("https://{}{path}", server.address());
        server.client("curl", [&["-sf", "--cacert", "cert.pem", &url], arguments, more].concat());
    }
    let wanted: Vec<Want> = WAYS.iter().map(|(path, ..)| Want::any("GET", *path, 200)).collect();
    agent.expect(&server.address(), &wanted);
    let ends = [Side::Server, Side::Client].map(|side| agent.seen(&server.address(), side));
    move |path| ends.each_ref().map(|all| all.iter().find(|x| x.path.as_deref() == Some(path)).expect("seen").clone())
}

#[test]
fn nginx_and_curl() {
    for (versions, version) in [("TLSv1.2", TlsVersion::Tls12), ("TLSv1.3", TlsVersion::Tls13)] {
        let server = nginx(versions);
        let of = asked(&server, &[]);
        for (path, _, alpn, known) in WAYS {
            let [server, client] = of(path);
            for end in [&server, &client] {
                assert_eq!((end.tls_version, end.tls_alpn), (Some(version), Some(alpn)), "{path} {:?}", end.side);
                assert!(end.tls_cipher.is_some());
            }
            let auth = if known { Auth::Mtls } else { Auth::None };
            assert_eq!((server.client_certificate, server.auth), (Some(known), auth), "{path} over {versions}");
            // A client sees the server's certificate alone.
            assert_eq!((client.client_certificate, client.auth), (None, Auth::None), "{path}");
        }
    }
}

#[test]
fn a_credential_is_stronger_than_a_certificate() {
    let server = nginx("TLSv1.3");
    let of = asked(&server, &["-u", "someone:secret"]);
    for (path, .., known) in WAYS {
        let [server, _] = of(path);
        assert_eq!((server.client_certificate, server.auth), (Some(known), Auth::Basic), "{path}");
    }
}

/// Node's sessions are on memory; it says itself what was agreed on.
#[test]
fn node_has_openssl_inside() {
    let server = Server::start(
        "handshake-node",
        "node",
        "const fs = require('fs'), port = +process.argv.at(-1);
         const o = { key: fs.readFileSync('key.pem'), cert: fs.readFileSync('cert.pem'), requestCert: true,
                     rejectUnauthorized: false, allowHTTP1: true };
         require('http2').createSecureServer(o, (q, a) => a.end('ok')).listen(port, '127.0.0.1', () => console.log('ready'));",
    );
    let of = asked(&server, &[]);
    for (path, _, alpn, known) in WAYS {
        let [server, _] = of(path);
        assert_eq!((server.tls_alpn, server.client_certificate), (Some(alpn), Some(known)), "{path}");
        assert_eq!(server.protocol == Protocol::Http2, alpn == Alpn::H2);
    }
}
