//! Process -> service name and executable, from `/proc`. Bounded and cached: a lookup costs some tens
//! of microseconds, a cached one a hash.
//!
//! The name of a service: `OTEL_SERVICE_NAME` of the process (or `service.name` in its
//! `OTEL_RESOURCE_ATTRIBUTES`), else what Kubernetes says of its pod, else the script that an interpreter
//! runs, else the executable. Rules of the configuration come before all of these (see `config`).
//!
//! [`cgroup`] finds a process's container, [`pods`] knows what runs where, [`ends`] names exchanges by both.

pub mod cgroup;
pub mod ends;
pub mod pods;

use std::{fs, path::Path, sync::Arc, time::Instant};

use rustc_hash::FxHashMap;

use crate::exchange::Origin;

/// Most processes that are remembered; then all are looked up again.
const MAX_PROCESSES: usize = 16_384;
/// A process is looked at again after this long, since numbers are reused and programs exec.
const FRESH_FOR: std::time::Duration = std::time::Duration::from_secs(5);
/// Most bytes that are read of a process's environment and arguments.
const MAX_READ: usize = 64 * 1024;

/// What is known of a process.
#[derive(Debug, Clone)]
pub struct Process {
    /// Service name.
    pub service: Arc<str>,
    /// Executable, as the process sees its path.
    pub exe: Option<Arc<str>>,
    /// Name without path, for rules.
    pub name: Arc<str>,
    /// Its container, as the kernel tells; `None` outside of one.
    pub origin: Option<Arc<Origin>>,
    start: u64,
    seen: Instant,
}

/// Remembers processes.
#[derive(Default)]
pub struct Processes {
    known: FxHashMap<u32, Process>,
}

impl Processes {
    /// Name of a process that was asked for before, as the kernel has it.
    #[must_use]
    pub fn name(&self, pid: u32) -> Option<Arc<str>> {
        self.known.get(&pid).map(|known| known.name.clone())
    }

    /// The process `pid`; `comm` is used where it is gone already.
    pub fn get(&mut self, pid: u32, comm: &str) -> Process {
        let now = Instant::now();
        if let Some(known) = self.known.get_mut(&pid) {
            if now.duration_since(known.seen) < FRESH_FOR {
                return known.clone();
            }
            if start_time(pid) == Some(known.start) && *known.name == *comm_of(pid).as_deref().unwrap_or(&known.name) {
                known.seen = now;
                return known.clone();
            }
        }
        let process = look_up(pid, comm, now);
        if self.known.len() >= MAX_PROCESSES {
            self.known.clear();
        }
        self.known.insert(pid, process.clone());
        process
    }
}

/// True when there is no such process.
pub fn is_gone(pid: u32) -> bool {
    pid != 0 && !Path::new(&format!("/proc/{pid}")).exists()
}

fn comm_of(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned())
}

/// Start of the process in clock ticks since boot (`proc_pid_stat(5)`, field 22).
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything: count from the last one.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn look_up(pid: u32, comm: &str, now: Instant) -> Process {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).ok();
    let exe = exe.as_deref().map(|e| e.to_string_lossy().trim_end_matches(" (deleted)").to_owned());
    let arguments = read_some(&format!("/proc/{pid}/cmdline"));
    let named = service_name(&read_some(&format!("/proc/{pid}/environ")));
    let container = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok().and_then(|text| cgroup::container(&text));
    let origin = container
        .map(|c| Arc::new(Origin { named: named.is_some(), ..Origin::of_container(&c.id, c.pod_uid.as_deref()) }));
    let service = named
        .or_else(|| script(exe.as_deref()?, &arguments))
        .or_else(|| Some(Path::new(exe.as_deref()?).file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_else(|| comm.to_owned());
    Process {
        service: service.into(),
        exe: exe.map(Into::into),
        name: comm.into(),
        origin,
        start: start_time(pid).unwrap_or(0),
        seen: now,
    }
}

/// The name that a process gives itself (OpenTelemetry's specification of SDK environment variables).
fn service_name(environment: &[u8]) -> Option<String> {
    let value = |name: &[u8]| environment.split(|&b| b == 0).find_map(|v| v.strip_prefix(name));
    let text = |v: &[u8]| Some(String::from_utf8_lossy(v).into_owned()).filter(|v| !v.is_empty() && v.len() <= 128);
    value(b"OTEL_SERVICE_NAME=").and_then(text).or_else(|| {
        let pairs = value(b"OTEL_RESOURCE_ATTRIBUTES=")?.split(|&b| b == b',');
        pairs.filter_map(|p| p.trim_ascii().strip_prefix(b"service.name=")).find_map(text)
    })
}

fn read_some(path: &str) -> Vec<u8> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(path) {
        // A process that is gone or not readable has nothing to say.
        let _ = file.take(MAX_READ as u64).read_to_end(&mut bytes);
    }
    bytes
}

/// Name of the script, module or archive that an interpreter runs.
fn script(exe: &str, arguments: &[u8]) -> Option<String> {
    let interpreter = Path::new(exe).file_name()?.to_str()?.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    let arguments: Vec<&str> =
        arguments.split(|&b| b == 0).skip(1).filter_map(|a| std::str::from_utf8(a).ok()).collect();
    let stem = |path: &str| Path::new(path).file_stem().map(|s| s.to_string_lossy().into_owned());
    match interpreter {
        "python" | "pypy" => {
            let mut rest = arguments.iter();
            while let Some(argument) = rest.next() {
                match *argument {
                    "-m" => return rest.next().map(|m| (*m).to_owned()),
                    "-c" => return None,
                    "-W" | "-X" => {
                        rest.next();
                    }
                    flag if flag.starts_with('-') => {}
                    path => return stem(path).map(|s| if s == "__main__" { path.to_owned() } else { s }),
                }
            }
            None
        }
        "java" => {
            let jar = arguments.iter().position(|a| *a == "-jar").and_then(|i| arguments.get(i + 1));
            if let Some(jar) = jar {
                return stem(jar);
            }
            let mut rest = arguments.iter();
            while let Some(argument) = rest.next() {
                match *argument {
                    "-cp" | "-classpath" | "--class-path" | "-p" | "--module-path" => {
                        rest.next();
                    }
                    flag if flag.starts_with('-') => {}
                    class => return class.rsplit(['.', '/']).next().map(str::to_owned),
                }
            }
            None
        }
        "node" | "nodejs" | "bun" | "deno" | "ruby" | "perl" | "php" => {
            arguments.iter().find(|a| !a.is_empty() && !a.starts_with('-')).and_then(|a| stem(a))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_name_services() {
        let name = |exe: &str, arguments: &str| script(exe, format!("x\0{}", arguments.replace(' ', "\0")).as_bytes());
        assert_eq!(name("/usr/bin/python3.11", "-u /srv/orders.py 80").as_deref(), Some("orders"));
        assert_eq!(name("/usr/bin/python3", "-m http.server 80").as_deref(), Some("http.server"));
        assert_eq!(name("/usr/bin/node", "--inspect /srv/cart.mjs").as_deref(), Some("cart"));
        assert_eq!(name("/usr/bin/java", "-Xmx1g -jar /srv/pay-1.jar").as_deref(), Some("pay-1"));
        assert_eq!(name("/usr/bin/java", "-cp a.jar com.shop.Main x").as_deref(), Some("Main"));
        assert_eq!(name("/usr/sbin/nginx", "-c /x.conf"), None);
    }

    #[test]
    fn processes_name_themselves() {
        let name = |text: &str| service_name(text.replace(' ', "\0").as_bytes());
        assert_eq!(name("A=1 OTEL_SERVICE_NAME=cart B=2").as_deref(), Some("cart"));
        assert_eq!(name("OTEL_RESOURCE_ATTRIBUTES=a=b,service.name=pay,c=d").as_deref(), Some("pay"));
        assert_eq!(name("OTEL_RESOURCE_ATTRIBUTES=service.name=pay OTEL_SERVICE_NAME=cart").as_deref(), Some("cart"));
        assert_eq!(name("OTEL_SERVICE_NAME= X_OTEL_SERVICE_NAME=x"), None);
    }

    #[test]
    fn this_process_and_one_that_is_gone() {
        let mut processes = Processes::default();
        assert!(processes.get(std::process::id(), "me").exe.is_some());
        let gone = processes.get(u32::MAX - 1, "ghost");
        assert_eq!((&*gone.service, gone.exe), ("ghost", None));
        assert!(is_gone(u32::MAX - 1) && !is_gone(std::process::id()));
    }
}
