//! `cargo xtask bench`: what the agent costs, as numbers that can be compared from one commit to the next.
//!
//! (a) ns per eBPF program run, and runs per request; (b) throughput and latency with the agent against
//! without, in alternating rounds; (c) the agent's own CPU per exchange, and its memory; (d) the pipeline
//! without a kernel; (e) TLS, against as many empty probes. Rounds alternate because a machine's speed drifts by
//! more than the agent costs; so only ratios of neighbours are worth reading.

mod agent;
mod grpc;
mod load;
mod pipeline;
mod tls;

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use self::{
    agent::{Agent, Statistics},
    load::{Nginx, Speed, Traffic},
};
use crate::{
    build, place, root,
    run::stopped,
    setup::{self, Level},
    step,
};

/// How to measure.
#[derive(Debug, Args)]
pub struct Options {
    /// Short rounds: to see that it works, not to compare.
    #[arg(long)]
    quick: bool,
    /// TLS alone.
    #[arg(long)]
    tls: bool,
    /// Also write the results here.
    #[arg(long, value_name = "OUT")]
    json: Option<PathBuf>,
    /// Measure this build of the agent instead of the clone's.
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
}

/// How much of everything.
struct Size {
    /// Rounds with and without, per kind of traffic and ends.
    rounds: usize,
    /// Seconds of a round.
    seconds: u64,
    /// Connections held open while memory is read.
    connections: usize,
}

/// Which ends of a connection are traced.
const ENDS: [(&str, bool, f64); 2] = [("server", true, 1.0), ("both", false, 2.0)];
/// Kinds of traffic.
const TRAFFIC: [Traffic; 4] = [Traffic::KeepAlive, Traffic::NewConnection, Traffic::Http2(1), Traffic::Http2(32)];
/// After the last request: the agent's own work on what it has read.
const SETTLE: Duration = Duration::from_millis(1500);

/// Runs the command.
///
/// # Errors
/// A part of the measurement cannot be had.
pub fn run(options: &Options) -> Result<()> {
    setup::need(Level::Bench)?;
    root::command("true", "measuring")?;
    let binary = match &options.agent {
        Some(path) => path.canonicalize().with_context(|| format!("no agent at {}", path.display()))?,
        None => {
            build::agent()?;
            place::agent()
        }
    };
    let size = if options.quick {
        Size { rounds: 2, seconds: 2, connections: 10_000 }
    } else {
        Size { rounds: 7, seconds: 5, connections: 10_000 }
    };
    let pipeline = if options.tls { json!([]) } else { pipeline::run(options.quick)? };
    let folder = place::target().join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
    let stop = stopped()?;
    let nginx = Nginx::start(&folder)?;
    let bench = Bench { binary, folder, size, nginx, grpc: grpc::Server::start()?, stop };
    let mut report = json!({ "machine": machine(), "quick": options.quick });
    if !options.tls {
        report["kernel"] = bench.kernel()?;
        report["throughput"] = bench.throughput()?;
        report["memory"] = bench.memory()?;
        report["pipeline"] = pipeline;
    }
    report["tls"] = tls::run(&bench)?;
    drop(bench);
    if !options.tls {
        print!("{}", table(&report));
    }
    print!("{}", tls::table(report.get("tls").unwrap_or(&Value::Null)));
    if let Some(out) = &options.json {
        fs::write(out, format!("{report:#}\n")).with_context(|| format!("failed to write {}", out.display()))?;
    }
    Ok(())
}

struct Bench {
    binary: PathBuf,
    folder: PathBuf,
    size: Size,
    nginx: Nginx,
    grpc: grpc::Server,
    stop: Arc<AtomicBool>,
}

/// A kind of traffic, and how to make it for so many seconds.
type Load<'a> = (&'static str, Box<dyn Fn(u64) -> Result<Speed> + 'a>);

impl Bench {
    /// Everything started so far ends on the way out.
    fn go_on(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    fn loads(&self) -> Vec<Load<'_>> {
        let nginx = TRAFFIC.into_iter().map(|traffic| -> Load<'_> {
            (traffic.name(), Box::new(move |seconds| self.nginx.full_speed(traffic, seconds)))
        });
        let grpc: Load<'_> = ("gRPC, unary", Box::new(|seconds| self.grpc.full_speed(seconds)));
        nginx.chain([grpc]).collect()
    }

    fn agent(&self, server_only: bool) -> Result<Agent> {
        self.go_on()?;
        Agent::start(&self.binary, &self.folder, server_only)
    }

    /// (a) With the kernel's statistics, which cost something themselves: in rounds of their own.
    fn kernel(&self) -> Result<Value> {
        eprintln!("  eBPF programs ...");
        let _statistics = Statistics::on()?;
        let mut found = Vec::new();
        for (traffic, load) in self.loads() {
            for (ends, server_only, per_request) in ENDS {
                let agent = self.agent(server_only)?;
                let before = agent.programs()?;
                let speed = load(self.size.seconds)?;
                let after = agent.programs()?;
                agent.end()?;
                let requests = speed.requests as f64;
                let mut programs = Vec::new();
                let mut total = 0;
                for (name, cost) in after {
                    let old = before.get(&name).copied().unwrap_or_default();
                    let (ns, runs) = (cost.ns.saturating_sub(old.ns), cost.runs.saturating_sub(old.runs));
                    total += ns;
                    programs.push(json!({
                        "name": name,
                        "ns_per_run": (runs > 0).then(|| ns as f64 / runs as f64),
                        "runs_per_request": runs as f64 / requests,
                    }));
                }
                found.push(json!({
                    "traffic": traffic,
                    "ends": ends,
                    "ns_per_exchange": total as f64 / (requests * per_request),
                    "programs": programs,
                }));
            }
        }
        Ok(found.into())
    }

    /// (b), and of (c) the CPU.
    fn throughput(&self) -> Result<Value> {
        if Statistics::are_on() {
            eprintln!("  note: somebody has kernel.bpf_stats_enabled on, which costs throughput");
        }
        let mut found = Vec::new();
        for (traffic, load) in self.loads() {
            for (ends, server_only, per_request) in ENDS {
                eprintln!("  throughput, {traffic}, {ends}: {} rounds ...", self.size.rounds);
                let (mut without, mut with, mut cpu, mut lost) = (Vec::new(), Vec::new(), Vec::new(), 0);
                // What ran first is warmer or cooler than what ran second: take turns.
                for round in 0..self.size.rounds {
                    for traced in [round % 2 == 0, round % 2 != 0] {
                        self.go_on()?;
                        if !traced {
                            without.push(load(self.size.seconds)?);
                            continue;
                        }
                        let agent = self.agent(server_only)?;
                        let before = agent.cpu_us()?;
                        let speed = load(self.size.seconds)?;
                        thread::sleep(SETTLE);
                        cpu.push((agent.cpu_us()? - before) as f64 / (speed.requests as f64 * per_request));
                        lost += agent.lost().unwrap_or(0);
                        agent.end()?;
                        with.push(speed);
                    }
                }
                let ratio =
                    |of: fn(&Speed) -> f64| median(with.iter().zip(&without).map(|(a, b)| of(a) / of(b)).collect());
                found.push(json!({
                    "traffic": traffic,
                    "ends": ends,
                    "without": summary(&without),
                    "with": summary(&with),
                    "ratio": { "rate": ratio(|s| s.rate), "p50": ratio(|s| s.p50_us), "p99": ratio(|s| s.p99_us) },
                    "agent_us_per_exchange": median(cpu),
                    "lost": lost,
                }));
            }
        }
        Ok(found.into())
    }

    /// Of (c) the memory.
    fn memory(&self) -> Result<Value> {
        eprintln!("  memory with {} open connections ...", self.size.connections);
        let agent = self.agent(false)?;
        let idle = agent.resident()?;
        let held = self.nginx.open(self.size.connections)?;
        thread::sleep(SETTLE);
        let (resident, maps) = (agent.resident()?, agent.maps()?);
        drop(held);
        agent.end()?;
        Ok(json!({
            "connections": self.size.connections,
            "resident_bytes_idle": idle,
            "resident_bytes": resident,
            "map_bytes": maps,
            "total_bytes": resident + maps,
        }))
    }
}

fn summary(rounds: &[Speed]) -> Value {
    let of = |value: fn(&Speed) -> f64| median(rounds.iter().map(value).collect());
    json!({ "rate": of(|s| s.rate), "p50_us": of(|s| s.p50_us), "p99_us": of(|s| s.p99_us) })
}

/// 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    match (values.get(low), values.get(high)) {
        (Some(low), Some(high)) => f64::midpoint(*low, *high),
        _ => 0.0,
    }
}

fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|l| Some(l.strip_prefix("model name")?.split_once(':')?.1.trim().to_owned()));
    let commit =
        step::output(Command::new("git").args(["-C"]).arg(place::root()).args(["rev-parse", "--short", "HEAD"]));
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cpu": cpu,
        "cores": thread::available_parallelism().map_or(0, usize::from),
        "commit": commit.map(|c| c.trim().to_owned()).ok(),
    })
}

/// The report for people.
fn table(report: &Value) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    let number = |value: &Value, pointer: &str| value.pointer(pointer).and_then(Value::as_f64).unwrap_or(f64::NAN);
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    let list = |key: &str| report.get(key).and_then(Value::as_array).cloned().unwrap_or_default();

    line("\neBPF programs                                        ns/run  runs/request".to_owned());
    for part in list("kernel") {
        let (traffic, ends) = (text(&part, "traffic"), text(&part, "ends"));
        line(format!("  {traffic}, {ends}: {:.0} ns per exchange", number(&part, "/ns_per_exchange")));
        for program in part.get("programs").and_then(Value::as_array).into_iter().flatten() {
            let (ns, runs) = (number(program, "/ns_per_run"), number(program, "/runs_per_request"));
            if runs >= 0.0005 {
                line(format!("    {:<46} {ns:>8.0} {runs:>13.3}", text(program, "name")));
            }
        }
    }
    line("\nwith / without           ends      req/s without      req/s    p50    p99  us/exchange   lost".to_owned());
    for part in list("throughput") {
        line(format!(
            "  {:<22} {:<8} {:>14.0} {:>10.3} {:>6.2} {:>6.2} {:>12.3} {:>6.0}",
            text(&part, "traffic"),
            text(&part, "ends"),
            number(&part, "/without/rate"),
            number(&part, "/ratio/rate"),
            number(&part, "/ratio/p50"),
            number(&part, "/ratio/p99"),
            number(&part, "/agent_us_per_exchange"),
            number(&part, "/lost"),
        ));
    }
    let memory = report.get("memory").cloned().unwrap_or_default();
    let mib = |key: &str| number(&memory, key) / f64::from(1 << 20);
    line(format!(
        "\nmemory, {:.0} connections: {:.1} MiB resident ({:.1} idle) + {:.1} MiB maps = {:.1} MiB",
        number(&memory, "/connections"),
        mib("/resident_bytes"),
        mib("/resident_bytes_idle"),
        mib("/map_bytes"),
        mib("/total_bytes")
    ));
    line("\npipeline without a kernel".to_owned());
    let pipeline = list("pipeline");
    if pipeline.is_empty() {
        line("  not measured: the agent has no benchmark called pipeline".to_owned());
    }
    for part in pipeline {
        let (ns, rate) = (number(&part, "/ns_per_exchange"), number(&part, "/exchanges_per_second"));
        line(format!("  {:<46} {ns:>8.0} ns/exchange {rate:>12.0} exchanges/s/core", text(&part, "name")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]).to_bits(), 0.0_f64.to_bits());
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn a_report_with_holes_is_still_a_table() {
        let shown =
            table(&json!({ "throughput": [{ "traffic": "keep-alive", "ends": "server", "ratio": { "rate": 0.97 } }] }));
        assert!(shown.contains("0.970"), "{shown}");
        assert!(shown.contains("not measured"), "{shown}");
    }
}
