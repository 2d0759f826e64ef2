//! The agent under test.

use std::{
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use apiscope::{
    exchange::{End, Exchange, Side},
    table::Snapshot,
};

/// A running agent that records every exchange.
pub struct Agent {
    /// Its process.
    pub child: Child,
    /// Its binary.
    pub binary: PathBuf,
    /// Its recording.
    pub file: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
}

/// An exchange that must be seen. `None` is not checked.
#[derive(Debug, Clone)]
pub struct Want {
    /// Method.
    pub method: &'static str,
    /// Path.
    pub path: String,
    /// Status.
    pub status: u16,
    /// Whole sizes.
    pub request_bytes: Option<u64>,
    /// See `request_bytes`.
    pub response_bytes: Option<u64>,
    /// Content sizes.
    pub request_body: Option<u64>,
    /// See `request_body`.
    pub response_body: Option<u64>,
    /// End.
    pub end: Option<End>,
    /// Bounds of the duration, ns.
    pub duration: Option<(u64, u64)>,
}

impl Want {
    /// A complete exchange with these sizes.
    #[must_use]
    pub fn new(method: &'static str, path: impl Into<String>, status: u16, request: &[u8], response: &[u8]) -> Self {
        Self {
            request_bytes: Some(request.len() as u64),
            response_bytes: Some(response.len() as u64),
            ..Self::any(method, path, status)
        }
    }

    /// A complete exchange of any sizes.
    #[must_use]
    pub fn any(method: &'static str, path: impl Into<String>, status: u16) -> Self {
        Self {
            method,
            path: path.into(),
            status,
            request_bytes: None,
            response_bytes: None,
            request_body: None,
            response_body: None,
            end: Some(End::Complete),
            duration: None,
        }
    }

    /// With another end.
    #[must_use]
    pub fn ending(self, end: End) -> Self {
        Self { end: Some(end), ..self }
    }

    /// With content sizes.
    #[must_use]
    pub fn bodies(self, request: usize, response: usize) -> Self {
        Self { request_body: Some(request as u64), response_body: Some(response as u64), ..self }
    }

    /// What of an exchange is not as wanted.
    #[must_use]
    pub fn complaint(&self, seen: &Exchange) -> Option<String> {
        let mut wrong = Vec::new();
        let mut hold = |what: &str, wanted: Option<u64>, seen: Option<u64>| {
            if wanted.is_some() && wanted != seen {
                wrong.push(format!("{what} is {seen:?}, not {wanted:?}"));
            }
        };
        hold("request_bytes", self.request_bytes, Some(seen.request_bytes));
        hold("response_bytes", self.response_bytes, Some(seen.response_bytes));
        hold("request_body_bytes", self.request_body, seen.request_body_bytes);
        hold("response_body_bytes", self.response_body, seen.response_body_bytes);
        if self.end.is_some_and(|end| end != seen.end) {
            wrong.push(format!("end is {}, not {:?}", seen.end, self.end));
        }
        if self.duration.is_some_and(|(least, most)| seen.duration_ns < least || seen.duration_ns > most) {
            wrong.push(format!("duration is {}, not in {:?}", seen.duration_ns, self.duration));
        }
        (!wrong.is_empty()).then(|| format!("{} {} {:?} side: {}", self.method, self.path, seen.side, wrong.join("; ")))
    }
}

/// The binary that `cargo xtask test` built; `APISCOPE` names another.
///
/// # Panics
/// It is not built.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("APISCOPE") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a running test has a path");
    let folder = test.parent().and_then(|p| p.parent()).expect("target/PROFILE/deps");
    let binary = folder.join("apiscope");
    assert!(binary.exists(), "{} is not built: run `cargo xtask test`, or `cargo build` first", binary.display());
    binary
}

/// How long an agent may take to attach its probes. An emulated processor verifies programs for minutes:
/// `APISCOPE_READY_S` gives it more time.
fn ready_within() -> Duration {
    let named = std::env::var("APISCOPE_READY_S").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(named.unwrap_or(90))
}

impl Agent {
    /// Starts an agent and waits until every probe is attached.
    ///
    /// # Panics
    /// Not root, or the agent does not come up.
    #[must_use]
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_with(name, arguments, &[])
    }

    /// As [`Agent::start`], with variables of its environment.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn start_with(name: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        // SAFETY: no preconditions.
        assert_eq!(unsafe { libc::geteuid() }, 0, "the end-to-end tests need root: run `cargo xtask test`");
        let binary = binary();
        let folder = std::env::temp_dir().join(format!("apiscope-test-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the test");
        let (file, socket) = (folder.join("exchanges.ndjson"), folder.join("agent.sock"));
        let mut command = Command::new(&binary);
        command
            .args(["run", "--quiet", "--capture-path", "raw", "--exchanges"])
            .arg(&file)
            .arg("--socket")
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
            .envs(environment.iter().copied());
        // SAFETY: async-signal-safe; the agent ends with the test, however that ends.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGINT);
                Ok(())
            })
        };
        let child = command.spawn().expect("the agent starts");
        let mut agent = Self { child, binary, file, socket };
        let end = Instant::now() + ready_within();
        while agent.snapshot().is_none_or(|s| !s.ready) {
            if let Some(status) = agent.child.try_wait().expect("a child") {
                panic!("the agent ended: {status}");
            }
            assert!(Instant::now() < end, "the agent did not become ready");
            std::thread::sleep(Duration::from_millis(100));
        }
        agent
    }

    /// The one that all tests of this binary share.
    pub fn shared() -> &'static Self {
        static AGENT: OnceLock<Agent> = OnceLock::new();
        AGENT.get_or_init(|| {
            sweep();
            // The thread that starts a child must outlive it, or its death ends the child: not a test's.
            let (send, receive) = std::sync::mpsc::sync_channel(1);
            std::thread::spawn(move || {
                let _ = send.send(Self::start("shared", &[]));
                loop {
                    std::thread::park();
                }
            });
            receive.recv().expect("the agent starts")
        })
    }

    /// Its state.
    #[must_use]
    pub fn snapshot(&self) -> Option<Snapshot> {
        apiscope::local::snapshot(&self.socket).ok()
    }

    /// Its losses in all.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.snapshot().map_or(0, |s| s.totals.losses.values().sum())
    }

    /// What it saw at a server address.
    #[must_use]
    pub fn seen(&self, server: &str, side: Side) -> Vec<Exchange> {
        let text = std::fs::read(&self.file).unwrap_or_default();
        // The recording is of the whole machine: lines of others are not worth their parsing.
        let mut seen: Vec<_> = text
            .split(|&b| b == b'\n')
            .filter(|line| memchr::memmem::find(line, server.as_bytes()).is_some())
            .filter_map(|line| Exchange::from_json(line).ok())
            .filter(|e| e.side == side && e.server.to_string() == server)
            .collect();
        seen.sort_by_key(|e| e.ts);
        seen
    }

    /// Waits until both sides saw as much as is wanted, then compares each exchange.
    ///
    /// # Panics
    /// Something is missing, too much or wrong.
    pub fn expect(&self, server: &str, wanted: &[Want]) {
        for side in [Side::Server, Side::Client] {
            self.expect_side(server, side, wanted);
        }
    }

    /// As [`Agent::expect`], for one side.
    ///
    /// # Panics
    /// As there.
    pub fn expect_side(&self, server: &str, side: Side, wanted: &[Want]) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.seen(server, side).len() < wanted.len() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
        }
        // What is too much needs a moment to show.
        std::thread::sleep(Duration::from_millis(300));
        let mut seen = self.seen(server, side);
        let mut complaints = Vec::new();
        for want in wanted {
            let found = seen.iter().position(|e| {
                e.method.as_str() == want.method && e.path.as_deref() == Some(&*want.path) && e.status == want.status
            });
            match found {
                Some(i) => complaints.extend(want.complaint(&seen.remove(i))),
                None => complaints
                    .push(format!("missing on the {side} side: {} {} {}", want.method, want.path, want.status)),
            }
        }
        for e in seen {
            complaints.push(format!("not sent: {side} {} {:?} {}", e.method, e.path, e.status));
        }
        let told = |totals: &std::collections::BTreeMap<String, u64>| format!("{totals:?}");
        assert!(
            complaints.is_empty(),
            "at {server} (losses {}, unread {}):\n  {}",
            self.lost(),
            self.snapshot().map_or_else(String::new, |s| told(&s.totals.unread)),
            complaints.join("\n  ")
        );
    }

    /// Ends the agent as a person would; its exit must be clean and soon.
    ///
    /// # Panics
    /// It is not.
    pub fn stop(mut self) -> PathBuf {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a pid");
        // SAFETY: signals our own child, which is not waited for yet.
        unsafe { libc::kill(pid, libc::SIGINT) };
        let end = Instant::now() + Duration::from_secs(15);
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                assert!(status.success(), "the agent ended with {status}");
                return self.file.clone();
            }
            assert!(Instant::now() < end, "the agent did not end within 15 s");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The folders of shared agents whose process is gone: nothing runs when a process ends that would remove its own, and
/// recordings of the whole machine are large.
fn sweep() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|n| n.strip_prefix("apiscope-test-")?.strip_suffix("-shared")?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            // One that another process removes at the same time is as good as removed.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
