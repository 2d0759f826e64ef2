//! What tests of TLS share.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::program;

/// A server over TLS; `cert.pem` and `key.pem` are in its folder.
pub use crate::process::Process as Server;

impl Server {
    /// Starts a server from the code of an interpreter, which gets the port as its argument and says `ready`.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn start(name: &str, interpreter: &str, code: &str) -> Self {
        Self::ready(name, |folder, port| {
            certificate(folder);
            let mut command = Command::new(program(interpreter));
            command.args([if interpreter.ends_with("python3") { "-c" } else { "-e" }, code, &port.to_string()]);
            command
        })
    }

    /// `openssl s_server`, which answers with files.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn s_server() -> Self {
        Self::listening("s_server", |folder, port| {
            std::fs::create_dir_all(folder.join("curl")).expect("a folder");
            certificate(folder);
            for i in 0..20 {
                std::fs::write(folder.join(format!("curl/{i}")), "hello").expect("a file");
            }
            let mut command = Command::new(program("openssl"));
            command.args(["s_server", "-quiet", "-cert", "cert.pem", "-key", "key.pem", "-WWW"]);
            command.args(["-client_renegotiation", "-accept", &port.to_string()]);
            command
        })
    }

    /// Asks `count` times, by a process each, for `/CLIENT/i`.
    ///
    /// # Panics
    /// The client fails.
    pub fn ask(&self, client: &str, arguments: &[&str], count: usize) {
        for i in 0..count {
            let done = Command::new(program(client))
                .args(arguments)
                .arg(format!("https://127.0.0.1:{}/{client}/{i}", self.port))
                .current_dir(&self.folder)
                .stdout(Stdio::null())
                .status();
            assert!(done.is_ok_and(|s| s.success()), "{client} gets its answer");
        }
    }
}

/// Makes `cert.pem` and `key.pem` for this machine.
///
/// # Panics
/// openssl is not installed.
pub fn certificate(folder: &Path) {
    let made = Command::new(program("openssl"))
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
        // Not an authority: rustls takes those for nobody's own certificate.
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(folder)
        .stderr(Stdio::null())
        .status();
    assert!(made.is_ok_and(|s| s.success()), "openssl makes a certificate");
}

/// Waits until something listens.
///
/// # Panics
/// Nothing does for 20 s.
pub fn wait_for(port: u16) {
    let end = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "nothing listens on {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
