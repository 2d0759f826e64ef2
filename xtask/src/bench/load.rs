//! The traffic: nginx with a small answer, wrk and h2load at full speed, and connections that are just open.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::{place, run::Running, step};

/// wrk's connections: enough to keep one worker busy, few enough for stable percentiles.
const CONNECTIONS: &str = "16";
/// h2load's: each carries as many streams as asked for.
const HTTP2_CONNECTIONS: &str = "4";
/// Longest wait for nginx to listen.
const LISTEN: Duration = Duration::from_secs(10);

/// A running nginx.
#[derive(Debug)]
pub struct Nginx {
    _running: Running,
    port: u16,
    http2: u16,
}

impl Nginx {
    /// Starts one worker on a free loopback port, with its files in `folder`.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(folder: &Path) -> Result<Self> {
        let (port, http2) = (free_port()?, free_port()?);
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("  {kind}_temp_path tmp;\n"))
            .collect();
        let config = format!(
            "daemon off;\nworker_processes 1;\nworker_rlimit_nofile 40000;\npid nginx.pid;\nerror_log error.log crit;\n\
             events {{ worker_connections 20000; }}\n\
             http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 600;\n{temporary}\
             \x20 server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ return 200 \"ok\\n\"; }} }}\n\
             \x20 server {{ listen 127.0.0.1:{http2} http2; location / {{ return 200 \"ok\\n\"; }} }}\n}}\n"
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, config).with_context(|| format!("failed to write {}", file.display()))?;
        let mut command = Command::new(place::program("nginx").context("no nginx")?);
        command.arg("-p").arg(folder).arg("-c").arg(&file).args(["-e", "error.log"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut running = Running::start("nginx", &mut command)?;
        let started = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if running.is_over()? || started.elapsed() > LISTEN {
                let said = fs::read_to_string(folder.join("error.log")).unwrap_or_default();
                bail!("nginx did not start: {}", said.lines().last().unwrap_or("no message"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { _running: running, port, http2 })
    }

    /// Full speed for `seconds`.
    ///
    /// # Errors
    /// wrk or h2load fails or meets errors.
    pub fn full_speed(&self, traffic: Traffic, seconds: u64) -> Result<Speed> {
        if let Traffic::Http2(streams) = traffic {
            return h2load(&format!("http://127.0.0.1:{}/", self.http2), seconds, streams);
        }
        let more: &[&str] = if traffic == Traffic::NewConnection { &["-H", "Connection: close"] } else { &[] };
        wrk(&format!("http://127.0.0.1:{}/", self.port), seconds, more)
    }

    /// Opens `count` connections, one request on each, and keeps them.
    ///
    /// # Errors
    /// This process may not hold as many, or nginx does not answer.
    pub fn open(&self, count: usize) -> Result<Vec<TcpStream>> {
        let mut limit = getrlimit(Resource::Nofile);
        let wanted = count as u64 + 100;
        if limit.current.is_some_and(|now| now < wanted) {
            limit.current = limit.maximum.map_or(Some(wanted), |most| Some(wanted.min(most)));
            setrlimit(Resource::Nofile, limit).context("failed to raise the limit of open files")?;
        }
        let mut held = Vec::with_capacity(count);
        let mut answer = [0; 512];
        for n in 0..count {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))
                .with_context(|| format!("connection {n} of {count}"))?;
            stream.set_read_timeout(Some(LISTEN))?;
            stream.write_all(b"GET /held HTTP/1.1\r\nHost: bench.example\r\n\r\n")?;
            if stream.read(&mut answer)? == 0 {
                bail!("nginx closed connection {n} of {count}");
            }
            held.push(stream);
        }
        Ok(held)
    }
}

/// A port of loopback that is free now.
///
/// # Errors
/// The system has none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// h2load at full speed for `seconds`, with so many streams at a time on each connection.
///
/// # Errors
/// It fails or meets errors.
pub fn h2load(url: &str, seconds: u64, streams: u32) -> Result<Speed> {
    let mut load = Command::new(place::program("h2load").context("no h2load")?);
    load.args(["-t1", "-c", HTTP2_CONNECTIONS, &format!("-m{streams}"), "-D", &seconds.to_string()]);
    let text = step::output(load.arg(url))?;
    Speed::parse_h2load(&text).with_context(|| format!("h2load said:\n{text}"))
}

/// wrk at full speed for `seconds`.
///
/// # Errors
/// It fails or meets errors.
pub fn wrk(url: &str, seconds: u64, more: &[&str]) -> Result<Speed> {
    let mut wrk = Command::new(place::program("wrk").context("no wrk")?);
    wrk.args(["-t1", "-c", CONNECTIONS, "-d", &format!("{seconds}s"), "--latency"]).args(more);
    let text = step::output(wrk.arg(url))?;
    Speed::parse(&text).with_context(|| format!("wrk said:\n{text}"))
}

/// How requests use connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// All requests of a client on one.
    KeepAlive,
    /// One each.
    NewConnection,
    /// So many streams at a time on each connection of HTTP/2.
    Http2(u32),
}

impl Traffic {
    /// As in the report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keep-alive",
            Self::NewConnection => "new connection",
            Self::Http2(1) => "HTTP/2, 1 stream",
            Self::Http2(32) => "HTTP/2, 32 streams",
            Self::Http2(_) => "HTTP/2",
        }
    }
}

/// What wrk, h2load or the client of gRPC measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Requests answered.
    pub requests: u64,
    /// Requests per second.
    pub rate: f64,
    /// Median latency, us; of h2load, which has none, the mean.
    pub p50_us: f64,
    /// 99th percentile, us; of h2load the longest.
    pub p99_us: f64,
}

impl Speed {
    fn parse(text: &str) -> Result<Self> {
        let percentile = |name: &str| {
            let line = text.lines().find_map(|l| l.trim().strip_prefix(name)).with_context(|| format!("no {name}"))?;
            microseconds(line.trim())
        };
        let requests = text.lines().find_map(|l| l.split_once(" requests in ")?.0.trim().parse().ok());
        let rate = text.lines().find_map(|l| l.strip_prefix("Requests/sec:")?.trim().parse().ok());
        let failed =
            text.lines().find(|l| l.contains("Non-2xx or 3xx responses") || l.contains("Socket errors: connect"));
        if let Some(failed) = failed {
            // A connection that the server closed after its answer counts as a read error of wrk.
            let only_reads =
                failed.contains("connect 0,") && failed.contains("write 0,") && failed.contains("timeout 0");
            if !only_reads {
                bail!("errors: {}", failed.trim());
            }
        }
        Ok(Self {
            requests: requests.context("no count of requests")?,
            rate: rate.context("no rate")?,
            p50_us: percentile("50%")?,
            p99_us: percentile("99%")?,
        })
    }
}

impl Speed {
    fn parse_h2load(text: &str) -> Result<Self> {
        let line = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).with_context(|| format!("no {name}"));
        let requests = line("requests:")?;
        let count = |what: &str| {
            let found = requests.split(',').find_map(|part| part.trim().strip_suffix(what)?.trim().parse::<u64>().ok());
            found.with_context(|| format!("no count of {what}"))
        };
        if count("failed")? + count("errored")? + count("timeout")? > 0 {
            bail!("errors: {requests}");
        }
        let mut times = line("time for request:")?.split_whitespace();
        let (_shortest, longest, mean) = (times.next(), times.next(), times.next());
        let rate =
            line("finished in")?.split(',').find_map(|part| part.trim().strip_suffix("req/s")?.trim().parse().ok());
        Ok(Self {
            requests: count("succeeded")?,
            rate: rate.context("no rate")?,
            p50_us: microseconds(mean.context("no mean time")?)?,
            p99_us: microseconds(longest.context("no longest time")?)?,
        })
    }
}

/// `91.00us`, `1.25ms`, `2.00s`.
fn microseconds(text: &str) -> Result<f64> {
    let (number, factor) = if let Some(n) = text.strip_suffix("us") {
        (n, 1.0)
    } else if let Some(n) = text.strip_suffix("ms") {
        (n, 1e3)
    } else if let Some(n) = text.strip_suffix('s') {
        (n, 1e6)
    } else {
        bail!("{text} is no duration of wrk");
    };
    Ok(number.parse::<f64>().with_context(|| format!("{text} is no duration of wrk"))? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrk_is_read() {
        let text = "Running 2s test @ http://127.0.0.1:1/\n  1 threads and 16 connections\n  Latency Distribution\n     \
                    50%   91.00us\n     75%  118.00us\n     99%    1.25ms\n  300612 requests in 2.10s, 48.5MB read\n\
                    Requests/sec: 143153.92\nTransfer/sec:     23.07MB\n";
        let speed = Speed::parse(text).expect("parses");
        assert_eq!(speed, Speed { requests: 300_612, rate: 143_153.92, p50_us: 91.0, p99_us: 1250.0 });
        assert!(Speed::parse(&format!("{text}  Socket errors: connect 3, read 0, write 0, timeout 0\n")).is_err());
        assert!(Speed::parse("").is_err());
    }

    #[test]
    fn h2load_is_read() {
        let text = "finished in 2.00s, 100002.00 req/s, 3.21MB/s\nrequests: 200004 total, 200004 started, 200004 done, \
                    200004 succeeded, 0 failed, 0 errored, 0 timeout\n                     min         max         mean\n\
                    time for request:       44us      4.92ms       136us       103us    93.83%\n";
        let speed = Speed::parse_h2load(text).expect("parses");
        assert_eq!(speed, Speed { requests: 200_004, rate: 100_002.0, p50_us: 136.0, p99_us: 4920.0 });
        assert!(Speed::parse_h2load(&text.replace("0 failed", "2 failed")).is_err());
        assert!(Speed::parse_h2load("").is_err());
    }
}
