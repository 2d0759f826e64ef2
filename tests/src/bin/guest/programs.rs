//! Servers and clients that speak TLS and HTTP/2: nginx, curl and nghttp of Debian, in a root of their own as in a
//! container, and a program of Go. The image has them when all tests are asked for (`xtask/src/vm/debian.rs`).

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use apiscope::exchange::{Exchange, Side};
use apiscope_tests::{Agent, Want, process::Guard};

/// Requests of each kind of traffic.
pub const REQUESTS: usize = 10;
/// Where nginx speaks TLS, and where Go does.
const NGINX: &str = "127.0.0.1:8443";
const GO: &str = "127.0.0.1:8444";
/// `tests/programs/tls.go`.
const PROGRAM: &str = "/go-tls";

/// Requests to one server by one process.
pub struct Traffic {
    /// Name of the test, and first part of each path.
    pub name: &'static str,
    /// Address.
    pub server: &'static str,
    /// The client and its arguments in front of the addresses.
    client: &'static [&'static str],
    /// Bytes of an answer's body.
    answer: usize,
}

/// All of it.
pub const TRAFFIC: [Traffic; 5] = [
    Traffic { name: "tls", server: NGINX, client: &["curl", "-sSk", "-o", "/tmp/answer", "--http1.1"], answer: 20 },
    Traffic { name: "tls-http2", server: NGINX, client: &["curl", "-sSk", "-o", "/tmp/answer", "--http2"], answer: 20 },
    // curl of Debian 12 takes a second answer on a connection in plaintext for an error.
    Traffic { name: "http2", server: "127.0.0.1:8080", client: &["nghttp", "-n"], answer: 20 },
    Traffic { name: "go", server: GO, client: &[], answer: 5 },
    Traffic { name: "go-http2", server: GO, client: &["curl", "-sSk", "-o", "/tmp/answer", "--http2"], answer: 5 },
];

/// Starts the servers.
///
/// # Panics
/// One does not start.
pub fn servers() -> [Guard; 2] {
    let go = Command::new(PROGRAM).args(["serve", "8444", "/tmp/go.pem"]).stdin(Stdio::null()).spawn();
    [
        Guard(debian("sbin/nginx", &["-c", "/etc/nginx.conf"]).spawn().expect("nginx starts")),
        Guard(go.expect("Go starts")),
    ]
}

/// Waits until the servers are up and every agent has found the libraries that they use.
///
/// # Panics
/// Nothing of one is seen.
pub fn warm_up(agents: &[(String, Agent)]) {
    let end = Instant::now() + Duration::from_secs(120);
    let seen = |agent: &Agent, server| [Side::Server, Side::Client].iter().all(|s| !agent.seen(server, *s).is_empty());
    for server in [NGINX, GO] {
        while !agents.iter().all(|(_, agent)| seen(agent, server)) {
            let late: Vec<_> = agents.iter().filter(|(_, a)| !seen(a, server)).map(|(door, _)| door.as_str()).collect();
            assert!(Instant::now() < end, "nothing of TLS at {server} is seen by {}", late.join(", "));
            let _ = if server == GO {
                Command::new(PROGRAM).args(["client", "8444", "keepalive", "warm", "1"]).status()
            } else {
                debian("bin/curl", &["-sk", "-o", "/tmp/answer", &format!("https://{server}/warm/0")]).status()
            };
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

impl Traffic {
    /// Sends the requests.
    ///
    /// # Errors
    /// The client's words.
    pub fn ask(&self) -> Result<(), String> {
        let scheme = if self.name == "http2" { "http" } else { "https" };
        let urls: Vec<String> =
            (0..REQUESTS).map(|i| format!("{scheme}://{}/{}/{i}", self.server, self.name)).collect();
        let mut command = match self.client {
            [program, arguments @ ..] => {
                let all: Vec<&str> = arguments.iter().copied().chain(urls.iter().map(String::as_str)).collect();
                debian(&format!("bin/{program}"), &all)
            }
            [] => {
                let mut command = Command::new(PROGRAM);
                command.args(["client", "8444", "keepalive", self.name, &REQUESTS.to_string()]);
                command
            }
        };
        let out = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
        if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
    }

    /// As `Agent::expect`, for this traffic alone: other went to the same server.
    ///
    /// # Errors
    /// What is missing, too much or wrong.
    pub fn hold(&self, agent: &Agent) -> Result<(), String> {
        let start = format!("/{}/", self.name);
        let of_answer = self.answer;
        let wanted: Vec<Want> =
            (0..REQUESTS).map(|i| Want::any("GET", format!("{start}{i}"), 200).bodies(0, of_answer)).collect();
        let of = |side| -> Vec<_> {
            let ours = |e: &Exchange| e.path.as_deref().is_some_and(|p| p.starts_with(&start));
            agent.seen(self.server, side).into_iter().filter(ours).collect()
        };
        let end = Instant::now() + Duration::from_secs(20);
        for side in [Side::Server, Side::Client] {
            while of(side).len() < wanted.len() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(100));
            }
            let mut seen = of(side);
            for want in &wanted {
                let at = seen.iter().position(|e| e.path.as_deref() == Some(&*want.path));
                let Some(at) = at else { return Err(format!("{} is not seen at the {side:?} side", want.path)) };
                if let Some(complaint) = want.complaint(&seen.remove(at)) {
                    return Err(complaint);
                }
            }
            if let Some(more) = seen.first() {
                return Err(format!(
                    "seen too often at the {side:?} side: {}",
                    more.path.as_deref().unwrap_or_default()
                ));
            }
        }
        Ok(())
    }
}

/// A program of Debian, in its own root.
fn debian(program: &str, arguments: &[&str]) -> Command {
    use std::os::unix::process::CommandExt as _;
    let mut command = Command::new(format!("/usr/{program}"));
    command.args(arguments).stdin(Stdio::null());
    // SAFETY: the calls are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            if libc::chroot(c"/debian".as_ptr()) == 0 && libc::chdir(c"/".as_ptr()) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        })
    };
    command
}
