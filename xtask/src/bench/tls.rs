//! TLS: probe hits a request and ns a hit; throughput with the agent, and with as many probes that do nothing, against
//! without.
//!
//! The clients are wrk and h2load, whose OpenSSL is the same file as nginx's: its calls are hits too, whichever end is
//! traced. So hits are those of both ends; of Go's server the programs `go_*` are its own.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Bench, agent::Statistics, load, median, summary};
use crate::{
    place, programs, root,
    run::{Running, Tied},
    setup, step,
};

/// Longest wait for a server to listen.
const LISTEN: Duration = Duration::from_secs(20);

/// A server over TLS, and the files that are probed when it and wrk talk.
struct Server {
    name: &'static str,
    url: String,
    /// Names of the traffic that it gets, with the streams of HTTP/2 at a time.
    traffic: &'static [(&'static str, Option<u32>)],
    files: Vec<PathBuf>,
    _running: Running,
}

/// Measures each server.
///
/// # Errors
/// A server, the agent or the empty probes do not start.
pub fn run(bench: &Bench) -> Result<Value> {
    let mut build = setup::cargo();
    step::plainly(build.args([
        "build",
        "--release",
        "--locked",
        "--package",
        "apiscope",
        "--example",
        "empty_probes",
    ]))?;
    let folder = bench.folder.join("tls");
    fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
    let mut found = Vec::new();
    for start in [nginx, go] {
        let server = start(&folder)?;
        for &(traffic, streams) in server.traffic {
            found.push(measure(bench, &server, traffic, streams)?);
        }
    }
    Ok(found.into())
}

fn measure(bench: &Bench, server: &Server, traffic: &str, streams: Option<u32>) -> Result<Value> {
    let name = format!("{}, {traffic}", server.name);
    eprintln!("  TLS, {name}: {} rounds ...", bench.size.rounds);
    let load = || match streams {
        Some(streams) => load::h2load(&server.url, bench.size.seconds, streams),
        None => load::wrk(&server.url, bench.size.seconds, &[]),
    };
    let statistics = Statistics::on()?;
    let agent = bench.agent(true)?;
    let before = agent.programs()?;
    let requests = load()?.requests as f64;
    let mut programs = Vec::new();
    let (mut hits, mut ns) = (0, 0);
    for (name, cost) in agent.programs()? {
        let old = before.get(&name).copied().unwrap_or_default();
        let (more, time) = (cost.runs.saturating_sub(old.runs), cost.ns.saturating_sub(old.ns));
        if more as f64 / requests < 0.0005 {
            continue;
        }
        if name.starts_with("tls_") || name.starts_with("go_") {
            hits += more;
            ns += time;
        }
        programs.push(json!({
            "name": name, "ns_per_run": time as f64 / more as f64, "runs_per_request": more as f64 / requests,
        }));
    }
    agent.end()?;
    drop(statistics);
    ensure!(hits > 0, "the agent does not read the TLS of {name}");

    let (mut without, mut with, mut empty) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..bench.size.rounds {
        // Each is first, second and third in turn.
        for part in 0..3 {
            bench.go_on()?;
            match (round + part) % 3 {
                0 => without.push(load()?),
                1 => {
                    let agent = bench.agent(true)?;
                    with.push(load()?);
                    agent.end()?;
                }
                _ => {
                    let probes = empty_probes(&server.files)?;
                    empty.push(load()?);
                    drop(probes);
                }
            }
        }
    }
    let ratio = |a: &[load::Speed], b: &[load::Speed]| median(a.iter().zip(b).map(|(a, b)| a.rate / b.rate).collect());
    Ok(json!({
        "server": name,
        "hits_per_request": hits as f64 / requests,
        "ns_per_hit": ns as f64 / hits as f64,
        "programs": programs,
        "without": summary(&without),
        "with": summary(&with),
        "empty": summary(&empty),
        "ratio": {
            "rate": ratio(&with, &without), "empty": ratio(&empty, &without), "to_empty": ratio(&with, &empty),
        },
    }))
}

/// nginx with one worker and a small answer.
fn nginx(folder: &Path) -> Result<Server> {
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]);
    step::output(openssl.args(["-keyout", "key.pem", "-out", "cert.pem"]).current_dir(folder))?;
    let port = load::free_port()?;
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("  {kind}_temp_path tmp;\n"))
        .collect();
    let config = format!(
        "daemon off;\nworker_processes 1;\npid nginx.pid;\nerror_log error.log crit;\nevents {{ }}\nhttp {{\n  \
         access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 600;\n{temporary}  server {{ listen \
         127.0.0.1:{port} ssl http2; ssl_certificate cert.pem; ssl_certificate_key key.pem; location / {{ return 200 \
         \"ok\\n\"; }} }}\n}}\n"
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, config).with_context(|| format!("failed to write {}", file.display()))?;
    let mut command = Command::new(place::program("nginx").context("no nginx")?);
    command.arg("-p").arg(folder).arg("-c").arg(&file).args(["-e", "error.log"]);
    let running = start("nginx", &mut command, port)?;
    let files = libraries(running.pid())?;
    let url = format!("https://127.0.0.1:{port}/");
    // wrk does not offer HTTP/2, h2load takes it.
    let traffic = &[("HTTP/1.1", None), ("HTTP/2, 1 stream", Some(1)), ("HTTP/2, 32 streams", Some(32))];
    Ok(Server { name: "nginx", url, traffic, files, _running: running })
}

/// The tests' Go server, where the machine has Go.
fn go(folder: &Path) -> Result<Server> {
    let program = folder.join("go-server");
    let mut build = programs::go_tls(&program)?;
    step::output(build.env("GOCACHE", folder.join("go-cache")).env("GOPATH", folder.join("go-path")))?;
    let port = load::free_port()?;
    let mut command = Command::new(&program);
    command.args(["serve", &port.to_string()]).arg(folder.join("go-cert.pem"));
    let running = start("the Go server", &mut command, port)?;
    // wrk's library counts there as well as here.
    let url = format!("https://127.0.0.1:{port}/");
    let mut wrk = short_wrk(&url)?;
    let started = Instant::now();
    let mut files = libraries(wrk.id());
    while files.is_err() && started.elapsed() < LISTEN && wrk.try_wait()?.is_none() {
        thread::sleep(Duration::from_millis(20));
        files = libraries(wrk.id());
    }
    wrk.wait()?;
    let mut files = files?;
    files.push(program);
    Ok(Server { name: "Go", url, traffic: &[("HTTP/1.1", None)], files, _running: running })
}

/// A wrk that has just started, and ends after a second.
fn short_wrk(url: &str) -> Result<Child> {
    let mut wrk = Command::new(place::program("wrk").context("no wrk")?);
    wrk.args(["-t1", "-c1", "-d1s", url]).stdout(Stdio::null()).stderr(Stdio::null());
    wrk.spawn().context("failed to start wrk")
}

fn start(what: &str, command: &mut Command, port: u16) -> Result<Running> {
    let mut running = Running::start(what, command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))?;
    let started = Instant::now();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        if running.is_over()? || started.elapsed() > LISTEN {
            bail!("{what} did not start");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(running)
}

/// The copies of libssl that a process maps.
fn libraries(pid: u32) -> Result<Vec<PathBuf>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("the process is gone")?;
    let mut found: Vec<PathBuf> = maps
        .lines()
        .filter_map(|l| l.split_whitespace().nth(5))
        .filter(|p| p.contains("libssl"))
        .map(Into::into)
        .collect();
    found.dedup();
    ensure!(!found.is_empty(), "process {pid} has no libssl");
    Ok(found)
}

/// Probes that do nothing where the agent's would be, while the value lives.
fn empty_probes(files: &[PathBuf]) -> Result<Tied> {
    let mut command = root::command(place::target().join("release/examples/empty_probes"), "measuring")?;
    let mut probes = Tied::start("the empty probes", command.args(files))?;
    ensure!(probes.line()? == "ready", "the empty probes were not attached");
    Ok(probes)
}

/// The part of the report for people.
pub fn table(report: &Value) -> String {
    let mut out = "\nTLS, server's end traced (hits of both)   hits/request  ns/hit  req/s without   with  empty probes  with/empty\n".to_owned();
    for part in report.as_array().into_iter().flatten() {
        let number = |pointer: &str| part.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN);
        out += &format!(
            "  {:<38} {:>13.2} {:>7.0} {:>14.0} {:>6.3} {:>13.3} {:>11.3}\n",
            part.get("server").and_then(Value::as_str).unwrap_or("?"),
            number("/hits_per_request"),
            number("/ns_per_hit"),
            number("/without/rate"),
            number("/ratio/rate"),
            number("/ratio/empty"),
            number("/ratio/to_empty"),
        );
        for program in part.get("programs").and_then(Value::as_array).into_iter().flatten() {
            let of = |key: &str| program.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
            let name = program.get("name").and_then(Value::as_str).unwrap_or("?");
            out += &format!("    {name:<46} {:>8.0} ns {:>10.3} a request\n", of("ns_per_run"), of("runs_per_request"));
        }
    }
    out
}
