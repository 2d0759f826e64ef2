//! A program with rustls: a client and a server of it, which talk to each other, `COUNT` connections of a request each,
//! with the certificate in `FOLDER`. Then it prints `ready` and waits for the end of its input.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    sync::Arc,
};

use apiscope_tests::listener;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let folder = arguments.next().expect("FOLDER");
    let count = arguments.next().and_then(|n| n.to_str()?.parse().ok()).expect("COUNT");
    talk(folder.as_ref(), count);
    println!("ready");
    let _ = std::io::stdin().read(&mut [0]);
}

fn talk(folder: &Path, count: usize) {
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
