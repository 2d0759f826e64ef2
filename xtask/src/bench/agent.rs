//! The agent under measurement: started, found ready, weighed, ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{place, root, run::Running, step};

/// Longest time from start to every probe attached.
const READY: Duration = Duration::from_secs(30);

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    running: Running,
    binary: PathBuf,
    socket: PathBuf,
    before: Objects,
}

/// Ids of the BPF objects that were there before the agent.
#[derive(Debug, Default)]
struct Objects {
    programs: BTreeSet<u64>,
    maps: BTreeSet<u64>,
}

/// What one program has cost since it was loaded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// Time in it, ns; grows only with `kernel.bpf_stats_enabled`.
    pub ns: u64,
    /// Times it ran.
    pub runs: u64,
}

impl Agent {
    /// Starts `binary run`, on the server's end alone or on both, and waits until it is attached.
    ///
    /// # Errors
    /// It does not start, ends, or is not ready within [`READY`].
    pub fn start(binary: &Path, folder: &Path, server_only: bool) -> Result<Self> {
        let before = Objects { programs: ids("prog")?, maps: ids("map")? };
        let socket = folder.join("apiscope.sock");
        fs::remove_file(&socket).ok();
        let log = fs::File::create(folder.join("agent.log"))?;
        let mut command = root::command(binary, "measuring")?;
        command.arg("run").arg("--socket").arg(&socket).args(if server_only { &["--side", "server"][..] } else { &[] });
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let running = Running::start("the agent", &mut command)?;
        let mut agent = Self { running, binary: binary.to_owned(), socket, before };
        let started = Instant::now();
        while agent.top().is_none() {
            if agent.running.is_over()? || started.elapsed() > READY {
                let said = fs::read_to_string(folder.join("agent.log")).unwrap_or_default();
                bail!(
                    "the agent is not ready after {} s: {}",
                    started.elapsed().as_secs(),
                    said.lines().last().unwrap_or_default()
                );
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(agent)
    }

    /// `apiscope top --once --json`: `None` until every probe is attached.
    #[must_use]
    pub fn top(&self) -> Option<Value> {
        let mut command = root::command(&self.binary, "measuring").ok()?;
        command.args(["top", "--once", "--json", "--socket"]).arg(&self.socket).stderr(Stdio::null());
        serde_json::from_str(&step::output(&mut command).ok()?).ok()
    }

    /// Everything lost since the start, all reasons together.
    #[must_use]
    pub fn lost(&self) -> Option<u64> {
        let top = self.top()?;
        Some(top.get("losses")?.as_object()?.values().filter_map(Value::as_u64).sum())
    }

    /// User and system time of all its threads, us.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu_us(&self) -> Result<u64> {
        let stat = self.proc("stat")?;
        // The name in parentheses may hold spaces; utime and stime are the 12th and 13th after it.
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        Ok(ticks * 1_000_000 / rustix::param::clock_ticks_per_second().max(1))
    }

    /// Resident memory, bytes.
    ///
    /// # Errors
    /// It is gone.
    pub fn resident(&self) -> Result<u64> {
        let status = self.proc("status")?;
        let kb = status
            .lines()
            .find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
        Ok(kb.context("/proc/PID/status has no VmRSS")? * 1024)
    }

    /// Memory of the BPF maps that came with it, bytes.
    ///
    /// # Errors
    /// bpftool fails.
    pub fn maps(&self) -> Result<u64> {
        let new = |map: &&Value| id(map).is_some_and(|id| !self.before.maps.contains(&id));
        Ok(show("map")?.iter().filter(new).filter_map(|map| map.get("bytes_memlock")?.as_u64()).sum())
    }

    /// The cost of each program that came with it, by name.
    ///
    /// # Errors
    /// bpftool fails.
    pub fn programs(&self) -> Result<BTreeMap<String, Cost>> {
        let mut found: BTreeMap<String, Cost> = BTreeMap::new();
        for program in show("prog")? {
            let Some(id) = id(&program) else { continue };
            if self.before.programs.contains(&id) {
                continue;
            }
            let number = |key: &str| program.get(key).and_then(Value::as_u64).unwrap_or(0);
            let name = program.get("name").and_then(Value::as_str).map_or_else(|| id.to_string(), str::to_owned);
            let cost = found.entry(name).or_default();
            cost.ns += number("run_time_ns");
            cost.runs += number("run_cnt");
        }
        Ok(found)
    }

    /// Ends it as an operator would.
    ///
    /// # Errors
    /// It had to be killed or failed.
    pub fn end(mut self) -> Result<()> {
        let status = self.running.end()?;
        if !status.success() {
            bail!("the agent ended: {status}");
        }
        Ok(())
    }

    fn proc(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", descendant(self.running.pid()));
        fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))
    }
}

/// Under sudo the agent is a child of what was started; itself it starts none.
fn descendant(pid: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().next().and_then(|child| child.parse().ok()).map_or(pid, descendant)
}

fn show(kind: &str) -> Result<Vec<Value>> {
    let bpftool = place::program("bpftool").context("no bpftool")?;
    let mut command: Command = root::command(bpftool, "measuring")?;
    let text = step::output(command.args(["--json", kind, "show"]))?;
    match serde_json::from_str(&text).context("bpftool's answer is not JSON")? {
        Value::Array(list) => Ok(list),
        other => bail!("bpftool {kind} show: {other}"),
    }
}

fn ids(kind: &str) -> Result<BTreeSet<u64>> {
    Ok(show(kind)?.iter().filter_map(id).collect())
}

fn id(object: &Value) -> Option<u64> {
    object.get("id")?.as_u64()
}

/// `kernel.bpf_stats_enabled` switched on for as long as this lives.
#[derive(Debug)]
pub struct Statistics {
    before: String,
}

impl Statistics {
    const FILE: &str = "/proc/sys/kernel/bpf_stats_enabled";

    /// Switches it on.
    ///
    /// # Errors
    /// The kernel has none, or this cannot be root.
    pub fn on() -> Result<Self> {
        let before = fs::read_to_string(Self::FILE).with_context(|| format!("failed to read {}", Self::FILE))?;
        let on = Self { before: before.trim().to_owned() };
        Self::set("1")?;
        Ok(on)
    }

    /// Whether it is on, by whomever.
    #[must_use]
    pub fn are_on() -> bool {
        fs::read_to_string(Self::FILE).is_ok_and(|text| text.trim() != "0")
    }

    fn set(value: &str) -> Result<()> {
        let mut write = root::command("sh", "measuring")?;
        step::output(write.args(["-c", &format!("echo {value} >{}", Self::FILE)])).map(drop)
    }
}

impl Drop for Statistics {
    fn drop(&mut self) {
        if let Err(error) = Self::set(&self.before) {
            eprintln!("  note: kernel.bpf_stats_enabled was {} and is 1 now: {error:#}", self.before);
        }
    }
}
