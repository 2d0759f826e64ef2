//! The agent's own numbers for Prometheus, over HTTP: `GET /metrics` in the text format (version 0.0.4),
//! `GET /healthz` and `/readyz` besides. Off unless `agent.metrics` names an address.
//!
//! The names are those that a collector makes of the OTLP metrics of [`crate::export`], so that one set of
//! dashboards and alerts serves both. Endpoints are not here: their histograms go by OTLP.
//!
//! One thread, one request at a time: a scraper asks every 15 s. A client has [`PATIENCE`].

use std::{
    fmt::Write as _,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    coverage::{Reason, Sum},
    stats::{self, Loss, Stats, Unnamed, Unread},
};

/// A client that does not ask or read within this time is left.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest head of a request, bytes.
const MAX_HEAD: u64 = 8 << 10;

/// The listening thread; it ends when this is dropped.
pub struct Scrape {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Scrape {
    /// Listens at `address`.
    ///
    /// # Errors
    /// The address is taken, or not this machine's.
    pub fn start(address: SocketAddr, stats: Arc<Stats>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("failed to listen at {address}: choose another agent.metrics"))?;
        let address = listener.local_addr()?;
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let thread = std::thread::Builder::new().name("scrape".into()).spawn(move || {
            for stream in listener.incoming() {
                if ends.load(Ordering::Relaxed) {
                    return;
                }
                // A client that fails has only itself to blame.
                if let Ok(stream) = stream
                    && let Err(e) = answer(&stream, &stats)
                {
                    log::debug!("a scrape failed: {e}");
                }
            }
        })?;
        Ok(Self { address, over, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Scrape {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let ip = if self.address.ip().is_unspecified() {
            if self.address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() }
        } else {
            self.address.ip()
        };
        // Wakes the thread; without it, the thread ends with the process.
        let woken = TcpStream::connect_timeout(&SocketAddr::new(ip, self.address.port()), PATIENCE).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            // A panic there was reported already.
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: &TcpStream, stats: &Stats) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = BufReader::new(stream.take(MAX_HEAD));
    let mut first = String::new();
    head.read_line(&mut first)?;
    loop {
        let mut line = Vec::new();
        if head.read_until(b'\n', &mut line)? == 0 || line.trim_ascii().is_empty() {
            break;
        }
    }
    let mut words = first.split_ascii_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let verdict =
        |good: bool| if good { ("200 OK", "ok\n".to_owned()) } else { ("503 Service Unavailable", "not now\n".into()) };
    let (status, body) = match (method, target.split('?').next().unwrap_or_default()) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", text(stats)),
        ("GET" | "HEAD", "/healthz") => verdict(stats.is_alive()),
        ("GET" | "HEAD", "/readyz") => verdict(stats.is_alive() && stats.ready.load(Ordering::Relaxed)),
        ("GET" | "HEAD", _) => ("404 Not Found", "/metrics, /healthz, /readyz\n".into()),
        _ => ("405 Method Not Allowed", String::new()),
    };
    let length = body.len();
    let body = if method == "HEAD" { "" } else { &body };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// Everything, in the text format.
#[must_use]
pub fn text(stats: &Stats) -> String {
    let get = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    let mut out = String::with_capacity(4096);
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    let by = |key: &str, value: &str, n: u64| (format!("{{{key}=\"{value}\"}}"), n as f64);
    let one = |n: f64| [(String::new(), n)];
    let info = [(format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1.0)];
    family("apiscope_build_info", "gauge", "Version of the agent.", &info);
    family(
        "apiscope_agent_ready",
        "gauge",
        "1 when every probe is attached.",
        &one(f64::from(u8::from(stats.ready.load(Ordering::Relaxed)))),
    );
    let lost: Vec<_> = Loss::ALL.iter().map(|&r| by("reason", r.name(), stats.lost(r))).collect();
    family("apiscope_capture_lost_total", "counter", "Exchanges, or parts of them, that are missing.", &lost);
    let unread: Vec<_> = Unread::ALL.iter().map(|&r| by("reason", r.name(), stats.unread(r))).collect();
    family("apiscope_capture_unread_total", "counter", "What was seen and not read.", &unread);
    let tls = stats.tls();
    let states =
        [by("state", "read", tls.read), by("state", "unread", tls.unread), by("state", "left_out", tls.left_out)];
    family("apiscope_tls_connections_total", "counter", "TLS connections, by whether they are read.", &states);
    let open = tls.connections.saturating_sub(tls.read + tls.unread + tls.left_out);
    family(
        "apiscope_tls_connections_undecided",
        "gauge",
        "Open TLS connections of which nothing was read.",
        &one(open as f64),
    );
    let bytes = tls.unread_bytes as f64;
    family(
        "apiscope_tls_unread_bytes_total",
        "counter",
        "Ciphertext of TLS connections that were not read.",
        &one(bytes),
    );
    family("apiscope_tls_calls_total", "counter", "Calls of TLS libraries that were read.", &one(tls.calls as f64));
    let without = tls.sessions_without_socket as f64;
    family("apiscope_tls_sessions_without_socket_total", "counter", "Sessions read without addresses.", &one(without));
    let sums = stats.coverage().view().libraries;
    let labels =
        |s: &Sum| format!("{{library=\"{}\",reason=\"{}\"}}", s.library.label(), s.reason.map_or("", Reason::label));
    let processes: Vec<_> = sums.iter().map(|s| (labels(s), s.processes as f64)).collect();
    family(
        "apiscope_tls_processes",
        "gauge",
        "Processes with a TLS library; reason says why it is not read.",
        &processes,
    );
    let unread: Vec<_> =
        sums.iter().filter(|s| s.reason.is_some()).map(|s| (labels(s), s.connections.unread as f64)).collect();
    family("apiscope_tls_unread_connections_total", "counter", "TLS connections that were not read, by why.", &unread);
    let unnamed: Vec<_> = Unnamed::ALL.iter().map(|&r| by("reason", r.name(), stats.unnamed_by(r))).collect();
    family("apiscope_identity_unnamed_total", "counter", "Ends of exchanges without their pod.", &unnamed);
    let sides = [by("side", "server", get(&stats.exchanges[0])), by("side", "client", get(&stats.exchanges[1]))];
    family("apiscope_exchange_count_total", "counter", "Exchanges seen.", &sides);
    family("apiscope_identity_pods", "gauge", "Pods that are known.", &one(get(&stats.pods) as f64));
    let failed = get(&stats.kubernetes_failed) as f64;
    family(
        "apiscope_identity_requests_failed_total",
        "counter",
        "Failed requests to the Kubernetes API.",
        &one(failed),
    );
    family("apiscope_agent_connections", "gauge", "Open connections.", &one(get(&stats.connections) as f64));
    family(
        "apiscope_agent_spans_dropped_total",
        "counter",
        "Spans that no collector took.",
        &one(get(&stats.spans_dropped) as f64),
    );
    family(
        "apiscope_agent_spans_limited_total",
        "counter",
        "Spans that the rate limit left out.",
        &one(get(&stats.spans_limited) as f64),
    );
    family(
        "apiscope_agent_exports_failed_total",
        "counter",
        "Exports that failed.",
        &one(get(&stats.exports_failed) as f64),
    );
    let (cpu, resident) = stats::usage();
    family("apiscope_agent_cpu_time_seconds_total", "counter", "CPU time of the agent.", &one(cpu));
    family("apiscope_agent_memory_usage_bytes", "gauge", "Resident memory of the agent.", &one(resident as f64));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).expect("listens");
        stream.write_all(request.as_bytes()).expect("taken");
        let mut text = String::new();
        // A server that closed early ends the text.
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn scraped_and_probed() {
        let stats = Arc::new(Stats::default());
        stats.lose(Loss::RingFull, 3);
        let scrape = Scrape::start(([127, 0, 0, 1], 0).into(), stats.clone()).expect("free");
        let address = scrape.address();
        let metrics = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            metrics.starts_with("HTTP/1.1 200")
                && metrics.contains("\napiscope_capture_lost_total{reason=\"ring_full\"} 3\n")
        );
        assert!(ask(address, "GET /readyz HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 503"));
        stats.beat();
        stats.ready.store(true, Ordering::Relaxed);
        assert!(ask(address, "GET /readyz HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
        assert!(ask(address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(ask(address, &"x".repeat(20_000)).len() < 300);
        drop(scrape);
        assert!(TcpStream::connect(address).is_err());
    }
}
